"""Group-relative advantages (DeepIntuit, arXiv 2603.10300; GRPO, arXiv 2402.03300).

Shape letters: B prompts, G completions per prompt.

Deviations from the paper's formula:
    1. A group whose rewards are all equal gets exactly 0. In float32 eight rewards of 1.2 have a mean that is off by
       one rounding step and a standard deviation of the same size, so that the formula gives 0.1 instead of 0.
    2. A completion that could not be scored (NaN) takes no part in mean and deviation, and gets exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_relative_advantages(
    rewards: Tensor, *, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-6
) -> Tensor:
    """Returns the advantage of each completion over the other completions of its group.

    ``A = (R - mean of the group) / (std + eps)``, computed in float64, with standard deviations of ddof 1.

    Args:
        rewards: [B, G]; NaN where a completion could not be scored.
        scale: The standard deviation that divides: ``group`` is that of the completion's group, ``batch`` that of all
            B x G rewards, ``none`` does not divide (Dr. GRPO, arXiv 2503.20783).
        eps: Added to the standard deviation.

    Returns:
        [B, G] in the dtype of the rewards (float32 for integers); exactly 0 in dead groups and where the reward is NaN.

    Raises:
        ValueError: If the rewards are not [B, G], one is infinite, or the scale is unknown.
    """
    dead = dead_groups(rewards)
    if bool(torch.isinf(rewards).any()):
        raise ValueError(f"rewards must be finite (or NaN: not scored), got {rewards.tolist()}")
    exact = rewards.detach().double()
    scored = ~torch.isnan(exact)
    centred = exact - exact.nanmean(dim=1, keepdim=True)
    if scale == "group":
        # One completion has no ddof-1 deviation; its group is dead and overwritten below.
        freedom = (scored.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        centred = centred / (centred.square().nansum(dim=1, keepdim=True).div(freedom).sqrt() + eps)
    elif scale == "batch":
        known = exact[scored]
        centred = centred / (known.std(correction=1) + eps if known.numel() > 1 else 1.0)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    advantages = centred.masked_fill(dead.unsqueeze(1) | ~scored, 0.0)
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def dead_groups(rewards: Tensor) -> Tensor:
    """Returns which groups have no learning signal because all their rewards are equal.

    Args:
        rewards: [B, G]; NaN where a completion could not be scored.

    Returns:
        [B] bool; True also for groups in which at most one completion was scored.

    Raises:
        ValueError: If the rewards are not [B, G] with G >= 1.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must be [B, G] with G >= 1, got {tuple(rewards.shape)}")
    values = rewards.detach().double()
    unknown = torch.isnan(values)
    # Largest <= smallest, each ignoring NaN. A group without any score compares -inf with inf, so it is dead too.
    return values.masked_fill(unknown, -torch.inf).amax(dim=1) <= values.masked_fill(unknown, torch.inf).amin(dim=1)
