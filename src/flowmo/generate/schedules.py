"""How a MaskGiT hides and reveals ids (Chang et al. 2022): how many are hidden when, and in which order they appear."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hidden_share(progress: Tensor, schedule: str) -> Tensor:
    """Share of ids that are hidden, falling from 1 at progress 0 to 0 at progress 1.

    ``arccos`` and ``cosine`` reveal few ids first, when little is known, and many at the end; ``arccos`` more so.
    """
    if schedule == "arccos":
        return torch.acos(progress.clamp(0, 1)) * (2 / math.pi)
    if schedule == "cosine":
        return torch.cos(progress.clamp(0, 1) * (math.pi / 2))
    return 1 - progress.clamp(0, 1)


MEAN_HIDDEN_SHARE = {"arccos": 2 / math.pi, "cosine": 2 / math.pi, "linear": 0.5}
"""The integral of ``hidden_share`` over progress."""


def hidden_counts(ids: int, steps: int, schedule: str) -> list[int]:
    """How many of ``ids`` are hidden after each of ``steps`` steps: strictly falling while any are, at the end none.

    With more steps than ids, one id a step is revealed and the last steps have nothing to do.

    Raises:
        ValueError: fewer than one step or id.
    """
    if steps < 1 or ids < 1:
        raise ValueError(f"{ids} ids cannot be revealed in {steps} steps; both must be at least 1")
    shares = hidden_share(torch.arange(1, steps + 1, dtype=torch.float64) / steps, schedule)
    counts, left = [], ids
    for step, share in enumerate(shares.tolist(), start=1):
        steps_left = steps - step
        # At least one now, and not so many that a later step finds none.
        left = max(min(math.floor(share * ids), left - 1), 0) if steps_left else 0
        counts.append(left)
    return counts


def halton_order(tokens: int, sub_tokens: int) -> Tensor:
    """A permutation of the tokens × sub-tokens places in which any first part is spread evenly: int64 ids.

    The Halton sequence (Besnier et al. 2025) over tokens, in base 2, and sub-tokens, in base 3.
    """
    order: list[int] = []
    seen = set()
    index = 1
    while len(order) < tokens * sub_tokens:
        token, sub_token = int(van_der_corput(index, 2) * tokens), int(van_der_corput(index, 3) * sub_tokens)
        place = token * sub_tokens + sub_token
        if place not in seen:
            seen.add(place)
            order.append(place)
        index += 1
    return torch.tensor(order)


def van_der_corput(index: int, base: int) -> float:
    """The digits of ``index`` mirrored at the point: in [0, 1)."""
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        index, digit = divmod(index, base)
        value += digit * scale
    return value


def hide(ids: int, generator: torch.Generator, schedule: str) -> Tensor:
    """Which of a picture's ids a training step hides: bool, at least one.

    The share is that of a uniformly drawn progress, the places are drawn without preference.
    """
    share = hidden_share(torch.rand((), generator=generator), schedule)
    count = max(1, math.ceil(float(share) * ids))
    hidden = torch.zeros(ids, dtype=torch.bool)
    hidden[torch.randperm(ids, generator=generator)[:count]] = True
    return hidden
