"""What GRPO adds to checkpoints: the reference, what is counted, groups to be replayed, an unfinished step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy

from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.grpo_replay import ReplayBuffer
from vidreason.lightning_modules.grpo_state import RolloutStep, pack, unpack
from vidreason.lightning_modules.interrupts import StopRequested, check_stop

REFERENCE = "reference"
"""Name of the adapter that the KL term compares with"""


class ResumablePolicy(VLMModule):
    """A policy whose fit may be stopped in a rollout and between two optimizer steps on it."""

    replay: ReplayBuffer | None
    _unfinished_step: RolloutStep | None = None
    _rollout_steps = 0
    _parsed = 0
    _tokens = 0

    def kept_beside(self, name: str) -> bool:
        """The reference adapter: its folder may be overwritten while the fit runs."""
        return f".{REFERENCE}." in name

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with what is counted over the whole fit."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grpo"] = {"rollout_steps": self._rollout_steps, "parsed": self._parsed, "tokens": self._tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with what was counted."""
        super().on_load_checkpoint(checkpoint)
        counted = checkpoint["grpo"]
        self._rollout_steps, self._parsed = counted["rollout_steps"], counted["parsed"]
        self._tokens = counted["tokens"]

    def rank_state(self) -> dict[str, Any]:
        """The step that was left between two of its updates, and the groups to be replayed."""
        state = super().rank_state()
        if self._unfinished_step is not None:
            state["unread"] = self.unread_before_this_batch()
        return {
            **state,
            "half_learnt": None if self._unfinished_step is None else self._unfinished_step.state(),
            "replay": [] if self.replay is None else [pack(group) for group in self.replay.groups],
        }

    def take_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes up both; groups of more or fewer ranks are dealt out anew.

        An unfinished step, which one process has sampled, goes whole to each of several ranks: their mean gradient is
        that of one.
        """
        super().take_rank_states(states)
        clips = {clip.video_id: clip for clip in self.data.clips("train")}
        if len(states) == self.trainer.world_size:
            mine = states[self.global_rank]["replay"]
        else:
            mine = [group for state in states for group in state["replay"]][self.global_rank :: self.trainer.world_size]
        if self.replay is not None:
            self.replay.groups.extend(unpack(group, clips, self.completion) for group in mine)
        half = states[0]["half_learnt"]  # a process that trains alone
        if half is not None:
            shared = self.trainer.world_size > 1
            self._unfinished_step = replace(RolloutStep.of(half, clips, self.completion), shared=shared)

    def unfinished_step(self) -> RolloutStep | None:
        """The step in which the fit was interrupted; None from the next batch on."""
        found, self._unfinished_step = self._unfinished_step, None
        if found is None:
            return None
        self.go_on_within_batch()
        training_parts = [[part.to(self.device) for part in place] for place in found.training_parts]
        sampled = [part.to(self.device) for part in found.sampled]
        return replace(found, training_parts=training_parts, sampled=sampled)

    def stop_between_updates(self, step: RolloutStep) -> None:
        """Leaves the fit where a signal asks for it; ranks that exchange gradients finish the batch first.

        Raises:
            StopRequested: A checkpoint written now holds the rest of the batch.
        """
        if isinstance(self.trainer.strategy, ParallelStrategy):
            return
        try:
            check_stop()
        except StopRequested:
            self._unfinished_step = step
            raise
