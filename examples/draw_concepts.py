"""Draws the pictures of docs/concepts.md with the bundled model and matplotlib.

python examples/draw_concepts.py docs/pictures
"""

import sys
from pathlib import Path

import matplotlib
import torch

import flowmo
from flowmo.data.bits import token_bits
from flowmo.images import resize_and_crop, to_pil, to_tensor
from flowmo.model.sampler import shifted_times
from flowmo.model.tiling import Tiling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHOTO = Path(__file__).parent / "pictures" / "cat.jpg"
QUALITY = {"quality": 88, "optimize": True}
INK, BLUE, ORANGE = "#334155", "#6366f1", "#f59e0b"
plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK})


def bare(axes, title):
    axes.set_xticks([]), axes.set_yticks([])
    axes.set_title(title, fontsize=10)


def draw_code(tok, photo, file):
    """A picture, the bits of its tokens, the ids that these are, and what they decode to."""
    codes = tok.encode_image(photo, fit="crop")
    bits = token_bits(codes.ids.numpy(), (codes.id_count - 1).bit_length())[0]
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), width_ratios=(1, 1, 0.9, 1), layout="constrained")
    axes[0].imshow(resize_and_crop(photo, tok.config.data.image_size))
    bare(axes[0], "a picture")
    axes[1].imshow(bits, cmap="Purples", aspect="auto", vmin=-0.2, vmax=1.4, interpolation="nearest")
    bare(axes[1], f"its code: {len(bits)} tokens of {len(bits[0])} bits")
    axes[1].set_ylabel("token")
    rows = [" ".join(f"{i:3d}" for i in row) for row in codes.ids[0, :9].tolist()]
    axes[2].text(0.5, 0.5, "\n".join([*rows, "…"]), family="monospace", ha="center", va="center")
    bare(axes[2], f"as ids: {codes.ids.shape[2]} a token, below {codes.id_count}")
    axes[3].imshow(tok.decode_image(codes))
    bare(axes[3], f"decoded from {codes.nbytes} bytes")
    for place in axes:
        place.spines[:].set_visible(False)
    figure.savefig(file, dpi=110, pil_kwargs=QUALITY)


def draw_path(photo, file):
    """The straight path from a picture to noise, and where on it the sampler stops."""
    times = (0, 0.15, 0.35, 0.6, 0.8, 1)
    picture = to_tensor(resize_and_crop(photo, 128))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    figure = plt.figure(figsize=(11, 4.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    for axes, t in zip(above.subplots(1, len(times)), times, strict=True):
        axes.imshow(to_pil(((1 - t) * picture + t * noise).clamp(-1, 1)))
        bare(axes, f"t = {t:g}")
        axes.spines[:].set_visible(False)
    axes = below.subplots()
    axes.axvspan(0.15, 0.5, color=BLUE, alpha=0.12, lw=0)
    axes.text(0.325, 2.45, "guidance", ha="center", va="top", color=BLUE)
    for row, rho in enumerate((1, 4)):
        stops = shifted_times(25, rho)
        axes.plot(stops, [row + 0.5] * len(stops), "|-", color=(INK, ORANGE)[row], markersize=14, lw=1)
    axes.set(ylim=(0, 2.6), xlim=(-0.02, 1.02), yticks=(0.5, 1.5), yticklabels=("ρ = 1", "ρ = 4"))
    axes.set_xlabel("t, where 25 steps stop on their way from noise (right) to the picture (left)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, pil_kwargs=QUALITY)


def draw_tiles(tok, photo, file):
    """How tiles cover a picture."""
    tiling = Tiling(photo.height, photo.width, tok.config.data.image_size)
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    axes.imshow(photo, alpha=0.75)
    for i, (top, left) in enumerate(tiling.corners):
        square = plt.Rectangle((left, top), tiling.tile - 1, tiling.tile - 1, fill=False, lw=1.6)
        square.set_edgecolor((BLUE, ORANGE)[(i + i // len(tiling.starts(photo.width))) % 2])
        axes.add_patch(square)
    bare(axes, f"{photo.width} × {photo.height} pixels: {tiling.count} tiles of {tiling.tile} × {tiling.tile}")
    axes.spines[:].set_visible(False)
    figure.savefig(file, dpi=110, pil_kwargs=QUALITY)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    tokenizer, photograph = flowmo.load("nano"), flowmo.read_image(PHOTO)
    draw_code(tokenizer, photograph, target / "code.jpg")
    draw_path(photograph, target / "path.jpg")
    draw_tiles(tokenizer, photograph, target / "tiles.jpg")
