"""KID, Inception Score, precision and recall of image sets, from a network's features.

torch-fidelity's KID does not leave out pairs, and its Inception Score depends on the order of files. The rest is equal
to it (tested), and works without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmo.evaluate.metrics.fid import StatisticsError, shuffled

KERNEL_IMAGES = 5000
"""Number of random images that the kernel distance takes of a set."""
SCORE_SPLIT = 5000
NEIGHBOURS = 3
MOST_NEIGHBOURS = 50_000
"""Largest set of which precision and recall use all images."""
ROWS = 2048
"""Rows of a distance matrix in memory at a time."""


def kernel_distance(features: Tensor, features_2: Tensor, paired: bool = False) -> float:
    """Unbiased squared MMD under the kernel (x·y / d + 1)³: the KID (Bińkowski et al. 2018). It can be negative.

    Larger sets are thinned out to ``KERNEL_IMAGES`` random rows.

    Args:
        features, features_2: n × d, and m × d.
        paired: row i of one set reconstructs row i of the other. Such pairs are not independent and are left out.

    Raises:
        StatisticsError: a set has fewer than two rows, or pairs have unequal counts.
    """
    x, y = (shuffled(rows)[:KERNEL_IMAGES].double() for rows in (features, features_2))
    if min(len(x), len(y)) < 2:
        raise StatisticsError(f"A kernel distance needs at least 2 images a set, not {len(x)} and {len(y)}.")
    if paired and len(x) != len(y):
        raise StatisticsError(f"Pairs need equal counts, not {len(x)} and {len(y)}.")

    def mean_kernel(a: Tensor, b: Tensor, off_diagonal: bool) -> Tensor:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        if off_diagonal:
            return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))
        return kernel.sum() / kernel.numel()

    return float(mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, paired))


def inception_score(logits: Tensor, split: int = SCORE_SPLIT) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E[KL(p(class | image) ‖ p(class))] (Salimans et al. 2016).

    Images are shuffled first: a split of images sorted by class holds few classes, and its score cannot exceed their
    number. Splits are as equal as can be, because the score of few images is too low.
    """
    scores = []
    for part in shuffled(logits.double()).tensor_split(max(round(len(logits) / split), 1)):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0, keepdim=True).clamp(min=1e-300).log()
        scores.append((p * (log_p - marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def precision_and_recall(reference: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of each set that lies in the other's manifold (Kynkäänniemi et al. 2019).

    A manifold is the union of balls around its images. A ball's radius is the distance to the k-th nearest neighbour.
    The cost grows with the square of the images, so of a larger set ``MOST_NEIGHBOURS`` drawn ones count: as many as
    the paper's and ADM's sets have.

    Raises:
        StatisticsError: a set has no more than ``neighbours`` images.
    """
    if min(len(reference), len(generated)) <= neighbours:
        raise StatisticsError(f"Precision and recall need more than {neighbours} images a set.")

    def covered(points: Tensor, manifold: Tensor) -> float:
        nearest = [torch.cdist(x, manifold).kthvalue(neighbours + 1, dim=1).values for x in manifold.split(ROWS)]
        radii = torch.cat(nearest)
        inside = [(torch.cdist(x, manifold) <= radii).any(dim=1) for x in points.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    reference, generated = (shuffled(x)[:MOST_NEIGHBOURS].double() for x in (reference, generated))
    return covered(generated, reference), covered(reference, generated)
