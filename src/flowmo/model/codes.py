"""``Codes``: ids of images, with the sizes that decoding needs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmo.model.tiling import Tiling


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
        index = rows if isinstance(rows, slice | list) or getattr(rows, "ndim", False) else [operator.index(rows)]
        return replace(self._map(lambda x: x[index]), tiling=None)

    def __iter__(self) -> Iterator[Codes]:
        """Yield each row as a batch of one."""
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """True if ids, code and sizes are equal, wherever the tensors are."""
        if not isinstance(other, Codes):
            return NotImplemented
        pairs = ((self.ids, other.ids), (self.code, other.code))
        return (self._kind, self.tiling) == (other._kind, other.tiling) and all(
            torch.equal(a.cpu(), b.cpu()) for a, b in pairs if a is not None and b is not None
        )

    def __repr__(self) -> str:
        height, width = self.output_size
        count, tiles = (1, f" in {len(self)} tile{'s' * (len(self) != 1)}") if self.tiling else (len(self), "")
        images = f"{count} image{'s' * (count != 1)} of {height} × {width} pixels{tiles}"
        values, unit = self._values, "channels" if self.ids is None else f"ids below {self.id_count}"
        return f"Codes({images}, {values.shape[1]} tokens × {values.shape[2]} {unit} each, {values.device})"

    def to(self, device: str | torch.device) -> Codes:
        """Move all tensors to a device."""
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        ids, code = (None if x is None else function(x) for x in (self.ids, self.code))
        return replace(self, ids=ids, code=code)

    @classmethod
    def cat(cls, codes: Sequence[Codes]) -> Codes:
        """Join batches of codes of images of one size. Raises ``ValueError`` for none, or for other sizes or kinds."""
        codes = list(codes)
        if len({c._kind for c in codes}) != 1 or any(c.tiling for c in codes):
            raise ValueError(
                "Codes.cat joins one or more batches of one size and one kind of ids, not tiles of an image."
            )
        ids, code = (None if x[0] is None else torch.cat(x) for x in ([c.ids for c in codes], [c.code for c in codes]))
        return replace(codes[0], ids=ids, code=code)

    def to_sequence(self, offset: int = 0, distinct: bool = False) -> Tensor:
        """Flatten the ids for a language model, token after token: int64 b × (tokens · sub-tokens).

        Args:
            offset: at least 0, added to every id, to leave room for other words of a vocabulary.
            distinct: give each sub-token its own ids, for a vocabulary of sub-tokens · ``id_count`` ids.

        Raises:
            TypeError: a continuous code, or an offset that is not an integer.
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
    def _kind(self) -> tuple:
        """Equal for codes that can be one batch."""
        return self.size, self.output_size, self.id_count, self._values.shape[1:], self.ids is None, self.code is None

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
        """Height and width of the decoded image: one image for all rows if they are its tiles, else one per row."""
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
        if self.ids is None or self.code is not None:
            raise TypeError("Continuous or differentiable codes keep all channels. Give encode bits_per_pixel instead.")
        if not 1 <= sub_tokens <= self.ids.shape[2]:
            raise ValueError(f"{sub_tokens} sub-tokens of {self.ids.shape[2]}; keep at least 1, at most all.")
        return replace(self, ids=self.ids[:, :, :sub_tokens])
