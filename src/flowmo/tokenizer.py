"""``FlowMo``: pictures to ``Codes`` and back. What users import.

Notable: inference always runs the networks on batches of one fixed size, ``chunk_size`` (1 on a CPU, 16 elsewhere,
the last batch padded). The rounding of a matrix product depends on its shape, and a code channel close to zero turns
such rounding into another bit; with one shape for every call the same picture has the same ids, and the same sample,
alone and in any batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowmo import images as pictures
from flowmo.config import Config
from flowmo.errors import FlowMoError
from flowmo.images import Tiling
from flowmo.model import sampler as sample
from flowmo.model.blocks import blocks, ramp
from flowmo.model.cpu_prepack import Packable
from flowmo.model.quantizers import build_quantizer, check_ids
from flowmo.model.transformer import Decoder, Encoder, Shape
from flowmo.model.windowed import WindowedDecoder, WindowedEncoder, WindowedShape
from flowmo.precision import computing

RANGE_TOLERANCE = 1e-4


class RateError(FlowMoError, ValueError):
    """A rate that a tokenizer has not; the message lists those that it has."""


@dataclass(frozen=True)
class Codes:
    """What ``FlowMo.encode`` makes of pictures: all that ``decode`` needs.

    Attributes:
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck. With a model of variable rate, the
            first sub-tokens alone decode to a coarser image.
        size: height and width of the picture that each row decodes to.
        id_count: ids run from 0 to ``id_count`` − 1.
        tiling: how the rows tile one picture of any size; ``None`` where each row is a picture of its own.
        code: float32 b × tokens × channels where there are no ids, else ``None``.
        image_size: true height and width, where ``size`` is padded to whole cells.
    """

    ids: Tensor | None
    size: tuple[int, int]
    id_count: int | None = None
    tiling: Tiling | None = None
    code: Tensor | None = None
    image_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Codes:
        """The codes of some rows, as a batch of their own."""
        if isinstance(rows, int):
            rows = [rows]
        pick = lambda x: None if x is None else x[rows]  # noqa: E731
        return replace(self, ids=pick(self.ids), code=pick(self.code), tiling=None)

    @property
    def _values(self) -> Tensor:
        values = self.code if self.ids is None else self.ids
        if values is None:
            raise TypeError("codes of neither ids nor a continuous code")
        return values

    @property
    def bits(self) -> int:
        """Bits of all ids together; of a continuous code as stored, in float32."""
        if self.ids is None:
            return self._values.numel() * 32
        if self.id_count is None:
            raise TypeError("how many bits an id takes is not known without id_count")
        return self.ids.numel() * (self.id_count - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of all ids, packed."""
        return (self.bits + 7) // 8

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the picture that all rows tile together, or of each row's own."""
        return (self.tiling.height, self.tiling.width) if self.tiling else self.image_size or self.size

    def coarser(self, sub_tokens: int) -> Codes:
        """The codes with the first ``sub_tokens`` sub-tokens of every token alone.

        Raises:
            TypeError: a continuous code.
            ValueError: none, or more than there are.
        """
        if self.ids is None:
            raise TypeError("a continuous code has no sub-tokens")
        if not 1 <= sub_tokens <= self.ids.shape[2]:
            raise ValueError(f"{sub_tokens} sub-tokens of {self.ids.shape[2]}; keep at least 1, at most all")
        return replace(self, ids=self.ids[:, :, :sub_tokens])

    @property
    def bits_per_pixel(self) -> float:
        height, width = self.output_size
        pixels = height * width * (1 if self.tiling else len(self))
        return self.bits / pixels


def identity_of(facts: Mapping[str, Any], network: nn.Module) -> str:
    """16 hex digits that name some facts, as JSON takes them, and a network's weights."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy())
    return digest.hexdigest()


class FlowMo(Packable):
    """The tokenizer: an encoder, a bottleneck and a rectified-flow decoder built from a ``Config``.

    Fresh weights are random; ``flowmo.load`` gives trained ones. Device, precision, packing and compilation are the
    caller's choice: ``.to(device)``, ``torch.autocast``, ``.pack()``, ``.compile()``.
    """

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        model = self.config.model
        self.quantizer = build_quantizer(model)
        self.encoder: Encoder | WindowedEncoder
        self.decoder: Decoder | WindowedDecoder
        if model.network == "windowed":
            self.encoder = WindowedEncoder(WindowedShape.encoder(model), self.quantizer.encoder_channels)
            self.decoder = WindowedDecoder(WindowedShape.decoder(model), model.context_dim)
        else:
            self.encoder = Encoder(Shape.encoder(model), model.code_length, self.quantizer.encoder_channels)
            self.decoder = Decoder(Shape.decoder(model), model.context_dim)
        self.chunk_size: int | None = None

    # The names that users of other libraries look for

    @classmethod
    def from_pretrained(cls, source: str | Path, *overrides: str, device: str | torch.device = "cpu") -> FlowMo:
        """The same as ``flowmo.load``."""
        from flowmo.checkpoint.files import load

        return load(source, *overrides, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and a model card into a folder, which ``from_pretrained`` takes."""
        from flowmo.checkpoint.hub import write_folder

        write_folder(self, Path(folder))

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Upload to the Hugging Face Hub as ``owner/name``; gives the address. ``flowmo push`` adds a context model.

        Raises:
            HubError: the Hub refuses, or huggingface_hub is not installed.
        """
        from flowmo.checkpoint.hub import push, write_folder

        with tempfile.TemporaryDirectory() as folder:
            write_folder(self, Path(folder), name=name)
            return push(Path(folder), name, private)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those made of blocks, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def code_length(self) -> int:
        return self.config.model.code_length

    @property
    def native_size(self) -> bool:
        """Whether images keep their own height and width: one code token per cell, as many as the image has."""
        return self.config.model.network == "windowed"

    def tokens(self, height: int, width: int) -> int:
        """Code tokens of an image of so many pixels, whole patches."""
        patch = self.config.model.patch_size
        return (height // patch) * (width // patch) if self.native_size else self.code_length

    def keep_prefix(self, code: Tensor, kept: Tensor) -> Tensor:
        """Nested dropout: set the channels of all but the first sub-tokens to 0, which stands for "not sent".

        Args:
            code: quantized, b × tokens × channels.
            kept: int64, broadcast to b × tokens; sub-tokens to keep, from 1.

        Raises:
            TypeError: a bottleneck without sub-tokens.
        """
        channel = torch.arange(code.shape[-1], device=code.device)
        return code * (self.quantizer.sub_token_of(channel) < kept[..., None]).to(code.dtype)

    def identity(self) -> str:
        """16 hex digits that name these weights and this architecture: codes of one tokenizer are noise to another."""
        default = Config().architecture()
        # Only what departs from the default counts, so that a setting which does not exist yet cannot change it.
        ours = {name: value for name, value in self.config.architecture().items() if value != default[name]}
        return identity_of(ours, self)

    # Batches of pictures

    @property
    def variable_rate(self) -> bool:
        """Whether a prefix of each token's sub-tokens decodes to a coarser image."""
        return self.config.model.nested_dropout > 0

    def rates(self, height: int, width: int) -> tuple[float, ...]:
        """Bits per pixel that images of this true size can be encoded at, ascending; none for a continuous model.

        They are those of ``Codes.bits_per_pixel``: an id takes whole bits.
        """
        id_count, sub_tokens = self.quantizer.id_count, self.quantizer.sub_tokens
        if id_count is None or sub_tokens is None:
            return ()
        patch = self.config.model.patch_size
        tokens = self.tokens(math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
        full = tokens * sub_tokens * (id_count - 1).bit_length() / (height * width)
        return tuple(full * k / sub_tokens for k in range(1, sub_tokens + 1)) if self.variable_rate else (full,)

    def sub_tokens_at(self, bits_per_pixel: float, height: int, width: int) -> int:
        """Most sub-tokens per token that make at most ``bits_per_pixel`` in an image of this true size.

        Raises:
            RateError: the model has one rate, or none so low; the message lists its rates.
        """
        rates = self.rates(height, width)
        shown = ", ".join(f"{rate:.4f}" for rate in rates) or "none, for it is continuous"
        if not self.variable_rate:
            raise RateError(f"this tokenizer has no choice of rate; bits per pixel it has: {shown}")
        within = sum(rate <= bits_per_pixel * (1 + 1e-9) for rate in rates)
        if not within:
            raise RateError(f"{bits_per_pixel:g} bits per pixel is below every rate at {height}×{width}: {shown}")
        return within

    @torch.no_grad()
    def encode(self, images: Tensor, bits_per_pixel: float | None = None) -> Codes:
        """Pictures to codes.

        Args:
            images: float b × 3 × h × w in [−1, 1]; h and w are multiples of the patch size. A tokenizer of fixed
                length was trained at one size, ``config.data.image_size``; ``encode_image`` brings any picture to it.
            bits_per_pixel: of a tokenizer of variable rate: the highest rate at or below it; ``None`` is the full rate.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape, values outside [−1, 1] or not finite, or a rate that the tokenizer has not.
        """
        self._check_images(images)
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, *images.shape[-2:])
        codes, ids = [], []
        for chunk in self._chunks(images.to(self.device, torch.float32)):
            with computing(self.precision, self.device):
                encoded = self._encode_blocks(chunk)
            code, chunk_ids = self.quantizer.quantize(encoded)
            codes.append(code)
            ids.append(chunk_ids)
        size = (images.shape[-2], images.shape[-1])
        if self.quantizer.id_count is None:
            return Codes(None, size, code=torch.cat(codes)[: len(images)])
        out = Codes(torch.cat(ids)[: len(images)], size, self.quantizer.id_count)
        return out if kept is None else out.coarser(kept)

    def _encode_blocks(self, images: Tensor) -> Tensor:
        """The encoder's output, float32 b × tokens × channels; large images of native size in blocks."""
        if not self.native_size:
            return self.encoder(images).float()
        cell = self.config.model.patch_size
        rows, columns = images.shape[-2] // cell, images.shape[-1] // cell
        out = images.new_empty(len(images), rows, columns, self.quantizer.encoder_channels)
        for down, across in blocks(rows, columns):
            block = images[..., down.start * cell : down.stop * cell, across.start * cell : across.stop * cell]
            code = self.encoder(block).float().unflatten(1, (down.stop - down.start, -1))
            kept = code[:, down.first - down.start : down.last - down.start, across.first - across.start :]
            out[:, down.first : down.last, across.first : across.last] = kept[:, :, : across.last - across.first]
        return out.flatten(1, 2)

    @torch.no_grad()
    def decode(
        self,
        codes: Codes | Tensor,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        guidance: float | None = None,
        rho: float | None = None,
        solver: str | None = None,
        size: tuple[int, int] | None = None,
        noise_scale: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Codes, or bare ids, to pictures: solves the flow from seeded noise (section 3.4). Needs no picture.

        Args:
            codes: ``Codes``, or int64 ids b × tokens × sub-tokens; of a tokenizer of variable rate, the first
                sub-tokens alone make a coarser image.
            steps: of the solver; the model's own where ``None``: 1 of nano, 25 of the paper's, which with guidance in
                its interval are 31 passes.
            seed: one seed for every picture, or one a picture. A picture is a function of its ids and its seed alone.
            guidance: classifier-free guidance inside the preset's interval; 1 switches it off. Preset: 1.5.
            rho: shift of the sampler, equation 14. Preset: 4.
            solver: ``euler``, the paper's, ``midpoint``, ``heun`` or ``multistep``, see ``flowmo.model.sampler``.
            size: height and width, where ``codes`` are bare ids and the size is not the trained one.
            noise_scale: of the noise that the flow starts from; below 1 it is likelier noise (appendix C, figure 9).
            progress: called with (pictures done, pictures in all).

        Returns:
            float32 b × 3 × h × w, clipped to [−1, 1].

        Raises:
            TypeError, ValueError: ids of the wrong kind, shape or range; a seed count other than b; a negative or
                infinite scale.
            NotFiniteError: guidance, or weights, so extreme that a sample is no picture.
        """
        if not 0 <= noise_scale < math.inf:
            raise ValueError(f"noise_scale {noise_scale} must be finite and at least 0")
        code, height, width = self._code_and_size(codes, size)
        seeds = list(seed) if isinstance(seed, Sequence | Tensor) else [seed] * len(code)
        if len(seeds) != len(code):
            raise ValueError(f"{len(seeds)} seeds for {len(code)} pictures; give one, or one a picture")
        noise = sample.seeded_noise(seeds, height, width, noise_scale)
        return self._decode_from(noise, code, steps, guidance, rho, solver, progress)

    def _code_and_size(self, codes: Codes | Tensor, size: tuple[int, int] | None) -> tuple[Tensor, int, int]:
        """Code as the decoder sees it, and the size of the pictures to make."""
        if not isinstance(codes, Codes):
            codes = Codes(codes, size or (self.config.data.image_size,) * 2, self.quantizer.id_count)
        height, width = size or codes.size
        self._check_size(height, width)
        sub_tokens, id_count = self.quantizer.sub_tokens, self.quantizer.id_count
        if sub_tokens is None or id_count is None:
            if codes.code is None:
                raise TypeError("this tokenizer is continuous and has no ids; decode the Codes that encode returned")
            code = codes.code.to(self.device, torch.float32)
        else:
            ids = check_ids(
                codes.ids, self.tokens(height, width), sub_tokens, id_count, allow_prefix=self.variable_rate
            )
            sent = ids.shape[2]
            code = self.quantizer.code_from_ids(F.pad(ids, (0, sub_tokens - sent)).to(self.device))
            if sent < sub_tokens:
                code = self.keep_prefix(code, torch.tensor([sent], device=self.device))
        return code, height, width

    @torch.no_grad()
    def _decode_from(
        self,
        noise: Tensor,
        code: Tensor,
        steps: int | None,
        guidance: float | None,
        rho: float | None = None,
        solver: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        preset = self.config.eval.sampling
        solver = preset.solver if solver is None else solver
        times = sample.shifted_times(
            preset.sample_steps if steps is None else steps, preset.rho if rho is None else rho
        )
        guidance = preset.guidance if guidance is None else guidance
        mean = self.config.model.mean_velocity
        if mean and (solver != "euler" or guidance != 1):
            raise ValueError(
                "a distilled tokenizer has guidance folded in and makes Euler's steps; leave both as they are"
            )
        if solver not in sample.SOLVERS:
            raise ValueError(f"Unknown solver {solver!r}. Use {', '.join(sample.SOLVERS)}.")
        out, done = [], 0
        for z, c in zip(self._chunks(noise.to(self.device)), self._chunks(code), strict=True):
            with computing(self.precision, self.device):
                if mean:
                    x = sample.follow_mean_velocity(self.decoder, c, z, times)
                else:
                    velocity = sample.guided_velocity(
                        self.decoder, c, guidance, preset.guidance_low, preset.guidance_high
                    )
                    x = sample.SOLVERS[solver](velocity, z, times)
                out.append(x.float().clamp(-1, 1))
            done = min(done + len(z), len(noise))
            if progress:
                progress(done, len(noise))
        if not out:
            return noise.to(self.device)
        pictures = torch.cat(out)[: len(noise)]
        if not torch.isfinite(pictures).all():
            raise sample.NotFiniteError(f"the sample is not finite with guidance {guidance:g}; nearer to 1 it may be")
        return pictures

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        """Rows of ``x`` in batches of one size; the last is padded with zeros."""
        size = self.chunk_size or (1 if self.device.type == "cpu" else 16)
        for start in range(0, len(x), size):
            chunk = x[start : start + size]
            yield F.pad(chunk, (0, 0) * (chunk.ndim - 1) + (0, size - len(chunk)))

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = f"{images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in [−1, 1], not a {kind}; uint8 x: x / 127.5 − 1")
        if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(f"images have shape {tuple(images.shape)}; give at least one as (batch, 3, height, width)")
        self._check_size(*images.shape[-2:])
        low, high = images.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError("images hold NaN or infinite values")
        if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"images run from {low:.4g} to {high:.4g}; scale them to [−1, 1]")

    def _check_size(self, height: int, width: int) -> None:
        patch = self.config.model.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"pictures of {height}×{width} do not divide into patches of {patch}×{patch}; "
                "use encode_image, or resize them"
            )

    # Single pictures of any size

    def encode_image(self, picture: Image.Image, fit: str = "whole", bits_per_pixel: float | None = None) -> Codes:
        """One PIL picture of any size and mode to codes.

        Args:
            fit: ``whole`` (or ``tile``) keeps the whole picture: at its own size where the tokenizer has native size,
                else as overlapping tiles of the trained size. ``crop`` follows the paper's protocol: short side
                resized to the trained size, central square.
            bits_per_pixel: as in ``encode``.

        Raises:
            TypeError: not a PIL picture.
            ValueError: another ``fit``, a picture without pixels or above ``pictures.MAX_PIXELS``, or a rate that the
                tokenizer has not.
        """
        if not isinstance(picture, Image.Image):
            raise TypeError(f"encode_image takes a PIL picture, not a {type(picture).__name__}; encode takes tensors")
        if fit not in ("whole", "tile", "crop"):
            raise ValueError(f"unknown fit {fit!r}; use 'whole' or 'crop'")
        pictures.check_size(picture)
        side = self.config.data.image_size
        picture = pictures.to_rgb(picture)
        if fit == "crop":
            picture = pictures.resize_and_crop(picture, side)
        if self.native_size:
            return self._encode_whole(pictures.to_tensor(picture), bits_per_pixel)
        tiling = Tiling(picture.height, picture.width, side)
        return replace(self.encode(tiling.split(pictures.to_tensor(picture)), bits_per_pixel), tiling=tiling)

    def _encode_whole(self, image: Tensor, bits_per_pixel: float | None) -> Codes:
        """An image 3 h w at its own size, padded to whole cells by its last row and column."""
        height, width = image.shape[-2:]
        cell = self.config.model.patch_size
        padded = F.pad(image[None], (0, -width % cell, 0, -height % cell), mode="replicate")
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, height, width)
        codes = replace(self.encode(padded), image_size=(height, width))
        return codes if kept is None else codes.coarser(kept)

    def decode_image(
        self,
        codes: Codes,
        steps: int | None = None,
        seed: int = 0,
        *,
        guidance: float | None = None,
        rho: float | None = None,
        solver: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Image.Image:
        """The picture of codes from ``encode_image``; arguments as in ``decode``.

        All tiles are cut from one canvas of noise, so that neighbours agree where they overlap before they are blended.
        """
        if self.native_size:
            return self._decode_whole(codes, seed, steps, guidance, rho, solver, progress)
        tiling = codes.tiling or Tiling(*codes.size, self.config.data.image_size)
        code, *_ = self._code_and_size(codes, None)
        if len(code) != len(tiling.corners):
            raise ValueError(f"{len(code)} codes for a picture of {len(tiling.corners)} tiles")
        noise = tiling.crop(sample.seeded_noise([seed], *tiling.canvas)[0])
        tiles = self._decode_from(noise, code, steps, guidance, rho, solver, progress)
        return pictures.to_pil(tiling.merge(tiles))

    def _decode_whole(
        self,
        codes: Codes,
        seed: int,
        steps: int | None,
        guidance: float | None,
        rho: float | None,
        solver: str | None,
        progress: Callable[[int, int], None] | None,
    ) -> Image.Image:
        """One image of native size; a large one in blocks, which are cut from one canvas of noise and blended."""
        code, height, width = self._code_and_size(codes, None)
        if len(code) != 1:
            raise ValueError(f"{len(code)} codes for one image; decode takes batches")
        noise = sample.seeded_noise([seed], height, width)
        cell = self.config.model.patch_size
        rows, columns = height // cell, width // cell
        code = code.unflatten(1, (rows, columns))
        total, weights = torch.zeros(3, height, width), torch.zeros(height, width)
        todo = list(blocks(rows, columns))
        for done, (down, across) in enumerate(todo):
            y, x = slice(down.start * cell, down.stop * cell), slice(across.start * cell, across.stop * cell)
            part = code[:, down.start : down.stop, across.start : across.stop].flatten(1, 2)
            image = self._decode_from(noise[..., y, x], part, steps, guidance, rho, solver)[0].cpu()
            weight = ramp(down, rows, cell)[:, None] * ramp(across, columns, cell)
            total[:, y, x] += weight * image
            weights[y, x] += weight
            if progress:
                progress(done + 1, len(todo))
        true_height, true_width = codes.output_size
        return pictures.to_pil((total / weights)[:, :true_height, :true_width])
