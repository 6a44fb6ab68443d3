"""Positions of families with M-RoPE against the published formula, written as a loop over tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from published_positions import published_frame_positions, published_positions
from torch import Tensor
from vlm_builders import PROMPTS

from vidreason.datamodules.types import Example, FrameTiming
from vidreason.lightning_modules.vlms import qwen
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.prefix.layout import next_positions, unwrap

MakeVLM = Callable[..., VLM]
FAMILIES = ("qwen", "qwen2")
CLIPS = ((16, (56, 56)), (2, (112, 56)), (8, (28, 84)))  # frames and size: times beyond, at and below the spatial grid


def example_at(rate: float, frames: int, size: tuple[int, int], prompt: str, seed: int = 0) -> Example:
    """A clip of which ``rate`` frames a second were taken."""
    made = builders.make_example(prompt=prompt, frames=frames, size=size, seed=seed)
    timing = FrameTiming(fps=rate, total_frames=frames, indices=tuple(range(frames)))
    return replace(made, sample=replace(made.sample, timing=timing))


def inputs_at(vlm: VLM, rate: float) -> dict[str, Tensor]:
    examples = [example_at(rate, *clip, prompt) for clip, prompt in zip(CLIPS, PROMPTS, strict=True)]
    return dict(vlm.encode(examples).prompts.inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [0.7, 1, 1.2, 3, 4, 8, 32])
def test_positions_follow_the_published_formula(make_vlm: MakeVLM, family: str, rate: float) -> None:
    """Left-padded prompts behind unequal clips; sampled tokens continue behind the largest position."""
    vlm = make_vlm(family, max_pixels=28 * 28 * 16)
    model = unwrap(vlm.build())
    inputs = inputs_at(vlm, rate)
    expected = published_positions(model.config, inputs)
    found = vlm.position_ids(model, inputs)
    assert found.equal(expected)
    assert not inputs["attention_mask"].all(), "a row is padded"
    assert next_positions(found).tolist() == (expected.amax(dim=(0, 2)) + 1).tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "glm", "glm46"])
def test_positions_of_frames_with_times_between(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family, max_pixels=28 * 28 * 16)
    model = unwrap(vlm.build())
    token = model.config.image_token_id if family.startswith("glm") else model.config.video_token_id
    for rate in (0.7, 2, 8):
        inputs = inputs_at(vlm, rate)
        found = vlm.position_ids(model, inputs)
        assert found.equal(published_frame_positions(model.config, inputs, token))
        assert not inputs["attention_mask"].all(), "a row is padded"


@pytest.mark.parametrize(
    ("family", "rate", "times"),
    [
        ("qwen", 1.0, [0, 4, 8, 12, 16, 20, 24, 28]),  # 2 frames a step, 2 positions a second
        ("qwen", 4.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("qwen", 8.0, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("qwen2", 8.0, [0, 1, 2, 3, 4, 5, 6, 7]),  # no time factor
    ],
)
def test_times_by_hand(make_vlm: MakeVLM, family: str, rate: float, times: list[int]) -> None:
    vlm = make_vlm(family)
    inputs = dict(vlm.encode([example_at(rate, 16, (56, 56), "who?")]).prompts.inputs)
    model = unwrap(vlm.build())
    time, height, width = vlm.position_ids(model, inputs)[:, 0]
    video = inputs["input_ids"][0] == model.config.video_token_id
    start = int(video.nonzero()[0])
    assert (time[video] - start).tolist() == [t for t in times for _ in range(4)]
    assert (height[video] - start).tolist() == [0, 0, 1, 1] * 8
    assert (width[video] - start).tolist() == [0, 1, 0, 1] * 8
    behind = int(video.nonzero()[-1]) + 1
    assert [axis[behind] for axis in (time, height, width)] == [start + times[-1] + 1] * 3
    assert time[behind:].diff().eq(1).all()


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "qwen3_5", "glm"])
def test_a_texts_positions_do_not_change_those_of_its_prompt(make_vlm: MakeVLM, family: str) -> None:
    """The naive route appends texts, padded on the right."""
    vlm = make_vlm(family)
    model = unwrap(vlm.build())
    inputs = inputs_at(vlm, 2)
    alone = vlm.position_ids(model, inputs)
    for name, fill in (("input_ids", 30), ("attention_mask", 1)):
        inputs[name] = torch.cat([inputs[name], torch.full((3, 4), fill)], dim=1)
    inputs["attention_mask"][1, -2:] = 0
    found = vlm.position_ids(model, inputs)
    assert found[..., :-4].equal(alone)
    steps = torch.arange(4)
    assert found[0, 0, -4:].equal(next_positions(alone)[0] + steps)


@pytest.mark.parametrize(("rate", "reports"), [(4.0, 0), (8.0, 1)])
def test_shared_times_are_reported_once(
    make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, rate: float, reports: int
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(qwen, "rank_zero_info", said.append)
    vlm = make_vlm("qwen")
    model = unwrap(vlm.build())
    for _ in range(2):
        vlm.position_ids(model, inputs_at(vlm, rate))
    assert len(said) == reports
