"""Completions sampled from a model, as tokens, texts and parsed answers.

Shape letters: B prompts, G completions per prompt, N = B·G rows in the order b0g0, b0g1, …, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidreason.datamodules.types import Clip, EncodedPrompts, TextBatch
from vidreason.lightning_modules.functional.finite import check_rows
from vidreason.lightning_modules.vlms.base import VLM, Generated
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.text.context import check_context_length
from vidreason.rewards.completion import THINK_FORM, CompletionForm, ParsedCompletion, parse_completion


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    text: str
    parsed: ParsedCompletion
    ids: Tensor
    """[n] int64, the sampled tokens, including the end of turn if it was sampled."""
    logprobs: Tensor
    """[n] fp32, log-probabilities of the sampler (``rollout_logprobs``)."""
    finish_reason: Literal["stop", "length"]
    """``length``: truncated at ``max_new_tokens``."""

    @property
    def n_tokens(self) -> int:
        """Number of sampled tokens."""
        return int(self.ids.shape[0])


@dataclass(frozen=True)
class CompletionBatch:
    """G completions for each of B prompts, as tokens and as texts."""

    clips: tuple[Clip, ...]
    """[B]"""
    prompts: EncodedPrompts
    texts: TextBatch
    """N sampled rows; ``loss_mask`` counts every sampled token."""
    logprobs: Tensor
    """[N, L] fp32 log-probabilities of the sampler, 0 outside the mask."""
    completions: tuple[tuple[Completion, ...], ...]
    """[B][G]"""

    def take(self, vlm: VLM, rows: Sequence[int]) -> CompletionBatch:
        """Returns the prompts ``rows`` with their completions."""
        group_size = len(self.completions[0])
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.texts.ids.device)
        texts = (index[:, None] * group_size + torch.arange(group_size, device=index.device)).flatten()
        return CompletionBatch(
            clips=tuple(self.clips[b] for b in rows),
            prompts=take_prompts(vlm, self.prompts, index),
            texts=TextBatch(
                ids=self.texts.ids[texts],
                mask=self.texts.mask[texts],
                loss_mask=self.texts.loss_mask[texts],
                answer_mask=self.texts.answer_mask[texts],
                owner=torch.arange(len(rows), device=index.device).repeat_interleave(group_size),
                parent=self.texts.parent[texts],
            ),
            logprobs=self.logprobs[texts],
            completions=tuple(self.completions[b] for b in rows),
        )

    def with_groups(self, rows: Sequence[int], fresh: CompletionBatch) -> CompletionBatch:
        """Returns this batch with the completions of the prompts ``rows`` replaced by those of ``fresh``, in order."""
        group_size = len(self.completions[0])
        length = max(self.texts.ids.shape[1], fresh.texts.ids.shape[1])
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.texts.ids.device)
        where = (index[:, None] * group_size + torch.arange(group_size, device=index.device)).flatten()

        def merged(old: Tensor, new: Tensor) -> Tensor:  # pads with 0 or False; the mask hides what ids get
            wide = functional.pad(old, (0, length - old.shape[1]))
            return wide.index_copy(0, where, functional.pad(new, (0, length - new.shape[1])))

        completions = list(self.completions)
        for row, group in zip(rows, fresh.completions, strict=True):
            completions[row] = group
        ours, theirs = self.texts, fresh.texts
        texts = replace(
            ours,
            ids=merged(ours.ids, theirs.ids),
            mask=merged(ours.mask, theirs.mask),
            loss_mask=merged(ours.loss_mask, theirs.loss_mask),
            answer_mask=merged(ours.answer_mask, theirs.answer_mask),
        )
        return replace(
            self, texts=texts, logprobs=merged(self.logprobs, fresh.logprobs), completions=tuple(completions)
        )

    def to(self, device: torch.device | str) -> CompletionBatch:
        """Returns a copy whose tensors are on ``device``; the completions stay on the CPU."""
        return replace(
            self, prompts=self.prompts.to(device), texts=self.texts.to(device), logprobs=self.logprobs.to(device)
        )


def take_prompts(vlm: VLM, prompts: EncodedPrompts, index: Tensor) -> EncodedPrompts:
    """Returns the prompts ``index`` [n] of a batch."""
    rows = index.tolist()
    per_video = {
        name: tuple(getattr(prompts, name)[b] for b in rows) if getattr(prompts, name) else ()
        for name in ("videos", "known", "without_pixels")
    }
    return EncodedPrompts(vlm.repeat_prompts(prompts.inputs, index), len(rows), prompts.turn_end, **per_video)


def completion_seed(seed: int, step: int, video_id: str, sample: int) -> int:
    """Returns the seed of a completion's noise, a 63-bit integer that depends on the arguments only.

    The composition of the batch and the machine have no influence.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{video_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate_completions(
    vlm: VLM,
    model: nn.Module,
    prompts: EncodedPrompts,
    clips: Sequence[Clip],
    group_size: int,
    sampling: Sampling,
    seed: int,
    step: int = 0,
    form: CompletionForm = THINK_FORM,
) -> CompletionBatch:
    """Samples ``group_size`` completions for every clip in eval mode, with one prefill per prompt.

    Args:
        vlm: The family that encoded the prompts.
        model: The policy.
        prompts: B prompts.
        clips: [B] clips of the prompts.
        group_size: G, completions per clip.
        sampling: Sampling options.
        seed: The run's seed. The noise of a completion depends only on the seed, ``step``, the clip's id and the index
            of the completion in its group.
        step: Optimizer step; 0 outside of training.
        form: Blocks that a completion consists of.

    Returns:
        The B·G completions, on the model's device.

    Raises:
        ValueError: If a prompt and ``sampling.max_new_tokens`` exceed the model's context, or the chat template begins
            with the reasoning, but the form does not.
    """
    if vlm.chat_frame.reasoning_start and form.mode != "think":
        raise ValueError(
            f"completion.mode is {form.mode}, but the chat template of {vlm.path} opens <think> itself: set "
            "completion.mode to think, or vlm.chat_template_kwargs to what turns it off, for example "
            "{enable_thinking: false}"
        )
    names, room = [clip.video_id for clip in clips], [sampling.max_new_tokens] * len(clips)
    check_context_length(names, prompts, room, vlm.context_length, "max_new_tokens asks for")
    seeds = [[completion_seed(seed, step, clip.video_id, g) for g in range(group_size)] for clip in clips]
    generated = vlm.generate(model, prompts, group_size, sampling, seeds)
    logprobs = generated.logprobs.where(generated.mask, 0.0).view(len(clips), -1)
    check_rows(logprobs, names, "the log-probabilities of sampled tokens are")
    rows = completions_of(generated, form)
    completions = tuple(rows[b * group_size : (b + 1) * group_size] for b in range(len(clips)))
    return CompletionBatch(tuple(clips), prompts, vlm.texts_from(generated), generated.logprobs, completions)


def completions_of(generated: Generated, form: CompletionForm = THINK_FORM) -> tuple[Completion, ...]:
    """Returns the N rows of ``generated`` as parsed completions with tokens on the CPU."""
    ids, logprobs, mask = generated.ids.cpu(), generated.logprobs.float().cpu(), generated.mask.cpu()
    return tuple(
        Completion(
            text, parse_completion(text, form), ids[n][mask[n]], logprobs[n][mask[n]], generated.finish_reason[n]
        )
        for n, text in enumerate(generated.texts)
    )
