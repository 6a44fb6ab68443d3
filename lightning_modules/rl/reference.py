"""The reference policy of the KL term, and the log-probabilities of policies that are not trained.

The reference is the policy at the start of the stage (DeepIntuit, arXiv 2603.10300), not the base: with LoRA a frozen
copy of the adapter on the same base, with full fine-tuning a frozen copy of the model.

Shape letters: n completions of a micro-batch, L tokens.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor, nn

from vidreason.lightning_modules.rl.microbatch import MicroBatch
from vidreason.lightning_modules.vlms.base import VLM, Scores
from vidreason.lightning_modules.vlms.loading.adapters import copy_adapter, use_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY

REFERENCE = "reference"
"""Name of the reference adapter in memory and in checkpoints."""


def add_reference(model: nn.Module) -> nn.Module | None:
    """Makes a frozen copy of the current policy.

    Returns:
        The copied model; None if the copy is an adapter in ``model``.
    """
    if isinstance(model, PeftModel):
        copy_adapter(model, POLICY, REFERENCE)
        return None
    # eval mode also disables gradient checkpointing and dropout in the reference.
    return copy.deepcopy(model).requires_grad_(False).eval()


def score_rollouts(
    vlm: VLM, model: nn.Module, micro_batch: MicroBatch, temperature: float, with_entropy: bool = False
) -> Scores:
    """Scores the sampled tokens at the sampling temperature."""
    batch = micro_batch.batch
    return vlm.score(model, batch.prompts, batch.texts, temperature, with_entropy)


@torch.no_grad()
def policy_logprobs(vlm: VLM, model: nn.Module, micro_batch: MicroBatch, temperature: float) -> Tensor:
    """Returns the log-probabilities [n, L] of the current policy, without gradient."""
    return score_rollouts(vlm, model, micro_batch, temperature).logprobs


@torch.no_grad()
def reference_logprobs(
    vlm: VLM, model: nn.Module, copied: nn.Module | None, micro_batch: MicroBatch, temperature: float
) -> Tensor:
    """Returns the log-probabilities [n, L] of the reference policy.

    Args:
        vlm: The model family.
        model: The policy.
        copied: The model that :func:`add_reference` returned, or None.
        micro_batch: The rollouts.
        temperature: The sampling temperature.
    """
    adapter: AbstractContextManager[None] = nullcontext() if copied is not None else use_adapter(model, REFERENCE)
    with adapter:
        return score_rollouts(vlm, copied or model, micro_batch, temperature).logprobs
