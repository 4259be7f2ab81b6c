"""Several samples of one code (section 4.2, figure 8).

Reproduces where samples differ. Each image is encoded once and decoded from many seeds; a heat map shows the samples'
standard deviation per pixel. The paper sees it concentrate in backgrounds. Here it is measured: how the spread
correlates with the image's detail and with a sample's error, and how much PSNR the mean of samples gains.

Cost: smoke a few seconds. cpu two minutes per model of 5 M parameters on two cores. gpu a few minutes per model of 80 M
parameters on one H100, by arithmetic. paper 7 hours per model of FlowMo-Lo's size on one H100, by arithmetic.
Expect: samples differ where detail is, and hardly after stage 1B.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.images import to_pil
from flowmo.model.sampler import image_seed
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.page import Column
from reproduce.runner import SAMPLES_KEPT, Results, Row, Rows, Scale, Study

TAKES_MODELS = True
SCALES = {
    "smoke": Scale(images=2, samples=2),
    "cpu": Scale(images=64, samples=8),
    "gpu": Scale(images=1000, samples=16),
    "paper": Scale(images=5000, samples=16),
}
DETAIL_WINDOW = 5
"""Side in pixels of the window over which an image's detail is taken."""
COLUMNS = (
    Column("spread", "spread of a pixel (levels of 255) ↓", 2),
    Column("psnr", "PSNR of a sample (dB) ↑", 2),
    Column("psnr_of_mean", "PSNR of the mean (dB) ↑", 2),
    Column("with_detail", "correlation with detail ↑", 3),
    Column("with_error", "correlation with error ↑", 3),
    Column("lpips_between", "LPIPS between samples ↓", 4),
)


def rows(study: Study, metadata: Row) -> Rows:
    metadata["samples"] = SCALES[study.scale].samples
    for _, name, tokenizer in study.load_models():
        yield study.once(name, partial(measure, name, tokenizer, study))


@torch.no_grad()
def measure(name: str, tokenizer: FlowMo, study: Study) -> Row:
    """Means over images of ``COLUMNS``. Keeps the first images' heat maps in the run's folder."""
    scale, lpips, device = SCALES[study.scale], study.evaluators.lpips_alex, study.world.device
    indices, images = study.held_out_images(scale.images, tokenizer.config.data.image_size)
    found: list[dict[str, float]] = []
    shown: list[tuple[Tensor, ...]] = []
    for index, x in zip(indices, images, strict=True):
        codes = tokenizer.encode(x[None])[[0] * scale.samples]
        seeds = [image_seed(number, index) for number in range(scale.samples)]
        samples = tokenizer.decode(codes, seed=seeds).cpu()
        found.append(metrics(x, samples))
        if lpips is not None:
            found[-1]["lpips_between"] = float(lpips(samples[:1].to(device), samples[1:2].to(device)).mean())
        if len(shown) < SAMPLES_KEPT:
            shown.append((x, samples[0], samples[1], deviation(samples)))
    if study.world.main:
        save_figure_8(shown, study.folder(name) / "figure8.png")
    means = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
    return {"arm": name, "label": name, **means}


def deviation(samples: Tensor) -> Tensor:
    """Standard deviation over samples (n 3 h w) per pixel, its channels pooled: h w, in levels of 255."""
    return samples.var(dim=0).mean(dim=0).sqrt() * 127.5


def metrics(x: Tensor, samples: Tensor) -> dict[str, float]:
    """Metrics of one image (3 h w) and its samples (n 3 h w)."""
    heat, error = deviation(samples), (samples[0] - x).square().mean(dim=0).sqrt()
    return {
        "spread": float(heat.mean()),
        "psnr": float(psnr(x.expand_as(samples), samples).mean()),
        "psnr_of_mean": float(psnr(x[None], samples.mean(dim=0, keepdim=True))),
        "with_detail": correlation(heat, detail(x)),
        "with_error": correlation(heat, error),
    }


def detail(x: Tensor) -> Tensor:
    """Standard deviation of an image (3 h w) in the window around each pixel: h w."""
    pad = (DETAIL_WINDOW // 2,) * 4
    mean, square = (F.avg_pool2d(F.pad(y[None], pad, mode="reflect"), DETAIL_WINDOW, 1)[0] for y in (x, x.square()))
    return (square - mean.square()).clamp(min=0).mean(dim=0).sqrt()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two maps; 0 if one is constant."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1].nan_to_num())


def save_figure_8(shown: Sequence[tuple[Tensor, ...]], path: Path) -> None:
    """Save rows of originals, two samples, and heat maps on one scale."""
    *images, heat = (torch.stack(column) for column in zip(*shown, strict=True))
    maps = heat_map(heat.movedim(0, 1).flatten(1)).unflatten(2, (len(heat), -1)).movedim(2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(grid([*images, maps])).save(path)


def body(results: Results, plot: Path) -> str:
    groups, columns = page.groups_of(results["rows"]), page.measured(results["rows"], COLUMNS)
    page.dot_plots([groups], columns, plot)
    return f"""\
{results["samples"]} samples of each of {results["pictures"]} held-out images' codes. Spread: standard deviation of a
pixel over samples. Correlations over the pixels of an image, then averaged: of the spread with the original's detail
near the pixel, and with the first sample's error. The images are beside the runs, as `figure8.png`.

{page.table(groups, columns, first={"model": "label"})}"""


HEAT = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))
"""Colours of ``heat_map`` from 0 to the maximum."""


def heat_map(values: Tensor) -> Tensor:
    """Colour values h × w as an image 3 × h × w in [−1, 1], from black at 0 over red to light yellow at the maximum."""
    colours = torch.tensor(HEAT, dtype=torch.float32, device=values.device)
    position = values.float() / values.max().clamp(min=1e-9) * (len(HEAT) - 1)
    below = position.floor().long().clamp(max=len(HEAT) - 2)
    mixed = torch.lerp(colours[below], colours[below + 1], (position - below)[..., None])
    return mixed.movedim(-1, 0) * 2 - 1
