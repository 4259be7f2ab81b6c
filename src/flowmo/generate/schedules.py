"""Mask schedules of MaskGIT (Chang et al. 2022): how many ids are masked at each step, and the unmasking order."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def mask_ratio(progress: Tensor, schedule: str) -> Tensor:
    """Fraction of masked ids, falling from 1 at progress 0 to 0 at progress 1.

    ``cosine`` unmasks slowly at first and fast at the end. ``arccos`` starts faster than ``cosine`` and leaves more ids
    for the last steps.
    """
    progress = progress.clamp(0, 1)
    if schedule == "arccos":
        return torch.acos(progress) * (2 / math.pi)
    return torch.cos(progress * (math.pi / 2)) if schedule == "cosine" else 1 - progress


@cache
def expected_masked(ids: int, schedule: str) -> float:
    """Expected number of ids that ``random_mask`` masks: Σ P(count > k) for k = 0 … ids − 1.

    The count exceeds k where the ratio exceeds k / ids: before the progress at which the ratio has this value.
    """
    progress_at: Callable[[float], float] = {
        "arccos": lambda ratio: math.cos(ratio * math.pi / 2),
        "cosine": lambda ratio: math.acos(ratio) * 2 / math.pi,
        "linear": lambda ratio: 1 - ratio,
    }[schedule]
    return math.fsum(progress_at(k / ids) for k in range(ids))


def masked_counts(ids: int, steps: int, schedule: str) -> list[int]:
    """Return the number of masked ids after each step. Each step unmasks at least one until none is left.

    Raises:
        ValueError: fewer than one step or id.
    """
    if steps < 1 or ids < 1:
        raise ValueError(f"{ids} ids cannot be unmasked in {steps} steps. Both must be at least 1.")
    ratios = mask_ratio(torch.arange(1, steps + 1, dtype=torch.float64) / steps, schedule)
    counts, left = [], ids
    for ratio in ratios[:-1].tolist():
        left = max(min(math.floor(ratio * ids), left - 1), 0)  # at least one a step
        counts.append(left)
    return [*counts, 0]


def halton_order(tokens: int, sub_tokens: int) -> Tensor:
    """Return a permutation of the tokens × sub-tokens positions whose every prefix is evenly spread: int64.

    The Halton sequence (Besnier et al. 2025), with base 2 over tokens and base 3 over sub-tokens.
    """
    order: dict[int, None] = {}
    index = 1
    while len(order) < tokens * sub_tokens:
        token, sub_token = int(van_der_corput(index, 2) * tokens), int(van_der_corput(index, 3) * sub_tokens)
        order.setdefault(token * sub_tokens + sub_token)
        index += 1
    return torch.tensor(list(order))


def van_der_corput(index: int, base: int) -> float:
    """Mirror the digits of ``index`` at the radix point: in [0, 1)."""
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        index, digit = divmod(index, base)
        value += digit * scale
    return value


def random_mask(ids: int, generator: torch.Generator, schedule: str) -> Tensor:
    """Draw the mask of a training step: bool, at least one id.

    Progress along the schedule is uniform, and so are the positions.
    """
    ratio = mask_ratio(torch.rand((), generator=generator), schedule)
    count = max(1, math.ceil(float(ratio) * ids))
    mask = torch.zeros(ids, dtype=torch.bool)
    mask[torch.randperm(ids, generator=generator)[:count]] = True
    return mask
