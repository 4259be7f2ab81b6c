"""Several samples of one code (section 4.2, figure 8): where does a decoder that seeks modes still have a choice?

Each picture is coded once and decoded from many seeds. The heat map is the samples' standard deviation at a pixel. The
paper sees it concentrate in backgrounds; here that is put to figures: how the spread follows the picture's own detail
and the error of a sample, and what a mean of samples, which no sample looks like, gains in PSNR over one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.checkpoint.files import write_whole
from flowmo.evaluate.metrics.pairs import grid, heat_map, psnr
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.images import to_pil
from flowmo.model.sampler import image_seed
from flowmo.tokenizer import FlowMo
from reproduce.page import (
    Column,
    bars,
    figures_table,
    groups_of,
    held_out,
    measured_columns,
    versions_line,
    write_page,
)
from reproduce.study import Place, judged_count, named_models, once, read_results, write_results

TITLE = "several samples of one code (section 4.2, figure 8)"
SHOWN = 6
NEIGHBOURHOOD = 5
"""Side in pixels of the square over which a picture's detail is taken."""

COLUMNS = (
    Column("spread", "spread of a pixel (levels of 255) ↓", 2),
    Column("psnr", "PSNR of a sample (dB) ↑", 2),
    Column("psnr_of_mean", "PSNR of the mean (dB) ↑", 2),
    Column("with_detail", "correlation with detail ↑", 3),
    Column("with_error", "correlation with error ↑", 3),
    Column("lpips_between", "LPIPS between samples ↓", 4),
)


@dataclass(frozen=True)
class Scale:
    """How large the study is: held-out pictures, samples of each, and what it takes, in words."""

    pictures: int
    samples: int
    cost: str


SCALES = {
    "smoke": Scale(2, 2, "a few seconds on two CPU cores; its figures mean nothing"),
    "cpu": Scale(64, 8, "two minutes a model of 5 M parameters on two CPU cores"),
    "gpu": Scale(1000, 16, "a few minutes a model of 80 M parameters on one H100, by arithmetic"),
    "paper": Scale(5000, 16, "7 hours a model of FlowMo-Lo's size on one H100, by arithmetic"),
}


def run(place: Place, judges: Evaluators) -> None:
    """Decode and measure what is not there; draw."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for name, tokenizer in named_models(place):

        def make(tokenizer: FlowMo = tokenizer, name: str = name) -> dict[str, Any]:
            return {"arm": name, "label": name, **spread(tokenizer, name, place, judges)}

        rows.append(once(name, place, make))
        write_results(place, {"pictures": judged_count(place, scale.pictures), "samples": scale.samples}, rows)
    if place.world.main:
        draw(place)


@torch.no_grad()
def spread(tokenizer: FlowMo, name: str, place: Place, judges: Evaluators) -> dict[str, Any]:
    """Means over pictures of what ``COLUMNS`` names; keeps the first pictures' heat maps in the run's folder."""
    scale, lpips = SCALES[place.scale], judges.lpips_alex
    indices, pictures = held_out(place, scale.pictures, tokenizer.config.data.image_size)
    found: list[dict[str, float]] = []
    shown: list[tuple[Tensor, ...]] = []
    for index, x in zip(indices, pictures, strict=True):
        samples = draw_samples(tokenizer, x, index, scale.samples)
        found.append(figures(x, samples))
        if lpips is not None:
            device = place.world.device
            found[-1]["lpips_between"] = float(lpips(samples[:1].to(device), samples[1:2].to(device)).mean())
        if len(shown) < SHOWN:
            shown.append((x, samples[0], samples[1], deviation(samples)))
    if place.world.main:
        keep(shown, place.folder(name) / "figure8.png")
    return {key: sum(row[key] for row in found) / len(found) for key in found[0]}


def draw_samples(tokenizer: FlowMo, x: Tensor, index: int, count: int) -> Tensor:
    """``count`` samples, n 3 h w, of the code of a picture 3 h w."""
    codes = tokenizer.encode(x[None])[[0] * count]
    return tokenizer.decode(codes, seed=[image_seed(number, index) for number in range(count)]).cpu()


def deviation(samples: Tensor) -> Tensor:
    """Standard deviation over samples n 3 h w of a pixel, over its colours together: h w, in levels of 255."""
    return samples.var(dim=0).mean(dim=0).sqrt() * 127.5


def figures(x: Tensor, samples: Tensor) -> dict[str, float]:
    """Of one picture 3 h w and its samples n 3 h w."""
    heat, mean = deviation(samples), samples.mean(dim=0)
    error = (samples[0] - x).square().mean(dim=0).sqrt()
    return {
        "spread": float(heat.mean()),
        "psnr": float(psnr(x.expand_as(samples), samples).mean()),
        "psnr_of_mean": float(psnr(x[None], mean[None])),
        "with_detail": correlation(heat, detail(x)),
        "with_error": correlation(heat, error),
    }


def detail(x: Tensor) -> Tensor:
    """Standard deviation of a picture 3 h w in the neighbourhood of each pixel: h w."""
    pad = (NEIGHBOURHOOD // 2,) * 4
    mean, square = (F.avg_pool2d(F.pad(y[None], pad, mode="reflect"), NEIGHBOURHOOD, 1)[0] for y in (x, x.square()))
    return (square - mean.square()).clamp(min=0).mean(dim=0).sqrt()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two maps; 0 where one of them is even."""
    a, b = (y.flatten().double() - y.double().mean() for y in (a, b))
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-12))


def keep(shown: list[tuple[Tensor, ...]], path: Path) -> None:
    """Originals, two samples, and heat maps, which all have one scale, as rows of one picture."""
    originals, first, second, heat = (torch.stack(column) for column in zip(*shown, strict=True))
    maps = heat_map(heat.movedim(0, 1).flatten(1)).unflatten(2, (len(heat), -1)).movedim(2, 0)
    picture = to_pil(grid([originals, first, second, maps]))
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    columns = measured_columns(results["rows"], COLUMNS)
    bars(groups, columns, place)
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT --models MODEL ...

{results["samples"]} samples of each of {results["pictures"]} held-out pictures' codes. Spread: standard deviation of a
pixel over samples. Correlations over the pixels of a picture, then averaged: of the spread with how much the original
varies near the pixel, and with the first sample's error. The pictures are beside the runs, as `figure8.png`.

{figures_table(groups, columns, first={"model": lambda group: group[0]["label"]})}
![figures of every model]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)
