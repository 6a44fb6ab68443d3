"""Logs rollouts of GRPO to TensorBoard: film strip, prompt, and completions with rewards and advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from vidreason.callbacks.film_strip import captioned_strips, film_strip
from vidreason.callbacks.tensorboard_text import log_image, log_text, markdown_table, quoted_texts
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.rl.rollouts import RolloutGroup, RolloutOutput


class RolloutLogger(L.Callback):
    """Logs the groups of a few prompts at regular intervals.

    Args:
        every_n_steps: Number of batches between two tables.
        prompts: Number of groups in a table.
        strips: Whether the frames of the clips are shown.
    """

    def __init__(self, every_n_steps: int = 10, prompts: int = 2, strips: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.strips = strips

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs a table of the first groups of a batch."""
        if not trainer.is_global_zero or trainer.fit_loop.total_batch_idx % self.every_n_steps:
            return
        if isinstance(outputs, Mapping) and "rollouts" in outputs:
            found: RolloutOutput = outputs["rollouts"]
            # rows of unreadable clips hold placeholders
            rows = found.sample_mask.nonzero().flatten().tolist()[: self.prompts]
            groups = tuple(found.groups[row] for row in rows)
            if not groups:
                return
            log_text(trainer, "train/rollouts", rollout_table(groups, found.advantages[rows]))
            assert isinstance(pl_module, VLMModule)
            view = pl_module.data.view
            assert view is not None
            prompts = [(group.clip.video_id, view.prompt(group.clip).text) for group in groups]
            log_text(trainer, "train/rollouts/prompts", quoted_texts(prompts))
            strips = [(group.clip, film_strip(group.clip.path, group.clip.stretch)) for group in groups if self.strips]
            sheet = [(f"{clip.video_id}: {clip.label}", strip) for clip, strip in strips if strip is not None]
            if sheet:
                log_image(trainer, "train/rollouts/clips", captioned_strips(sheet))


def rollout_table(groups: tuple[RolloutGroup, ...], advantages: Tensor) -> str:
    """Returns a Markdown table of numbers, one row per completion, and below it the completions.

    Args:
        groups: The groups of B prompts, G completions each.
        advantages: [B, G]; further rows are ignored.
    """
    parts = list(groups[0].rollouts[0].score.parts)
    listed = [(f"{b + 1}.{g + 1}", b, g) for b, group in enumerate(groups) for g in range(len(group.rollouts))]
    rows, texts = [], []
    for number, b, g in listed:
        clip, rollout = groups[b].clip, groups[b].rollouts[g]
        score, advantage = rollout.score, float(advantages[b, g])
        numbers = [score.total, *(score.parts[name] for name in parts), advantage, rollout.completion.n_tokens]
        rows.append([number, clip.video_id, clip.label or "", *numbers])
        texts.append((f"{number}, reward {score.total:.2f}, advantage {advantage:+.2f}", rollout.completion.text))
    header = ["", "clip", "label", "reward", *parts, "advantage", "tokens"]
    return f"{markdown_table(header, rows)}\n\n{quoted_texts(texts)}"
