"""The published positions of families with M-RoPE as loops over tokens, to compare with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def published_positions(config: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[3, B, P] positions of prompts with one video each; 0 on padding."""
    merge = config.vision_config.spatial_merge_size
    table = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.long)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        steps, height, width = inputs["video_grid_thw"][row].tolist()
        cells = [(t, h, w) for t in range(steps) for h in range(height // merge) for w in range(width // merge)]
        real = [column for column, kept in enumerate(inputs["attention_mask"][row].tolist()) if kept]
        following, start = 0, None  # where the next text token goes; where the video starts
        largest = -1
        for column in real:
            if ids[column] != config.video_token_id:
                place: tuple[int, ...] = (following,) * 3
            else:
                start = following if start is None else start
                t, h, w = cells.pop(0)
                if hasattr(config.vision_config, "tokens_per_second"):
                    # In fp32, as published. In float64, times that are exact products are rounded down to the number
                    # before: at 1.2 frames per second the third step is 9.9999998 instead of 10.
                    seconds = np.float32(inputs["second_per_grid_ts"][row])
                    t = int(np.float32(t) * seconds * np.float32(config.vision_config.tokens_per_second))
                place = (start + t, start + h, start + w)
            largest = max(largest, *place)
            following = start if start is not None and cells else largest + 1
            table[:, row, column] = torch.tensor(place)
        assert not cells, "the video has more tokens than its grid"
    return table


def published_frame_positions(config: Any, inputs: Mapping[str, Tensor], token: int) -> Tensor:
    """[3, B, P] positions of prompts of Qwen3-VL or GLM-4.1V, where each step of a video is an image of its own."""
    merge = config.vision_config.spatial_merge_size
    table = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.long)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        _, height, width = (n // merge for n in inputs["video_grid_thw"][row].tolist())
        cells = [(h, w) for h in range(height) for w in range(width)]
        following, left = 0, list(cells)
        for column, kept in enumerate(inputs["attention_mask"][row].tolist()):
            if not kept:
                continue
            if ids[column] != token:
                table[:, row, column] = following
                following += 1
                continue
            h, w = left.pop(0)
            table[:, row, column] = torch.tensor([following, following + h, following + w])
            if not left:
                following, left = following + max(height, width), list(cells)
    return table


def position_ids(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Positions for a forward of transformers' own; None where those that it works out itself are right."""
    config = getattr(model, "get_base_model", lambda: model)().config
    return published_positions(config, inputs) if config.model_type in ("qwen2_vl", "qwen2_5_vl") else None
