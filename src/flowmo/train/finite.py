"""Skipping of steps whose loss or gradient is not finite, without a host sync.

The flag stays a tensor on the device. The optimizer reads it there; the host reads counters when it logs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flowmo.distributed import World


class StepCounts:
    """Counters of skipped steps, on the device. ``total`` continues a resumed run's count."""

    def __init__(self, world: World, total: int = 0):
        self.world = world
        self.counts = torch.tensor([total, 0, 0], device=world.device)  # total, current row, longest row

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count a step. Return 1.0 if its loss and gradient norm are finite on every rank, else 0.0."""
        skipped = (~(torch.isfinite(loss) & torch.isfinite(norm))).to(torch.int64)
        if self.world.size > 1:
            dist.all_reduce(skipped, op=dist.ReduceOp.MAX)
        total, row, longest = self.counts.unbind()
        row = (row + 1) * skipped
        self.counts = torch.stack((total + skipped, row, torch.maximum(longest, row)))
        return (1 - skipped).float()

    def read(self) -> tuple[int, int]:
        """Return the number of skipped steps and the longest row of them. Waits for the device."""
        total, _, longest = self.counts.tolist()
        return total, longest


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step the optimizer if ``finite`` is 1; otherwise leave parameters and state unchanged."""
    if isinstance(optimizer, torch.optim.AdamW):  # fused Adam takes the flag itself
        optimizer.grad_scale, optimizer.found_inf = None, 1 - finite
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    with restored_unless(finite, [*parameters, *state]):
        optimizer.step()


@contextmanager
def restored_unless(finite: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the tensors at the end of the context if ``finite`` is 0."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite > 0, tensor, value))
