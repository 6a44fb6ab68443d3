"""Micro-batches of a GRPO step: the rollouts of the prompts that share a forward pass.

Shape letters: B prompts of a step, G completions per prompt, n completions of a micro-batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import StepCounts
from vidreason.lightning_modules.rl.rollouts import RolloutGroup
from vidreason.lightning_modules.vlms.completions import CompletionBatch

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredRollouts:
    """Completions of some prompts with their rewards."""

    batch: CompletionBatch
    groups: tuple[RolloutGroup, ...]


@dataclass(frozen=True)
class MicroBatch:
    """The rollouts of some prompts, ready for the loss."""

    batch: CompletionBatch
    advantages: Tensor
    """[n] advantage of each completion."""
    completion_mask: Tensor
    """[n, L] bool, tokens that count in the loss."""
    sample_mask: Tensor
    """[n] bool, completions of clips that count, including completions without a token that counts."""
    old_logprobs: Tensor | None = None
    """[n, L]; None if the forward pass of the update computes them."""
    ref_logprobs: Tensor | None = None
    """[n, L]; None without a KL term."""


def make_micro_batches(
    rollouts: Sequence[ScoredRollouts], advantages: Tensor, sample_mask: Tensor, mask_truncated: bool = False
) -> list[MicroBatch]:
    """Combines the parts of a step with their rows of advantages and masks.

    Args:
        rollouts: Completions of B prompts, in parts.
        advantages: [B, G].
        sample_mask: [B] bool, prompts whose clip counts.
        mask_truncated: Whether completions that were truncated at the maximal length are left out of the loss.
    """
    micro_batches, start = [], 0
    for part in rollouts:
        rows = slice(start, start + len(part.groups))
        start = rows.stop
        tokens = part.batch.texts.loss_mask
        samples = sample_mask[rows].to(tokens.device).repeat_interleave(advantages.shape[1])
        # Clips that do not count stay in the micro-batch, since all ranks must run the same forwards.
        mask = tokens & samples[:, None]
        if mask_truncated:
            mask = mask & finished_mask(part.batch)[:, None]
        rewarded = advantages[rows].flatten().float().to(tokens.device)
        micro_batches.append(MicroBatch(part.batch, rewarded, mask, samples))
    return micro_batches


def finished_mask(batch: CompletionBatch) -> Tensor:
    """Returns the mask [n] of completions that ended with a stop token."""
    ended = [completion.finish_reason == "stop" for group in batch.completions for completion in group]
    return torch.tensor(ended, device=batch.texts.ids.device)


def count_step(micro_batches: Sequence[MicroBatch]) -> StepCounts:
    """Returns the counts of this rank's part of an optimizer step as float32 scalars."""
    tokens = torch.stack([m.completion_mask.sum() for m in micro_batches]).sum().float()
    completions = torch.stack([m.sample_mask.sum() for m in micro_batches]).sum().float()
    forwards = torch.stack([m.sample_mask.any() for m in micro_batches]).sum().float()
    return StepCounts(tokens, completions, forwards)


def split_evenly(items: Sequence[T], n: int) -> Iterator[list[T]]:
    """Splits the micro-batches of a step into at most ``n`` non-empty minibatches of about equal size."""
    for i in range(n):
        chunk = list(items[i * len(items) // n : (i + 1) * len(items) // n])
        if chunk:
            yield chunk
