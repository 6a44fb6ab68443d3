"""Our side of ``grpo_step_vs_trl.py``: ``GRPOModule`` under a Lightning trainer, with clips in memory."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from grpo_step_work import FRAMES, LEARNING_RATE, Clock, hash_of, picture, prompt_length

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Encoded, EncodedPrompts, Example, FrameTiming, Prompt
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.microbatch import MicroBatch
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.rl.sampler import RolloutOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.text import chat
from vidreason.rewards.base import RewardFn, RewardInput


class Endless(QwenVL):
    """A Qwen2.5-VL whose completions all have the maximum length and whose prompts all have ``length`` tokens."""

    length: int
    shows_video = True

    @cached_property
    def suppressed_ids(self) -> frozenset[int]:
        """The ids that are never sampled, including those that would end a completion."""
        return super().suppressed_ids | self.stop_ids

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Encodes prompts of ``length`` tokens, padded with words; the text variant has no video in them."""
        asked = [replace(example, prompt=Prompt(self._question(example))) for example in examples]
        encoded = super().encode(asked) if self.shows_video else self._text_only(asked)
        found = encoded.prompts.inputs["input_ids"].shape[1]
        assert found == self.length, f"{found} prompt tokens instead of {self.length}"
        return encoded

    def _question(self, example: Example) -> str:
        bare = self._text_only([replace(example, prompt=Prompt(""))]).prompts.inputs["input_ids"].shape[1]
        # two frames make a temporal patch, and 28 x 28 pixels a visual token; the rest are marks around the video
        visual = 1 + example.sample.frames.shape[0] // 2 * (example.sample.frames.shape[-1] // 28) ** 2
        return " a" * (self.length - bare - (visual + 1 if self.shows_video else 0))

    def _text_only(self, examples: Sequence[Example]) -> Encoded:
        words = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": example.prompt.text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for example in examples
        ]
        made = self.tokenizer(words, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        inputs["mm_token_type_ids"] = torch.zeros_like(made["input_ids"])
        prompts = EncodedPrompts(inputs, len(examples), torch.zeros(0, dtype=torch.long))
        return Encoded(prompts, chat.encode_texts(self.processor, self.chat_frame, examples, self.suppressed_ids))


class InMemory(ClipDataset):
    """A data set of decoded clips of noise."""

    side: int

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Returns two equal frames (one temporal patch) for each image of TRL's side."""
        frames = torch.stack([picture(i // 2, self.side) for i in range(FRAMES)])
        return DecodedVideo(frames, FrameTiming(8.0, FRAMES, tuple(range(FRAMES))), FRAMES, reader="memory")


class Noise(VideoDataModule):
    """A data module of clips without files."""

    clip_count: int
    side: int
    label_names = ("a", "b")  # type: ignore[assignment]

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns one clip per training prompt; no two share a group."""
        return [Clip(Path(f"{split}{i}"), "a", f"{split}{i}", group=f"{split}{i}") for i in range(self.clip_count)]

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Returns a data set in memory."""
        made = InMemory(clips, view, self.frames, self.seed, train)
        made.side = self.side
        return made


class HashReward(RewardFn):
    """Reward: a hash of the completion, so that rewards of a group differ."""

    def __call__(self, item: RewardInput) -> float:
        """Returns a number in [0, 1)."""
        return hash_of(item.completion)


class Timed(GRPOModule):
    """GRPO that tells the clock when an update begins and a step ends."""

    clock: Clock

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Starts counting FLOPs and patches in the first step."""
        if batch_idx == 0:
            self.clock.watch(self.policy.model.visual)  # type: ignore[union-attr,arg-type]

    def update(self, minibatch: Sequence[MicroBatch]) -> None:
        """Tells the clock that the update begins, then runs it."""
        self.clock.begin_update()
        super().update(minibatch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the clock that the step is over."""
        self.clock.end_step()


def run_ours(path: str, options: argparse.Namespace, video: bool) -> dict[str, Any]:
    """Trains some steps under a Lightning trainer; returns the measurements."""
    vlm = Endless(path, dtype="float32", max_pixels=options.side**2)
    vlm.length, vlm.shows_video = prompt_length(options.side), video
    module = Timed(
        vlm,
        rewards=[HashReward()],
        rollouts=RolloutOptions(
            group_size=options.group_size,
            sampling=Sampling(max_new_tokens=options.completion),
            max_unparsed_steps=10**6,  # random weights never write the grammar
        ),
        loss=PolicyLoss(dual_clip=None, importance_cap=None),  # off by default in TRL
        optim=OptimOptions(lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)),
    )
    module.clock = Clock()
    data = Noise(encoder=vlm, batch_size=options.prompts)
    data.clip_count, data.side = options.prompts * (options.steps + 1), options.side
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=options.steps + 1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module.clock.result(vlm.length, logged["train/completions/mean_length"], round(logged["train/grad_norm"], 4))
