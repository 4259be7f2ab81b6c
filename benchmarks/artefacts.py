"""Artefacts of a tokenizer in numbers: detail that it invents, detail along the grid, colour, seams and borders.

    python benchmarks/artefacts.py IMAGES --model native --limit 50 --out artefacts

Measures of each decoded image beside its original:

correlation   Of brightness, by band of the period in pixels.
axis_share    Part of the power of brightness within 10° of the horizontal and vertical axes, by the same bands, in the
              original, and as the difference of the decoded image from it.
colour_error  Root-mean-square error of colour, without brightness, of the means of 16 × 16 pixels, of 255.
outer         Squared error of the outer 4 pixels over that of the pixels inside.
lpips, psnr   LPIPS (AlexNet) and PSNR in dB.
seams         As in seams.py, at the period ``--period``, over all images at once. It has no standard error.

Images are decoded at each rate of ``--bpp``, from the lowest to the highest. At the middle rate the decoding is then
changed: filters on every image, other settings of the sampler on ``--changes`` images from the middle of the list on.
``border 0.12`` moves the two pixels at each border of patches together by 0.12 of their difference. ``control 0.12``
does so in the middle of the patches. Each change is compared with the plain decoding of the same images.

Writes artefacts.json: means and standard errors over the images.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from seams import seam_energy
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.images import to_bytes, to_tensor
from flowmo.losses.perceptual import LPIPS
from flowmo.model.sampler import image_seed

BANDS = ((8, 16), (4, 8), (2, 4))
"""Shortest and longest period of each band, in pixels."""
AXIS_ANGLE = 10.0
BLOCK = 16
OUTER = 4
LUMA = (0.299, 0.587, 0.114)

Decode = Callable[..., Tensor]


def brightness(image: Tensor) -> Tensor:
    return (image * torch.tensor(LUMA)[:, None, None]).sum(0)


def spectrum(image: Tensor) -> Tensor:
    """Windowed Fourier transform of the brightness of an image 3 h w."""
    values = brightness(image)
    window = torch.outer(*(torch.hann_window(size) for size in values.shape))
    return torch.fft.fft2((values - values.mean()) * window)


def compare(original: Tensor, decoded: Tensor) -> dict[str, float]:
    """Measures of one pair of images 3 h w in [0, 255], except those of LPIPS, PSNR and seams."""
    x, y = spectrum(original), spectrum(decoded)
    down, across = torch.fft.fftfreq(x.shape[0])[:, None], torch.fft.fftfreq(x.shape[1])[None]
    frequency = (down.square() + across.square()).sqrt()
    angle = torch.atan2(down.abs(), across.abs()).rad2deg()
    found = {}
    for low, high in BANDS:
        band = (frequency >= 1 / high) & (frequency < 1 / low)
        axes = band & ((angle < AXIS_ANGLE) | (angle > 90 - AXIS_ANGLE))
        powers = [z[band].abs().square().sum() for z in (x, y)]
        shares = [float(z[axes].abs().square().sum() / power) for z, power in zip((x, y), powers, strict=True)]
        product = (x[band].conj() * y[band]).real.sum()
        found[f"correlation_{low}_{high}"] = float(product / (powers[0] * powers[1]).sqrt())
        found[f"axis_share_original_{low}_{high}"] = shares[0]
        found[f"axis_share_difference_{low}_{high}"] = shares[1] - shares[0]
    blocks = F.avg_pool2d(decoded - original, BLOCK)
    found["colour_error"] = float((blocks - brightness(blocks)).square().sum(0).mean().sqrt())
    error = (original - decoded).square().mean(0)
    inside = error[OUTER:-OUTER, OUTER:-OUTER]
    outer = (error.sum() - inside.sum()) / (error.numel() - inside.numel())
    return found | {"outer": float(outer / inside.mean())}


def move_together(image: Tensor, weight: float, period: int, first: int) -> Tensor:
    """Move both pixels at each line ``first`` + k · ``period`` together by ``weight`` of their difference."""
    image = image.clone()
    for view in (image, image.transpose(1, 2)):
        before, after = view[..., first - 1 : -1 : period], view[..., first::period]
        step = weight * (after - before)
        before += step
        after -= step
    return image


def blur(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of an image 3 h w, over 5 pixels."""
    kernel = torch.exp(-torch.arange(-2.0, 3).square() / (2 * deviation**2))
    kernel /= kernel.sum()
    channels = F.pad(image[:, None], (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(channels, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[:, 0]


def changes(decode: Decode, rate: float, plain: Tensor, period: int, sampled: bool) -> Iterator[tuple[str, Tensor]]:
    """Filters of a plain decoding and, if ``sampled``, decodings with other settings of the sampler."""
    yield "border 0.12", move_together(plain, 0.12, period, period)
    yield "border 0.25", move_together(plain, 0.25, period, period)
    yield "control 0.12", move_together(plain, 0.12, period, period // 2)
    yield "blur 0.5", blur(plain, 0.5)
    if sampled:
        other = decode(rate, seed=1)
        yield "seed", other
        yield "mean of two seeds", (plain + other) / 2
        yield "no noise", decode(rate, noise_scale=0.0)
        yield "four passes", decode(rate, steps=4)


def decoder(tokenizer: flowmo.FlowMo, image: Image.Image, index: int) -> Decode:
    """Decode one image at any rate. It is encoded once."""
    codes = tokenizer.encode_image(image)

    def decode(rate: float, seed: int = 0, **options: Any) -> Tensor:
        kept = codes.coarser(tokenizer.sub_tokens_at(rate, image.height, image.width))
        return tokenizer.decode_tensor(kept, seed=image_seed(seed, index), **options)

    return decode


def summarize(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard error of every measure."""
    found = {}
    for name in rows[0]:
        column = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        found[name] = {"mean": float(column.mean()), "error": float(column.std() / math.sqrt(len(column)))}
    return found


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    source, tokenizer, lpips = open_source(arguments.images), flowmo.load(arguments.model), LPIPS("alex")
    period, rates = arguments.period, sorted(arguments.bpp)
    middle = rates[len(rates) // 2]
    indices = evenly_spread(arguments.limit or len(source), len(source))
    sampled = indices[len(indices) // 2 :][: arguments.changes]
    rows: dict[tuple[float, str], list[dict[str, float]]] = defaultdict(list)
    images: dict[tuple[float, str], list[Tensor]] = defaultdict(list)
    originals: list[Tensor] = []

    def add(rate: float, change: str, decoded: Tensor) -> None:
        original, decoded = originals[-1], to_bytes(decoded).float()
        pair = [image[None] / 127.5 - 1 for image in (original, decoded)]
        found = compare(original, decoded) | {"lpips": float(lpips(*pair)), "psnr": float(psnr(*pair))}
        if change:
            plain = rows[rate, ""][-1]
            found |= {f"{name}_change": found[name] - plain[name] for name in ("lpips", "psnr")}
        rows[rate, change].append(found)
        images[rate, change].append(decoded)

    for index in indices:
        picture = source.read(index)
        originals.append(to_bytes(to_tensor(picture)).float())
        decode = decoder(tokenizer, picture, index)
        for rate in rates:
            plain = decode(rate)
            add(rate, "", plain)
            if rate == middle:
                for change, decoded in changes(decode, rate, plain, period, index in sampled):
                    add(rate, change, decoded)
    content: dict[str, Any] = {"images": len(indices), "source": Path(arguments.images).name}
    content |= {"model": tokenizer.weights_identity(), "seams_original": seam_energy(originals, period)}
    content["rows"] = [
        {"bits_per_pixel": rate, "change": change or "none", "images": len(found)}
        | {"seams": seam_energy(images[rate, change], period)}
        | summarize(found)
        for (rate, change), found in sorted(rows.items(), key=lambda item: item[0][0])
    ]
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images")
    parser.add_argument("--model", default="native")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.0352, 0.1407, 0.2813], help="bits per pixel")
    parser.add_argument("--period", type=int, default=4, help="side of the patches that the decoder writes, in pixels")
    parser.add_argument("--changes", type=int, default=8, help="images for other settings of the sampler")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    content = measure(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_content(arguments.out / "artefacts.json", json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
