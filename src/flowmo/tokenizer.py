"""``FlowMo``: images to ``Codes`` and back. What users import.

Notable: inference runs the networks on batches of one fixed size, ``chunk_size``, because the rounding of a matrix
product depends on its shape. So an image has the same ids and the same sample alone and in any batch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowmo.checkpoint import files, hub
from flowmo.config import Config
from flowmo.images import ImageError, resize_and_crop, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import Distance, Loss, pretrain_loss
from flowmo.model import sampler
from flowmo.model.autoencoder import Autoencoder
from flowmo.model.codes import Codes
from flowmo.model.tiling import MAX_OVERHANG, SMALL, Progress, Tiling, decode_blocks, encode_blocks
from flowmo.precision import computing


def identity_of(metadata: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hash JSON metadata and weights to 16 hex digits."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=8)
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy())
    return digest.hexdigest()


class FlowMo(Autoencoder):
    """The tokenizer: encoder, bottleneck and rectified-flow decoder, built from a ``Config``.

    Fresh weights are random; ``flowmo.load`` reads trained ones. The caller chooses device, precision and
    compilation: ``.to(device)``, ``.set_precision()``, ``.compile()``.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, *overrides: str, device: str | torch.device = "cpu") -> FlowMo:
        """Call ``flowmo.load``."""
        return load(source, *overrides, device=device)

    def save_pretrained(
        self,
        folder: str | Path,
        name: str | None = None,
        context: bytes | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``model.safetensors`` and a model card into a folder, which ``from_pretrained`` reads.

        A ``README.md`` that names these weights is kept, perhaps edited, unless there is an ``evaluation``.

        Args:
            name: ``owner/name`` of the repository. A card that does not name it is replaced.
            context: content of a context model's file, which goes beside the weights.
            evaluation: output of ``flowmo evaluate --json``, for the card.

        Raises:
            CheckpointError: the evaluation holds no metric. Nothing is written.
        """
        path, card = Path(folder) / hub.CARD_FILE, hub.card(self, name or "owner/name", evaluation)
        keep = evaluation is None and path.exists() and hub.is_card_of(path, self, name or "")
        save(self, Path(folder) / hub.MODEL_FILE)
        if not keep:
            files.write_content(path, card)
        if context is not None:
            files.write_content(Path(folder) / hub.CONTEXT_FILE, context)

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Upload to the Hugging Face Hub as ``owner/name``. Returns the address. ``flowmo push`` adds a context model.

        Raises ``CheckpointError`` if the Hub refuses, or huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name)
            return hub.push(Path(folder), name, private)

    @property
    def pixels(self) -> PixelFormat:
        """Channels and values of the images."""
        return PixelFormat.of(self.config)

    def identity(self) -> str:
        """Return the name of the ids, 16 hex digits. Tokenizers with equal identities decode each other's codes.

        The identity of the base tokenizer (``model.base``) if the encoder is unchanged, else of these weights.
        """
        base, _, encoder = self.config.model.base.partition("-")
        return base if base and encoder == self.weights_identity(ids_only=True) else self.weights_identity()

    def weights_identity(self, ids_only: bool = False) -> str:
        """16 hex digits that name architecture and weights. ``ids_only`` leaves out the decoder's weights."""
        default = Config().architecture()
        # Only departures from the default count, so that a new setting does not change old identities.
        changed = {name: value for name, value in self.config.architecture().items() if value != default[name]}
        if changed.get("prediction") == "image":
            changed["prediction"] = "picture"  # the former value, which older files' identities contain
        if ids_only:  # a student of stage 1C has its teacher's ids
            changed.pop("mean_velocity", None)
        weights = self.state_dict()
        if ids_only:  # an average of equal weights turns -0.0 into 0.0
            weights = {name: w + 0.0 for name, w in weights.items() if not name.startswith("decoder.")}
        return identity_of(changed, weights)

    def as_base(self) -> str:
        """Value of ``model.base`` for models that are fine-tuned from this one."""
        return f"{self.identity()}-{self.weights_identity(ids_only=True)}"

    # Training

    def forward(self, images: Tensor, perceptual: Distance | None = None, seed: int | None = None) -> Loss:
        """Compute the loss of stage 1A (equation 9): flow, perceptual and bottleneck terms, with the settings' weights.

        ``flowmo train`` has the other stages, EMA, schedules and exact resume. A ``vq`` bottleneck also needs
        ``tok.quantizer.learn(step)`` after each step.

        Args:
            images: as in ``encode``, which raises the same errors.
            perceptual: distance of two batches, such as ``flowmo.losses.perceptual.LPIPS("vgg")``; ``None`` omits it.
            seed: of timesteps and noise; ``None`` draws one from PyTorch's global generator, which the noise of a KL,
                LayerNorm or infill bottleneck always uses.
        """
        self.check_images(images)
        images = images.to(self.device, torch.float32)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        draw = torch.compiler.disable(TrainingNoise.of)  # torch.compile cannot trace generators
        noise = draw(self.config, images, range(len(images)), seed)
        with computing(self.precision, self.device):
            return pretrain_loss(self, images, noise, self.config.opt, perceptual)

    # Ids

    def from_sequence(
        self, sequence: Tensor, size: tuple[int, int] | None = None, offset: int = 0, distinct: bool = False
    ) -> Codes:
        """Restore codes from the flat ids of ``Codes.to_sequence``. Tiles of a larger image become images of their own.

        Args:
            sequence: whole numbers b × (tokens · sub-tokens).
            size: height and width of the images, any for a tokenizer of native size; by default the trained size.
            offset, distinct: as given to ``to_sequence``.

        Raises:
            TypeError, ValueError: ids of the wrong kind, number or range.
        """
        image_size = size or (self.config.data.image_size,) * 2
        height, width = self.padded_size(*image_size) if self.native_size else image_size
        self.check_size(height, width)
        tokens = self.tokens(height, width)
        sequence = torch.as_tensor(sequence)
        if sequence.ndim != 2 or sequence.shape[1] % tokens or not sequence.shape[1]:
            raise ValueError(f"sequence has shape {tuple(sequence.shape)}; give (batch, {tokens} tokens · sub-tokens).")
        if sequence.dtype == torch.bool:
            raise TypeError("sequence must hold whole numbers, not torch.bool.")
        ids, step = sequence.unflatten(1, (tokens, -1)), (self.vocab_size or 0) if distinct else 0
        ids = ids - (offset + step * torch.arange(ids.shape[2], device=ids.device))  # int64, where uint8 would wrap
        return Codes(self.check_ids(ids, tokens), (height, width), self.vocab_size, image_size=image_size)

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
            progress: callback with (images done, images in total); for one image of native size, with rows of blocks.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a wrong shape, values outside [−1, 1] or not finite, or a rate that the tokenizer does not have.
        """
        self.check_images(images)
        count, size = len(images), (images.shape[-2], images.shape[-1])
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, *size)
        by_image, by_block = (None, progress) if count == 1 and self.native_size else (progress, None)
        parts: list[Any] = []
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            for rows in self.chunks(count, by_image, self._largest_chunk(*size)):
                chunk = images[rows].to(self.device, torch.float32)
                with computing(self.precision, self.device):
                    if self.native_size:
                        encoded = encode_blocks(self.encoder, chunk, self.config.model.patch_size, by_block)
                    else:
                        encoded = self.encoder(chunk).float()
                parts.append(self.quantizer.quantize(encoded))
            code = torch.cat([code for code, _ in parts])[:count]
            if kept is not None:
                code = self.quantizer.keep_prefix(code, kept)
        if self.vocab_size is None:
            return Codes(None, size, code=code)
        ids = torch.cat([ids for _, ids in parts])[:count, :, :kept]
        return Codes(ids, size, self.vocab_size, code=code if differentiable else None)

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
            steps: of the solver; ``None`` is the model's setting (bundled ones 1; the paper's 25, which are 31 passes).
            seed: one for all images, or one per image. An image is a function of its ids and its seed alone.
            guidance: classifier-free guidance inside the model's interval; 1 switches it off. The paper's: 1.5.
            rho: shift of the sampler, equation 14. The paper's: 4.
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
        code, height, width = self._code_and_size(codes, size)
        seeds: Any = seed if np.ndim(seed) else [seed] * len(code)
        if len(seeds) != len(code):
            raise ValueError(f"{len(seeds)} seeds for {len(code)} images; give one, or one per image.")
        noise = sampler.seeded_noise(seeds, height, width, noise_scale, self.config.model.channels)
        settings = {"sample_steps": steps, "guidance": guidance, "rho": rho, "solver": solver}
        return self.sample(noise, code, progress, differentiable, **settings)

    def sample(
        self,
        noise: Tensor,
        code: Tensor,
        progress: Progress | None = None,
        differentiable: bool = False,
        **settings: Any,
    ) -> Tensor:
        """Solve the flow from noise b × c × h × w at t = 1, given quantized code b × tokens × channels.

        ``settings`` replace those of ``eval.sampling``, unless they are ``None``.
        """
        changed = {f"eval.sampling.{name}": value for name, value in settings.items() if value is not None}
        s = self.config.updated(changed).eval.sampling
        times = sampler.shifted_times(s.sample_steps, s.rho)
        out = [noise[:0].to(self.device)]
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            for rows in self.chunks(len(noise), progress, self._largest_chunk(*noise.shape[-2:])):
                z, c = noise[rows].to(self.device), code[rows]
                with computing(self.precision, self.device):
                    if self.config.model.mean_velocity:
                        x = sampler.follow_mean_velocity(self.decoder, c, z, times)
                    else:
                        velocity = sampler.guided_velocity(self.decoder, c, s.guidance, s.guidance_low, s.guidance_high)
                        x = sampler.SOLVERS[s.solver](velocity, z, times)
                out.append(x.float())
        images = torch.cat(out)[: len(noise)]
        if not torch.isfinite(images).all():  # before the clamp, which would make an infinite value a valid one
            guided = any(sampler.is_guided(t, s.guidance, s.guidance_low, s.guidance_high) for t in times[:-1])
            cause = f"guidance {s.guidance:g}" if guided and not self.config.model.mean_velocity else "this noise"
            raise sampler.NotFiniteError(
                f"The sample is not finite with {cause}. Take a guidance nearer to 1 and a noise_scale of at most 1. "
                "If they are, the weights may be damaged."
            )
        return images.clamp(-1, 1)

    def _largest_chunk(self, height: int, width: int) -> int:
        """Number of images of this size that have the pixels of the largest batch of trained size; at least 1.

        A lone large image would otherwise be computed as often as a batch has images.
        """
        return max(max(self.default_chunk_sizes) * self.config.data.image_size**2 // (height * width), 1)

    def _code_and_size(self, codes: Codes | Tensor, size: tuple[int, int] | None) -> tuple[Tensor, int, int]:
        """Return the decoder's code, and the size of the images to make."""
        if not isinstance(codes, Codes):
            codes = Codes(codes, size or (self.config.data.image_size,) * 2)
        height, width = size or codes.size
        self.check_size(height, width)
        tokens = self.tokens(height, width)
        if codes.code is None:
            advice = f" for {height}×{width} pixels. size=(height, width) sets another size" if self.native_size else ""
            return self.embed(self.check_ids(codes.ids, tokens, advice)), height, width
        shape, needed = tuple(codes.code.shape[1:]), (tokens, self.quantizer.channels)
        if shape != needed or codes.id_count != self.vocab_size:
            raise ValueError(
                f"The code is of shape {shape}; this tokenizer needs {needed}, from an encoder of its own."
            )
        return codes.code.to(self.device, torch.float32), height, width

    # Single images of any size

    def encode_image(
        self,
        image: Image.Image | Tensor,
        bits_per_pixel: float | None = None,
        *,
        fit: str = "whole",
        progress: Progress | None = None,
    ) -> Codes:
        """Encode one image of any size.

        Args:
            image: a PIL image, or a tensor c × h × w in [−1, 1], as ``read_tensor`` returns. PIL images become RGB for
                a tokenizer of 8-bit RGB.
            bits_per_pixel, progress: as in ``encode``.
            fit: ``whole`` (or ``tile``) keeps the whole image: at its own size if the tokenizer has native size, else
                as overlapping tiles of the trained size. ``crop`` follows the release's protocol: resize the short side
                to the trained size and take the central square.

        Raises:
            TypeError: neither a PIL image nor a tensor.
            ValueError: an unknown ``fit``; an image of other channels, without pixels, above ``images.MAX_PIXELS`` or
                too thin for its tiles or cells; or a rate that the tokenizer does not have.
        """
        if not isinstance(image, Image.Image) and not (isinstance(image, Tensor) and image.ndim == 3):
            raise TypeError(f"encode_image takes a PIL image or one tensor c × h × w, not a {type(image).__name__}.")
        if fit not in ("whole", "tile", "crop"):
            raise ValueError(f"Unknown fit {fit!r}. Use 'whole' or 'crop'.")
        side, image = self.config.data.image_size, self.pixels.prepare(image)
        pixels = to_tensor(resize_and_crop(image, side) if fit == "crop" else image)
        height, width = pixels.shape[1:]
        tiling = Tiling(height, width, side)
        rows, columns = self.padded_size(height, width) if self.native_size else (side * tiling.count, side)
        if rows * columns > max(MAX_OVERHANG * height * width, SMALL):
            raise ImageError(f"image: {width}×{height} is too thin. Its tiles would have {rows * columns:,} pixels.")
        if not self.native_size:
            return replace(self.encode(tiling.split(pixels), bits_per_pixel, progress=progress), tiling=tiling)
        padded = F.pad(pixels[None], (0, columns - width, 0, rows - height), mode="replicate")
        # The rate counts true pixels, not the padding.
        kept = None if bits_per_pixel is None else self.sub_tokens_at(bits_per_pixel, height, width)
        codes = replace(self.encode(padded, progress=progress), image_size=(height, width))
        return codes if kept is None else codes.coarser(kept)

    def decode_image(self, codes: Codes, steps: int | None = None, seed: int = 0, **settings: Any) -> Image.Image:
        """Decode the codes of ``encode_image`` to one PIL image; arguments as in ``decode_tensor``.

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
        noise_scale: float = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Decode the codes of ``encode_image`` to one image, float32 c × h × w on the CPU; arguments as in ``decode``.

        All tiles, or blocks of a large image, are cut from one canvas of noise, so that they agree where they overlap.
        """
        if not isinstance(codes, Codes):
            raise TypeError(f"One image is decoded from Codes, not from a {type(codes).__name__}. Use decode for ids.")
        code, height, width = self._code_and_size(codes, None)
        tiling = None if self.native_size else codes.tiling
        tiles, canvas = (tiling.count, tiling.canvas) if tiling else (1, (height, width))
        if len(code) != tiles:
            raise ValueError(f"{len(code)} codes for one image, which has {tiles}; decode takes batches.")
        noise = sampler.seeded_noise([seed], *canvas, noise_scale, self.config.model.channels)
        settings: Any = {"sample_steps": steps, "guidance": guidance, "rho": rho, "solver": solver}
        if tiling:
            return tiling.merge(self.sample(tiling.crop(noise[0]), code, progress, **settings).cpu())
        if not self.native_size:
            return self.sample(noise, code, progress, **settings)[0].cpu()
        cell = self.config.model.patch_size
        image = decode_blocks(lambda z, c: self.sample(z, c, **settings).cpu(), noise, code, cell, progress)
        height, width = codes.output_size
        return image[:, :height, :width]


def load(source: str | Path, *overrides: str, device: str | torch.device = "cpu", ema: bool = True) -> FlowMo:
    """Load a tokenizer with trained weights, ready for inference.

    Args:
        source: a bundled preset (``nano`` or ``native``; ``./nano`` is a run's folder), a ``.safetensors`` file, a
            folder that holds ``model.safetensors``, a training checkpoint (``.pth``, or the folder of a sharded one), a
            run's folder (``results/NAME``: its best checkpoint, or the newest), an authors' checkpoint (``.pth``), or a
            Hub id ``owner/name``, or ``owner/name@revision``, of a repository with ``model.safetensors``.
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

    Raises ``CheckpointError`` if names or shapes of ``state`` do not fit ``config``. ``name`` is for its message.
    """
    return files.instantiate(lambda: FlowMo(config), config.model.dec_depth + config.model.enc_depth, state, name)


def save(tokenizer: FlowMo, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and settings as one ``.safetensors`` file.

    Args:
        dtype: on disk. float16 halves the file, at about 3 decimal digits; int8 quarters it, see ``eight_bit``.

    Raises:
        CheckpointError: ``path`` has another suffix, which ``load`` would take for another kind of file; or ``dtype``
            is of other whole numbers.
    """
    files.write_safetensors(path, tokenizer.config, tokenizer.state_dict(), dtype)
