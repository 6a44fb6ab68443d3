"""Multimodal rotary positions (M-RoPE) of the Qwen and GLM families, as published with their weights.

``video_positions`` is the rule of Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, 2502.13923), ``frame_positions`` that of
Qwen3-VL, Qwen3.5 and GLM-4.1V. They are not taken from the installed transformers: ``get_rope_index`` of versions 5.19
to 5.24 lets the text behind a video of the first two start behind its height and width only, so that texts and frames
share positions wherever a video's times reach further.

Letters: B prompts, P tokens of a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def video_positions(
    video: Tensor, mask: Tensor, grids: Tensor, merge: int, seconds: Tensor | None, rate: float
) -> Tensor:
    """Returns positions of time, height and width of prompts with one video each, [3, B, P] int64.

    Text has one position on all axes. Each visual token adds its place in the merged grid to the position at which the
    video starts, and the text behind the video starts behind the largest of these positions.

    Args:
        video: [B, P] bool, True on visual tokens, which are contiguous.
        mask: [B, P] bool, True on real tokens; the others get position 0.
        grids: [B, 3] int64, patches along time, height and width.
        merge: Patches that are merged to one visual token, along height and along width.
        seconds: [B] float32, seconds per step of the temporal grid; None if a step is one position, as in Qwen2-VL.
        rate: Positions per second.
    """
    height, width = (grids[:, 1:, None] // merge).unbind(1)
    place = (video.long().cumsum(-1) - 1).clamp(min=0)
    step = place // (height * width)
    time = step if seconds is None else (step * seconds[:, None] * rate).long()  # rounded down, as published
    offsets = torch.stack([time, place // width % height, place % width])
    reach = offsets.masked_fill(~video, -1).amax(dim=(0, 2))[:, None] + 1
    text = (mask & ~video).long().cumsum(-1)
    behind = video.long().cumsum(-1) > 0
    positions = torch.where(video, text + offsets, text - 1 + reach * behind)
    return positions.masked_fill(~mask, 0)


def frame_positions(visual: Tensor, mask: Tensor, grids: Tensor, merge: int) -> Tensor:
    """Returns positions of prompts whose video is one image after another, with text between, [3, B, P] int64.

    This is the rule of Qwen3-VL (arXiv 2511.21631) and GLM-4.1V: each step of the temporal grid starts where the text
    before it ends, and the text behind it starts behind its height and width. The text tells the time.

    Args:
        visual: [B, P] bool, True on visual tokens.
        mask: [B, P] bool, True on real tokens; the others get position 0.
        grids: [B, 3] int64, patches along time, height and width.
        merge: Patches that are merged to one visual token, along height and along width.
    """
    height, width = (grids[:, 1:, None] // merge).unbind(1)
    reach = torch.maximum(height, width)
    seen = visual.long().cumsum(-1)
    place = (seen - 1).clamp(min=0)
    step, inner = place // (height * width), place % (height * width)
    offsets = torch.stack([torch.zeros_like(inner), inner // width, inner % width])
    text = (mask & ~visual).long().cumsum(-1)
    positions = torch.where(visual, text + step * reach + offsets, text - 1 + (seen > 0) * (step + 1) * reach)
    return positions.masked_fill(~mask, 0)
