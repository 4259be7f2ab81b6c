"""Networks and bottleneck as one module, with its ids and rates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.config import Config
from flowmo.errors import FlowMoError
from flowmo.model.inference import InferenceModel
from flowmo.model.quantizers import build_quantizer
from flowmo.model.transformer import Decoder, Encoder
from flowmo.model.windowed import WindowedDecoder, WindowedEncoder

RANGE_TOLERANCE = 1e-4


class RateError(FlowMoError, ValueError):
    """A rate that a tokenizer does not have; the message lists its rates."""


class Autoencoder(InferenceModel):
    """Encoder, bottleneck and rectified-flow decoder, built from a ``Config`` with random weights."""

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        model = self.config.model
        self.quantizer = build_quantizer(model)
        encoder, decoder = (WindowedEncoder, WindowedDecoder) if self.native_size else (Encoder, Decoder)
        self.encoder = encoder(model, self.quantizer.encoder_channels)
        self.decoder = decoder(model, model.context_dim)

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
    def variable_rate(self) -> bool:
        """True if a prefix of each token's sub-tokens decodes to a coarser image."""
        return self.config.model.nested_dropout > 0

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width rounded up to whole patches."""
        patch = self.config.model.patch_size
        return height + -height % patch, width + -width % patch

    def tokens(self, height: int, width: int) -> int:
        """Code tokens of an image of ``height`` × ``width`` pixels."""
        if not self.native_size:
            return self.code_length
        height, width = self.padded_size(height, width)
        return height * width // self.config.model.patch_size**2

    def rates(self, height: int, width: int) -> tuple[float, ...]:
        """Possible bits per pixel of images of this true size in one code, ascending; empty for a continuous model.

        They are values of ``Codes.bits_per_pixel``: an id takes whole bits. A large image may have a
        code for each of its tiles, which overlap: then give the size of a tile.
        """
        id_count, sub_tokens = self.quantizer.id_count, self.quantizer.sub_tokens
        if id_count is None or sub_tokens is None:
            return ()
        bits, fewest = self.tokens(height, width) * (id_count - 1).bit_length(), 1 if self.variable_rate else sub_tokens
        return tuple(bits * count / (height * width) for count in range(fewest, sub_tokens + 1))

    def sub_tokens_at(self, bits_per_pixel: float, height: int, width: int) -> int:
        """Return the largest number of sub-tokens per token within ``bits_per_pixel`` for an image of this true size.

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

    def embed(self, ids: Tensor) -> Tensor:
        """Return the vectors that the decoder sees: float32 b × tokens × channels, for any number of tokens.

        Args:
            ids: int64 b × tokens × sub-tokens. With a tokenizer of variable rate, the first sub-tokens alone.

        Raises:
            TypeError, ValueError: ids of the wrong kind, shape or range, or a continuous bottleneck.
        """
        ids = self.check_ids(ids)
        missing = (self.quantizer.sub_tokens or 0) - ids.shape[2]
        code = self.quantizer.code_from_ids(F.pad(ids, (0, missing)).to(self.device)).float()
        return self.quantizer.keep_prefix(code, ids.shape[2]) if missing else code

    def check_ids(self, ids: Tensor | None, tokens: int | None = None, advice: str = "") -> Tensor:
        """Return ids as int64, of ``tokens`` tokens or of any number. Raises as ``embed``.

        ``advice`` ends the message about a wrong shape.
        """
        sub_tokens, id_count = self.quantizer.sub_tokens, self.quantizer.id_count
        if sub_tokens is None or id_count is None:
            raise TypeError("This tokenizer is continuous and has no ids. Decode the Codes that encode returned.")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be an integer tensor, not {getattr(ids, 'dtype', type(ids).__name__)}.")
        allowed = range(1 if self.variable_rate else sub_tokens, sub_tokens + 1)
        if ids.ndim != 3 or (tokens is not None and ids.shape[1] != tokens) or ids.shape[2] not in allowed:
            needed = f"{tokens or 'tokens'}, {'1 to ' * self.variable_rate}{sub_tokens}"
            raise ValueError(f"ids have shape {tuple(ids.shape)}; this tokenizer needs (batch, {needed}){advice}.")
        ids = ids.long()  # torch orders no unsigned numbers above 8 bits
        if ids.numel() and (ids.min() < 0 or ids.max() >= id_count):
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}; this tokenizer's run from 0 to {id_count - 1}.")
        return ids

    def check_images(self, images: Tensor) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless images are float b × c × h × w in [−1, 1], of whole patches."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"images must be a floating-point tensor in [−1, 1], not {kind}. For uint8: x / 127.5 − 1.")
        shape, channels = tuple(images.shape), self.config.model.channels
        if len(shape) != 4 or shape[1] != channels or shape[0] == 0:
            raise ValueError(f"images have shape {shape}; give at least one as (batch, {channels}, height, width).")
        self.check_size(shape[2], shape[3])
        low, high = images.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError("images hold NaN or infinite values.")
        if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"images run from {low:.4g} to {high:.4g}; scale them to [−1, 1].")

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError`` unless images of this size divide into patches."""
        patch = self.config.model.patch_size
        if min(height, width) < patch or height % patch or width % patch:
            raise ValueError(
                f"Images of {height}×{width} pixels do not divide into patches of {patch}×{patch}. encode_image takes "
                "any size."
            )
