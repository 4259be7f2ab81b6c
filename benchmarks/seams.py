"""Seams and dot patterns: traces of a decoder's own grid in what it decodes.

    python benchmarks/seams.py IMAGES --model native --limit 50 --out seams

Two measures, each for the originals and for the decoded images:

seams   Mean squared difference of neighbouring pixels over the lines x ≡ 0 (mod P), divided by that over all lines, for
        the periods P of the network: patches, cells and attention windows. 1 is no seam.
screen  Power of flat regions (32 × 32 pixels of the original, with a standard deviation below 4 of 255) at the
        frequencies k / 8 per pixel, over the power at the frequencies half-way between, in dB. 0 is no screen.

Writes seams.json and skies.png: flat regions, originals above decoded ones, four times enlarged with the contrast
raised fourfold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import to_pil, to_tensor

FLAT = 4.0
REGION = 32
PERIOD = 8
SHOWN = 12


def seam_energy(images: Iterable[Tensor], period: int) -> float:
    """Energy of the differences across lines at multiples of ``period`` over that across all lines; images 3 h w."""
    at_lines, everywhere = [], []
    for image in images:
        for x in (image, image.transpose(1, 2)):
            difference = (x[..., 1:] - x[..., :-1]).square().mean((0, 1))  # of columns i and i + 1
            at_lines.append(difference[period - 1 :: period])
            everywhere.append(difference)
    return float(torch.cat(at_lines).mean() / torch.cat(everywhere).mean())


def flat_regions(image: Tensor) -> list[tuple[int, int]]:
    """Corners of the regions of a grid in which an image 3 h w in [0, 255] hardly varies."""
    corners = []
    for y in range(0, image.shape[1] - REGION + 1, REGION):
        for x in range(0, image.shape[2] - REGION + 1, REGION):
            if image[:, y : y + REGION, x : x + REGION].std((1, 2)).max() < FLAT:
                corners.append((y, x))
    return corners


def screen(regions: Tensor) -> float:
    """Peak in dB at multiples of 1 / ``PERIOD`` per pixel over the frequencies between; regions n 3 32 32."""
    window = torch.hann_window(REGION)
    windowed = (regions - regions.mean((2, 3), keepdim=True)) * torch.outer(window, window)
    power = torch.fft.rfft2(windowed).abs().square().mean((0, 1))
    down, across = torch.fft.fftfreq(REGION) * PERIOD, torch.fft.rfftfreq(REGION) * PERIOD
    harmonic = (down[:, None] % 1 == 0) & (across[None] % 1 == 0)
    # The lowest frequencies hold the region's own gradient, which is not of the grid.
    high = (down[:, None].abs() >= 1) | (across[None].abs() >= 1)
    # Half-way, two bins of the transform away, the Hann window lets nothing of a harmonic through.
    between = (down[:, None] % 1 == 0.5) & (across[None] % 1 == 0.5)
    return float(10 * torch.log10(power[harmonic & high].mean() / power[between & high].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bpp", type=float)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source, tokenizer = open_source(arguments.images), flowmo.load(arguments.model)
    model = tokenizer.config.model
    periods = sorted({2, 4, 8, model.patch_size, 16} | ({16 * model.window} if tokenizer.native_size else set()))
    pairs = []
    for index in evenly_spread(arguments.limit or len(source), len(source)):
        picture = source.read(index)
        decoded = tokenizer.decode_image(tokenizer.encode_image(picture, bits_per_pixel=arguments.bpp), seed=index)
        pairs.append(tuple((to_tensor(image) + 1) * 127.5 for image in (picture, decoded)))
    originals, results = zip(*pairs, strict=True)
    found = {"images": len(pairs), "model": tokenizer.weights_identity(), "bits_per_pixel": arguments.bpp}
    found["seams"] = {
        str(period): {"original": seam_energy(originals, period), "decoded": seam_energy(results, period)}
        for period in periods
    }
    flat = []
    for original, decoded in pairs:
        for y, x in flat_regions(original):
            flat.append(tuple(image[:, y : y + REGION, x : x + REGION] for image in (original, decoded)))
    found["flat_regions"] = len(flat)
    if flat:
        flat.sort(key=lambda pair: float(pair[0].std((1, 2)).max()))
        rows = [torch.stack(regions) for regions in zip(*flat, strict=True)]
        found["screen"] = {"original": screen(rows[0]), "decoded": screen(rows[1])}
        arguments.out.mkdir(parents=True, exist_ok=True)
        spread = torch.tensor(evenly_spread(SHOWN, len(flat)))
        shown = [4 * (row[spread] - row[spread].mean((2, 3), keepdim=True)) / 127.5 for row in rows]
        to_pil(grid([F.interpolate(row, scale_factor=4.0) for row in shown])).save(arguments.out / "skies.png")
    write_content(arguments.out / "seams.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
