"""Mean PSNR and LPIPS of a tokenizer over a folder of pictures, cropped as in the paper's protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flowmo.data import Views, open_source
from flowmo.evaluate.figures import psnr
from flowmo.perceptual import LPIPS
from flowmo.sample import picture_seed
from flowmo.tokenizer import FlowMo


@dataclass(frozen=True)
class Report:
    """Figures over ``pictures`` pictures; spreads are standard deviations over pictures."""

    pictures: int
    bits_per_pixel: float
    psnr: float
    psnr_spread: float
    lpips_alex: float | None
    lpips_alex_spread: float | None
    steps: int
    seed: int

    def as_dict(self) -> dict:
        return asdict(self)


def evaluate(
    tokenizer: FlowMo,
    folder: str | Path,
    *,
    limit: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    lpips: LPIPS | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Encode and decode pictures (short side resized, central square) and compare.

    Args:
        folder: pictures, searched through sub-folders, or a ``.tar`` with its index.
        limit: this many pictures only, spread evenly over the sorted folder.
        lpips: AlexNet LPIPS; without it that figure is left out.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError, PictureError: no pictures, or one that cannot be read.
    """
    source = Views(open_source(folder), tokenizer.config.data.image_size)
    count = min(limit or len(source), len(source))
    chosen = [i * len(source) // count for i in range(count)]
    psnrs, distances, bits = [], [], 0.0
    for start in range(0, count, batch_size):
        indices = chosen[start : start + batch_size]
        x = torch.stack([source[i, 0] for i in indices]).to(tokenizer.device)
        codes = tokenizer.encode(x)
        y = tokenizer.decode(codes, steps, [picture_seed(seed, i) for i in indices])
        bits = codes.bits_per_pixel
        psnrs.append(psnr(x, y))
        if lpips is not None:
            with torch.no_grad():
                distances.append(lpips(x, y))
        if progress:
            progress(start + len(indices), count)
    values, distance = torch.cat(psnrs), torch.cat(distances) if distances else None
    return Report(
        pictures=count,
        bits_per_pixel=bits,
        psnr=float(values.mean()),
        psnr_spread=float(values.std(correction=0)),
        lpips_alex=None if distance is None else float(distance.mean()),
        lpips_alex_spread=None if distance is None else float(distance.std(correction=0)),
        steps=steps or tokenizer.config.eval.sampling.sample_steps,
        seed=seed,
    )
