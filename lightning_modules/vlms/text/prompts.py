"""Encodes clips with their prompts one by one, checks that the video arrived, and joins them to a batch.

Each clip goes through the processor alone, since processors let a prompt depend on its neighbours: SmolVLM's, for
example, names the number of frames of the longest clip of a batch.

Letters: B prompts, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from vidreason.datamodules.types import VideoSample
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN


def extended(sample: VideoSample, count: int) -> VideoSample:
    """Returns a sample of ``count`` frames, of which the last one is repeated if there are fewer."""
    missing = count - len(sample.frames)
    if not missing:
        return sample
    indices = (*sample.timing.indices, *[sample.timing.indices[-1]] * missing)
    frames = torch.cat([sample.frames, sample.frames[-1:].expand(missing, -1, -1, -1)])
    return replace(sample, frames=frames, timing=replace(sample.timing, indices=indices))


def encode_prompt(processor: Any, text: str, sample: VideoSample, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the processor's tensors for one clip and its rendered prompt."""
    metadata = VideoMetadata(
        total_num_frames=sample.timing.total_frames,
        fps=sample.timing.fps,
        duration=sample.timing.duration,
        frames_indices=list(sample.timing.indices),
    )
    made = processor(
        text=[text],
        videos=[[sample.frames]],  # by prompt: SmolVLM's processor miscounts a list of videos before transformers 5.23
        video_metadata=[metadata],
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
        **options,
    )
    return {name: torch.as_tensor(value) for name, value in made.items() if name != "video_metadata"}


def check_video_arrived(
    clip: str,
    inputs: Mapping[str, Tensor],
    placeholders: Collection[int],
    visual_tokens: Callable[[Mapping[str, Tensor]], int | None],
) -> None:
    """Checks that the processor returned pixels for a clip, and visual tokens for them in the prompt.

    Args:
        clip: Id of the clip, for the message.
        inputs: What the processor returned for its prompt.
        placeholders: Tokens that stand for parts of a video.
        visual_tokens: Returns the number of visual tokens that the pixels need; None if the inputs do not say.

    Raises:
        ValueError: If the model would not see the video, or not all of it.
    """
    if not any(name.startswith("pixel") for name in inputs):
        raise ValueError(
            f"clip {clip}: the processor returned no pixels, so the model would not see the video: it takes no videos, "
            "and needs a family of its own (docs/extending.md)"
        )
    expected = visual_tokens(inputs)
    found = int(torch.isin(inputs["input_ids"], torch.tensor(sorted(placeholders))).sum())
    if found == 0 or expected not in (None, found):
        wanted = "some" if expected is None else expected
        raise ValueError(
            f"clip {clip}: the prompt has {found} visual tokens, but its pixels need {wanted}: the chat template or "
            "the processor of the model does not fit its family"
        )


def join_prompts(
    prompts: Sequence[Mapping[str, Tensor]], pad: int, join: Callable[[str, Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Joins the inputs of B prompts to a batch.

    Args:
        prompts: [B] inputs of one prompt each.
        pad: Id of the padding token.
        join: Joins the tensors of an input that has no entry per token, given its name.

    Returns:
        Inputs per token as [B, P], padded on the left, so that texts directly follow every prompt; the others as
        ``join`` returns them.
    """
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, Tensor] = {}
    for name in prompts[0]:
        values = [prompt[name] for prompt in prompts]
        if name in ("input_ids", "attention_mask", *PER_TOKEN):
            fill = pad if name == "input_ids" else 0
            padded = [torch.nn.functional.pad(value, (length - value.shape[1], 0), value=fill) for value in values]
            joined[name] = torch.cat(padded)
        else:
            joined[name] = join(name, values)
    return joined
