"""Rollouts as tensors and plain containers, for checkpoints: of an unfinished step, and those replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidreason.datamodules.types import Clip, EncodedPrompts, TextBatch
from vidreason.lightning_modules.grpo_parts import Part
from vidreason.lightning_modules.rollout import Completion, CompletionBatch, Rollout, RolloutGroup
from vidreason.rewards.base import RewardScore
from vidreason.rewards.completion import CompletionForm, parse_completion

_OPTIONAL = ("old_logprobs", "ref_logprobs", "completion_mask", "weighed")
_TEXTS = ("ids", "mask", "loss_mask", "answer_mask", "owner", "parent")


def _told(group: RolloutGroup) -> tuple[str, ...]:
    """What tells a group from others: its clip, and what was written about it."""
    return (group.clip.video_id, *(rollout.completion.text for rollout in group.rollouts))


@dataclass(frozen=True)
class RolloutStep:
    """What was sampled for a batch of prompts, and how many optimizer steps (updates) have been made on it."""

    training_parts: list[list[Part]]
    """What this rank trains on, in the place of each sampled part: itself, without the dead groups that replayed ones
    behind it replace"""
    sampled: list[Part]
    """What this rank has sampled"""
    advantages: Tensor
    """[B, G] of ``sampled``"""
    updates: int
    """Optimizer steps made"""
    shared: bool = False
    """Whether all ranks learn from these, which one process had sampled"""

    @property
    def groups(self) -> tuple[RolloutGroup, ...]:
        """[B] what was sampled."""
        return tuple(group for part in self.sampled for group in part.groups)

    @property
    def fillers(self) -> tuple[int, ...]:
        """Those of the B whose clips count nothing."""
        weighed = [counts for part in self.sampled for counts in part.weighed_groups]
        return tuple(row for row, counts in enumerate(weighed) if not counts)

    @property
    def replayed_groups(self) -> int:
        """How many groups of earlier steps this rank trains on."""
        sampled = {_told(group) for group in self.groups}
        trained = [group for place in self.training_parts for part in place for group in part.groups]
        return sum(_told(group) not in sampled for group in trained)

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {
            "slots": [[pack(part) for part in place] for place in self.training_parts],
            "own": [pack(part) for part in self.sampled],
            "advantages": self.advantages.cpu(),
            "updates": self.updates,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], clips: Mapping[str, Clip], form: CompletionForm) -> RolloutStep:
        """Reads what ``state`` returned; tensors are on the CPU.

        Args:
            state: The saved state.
            clips: Training clips by video id.
            form: Which blocks completions have.
        """
        training_parts = [[unpack(part, clips, form) for part in place] for place in state["slots"]]
        sampled = [unpack(part, clips, form) for part in state["own"]]
        return cls(training_parts, sampled, state["advantages"], state["updates"])


def pack(part: Part) -> dict[str, Any]:
    """A part as tensors on the CPU, numbers and strings."""
    part = part.to("cpu")
    batch = part.batch
    return {
        "video_ids": [clip.video_id for clip in batch.clips],
        "prompts": {
            "inputs": dict(batch.prompts.inputs),
            "turn_end": batch.prompts.turn_end,
            "videos": list(batch.prompts.videos),
        },
        "texts": {name: getattr(batch.texts, name) for name in _TEXTS},
        "logprobs": batch.logprobs,
        "rollouts": [[_pack_rollout(rollout) for rollout in group.rollouts] for group in part.groups],
        "advantages": part.advantages,
        "old_logprobs": part.old_logprobs,
        "ref_logprobs": part.ref_logprobs,
        "completion_mask": part.completion_mask,
        "weighed": part.weighed,
    }


def unpack(packed: Mapping[str, Any], clips: Mapping[str, Clip], form: CompletionForm) -> Part:
    """The part that ``pack`` packed.

    Args:
        packed: What it returned.
        clips: Training clips by video id.
        form: Which blocks completions have.
    """
    gone = [video_id for video_id in packed["video_ids"] if video_id not in clips]
    if gone:
        raise ValueError(
            f"this checkpoint holds completions about {gone[0]!r}, which is no training clip any more: put it back, or "
            "start the stage again without --ckpt_path"
        )
    shown = tuple(clips[video_id] for video_id in packed["video_ids"])
    groups = tuple(
        RolloutGroup(clip, tuple(_unpack_rollout(rollout, form) for rollout in rollouts))
        for clip, rollouts in zip(shown, packed["rollouts"], strict=True)
    )
    prompts = packed["prompts"]
    batch = CompletionBatch(
        clips=shown,
        prompts=EncodedPrompts(prompts["inputs"], len(shown), prompts["turn_end"], tuple(prompts["videos"])),
        texts=TextBatch(**packed["texts"]),
        logprobs=packed["logprobs"],
        completions=tuple(tuple(rollout.completion for rollout in group.rollouts) for group in groups),
    )
    optional: dict[str, Tensor | None] = {name: packed[name] for name in _OPTIONAL}
    return Part(batch, groups, packed["advantages"], **optional)


def _pack_rollout(rollout: Rollout) -> dict[str, Any]:
    completion, score = rollout.completion, rollout.score
    return {
        "text": completion.text,
        "ids": completion.ids.cpu(),
        "logprobs": completion.logprobs.cpu(),
        "finish_reason": completion.finish_reason,
        "total": score.total,
        "parts": dict(score.parts),
    }


def _unpack_rollout(packed: Mapping[str, Any], form: CompletionForm) -> Rollout:
    text = packed["text"]
    completion = Completion(
        text, parse_completion(text, form), packed["ids"], packed["logprobs"], packed["finish_reason"]
    )
    return Rollout(completion, RewardScore(packed["total"], packed["parts"]))
