"""Kernel distance (KID, Bińkowski et al. 2018): the unbiased companion of the Fréchet distance for few pictures."""

from __future__ import annotations

from torch import Tensor

from flowmo.evaluate.metrics.frechet import StatisticsError


def kernel_distance(features: Tensor, features_2: Tensor, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x·y / d + 1)³; can be a little below zero.

    Args:
        features: n × d.
        features_2: m × d.
        paired: row i of both comes from one picture, as with reconstructions; such pairs are left out of the mean over
            both sets, which would otherwise not be one of independent pictures.

    Raises:
        StatisticsError: fewer than two rows in a set, or pairs of unequal counts.
    """
    x, y = features.double(), features_2.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise StatisticsError(f"a kernel distance needs at least 2 pictures a set, not {n} and {m}")
    if paired and n != m:
        raise StatisticsError(f"pairs need equal counts, not {n} and {m}")

    def kernel_sum(a: Tensor, b: Tensor, diagonal: bool) -> Tensor:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        return kernel.sum() - (0 if diagonal else kernel.diagonal().sum())

    within = kernel_sum(x, x, False) / (n * (n - 1)) + kernel_sum(y, y, False) / (m * (m - 1))
    between = kernel_sum(x, y, False) / (n * (n - 1)) if paired else kernel_sum(x, y, True) / (n * m)
    return float(within - 2 * between)
