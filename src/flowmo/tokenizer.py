"""``FlowMo``: images to ``Codes`` and back. What users import.

Notable: inference runs the networks on batches of one fixed size, ``chunk_size`` (1 on a CPU, 16 elsewhere; the last
batch is padded). The rounding of a matrix product depends on its shape, and flips the bit of a channel close to zero.
With one shape for every call, an image has the same ids and the same sample alone and in any batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowmo.checkpoint import files, hub
from flowmo.config import Config
from flowmo.errors import FlowMoError
from flowmo.images import Tiling, resize_and_crop, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import Distance, pretrain_loss
from flowmo.model import blocks, sampler
from flowmo.model.cpu_prepack import Packable
from flowmo.model.quantizers import build_quantizer, check_ids
from flowmo.model.transformer import Decoder, Encoder
from flowmo.model.windowed import WindowedDecoder, WindowedEncoder
from flowmo.precision import computing

RANGE_TOLERANCE = 1e-4
Progress = Callable[[int, int], None]


class RateError(FlowMoError, ValueError):
    """A rate that a tokenizer does not have; the message lists its rates."""


class SamplingArguments(TypedDict, total=False):
    """Keyword arguments of ``FlowMo.decode_image``."""

    guidance: float | None
    rho: float | None
    solver: str | None
    progress: Progress | None


class Output(NamedTuple):
    """Output of ``FlowMo.forward``, the training pass.

    Attributes:
        loss: scalar to minimise, with gradient.
        images: b × c × h × w, the one-step estimates (equation 6), with gradient.
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck.
        parts: the terms of the loss and statistics of the bottleneck, detached scalars for a log.
    """

    loss: Tensor
    images: Tensor
    ids: Tensor | None
    parts: dict[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """Codes of images: the output of ``FlowMo.encode`` and everything that ``decode`` needs.

    Attributes:
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck. With a model of variable rate, the
            first sub-tokens alone decode to a coarser image.
        size: height and width of the image that each row decodes to.
        id_count: ids run from 0 to ``id_count`` − 1.
        tiling: how the rows tile one image of any size; ``None`` if each row is its own image.
        code: float32 b × tokens × channels, if there are no ids or if ``encode`` was ``differentiable``.
        image_size: true height and width, if ``size`` is padded to whole cells.
    """

    ids: Tensor | None
    size: tuple[int, int]
    id_count: int | None = None
    tiling: Tiling | None = None
    code: Tensor | None = None
    image_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: slice | Tensor | list[int] | int) -> Codes:
        """Select rows as a batch of their own."""
        if isinstance(rows, tuple):
            raise TypeError("Codes are selected by image: one index, a slice, or a list or tensor of indices.")
        index = rows if isinstance(rows, slice | list) or getattr(rows, "ndim", False) else [operator.index(rows)]
        ids, code = (None if x is None else x[index] for x in (self.ids, self.code))
        return replace(self, ids=ids, code=code, tiling=None)

    def __iter__(self) -> Iterator[Codes]:
        """Yield each row as a batch of one."""
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """True if ids, code and sizes are equal, wherever the tensors are."""
        if not isinstance(other, Codes):
            return NotImplemented
        pairs = [(self.ids, other.ids), (self.code, other.code)]
        if any((a is None) != (b is None) for a, b in pairs):
            return False
        metadata = [(x.size, x.id_count, x.tiling, x.output_size) for x in (self, other)]
        same = (torch.equal(a.cpu(), b.cpu()) for a, b in pairs if a is not None and b is not None)
        return metadata[0] == metadata[1] and all(same)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.output_size
        values, tiles = self._values, f" in {len(self)} tiles" if self.tiling else ""
        count = 1 if self.tiling else len(self)
        images = f"{count} image{'s' * (count != 1)} of {height} × {width} pixels{tiles}"
        unit = (
            "channels" if self.ids is None else "sub-tokens" if self.id_count is None else f"ids below {self.id_count}"
        )
        return f"Codes({images}, {values.shape[1]} tokens × {values.shape[2]} {unit} each, {values.device})"

    def to(self, device: str | torch.device) -> Codes:
        """Move all tensors to a device."""
        ids, code = (None if x is None else x.to(device) for x in (self.ids, self.code))
        return replace(self, ids=ids, code=code)

    @classmethod
    def cat(cls, codes: Sequence[Codes]) -> Codes:
        """Join batches of codes of images of one size.

        Raises:
            ValueError: nothing to join, tiles of a larger image, or codes of different kinds or sizes.
        """
        codes = list(codes)
        kinds = {
            (c.size, c.id_count, c.output_size, c.code is None, c.ids is None, c._values.shape[1:], c._values.device)
            for c in codes
        }
        if len(kinds) != 1:
            raise ValueError("Codes.cat joins one or more batches of one size and one kind of ids.")
        if any(c.tiling for c in codes):
            raise ValueError("These codes are the tiles of one image. Codes.cat joins images, not tiles.")
        joined = [[c.ids for c in codes], [c.code for c in codes]]
        ids, code = (None if x[0] is None else torch.cat([t for t in x if t is not None]) for x in joined)
        return replace(codes[0], ids=ids, code=code)

    def to_sequence(self, offset: int = 0, distinct: bool = False) -> Tensor:
        """Flatten the ids for a language model, token after token: int64 b × (tokens · sub-tokens).

        Args:
            offset: at least 0, added to every id, to leave room for other words of a vocabulary.
            distinct: give each sub-token its own ids, for a vocabulary of sub-tokens · ``id_count`` ids.

        Raises:
            TypeError: a continuous code, or an offset that is no integer.
            ValueError: a negative offset.
        """
        if self.ids is None or self.id_count is None:
            raise TypeError("A continuous code has no ids to flatten.")
        if operator.index(offset) < 0:
            raise ValueError(f"offset {offset} must be at least 0.")
        first = torch.arange(self.ids.shape[2], device=self.ids.device) * (self.id_count if distinct else 0)
        return (self.ids + first + offset).flatten(1)

    @property
    def _values(self) -> Tensor:
        values = self.code if self.ids is None else self.ids
        if values is None:
            raise TypeError("These codes have neither ids nor a continuous code.")
        return values

    @property
    def bits(self) -> int:
        """Bits of all ids, or of a continuous code in float32."""
        if self.ids is None:
            return self._values.numel() * 32
        if self.id_count is None:
            raise TypeError("The bits of an id are unknown without id_count.")
        return self.ids.numel() * (self.id_count - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of all ids, packed."""
        return (self.bits + 7) // 8

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the image that all rows tile together, or of each row's own."""
        return (self.tiling.height, self.tiling.width) if self.tiling else self.image_size or self.size

    @property
    def bits_per_pixel(self) -> float:
        height, width = self.output_size
        return self.bits / (height * width * (1 if self.tiling else max(len(self), 1)))

    def coarser(self, sub_tokens: int) -> Codes:
        """Keep only the first ``sub_tokens`` sub-tokens of every token.

        Raises:
            TypeError: a continuous code, or differentiable codes, whose gradient would be lost.
            ValueError: fewer than one, or more than there are.
        """
        if self.ids is None:
            raise TypeError("A continuous code has no sub-tokens.")
        if self.code is not None:
            raise TypeError("These codes are differentiable. Choose their rate in encode, with bits_per_pixel.")
        if not 1 <= sub_tokens <= self.ids.shape[2]:
            raise ValueError(f"{sub_tokens} sub-tokens of {self.ids.shape[2]}; keep at least 1, at most all.")
        return replace(self, ids=self.ids[:, :, :sub_tokens])


def identity_of(metadata: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hash JSON metadata and weights to 16 hex digits."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=8)
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy())
    return digest.hexdigest()


class FlowMo(Packable):
    """The tokenizer: encoder, bottleneck and rectified-flow decoder, built from a ``Config``.

    Fresh weights are random; ``flowmo.load`` reads trained ones. The caller chooses device, precision, packing and
    compilation: ``.to(device)``, ``.set_precision()``, ``.pack()``, ``.compile()``.
    """

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        model = self.config.model
        self.quantizer = build_quantizer(model)
        encoder, decoder = (WindowedEncoder, WindowedDecoder) if self.native_size else (Encoder, Decoder)
        self.encoder = encoder(model, self.quantizer.encoder_channels)
        self.decoder = decoder(model, model.context_dim)
        self.chunk_size: int | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, *overrides: str, device: str | torch.device = "cpu") -> FlowMo:
        """The same as ``flowmo.load``."""
        return load(source, *overrides, device=device)

    def save_pretrained(
        self,
        folder: str | Path,
        name: str = "owner/name",
        context: bytes | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``model.safetensors`` and a model card for ``name`` into a folder, which ``from_pretrained`` reads.

        Args:
            context: content of a context model's file, which goes beside the weights.
            evaluation: output of ``flowmo evaluate --json``, for the card.
        """
        save(self, Path(folder) / hub.MODEL_FILE)
        files.write_content(Path(folder) / hub.CARD_FILE, hub.card(self, name, evaluation))
        if context is not None:
            files.write_content(Path(folder) / hub.CONTEXT_FILE, context)

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Upload to the Hugging Face Hub as ``owner/name``. Returns the address. ``flowmo push`` adds a context model.

        Raises:
            CheckpointError: the Hub refuses, or huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name)
            return hub.push(Path(folder), name, private)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def code_length(self) -> int:
        return self.config.model.code_length

    @property
    def vocab_size(self) -> int | None:
        """Number of ids of a sub-token: they run from 0 to ``vocab_size`` − 1. ``None`` for a continuous bottleneck."""
        return self.quantizer.id_count

    @property
    def native_size(self) -> bool:
        """True if images keep their own height and width, with one code token per cell."""
        return self.config.model.network == "windowed"

    @property
    def pixels(self) -> PixelFormat:
        """Channels and values of the images."""
        return PixelFormat.of(self.config)

    def tokens(self, height: int, width: int) -> int:
        """Code tokens of an image of ``height`` × ``width`` pixels, whole patches."""
        patch = self.config.model.patch_size
        return (height // patch) * (width // patch) if self.native_size else self.code_length

    def keep_prefix(self, code: Tensor, kept: Tensor) -> Tensor:
        """Nested dropout: set the channels of all but the first sub-tokens to 0, which means "not sent".

        Args:
            code: quantized, b × tokens × channels.
            kept: int64, broadcast to b × tokens; sub-tokens to keep, from 1.

        Raises:
            TypeError: a bottleneck without sub-tokens to leave out.
        """
        channel = torch.arange(code.shape[-1], device=code.device)
        return code * (self.quantizer.sub_token_of(channel) < kept[..., None]).to(code.dtype)

    def identity(self) -> str:
        """16 hex digits that name the ids. A tokenizer decodes the codes of every other with the same identity.

        It is ``weights_identity``, or that of the tokenizer in ``model.base`` as long as the encoder is still its own.
        """
        base, _, encoder = self.config.model.base.partition("-")
        return base if base and encoder == self._encoder_identity() else self.weights_identity()

    def weights_identity(self) -> str:
        """16 hex digits that name architecture and weights."""
        return self._identity_of(self.state_dict())

    def as_base(self) -> str:
        """``model.base`` of the tokenizers that are trained from this one."""
        return f"{self.identity()}-{self._encoder_identity()}"

    def _encoder_identity(self) -> str:
        weights = self.state_dict().items()
        return self._identity_of({name: value for name, value in weights if not name.startswith("decoder.")})

    def _identity_of(self, weights: Mapping[str, Tensor]) -> str:
        default = Config().architecture()
        # Only departures from the default count, so that a new setting does not change old identities.
        ours = {name: value for name, value in self.config.architecture().items() if value != default[name]}
        return identity_of(ours, weights)

    # Rates

    @property
    def variable_rate(self) -> bool:
        """True if a prefix of each token's sub-tokens decodes to a coarser image."""
        return self.config.model.nested_dropout > 0

    def rates(self, height: int, width: int) -> tuple[float, ...]:
        """Possible bits per pixel of images of this true size, ascending; empty for a continuous model.

        They are values of ``Codes.bits_per_pixel``: an id takes whole bits.
        """
        id_count, sub_tokens = self.quantizer.id_count, self.quantizer.sub_tokens
        if id_count is None or sub_tokens is None:
            return ()
        patch = self.config.model.patch_size
        tokens = self.tokens(math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
        full = tokens * sub_tokens * (id_count - 1).bit_length() / (height * width)
        return tuple(full * k / sub_tokens for k in range(1, sub_tokens + 1)) if self.variable_rate else (full,)

    def sub_tokens_at(self, bits_per_pixel: float, height: int, width: int) -> int:
        """The most sub-tokens per token within ``bits_per_pixel`` for an image of this true size.

        Raises:
            RateError: the model has a single rate, or no rate so low.
        """
        rates = self.rates(height, width)
        listed = ", ".join(f"{rate:.4f}" for rate in rates) or "none, for it is continuous"
        if not self.variable_rate:
            raise RateError(f"This tokenizer has no choice of rate. Its bits per pixel: {listed}.")
        within = sum(rate <= bits_per_pixel * (1 + 1e-9) for rate in rates)
        if not within:
            raise RateError(f"{bits_per_pixel:g} bits per pixel is below every rate at {height}×{width}: {listed}.")
        return within

    # Training

    def forward(self, images: Tensor, perceptual: Distance | None = None, seed: int | None = None) -> Output:
        """Compute the loss of stage 1A (equation 9): flow, perceptual and bottleneck terms, with the settings' weights.

        ``flowmo train`` has the other stages, EMA, schedules and exact resume. A ``vq`` bottleneck also needs
        ``tok.quantizer.learn(step)`` after each step.

        Args:
            images: as in ``encode``.
            perceptual: distance of two batches, such as ``flowmo.losses.perceptual.LPIPS("vgg")``; ``None`` omits it.
            seed: of timesteps and noise; ``None`` draws one from PyTorch's global generator.

        Raises:
            TypeError, ValueError: as in ``encode``.
        """
        self._check_images(images)
        images = images.to(self.device, torch.float32)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        draw = torch.compiler.disable(TrainingNoise.of)  # torch.compile cannot trace generators
        noise = draw(self.config, images, range(len(images)), seed)
        with computing(self.precision, self.device):
            loss = pretrain_loss(self, images, noise, self.config.opt, perceptual)
        assert loss.images is not None
        return Output(loss.total, loss.images, loss.ids, loss.parts)

    # Ids

    def embed(self, ids: Tensor) -> Tensor:
        """Return the vectors that the decoder sees: float32 b × tokens × channels, for any number of tokens.

        Args:
            ids: int64 b × tokens × sub-tokens. With a tokenizer of variable rate, the first sub-tokens alone.

        Raises:
            TypeError, ValueError: ids of the wrong kind, shape or range, or a continuous bottleneck.
        """
        ids = self._check_ids(ids, None)
        missing = self.quantizer.sub_tokens - ids.shape[2]
        code = self.quantizer.code_from_ids(F.pad(ids, (0, missing)).to(self.device)).float()
        return self.keep_prefix(code, torch.tensor([ids.shape[2]], device=self.device)) if missing else code

    def from_sequence(
        self, sequence: Tensor, size: tuple[int, int] | None = None, offset: int = 0, distinct: bool = False
    ) -> Codes:
        """Restore codes from the flat ids of ``Codes.to_sequence``. Tiles of a larger image become images of their own.

        Args:
            sequence: int64 b × (tokens · sub-tokens).
            size: height and width of the images, any for a tokenizer of native size; by default the trained size.
            offset, distinct: as given to ``to_sequence``.

        Raises:
            TypeError, ValueError: ids of the wrong kind, number or range.
        """
        height, width = image_size = size or (self.config.data.image_size,) * 2
        if self.native_size:
            cell = self.config.model.patch_size
            height, width = height + -height % cell, width + -width % cell
        self._check_size(height, width)
        tokens = self.tokens(height, width)
        if not isinstance(sequence, Tensor):
            raise TypeError(f"sequence must be an integer tensor, not a {type(sequence).__name__}.")
        if sequence.ndim != 2 or sequence.shape[1] % tokens or not sequence.shape[1]:
            raise ValueError(f"sequence has shape {tuple(sequence.shape)}; give (batch, {tokens} tokens · sub-tokens).")
        first = torch.tensor([offset], device=sequence.device)  # int64: uint8 would wrap around
        ids = sequence.unflatten(1, (tokens, -1)) - first
        if distinct:
            ids = ids - torch.arange(ids.shape[2], device=ids.device) * (self.vocab_size or 0)
        return Codes(self._check_ids(ids, tokens), (height, width), self.vocab_size, image_size=image_size)

    def _check_ids(self, ids: Tensor | None, tokens: int | None) -> Tensor:
        """Return ids as int64, of ``tokens`` tokens or any number, or raise what ``embed`` lists."""
        if self.quantizer.sub_tokens is None or self.quantizer.id_count is None:
            raise TypeError("This tokenizer is continuous and has no ids. Decode the Codes that encode returned.")
        return check_ids(ids, tokens, self.quantizer.sub_tokens, self.quantizer.id_count, self.variable_rate)

    # Batches of images

    def encode(
        self,
        images: Tensor,
        bits_per_pixel: float | None = None,
        *,
        differentiable: bool = False,
        progress: Progress | None = None,
    ) -> Codes:
        """Encode a batch of images.

        Args:
            images: float b × c × h × w in [−1, 1]; h and w are multiples of the patch size. A tokenizer of fixed
                length was trained at one size, ``config.data.image_size``; ``encode_image`` brings any image to it.
            bits_per_pixel: upper bound of the rate, for a tokenizer of variable rate; ``None`` is the full rate.
            differentiable: also return ``Codes.code``, with the straight-through gradient to encoder and images.
            progress: callback with (images done, images in total); for one image of native size, with rows of cells.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a wrong shape, values outside [−1, 1] or not finite, or a rate that the tokenizer does not have.
        """
        self._check_images(images)
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, *images.shape[-2:])
        codes, ids = [], []
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            for chunk in self._chunks(images.to(self.device, torch.float32)):
                with computing(self.precision, self.device):
                    if self.native_size:
                        part = progress if len(images) == 1 else None
                        encoded = blocks.encode(self.encoder, chunk, self.config.model.patch_size, part)
                    else:
                        encoded = self.encoder(chunk).float()
                if differentiable and self.vocab_size is not None:
                    quantized = self.quantizer(encoded)  # straight-through
                    codes.append(quantized.code)
                    ids.append(quantized.ids)
                else:
                    chunk_code, chunk_ids = self.quantizer.quantize(encoded)
                    codes.append(chunk_code)
                    ids.append(chunk_ids)
                if progress and len(images) > 1:
                    progress(min(len(codes) * len(chunk), len(images)), len(images))
            code = torch.cat(codes)[: len(images)]
            if kept is not None:
                code = self.keep_prefix(code, torch.tensor([kept], device=self.device))
        size = (images.shape[-2], images.shape[-1])
        if self.quantizer.id_count is None:
            return Codes(None, size, code=code)
        out = Codes(torch.cat(ids)[: len(images), :, :kept], size, self.quantizer.id_count)
        return replace(out, code=code) if differentiable else out

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
        differentiable: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Decode codes, or bare ids, by solving the flow from seeded noise (section 3.4). Needs no image.

        Args:
            codes: ``Codes``, or int64 ids b × tokens × sub-tokens. With a tokenizer of variable rate, the first
                sub-tokens alone make a coarser image.
            steps: of the solver; ``None`` is the model's own: 1 for nano, 25 for the paper's, which are 31 passes.
            seed: one for all images, or one per image. An image is a function of its ids and its seed alone.
            guidance: classifier-free guidance inside the preset's interval; 1 switches it off. Preset: 1.5.
            rho: shift of the sampler, equation 14. Preset: 4.
            solver: ``euler``, the paper's, ``midpoint``, ``heun`` or ``multistep``, see ``flowmo.model.sampler``.
            size: height and width for bare ids; by default the trained size.
            noise_scale: factor on the start noise; below 1 the noise is likelier (appendix C, figure 9).
            differentiable: keep the gradient through all steps, to the decoder and to ``Codes.code``.
            progress: callback with (images done, images in total).

        Returns:
            float32 b × c × h × w, clipped to [−1, 1].

        Raises:
            TypeError, ValueError: ids of the wrong kind, shape or range; a wrong number of seeds; a negative or
                infinite scale.
            NotFiniteError: guidance or weights so extreme that a sample is not finite.
        """
        if not 0 <= noise_scale < math.inf:
            raise ValueError(f"noise_scale {noise_scale} must be finite and at least 0.")
        code, height, width = self._code_and_size(codes, size)
        # An array or tensor is not a Sequence. Without dimensions it is one seed.
        several = isinstance(seed, Sequence) or getattr(seed, "ndim", False)
        seeds: list[Any] = list(cast(Sequence[int], seed)) if several else [seed] * len(code)
        if len(seeds) != len(code):
            raise ValueError(f"{len(seeds)} seeds for {len(code)} images; give one, or one per image.")
        noise = sampler.seeded_noise(seeds, height, width, noise_scale, self.config.model.channels)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return self._sample(noise, code, self.sampling(steps, guidance, rho, solver), progress)

    def sampling(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        rho: float | None = None,
        solver: str | None = None,
    ) -> sampler.Sampling:
        """The model's own sampling settings, except for those that are given."""
        own = self.config.eval.sampling
        times = sampler.shifted_times(own.sample_steps if steps is None else steps, own.rho if rho is None else rho)
        solver = own.solver if solver is None else solver
        guidance = own.guidance if guidance is None else guidance
        if solver not in sampler.SOLVERS:
            raise ValueError(f"Unknown solver {solver!r}. Use {', '.join(sampler.SOLVERS)}.")
        if self.config.model.mean_velocity and (solver != "euler" or guidance != 1):
            raise ValueError("A distilled tokenizer has guidance built in and makes Euler steps. Leave both unset.")
        return sampler.Sampling(times, solver, guidance, own.guidance_low, own.guidance_high)

    @torch.no_grad()
    def sample(
        self, noise: Tensor, code: Tensor, sampling: sampler.Sampling | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Solve the flow from noise b × c × h × w at t = 1, given quantized code b × tokens × channels."""
        return self._sample(noise, code, sampling or self.sampling(), progress)

    def _sample(self, noise: Tensor, code: Tensor, sampling: sampler.Sampling, progress: Progress | None) -> Tensor:
        times, solver, guidance, low, high = sampling
        out: list[Tensor] = []
        for z, c in zip(self._chunks(noise.to(self.device)), self._chunks(code), strict=True):
            with computing(self.precision, self.device):
                if self.config.model.mean_velocity:
                    x = sampler.follow_mean_velocity(self.decoder, c, z, times)
                else:
                    x = sampler.SOLVERS[solver](sampler.guided_velocity(self.decoder, c, guidance, low, high), z, times)
            out.append(x.float().clamp(-1, 1))
            if progress:
                progress(min(len(out) * len(z), len(noise)), len(noise))
        if not out:
            return noise.to(self.device)
        images = torch.cat(out)[: len(noise)]
        if not torch.isfinite(images).all():
            advice = "The weights may be damaged." if guidance == 1 else "A guidance nearer to 1 may help."
            raise sampler.NotFiniteError(f"The sample is not finite with guidance {guidance:g}. {advice}")
        return images

    def _code_and_size(self, codes: Codes | Tensor, size: tuple[int, int] | None) -> tuple[Tensor, int, int]:
        """The decoder's code, and the size of the images to make."""
        if not isinstance(codes, Codes):
            codes = Codes(codes, size or (self.config.data.image_size,) * 2, self.quantizer.id_count)
        height, width = size or codes.size
        self._check_size(height, width)
        if codes.code is not None:
            expected = (self.tokens(height, width), self.quantizer.channels)
            if codes.code.shape[1:] != expected or codes.id_count != self.vocab_size:
                raise ValueError(
                    f"The code has shape {tuple(codes.code.shape)}; this tokenizer needs (batch, {expected[0]}, "
                    f"{expected[1]}), from an encoder of its own."
                )
            return codes.code.to(self.device, torch.float32), height, width
        return self.embed(self._check_ids(codes.ids, self.tokens(height, width))), height, width

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield rows of ``x`` in batches of one size; the last is padded with zeros."""
        size = self.chunk_size or (1 if self.device.type == "cpu" else 16)
        for chunk in x.split(size) if len(x) else ():
            yield F.pad(chunk, (0, 0) * (chunk.ndim - 1) + (0, size - len(chunk)))

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = f"{images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images must be a floating-point tensor in [−1, 1], not a {kind}. For uint8: x / 127.5 − 1."
            )
        channels = self.config.model.channels
        if images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; give at least one as (batch, {channels}, height, width)."
            )
        self._check_size(images.shape[-2], images.shape[-1], ", or encode_image, which takes any size")
        low, high = images.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError("images hold NaN or infinite values.")
        if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"images run from {low:.4g} to {high:.4g}; scale them to [−1, 1].")

    def _check_size(self, height: int, width: int, advice: str = "") -> None:
        patch = self.config.model.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            near = "×".join(str(max(round(side / patch), 1) * patch) for side in (height, width))
            raise ValueError(
                f"Images of {height}×{width} pixels do not divide into patches of {patch}×{patch}. Use {near}{advice}."
            )

    # Single images of any size

    def encode_image(
        self,
        image: Image.Image | Tensor,
        fit: str = "whole",
        bits_per_pixel: float | None = None,
        *,
        progress: Progress | None = None,
    ) -> Codes:
        """Encode one image of any size.

        Args:
            image: a PIL image, or a tensor c × h × w in [−1, 1], as ``read_tensor`` returns. PIL images become RGB for
                a tokenizer of 8-bit RGB.
            fit: ``whole`` (or ``tile``) keeps the whole image: at its own size if the tokenizer has native size, else
                as overlapping tiles of the trained size. ``crop`` follows the paper's protocol: resize the short side
                to the trained size and take the central square.
            bits_per_pixel, progress: as in ``encode``.

        Raises:
            TypeError: neither a PIL image nor a tensor.
            ValueError: an unknown ``fit``; an image of other channels, without pixels or above ``images.MAX_PIXELS``;
                or a rate that the tokenizer does not have.
        """
        if not isinstance(image, Image.Image) and not (isinstance(image, Tensor) and image.ndim == 3):
            kind = f"tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"encode_image takes a PIL image or a tensor c × h × w, not a {kind}.")
        if fit not in ("whole", "tile", "crop"):
            raise ValueError(f"Unknown fit {fit!r}. Use 'whole' or 'crop'.")
        side = self.config.data.image_size
        image = self.pixels.prepare(image)
        if fit == "crop":
            image = resize_and_crop(image, side)
        pixels = to_tensor(image)
        height, width = pixels.shape[1:]
        if not self.native_size:
            tiling = Tiling(height, width, side)
            return replace(self.encode(tiling.split(pixels), bits_per_pixel, progress=progress), tiling=tiling)
        cell = self.config.model.patch_size
        padded = F.pad(pixels[None], (0, -width % cell, 0, -height % cell), mode="replicate")
        # The rate counts true pixels, not the padding.
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, height, width)
        codes = replace(self.encode(padded, progress=progress), image_size=(height, width))
        return codes if kept is None else codes.coarser(kept)

    def decode_image(
        self, codes: Codes, steps: int | None = None, seed: int = 0, **settings: Unpack[SamplingArguments]
    ) -> Image.Image:
        """Decode the codes of ``encode_image`` to one PIL image; arguments as in ``decode``.

        Raises:
            ImageError: PIL has no such images, for example of four channels; ``decode_tensor`` decodes them.
        """
        return self.pixels.to_pil(self.decode_tensor(codes, steps, seed, **settings))

    def decode_tensor(
        self,
        codes: Codes,
        steps: int | None = None,
        seed: int = 0,
        *,
        guidance: float | None = None,
        rho: float | None = None,
        solver: str | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Decode the codes of ``encode_image`` to one image, float32 c × h × w; arguments as in ``decode``.

        All tiles, or blocks of a large image, are cut from one canvas of noise, so that they agree where they overlap.
        """
        if not isinstance(codes, Codes):
            raise TypeError(
                f"A single image is decoded from Codes, not from a {type(codes).__name__}. Use decode for ids."
            )
        sampling = self.sampling(steps, guidance, rho, solver)
        code, height, width = self._code_and_size(codes, None)
        channels = self.config.model.channels
        if self.native_size:
            if len(code) != 1:
                raise ValueError(f"{len(code)} codes for one image; decode takes batches.")
            noise = sampler.seeded_noise([seed], height, width, channels=channels)
            cell = self.config.model.patch_size
            image = blocks.decode(lambda z, c: self.sample(z, c, sampling).cpu(), noise, code, cell, progress)
            true_height, true_width = codes.output_size
            return image[:, :true_height, :true_width]
        tiling = codes.tiling or Tiling(*codes.size, self.config.data.image_size)
        if len(code) != tiling.count:
            tiles = f"an image of {tiling.count} tiles" if codes.tiling else "one image; decode takes batches"
            raise ValueError(f"{len(code)} codes for {tiles}.")
        noise = tiling.crop(sampler.seeded_noise([seed], *tiling.canvas, channels=channels)[0])
        return tiling.merge(self.sample(noise, code, sampling, progress))


def load(source: str | Path, *overrides: str, device: str | torch.device = "cpu", ema: bool = True) -> FlowMo:
    """Load a tokenizer with trained weights, ready for inference.

    Args:
        source: a bundled preset (``nano``), a ``.safetensors`` file, a folder that holds ``model.safetensors``, a
            training checkpoint (``.pth``, or the folder of a sharded one), a run's folder (``results/NAME``: its best
            checkpoint, or the newest), an authors' checkpoint (``.pth``), or a Hub id ``owner/name``, or
            ``owner/name@revision``, of a repository with ``model.safetensors``.
        overrides: ``section.name=value`` settings to change, for example what an authors' file does not show
            (``model.code_length``) or how to sample (``eval.sampling.sample_steps``).
        device: where the weights go.
        ema: of a training or authors' checkpoint, load the EMA weights rather than the last ones.

    Raises:
        CheckpointError: no such file, or one that cannot be used; the message says why.
        ConfigError: an override that does not work.
    """
    path = files.find(source)
    config, state = files.read(path, overrides, ema)
    return build(config, state, path).to(device)


def build(config: Config, state: Mapping[str, Tensor], name: str | Path = "checkpoint") -> FlowMo:
    """Build a tokenizer from settings and weights, in float32 and evaluation mode.

    Raises:
        CheckpointError: names or shapes of ``state`` do not fit ``config``.
    """
    return files.fill(lambda: FlowMo(config), config.model.dec_depth + config.model.enc_depth, state, name)


def save(tokenizer: FlowMo, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and settings as one ``.safetensors`` file.

    Args:
        dtype: on disk. float16 halves the file, at about 3 decimal digits; int8 quarters it, see ``eight_bit``.

    Raises:
        CheckpointError: ``path`` has another suffix, which ``load`` would take for another kind of file.
    """
    files.write_safetensors(path, tokenizer.config, tokenizer.state_dict(), dtype)
