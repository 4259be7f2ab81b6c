"""Steps without a finite loss and gradient change nothing, and no step waits for the host to find out.

Whether a step is finite stays a number on the device. The optimizer reads it there; the host reads the counts with
each line of the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flowmo.distributed import World


class StepCounts:
    """Counts of the steps that were skipped, on the device.

    Args:
        total: skipped steps before a resumed run goes on.
    """

    def __init__(self, world: World, total: int = 0):
        self.world = world
        self.counts = torch.tensor([total, 0, 0], device=world.device)  # in all, in a row, most in a row

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count a step by its loss and gradient norm. Returns 1.0 if both are finite in every rank, else 0.0."""
        skipped = ~(torch.isfinite(loss) & torch.isfinite(norm))
        skipped = skipped.to(torch.int64)
        if self.world.size > 1:
            dist.all_reduce(skipped, op=dist.ReduceOp.MAX)
        total, row, most = self.counts.unbind()
        row = (row + 1) * skipped
        self.counts = torch.stack((total + skipped, row, torch.maximum(most, row)))
        return (1 - skipped).float()

    def read(self) -> tuple[int, int]:
        """Skipped steps in all, and the most in a row. Waits for the device."""
        total, _, most = self.counts.tolist()
        return total, most


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step the optimizer where ``finite`` is 1, else leave parameters and state as they are, without asking the host.

    Fused Adam takes the flag itself; for others (Muon) parameters and state are put back.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale, optimizer.found_inf = None, 1 - finite
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    with restored_unless(finite, [*parameters, *state]):
        optimizer.step()


@contextmanager
def restored_unless(finite: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put tensors back to their values at the start where ``finite`` is 0, without asking the host."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite > 0, tensor, value))
