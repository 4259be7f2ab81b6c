"""Muon (Jordan 2024): momentum SGD whose update of a matrix is orthogonalized.

``torch.optim.Muon`` takes the same steps, but it multiplies in bfloat16 only, which a CPU without bfloat16 products
emulates, and it needs PyTorch 2.9. Here such a device multiplies in float32.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flowmo.precision import multiplies_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by a Newton–Schulz iteration in the dtype of the matrix.

    The coefficients are from Jordan 2024. They bring most singular values between 0.5 and 1.5.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPSILON)  # no singular value exceeds 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices. The rate of a tall matrix is multiplied by √(rows / columns).

    Args:
        params: as for any optimizer of PyTorch.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
        bfloat16: multiply in it where the device can.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        bfloat16: bool = True,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.bfloat16 = bfloat16
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[parameter]["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(buffer, momentum)
                half = self.bfloat16 and multiplies_bfloat16(parameter.device)
                parameter.mul_(1 - lr * group["weight_decay"])
                rows, columns = parameter.shape
                parameter.add_(
                    orthogonalize(update.to(torch.bfloat16 if half else torch.float32)),
                    alpha=-lr * math.sqrt(max(1, rows / columns)),
                )
