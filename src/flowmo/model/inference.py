"""Precision and compilation of models in use."""

import os
import shlex
import shutil
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from flowmo.errors import FlowMoError
from flowmo.model.tiling import Progress
from flowmo.model.transformer import rotary_table
from flowmo.precision import resolve


class InferenceModel(nn.Module):
    """Base class of models whose caller chooses device, precision and compilation."""

    compiled = False
    products = "float32"
    chunk_size: int | None = None
    default_chunk_sizes = (1, 16)  # on a CPU, elsewhere

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def precision(self) -> str:
        """``float32`` or ``bfloat16`` as set, or the weights' own type after ``.bfloat16()`` or ``.half()``."""
        stored = str(next(self.parameters()).dtype).removeprefix("torch.")
        return self.products if stored == "float32" else stored

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks made of blocks, by name."""
        return {name: child for name, child in self.named_children() if hasattr(child, "blocks")}

    def chunks(self, count: int, progress: Progress | None = None, most: int | None = None) -> Iterator[list[int]]:
        """Split indices into batches of one size, which repeat the last index: rounding depends on the batch size.

        ``most`` bounds the default size.
        """
        default = self.default_chunk_sizes[self.device.type != "cpu"]
        size = self.chunk_size or min(default, most or default)
        for start in range(0, count, size):
            yield [min(i, count - 1) for i in range(start, start + size)]
            if progress:
                progress(min(start + size, count), count)

    def set_precision(self, precision: str) -> Self:
        """Compute in ``float32`` or ``bfloat16``; ``auto`` chooses by the device. A few bits of ids may differ."""
        self.products = resolve(precision, self.device)
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the networks in place, with options of ``torch.compile``. Each new shape compiles on first use, at
        most eight.

        Raises ``FlowMoError`` if a CPU finds no C++ compiler.
        """
        if self.device.type == "cpu" and shutil.which((shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]) is None:
            raise FlowMoError("Compiling for a CPU takes a C++ compiler. Install g++, or name another in CXX.")
        torch.compiler.assume_constant_result(rotary_table)
        for network in self.networks.values():
            network.compile(dynamic=False, **options)
        self.compiled = True
        return self
