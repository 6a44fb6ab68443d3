"""The arms of ``grpo_step_vs_trl.py``: some GRPO steps on one side, and their CPU-seconds."""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clip_dataset import ClipDataset
from vidreason.datamodules.decoded import DecodedVideo
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Encoded, EncodedPrompts, Example, FrameTiming, Prompt
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.grpo_parts import Part
from vidreason.lightning_modules.vlms import chat
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.rewards.base import RewardFn, RewardInput

FRAMES, IMAGES = 16, 8
LEARNING_RATE = 1e-5
IMAGE = "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif"


def hash_of(text: str) -> float:
    """A reward in [0, 1) that differs between completions, the same on both sides."""
    return zlib.crc32(text.encode()) % 997 / 997


def picture(number: int, side: int) -> Tensor:
    """Noise, [3, side, side] uint8."""
    return torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def prompt_length(side: int) -> int:
    """Tokens of every prompt: those of eight images, and a question."""
    return IMAGES * (side // 28) ** 2 + 37


class Clock:
    """CPU-seconds of steps and updates; the first step counts FLOPs and encoded patches instead."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.updates: list[float] = []
        self.patches = 0
        self.flops = FlopCounterMode(display=False)
        self._update = 0.0

    def watch(self, tower: nn.Module) -> None:
        """Begins with the first step."""
        self._hook = tower.register_forward_pre_hook(self._count)
        self.flops.__enter__()

    def _count(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.patches += len(given[0])

    def begin_update(self) -> None:
        """The rollouts of a step are scored."""
        self._update = time.process_time()

    def end_step(self) -> None:
        """The optimizer has stepped."""
        if not self.ends:
            self.flops.__exit__(None, None, None)
            self._hook.remove()
        self.ends.append(time.process_time())
        self.updates.append(self.ends[-1] - self._update)

    def result(self, prompt_tokens: int, completion_tokens: float, grad_norm: float) -> dict[str, Any]:
        """What the arm prints."""
        return {
            "step": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "update": self.updates[1:],
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "step_gflop": round(self.flops.get_total_flops() / 1e9, 1),
            "vision_patches": self.patches,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "grad_norm": grad_norm,
        }


# ---------------------------------------------------------------------------------------------------------------- ours


class Endless(QwenVL):
    """Completions do not end before their longest; every prompt has ``length`` tokens."""

    length: int
    shows_video = True

    @cached_property
    def suppressed_ids(self) -> frozenset[int]:
        """Also what would end a completion."""
        return super().suppressed_ids | self.stop_ids

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Asks a question that fills the prompt up; without the video where it is not shown."""
        asked = [replace(example, prompt=Prompt(self._question(example))) for example in examples]
        encoded = super().encode(asked) if self.shows_video else self._text_only(asked)
        found = encoded.prompts.inputs["input_ids"].shape[1]
        assert found == self.length, f"{found} prompt tokens instead of {self.length}"
        return encoded

    def _question(self, example: Example) -> str:
        bare = self._text_only([replace(example, prompt=Prompt(""))]).prompts.inputs["input_ids"].shape[1]
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
    """Clips of noise that are decoded already."""

    side: int

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Two equal frames for each image that the other side gets."""
        frames = torch.stack([picture(i // 2, self.side) for i in range(FRAMES)])
        return DecodedVideo(frames, FrameTiming(8.0, FRAMES, tuple(range(FRAMES))), FRAMES, reader="memory")


class Noise(VideoDataModule):
    """Clips without files."""

    clip_count: int
    side: int
    label_names = ("a", "b")  # type: ignore[assignment]

    def samples(self, split: str) -> Sequence[Clip]:
        """As many as are trained on, and one to make the other splits of."""
        return [Clip(Path(f"{split}{i}"), "a", f"{split}{i}", group=f"{split}{i}") for i in range(self.clip_count)]

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """In memory."""
        made = InMemory(clips, view, self.frames, self.seed, train)
        made.side = self.side
        return made


class HashReward(RewardFn):
    """``hash_of`` the completion."""

    def __call__(self, item: RewardInput) -> float:
        """Returns a number in [0, 1)."""
        return hash_of(item.completion)


class Timed(GRPOModule):
    """Says when an update begins and a step ends."""

    clock: Clock

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Watches the first step."""
        if batch_idx == 0:
            self.clock.watch(self.policy.model.visual)  # type: ignore[union-attr,arg-type]

    def update(self, minibatch: Sequence[Part]) -> None:
        """As it is."""
        self.clock.begin_update()
        super().update(minibatch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over."""
        self.clock.end_step()


def run_ours(path: str, options: argparse.Namespace, video: bool) -> dict[str, Any]:
    """Trains some steps under a Lightning trainer."""
    vlm = Endless(path, dtype="float32", max_pixels=options.side**2)
    vlm.length, vlm.shows_video = prompt_length(options.side), video
    module = Timed(
        vlm,
        rewards=[HashReward()],
        group_size=options.group_size,
        train_sampling=Sampling(max_new_tokens=options.completion),
        dual_clip=None,
        importance_cap=None,
        cold_steps=10**6,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0),
        warmup=0,
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


# ---------------------------------------------------------------------------------------------------------------- TRL


def run_trl(path: str, options: argparse.Namespace, video: bool) -> dict[str, Any]:
    """Trains some steps with TRL's trainer."""
    clock = Clock()

    class TimedTrainer(GRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            made = super()._prepare_inputs(generation_batch)
            clock.begin_update()
            return made

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                clock.watch(model.model.visual)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end_step()

    processor = AutoProcessor.from_pretrained(path)
    processor.chat_template = processor.chat_template.replace("{% if", IMAGE, 1)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": options.side**2}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    images = [Image.fromarray(picture(i, options.side).permute(1, 2, 0).numpy()) for i in range(IMAGES)]
    seen = QwenVL(path)
    length = prompt_length(options.side)

    def rendered(words: str) -> int:
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images] if video else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]
        made = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
        return len(made["input_ids"][0])

    words = " a" * (length - rendered(""))
    assert rendered(words) == length, f"{rendered(words)} prompt tokens instead of {length}"
    rows = [{"prompt": [{"role": "user", "content": words}]}] * (options.prompts * (options.steps + 1))
    dataset = Dataset.from_list(rows)
    if video:
        dataset = dataset.with_transform(lambda batch: {**batch, "images": [images] * len(batch["prompt"])})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=options.prompts * options.group_size,
            num_generations=options.group_size,
            max_completion_length=options.completion,
            generation_kwargs={
                "min_new_tokens": options.completion,
                "suppress_tokens": sorted(seen.suppressed_ids | seen.stop_ids),
            },
            max_steps=options.steps + 1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            loss_type="dapo",
            temperature=1.0,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = TimedTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [hash_of(c[0]["content"]) for c in completions],
            args=config,
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[Watch()],
        )
        trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    norm = statistics.median(float(row["grad_norm"]) for row in logged)
    return clock.result(length, logged[-1]["completions/mean_length"], round(norm, 4))


def run_arm(arm: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs ``video_ours``, ``video_trl``, ``text_ours`` or ``text_trl``."""
    kind, _, side = arm.partition("_")
    return {"ours": run_ours, "trl": run_trl}[side](path, options, kind == "video")


def quiet() -> None:
    """Silences what trainers say about themselves."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
