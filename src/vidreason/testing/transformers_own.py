"""Computes references for tests with transformers alone: inputs of a conversation, log-probs, greedy completions.

Letters: P tokens of a prompt, N texts, L tokens of the longest text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from vidreason.datamodules.types import Example, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN, unwrap
from vidreason.lightning_modules.vlms.text.prompts import extended


def encoded(processor: Any, example: Example, count: int) -> dict[str, Tensor]:
    """Returns what a processor makes of a conversation that asks the example's prompt about its frames.

    Args:
        processor: The processor as ``AutoProcessor`` loads it.
        example: A clip with its prompt.
        count: Number of frames that the processor gets; the last one is repeated up to it.
    """
    sample = extended(example.sample, count)
    metadata = VideoMetadata(
        total_num_frames=sample.timing.total_frames,
        fps=sample.timing.fps,
        duration=sample.timing.duration,
        frames_indices=list(sample.timing.indices),
    )
    content = [{"type": "video", "video": sample.frames}, {"type": "text", "text": example.prompt.text}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False, "video_metadata": [metadata]},
    )
    return {name: torch.as_tensor(value) for name, value in made.items() if name != "video_metadata"}


def logprobs(
    model: Any, inputs: Mapping[str, Tensor], texts: TextBatch, vlm: VLM, passes_positions: bool = False
) -> Tensor:
    """Returns log-probs [N, L] of texts, each in a forward of its own of prompt and text, without a cache.

    Args:
        model: A stock model, with or without PEFT around it.
        inputs: Inputs of one prompt.
        texts: Texts directly behind it.
        vlm: The family, which names the tokens that have probability 0.
        passes_positions: Whether the family's positions are passed to the model.
    """
    found = torch.zeros(texts.ids.shape)
    start = inputs["input_ids"].shape[1]
    for row, ids in enumerate(texts.ids):
        tail = ids[texts.mask[row]]
        logits = _logits(model, _continued(inputs, tail), vlm, passes_positions)[start - 1 : -1]
        found[row, : len(tail)] = logits.log_softmax(-1).gather(-1, tail[:, None])[:, 0]
    return found * texts.loss_mask


def greedy(model: Any, inputs: Mapping[str, Tensor], vlm: VLM, length: int, passes_positions: bool) -> list[int]:
    """Returns the likeliest continuation of a prompt, at most ``length`` tokens, including a stop token.

    With ``passes_positions`` it comes from forwards of the whole text, since ``generate`` takes no positions.
    """
    start = inputs["input_ids"].shape[1]
    if not passes_positions:
        made = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=sorted(vlm.suppressed_ids),
            eos_token_id=sorted(vlm.stop_ids),
        )
        return list(made[0, start:].tolist())
    text: list[int] = []
    while len(text) < length and not (text and text[-1] in vlm.stop_ids):
        logits = _logits(model, _continued(inputs, torch.tensor(text, dtype=torch.long)), vlm, passes_positions)
        text.append(int(logits[-1].argmax()))
    return text


def _logits(model: Any, inputs: dict[str, Tensor], vlm: VLM, passes_positions: bool) -> Tensor:
    """Returns logits [P, V] of one row, in which tokens that are never sampled have none."""
    if passes_positions:
        inputs = {**inputs, "position_ids": vlm.position_ids(unwrap(model), inputs)}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
    return logits


def _continued(inputs: Mapping[str, Tensor], tail: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of a prompt with the tokens ``tail`` behind it."""
    longer = dict(inputs)
    fills = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}
    for name in ("input_ids", "attention_mask", *PER_TOKEN):
        if name in inputs:
            more = fills.get(name, torch.zeros_like(tail))[None].to(inputs[name].dtype)
            longer[name] = torch.cat([inputs[name], more], dim=1)
    return longer
