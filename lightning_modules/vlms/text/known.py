"""Prompts about videos that are not decoded: what the processor made of the video before, and the user's words.

The video stands first in every prompt, so that all tokens in front of the user's words depend on the video alone, and
all others on the words alone. K is the number of the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidreason.datamodules.types import KnownVideo, VideoSample
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN
from vidreason.lightning_modules.vlms.text import chat

_ROWS = ("input_ids", "attention_mask", *PER_TOKEN)


def opening(processor: Any, options: Mapping[str, Any]) -> str:
    """Returns the rendered conversation in front of the user's words.

    Args:
        processor: A processor with a chat template.
        options: Arguments of the chat template.
    """
    return chat.render(processor, chat.SENTINEL, options).partition(chat.SENTINEL)[0]


def tokens_behind(processor: Any, text: str, start: str) -> list[int] | None:
    """Returns the tokens from the user's first word on; None if the template or tokenizer does not part them there.

    Args:
        processor: A processor.
        text: The rendered prompt.
        start: The ``opening`` of its template.
    """
    words = text.removeprefix(start)
    if not text.startswith(start) or not words or words[0].isspace():
        return None
    behind = chat.tokens(processor, words)
    return behind if chat.tokens(processor, text) == chat.tokens(processor, start) + behind else None


def known_video(sample: VideoSample, inputs: Mapping[str, Tensor], behind: Sequence[int] | None) -> KnownVideo | None:
    """Returns what other prompts about a video need of it; None if that cannot be told from this one.

    Args:
        sample: The decoded clip.
        inputs: What the processor made of it and its prompt, [1, P] per token.
        behind: Tokens of the prompt from the user's first word on.
    """
    if not sample.identity or behind is None:
        return None
    rows = {name: value for name, value in inputs.items() if name in _ROWS}
    count = rows["input_ids"].shape[1] - len(behind)
    ends = {name: value[0, count:].tolist() for name, value in rows.items()}
    if ends != _ends(rows, behind):
        return None
    pixels = {name: value for name, value in inputs.items() if name.startswith("pixel")}
    others = {name: value for name, value in inputs.items() if name not in rows and name not in pixels}
    return KnownVideo(
        video=sample.identity,
        shape=tuple(sample.frames.shape),
        timing=sample.timing,
        per_token={name: value[:, :count].numpy() for name, value in rows.items()},
        others={name: value.numpy() for name, value in others.items()},
        pixels={name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in pixels.items()},
    )


def prompt_of_known(known: KnownVideo, behind: Sequence[int], empty: bool) -> dict[str, Tensor]:
    """Returns the inputs of a prompt about a video that is not decoded.

    Args:
        known: What the prompt needs of the video.
        behind: Tokens of the prompt from the user's first word on.
        empty: Whether pixels have a last axis of size 0, and so take no memory; otherwise they are 0.
    """
    rows = {name: torch.from_numpy(value) for name, value in known.per_token.items()}
    ends = {name: torch.tensor([end], dtype=rows[name].dtype) for name, end in _ends(rows, behind).items()}
    shapes = {name: ((*s[:-1], 0) if empty else s, getattr(torch, dtype)) for name, (dtype, s) in known.pixels.items()}
    return {
        **{name: torch.cat([row, ends[name]], dim=1) for name, row in rows.items()},
        **{name: torch.from_numpy(value) for name, value in known.others.items()},
        **{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()},
    }


def _ends(rows: Mapping[str, Tensor], behind: Sequence[int]) -> dict[str, list[int]]:
    """Returns the inputs per token of the user's words and what follows them: text that is not padding."""
    fills = {"input_ids": list(behind), "attention_mask": [1] * len(behind)}
    return {name: fills.get(name, [0] * len(behind)) for name in rows}
