"""TRL's side of ``grpo_step_vs_trl.py``: its own ``GRPOTrainer``, with the same pictures as images."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset
from grpo_step_work import IMAGES, LEARNING_RATE, Clock, hash_of, picture, prompt_length
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vidreason.lightning_modules.vlms.qwen import QwenVL

IMAGE = "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif"


def run_trl(path: str, options: argparse.Namespace, video: bool) -> dict[str, Any]:
    """Trains some steps with TRL's trainer; returns the measurements."""
    clock = Clock()

    class TimedTrainer(GRPOTrainer):
        # returns generated and scored completions, so the update begins at its end
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
    # the template of the test model has no images
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
