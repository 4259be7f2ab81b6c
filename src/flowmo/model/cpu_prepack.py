"""Networks made ready for inference on a CPU: weights laid out once as oneDNN's matrix products want them.

A plain ``nn.Linear`` hands its weights to a general matrix product, which lays them out anew in every pass. Here that
is done once, and the GELU behind a layer is computed while its output is still in the cache. The operators are those
that PyTorch's own compiler emits for CPUs.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowmo.errors import FlowMoError
from flowmo.model.transformer import GELU, Shape
from flowmo.precision import resolve


class PackedError(FlowMoError, RuntimeError):
    """What cannot be packed, or cannot be done to packed weights."""


FIXED = "a packed network keeps its weights; load others before packing"


def available() -> bool:
    """Whether this PyTorch has oneDNN and its packed linear layers."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def check_move(function: Callable[[Tensor], Tensor]) -> None:
    """Refuse what ``nn.Module.to`` and its like would do to packed weights."""
    moved = function(torch.empty(0))
    if moved.device.type != "cpu" or moved.dtype != torch.float32:
        raise PackedError("a packed network stays on the CPU in float32; move it before packing")


class PackedLinear(nn.Module):
    """A float32 linear layer on a CPU, without gradients, for weights that no longer change.

    Its state dict is that of the layer it replaces, to the bit.

    Args:
        linear: the layer to take weights from.
        gelu: apply GELU (tanh form) to the output.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.gelu = linear.in_features, linear.out_features, gelu
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Out × in, a copy in the usual layout."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise PackedError("a packed network is for inference; call it under torch.no_grad()")
        activation, form = ("gelu", "tanh") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x.float(), self.packed, self.bias, activation, [], form)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self.gelu}"

    # A packed tensor has no storage of its own that PyTorch could save, copy or move.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *_: Any) -> None:
        raise PackedError(FIXED)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        check_move(function)
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "packed": torch.ops.mkldnn._reorder_linear_weight(state["packed"])})


class Packable(nn.Module):
    """What has networks to make ready for inference: a tokenizer or a generator."""

    packed = False
    compiled = False
    precision = "float32"

    def set_precision(self, precision: str) -> Self:
        """Compute in ``float32`` or ``bfloat16``, see ``flowmo.precision``; ``auto`` chooses by the device.

        Ids of the two precisions differ in a few bits.

        Raises:
            PackedError: packed weights are float32.
            ValueError: an unknown name.
        """
        resolved = resolve(precision, self.device)
        if self.packed and resolved != "float32":
            raise PackedError("packed weights are float32; leave out --pack or --precision bfloat16")
        self.precision = resolved
        return self

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those made of blocks, by name."""
        raise NotImplementedError

    def pack(self) -> Self:
        """Lay the weights out for this CPU's matrix products, in place: the same mathematics sooner, in float32.

        Results can differ in their last bits from those before. The weights cannot be trained, changed or moved any
        more; they can be saved.

        Raises:
            PackedError: not in float32 on a CPU, or this PyTorch cannot.
        """
        if self.compiled:
            raise PackedError("pack before compiling, not after")
        for network in self.networks.values():
            check(network)
        for network in self.networks.values():
            pack(network)
        self.packed = True
        return self

    def compile(self, **options: Any) -> Self:
        """``torch.compile`` the networks, in place; it happens on their first use, for each of up to eight shapes.

        A packed one is compiled with its weights as constants.

        Args:
            options: of ``torch.compile``.

        Raises:
            PackedError: on a CPU, for which no C++ compiler is found.
        """
        if self.device.type == "cpu" and shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is None:
            raise PackedError("compiling for a CPU takes a C++ compiler: install g++, or name another in CXX")
        torch.compiler.assume_constant_result(Shape.rotary_table)  # it need not look inside
        for network in self.networks.values():
            compile_constant(network, **options) if self.packed else network.compile(dynamic=False, **options)
        self.compiled = True
        return self

    # Refused as a whole, before a part is changed

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        if self.packed:
            raise PackedError(FIXED)
        return super().load_state_dict(*arguments, **options)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.packed:
            check_move(function)
        return super()._apply(function, recurse)


def check(network: nn.Module) -> None:
    """Whether a network can be packed.

    Raises:
        PackedError: this PyTorch cannot, or the network is elsewhere or in another precision.
    """
    if not available():
        raise PackedError("this PyTorch was built without oneDNN's packed linear layers")
    wrong = next((p for p in network.parameters() if p.device.type != "cpu" or p.dtype != torch.float32), None)
    if wrong is not None:
        raise PackedError(f"packing is for float32 on a CPU, not {wrong.dtype} on {wrong.device}")


def pack(network: nn.Module) -> None:
    """Replace every linear layer of a network that passes ``check`` by a packed one, in place.

    A layer ``mlp_in`` beside a ``gelu`` takes it over.
    """
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                fused = name == "mlp_in" and isinstance(getattr(module, "gelu", None), GELU)
                setattr(module, name, PackedLinear(layer, fused))
                if fused:
                    module.gelu = nn.Identity()


def compile_constant(network: nn.Module, **options: Any) -> None:
    """``torch.compile`` a network whose weights, packed ones too, are constants, in place."""
    from torch._inductor import config  # takes a second to import

    compiled = torch.compile(network.forward, dynamic=False, **options)

    def forward(*arguments: Any) -> Any:
        # Read while the first call is traced, which the options of torch.compile come too late for.
        with config.patch(freezing=True):
            return compiled(*arguments)

    network.forward = forward
