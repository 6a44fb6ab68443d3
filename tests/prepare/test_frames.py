"""Frames and pixels that ``vidreason init`` suggests, from what was measured of the clips."""

import pytest
from vlm_builders import make_example, write_qwen

from vidreason.datamodules.clips.measuring import ClipProbe
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.prepare import frames
from vidreason.prepare.frames import limits_of, suggest_frames, visual_tokens

EMBEDDED, QWEN = limits_of(None), limits_of("configs/vlm/qwen2_5_vl_3b.yaml")


def probes(seconds=4.0, sizes=((320, 240),)):
    return [ClipProbe("x", int(seconds * 10), 10.0, w, h, False) for w, h in sizes]


@pytest.mark.parametrize(("seconds", "frames", "more"), [(1, 8, None), (5.0, 10, None), (9.0, 12, 18), (300, 12, 32)])
def test_frames_follow_from_the_median_duration(seconds, frames, more):
    suggestion = suggest_frames(probes(seconds), EMBEDDED)
    assert suggestion.num_frames == frames
    assert (f"would be {more}" in suggestion.why_frames) == (more is not None)
    assert ("--vlm MODEL" in suggestion.why_frames) == (more is not None)
    assert suggest_frames(probes(seconds), QWEN).num_frames == (more or frames), "the embedded base limits no other"
    assert "would be" not in suggest_frames(probes(seconds), QWEN).why_frames


def test_pixels_follow_from_the_measured_sizes():
    assert suggest_frames(probes(sizes=[(320, 240)] * 10), EMBEDDED).max_pixels == 320 * 240
    one_large = suggest_frames(probes(sizes=[(320, 240)] * 19 + [(1920, 1080)]), EMBEDDED)
    assert one_large.max_pixels == 320 * 240
    assert "up to 1920 x 1080" in one_large.why_pixels
    assert suggest_frames(probes(sizes=[(1920, 1080)] * 3), EMBEDDED).max_pixels == 448 * 448


def test_pixels_are_those_of_the_model_that_is_named(tmp_path):
    (tmp_path / "small.yaml").write_text("class_path: some.VLM\ninit_args: {path: x, max_pixels: 50176}\n")
    large = probes(sizes=[(1920, 1080)] * 3)
    assert suggest_frames(large, limits_of(str(tmp_path / "small.yaml"))).max_pixels == 224 * 224
    assert suggest_frames(large, QWEN).max_pixels == 200704
    assert limits_of("configs/vlm/tiny.yaml") == EMBEDDED
    with pytest.raises(ValueError, match=r"--vlm configs/vlm/no.yaml: no such file"):
        limits_of("configs/vlm/no.yaml")


def test_the_embedded_base_takes_the_suggested_frames():
    assert TinyVLMConfig().max_frames == frames.EMBEDDED_FRAMES


@pytest.mark.parametrize("size", [(480, 640), (120, 160)])
def test_visual_tokens_are_about_those_of_the_processors(tmp_path, size):
    """Sides are rounded to whole tokens, which is left out."""
    suggestion = suggest_frames(probes(sizes=[size[::-1]]), EMBEDDED)
    for name, vlm in {
        "the embedded base": TinyVLM(),
        "Qwen2.5-VL": QwenVL(str(write_qwen(tmp_path / "qwen")), max_pixels=frames.MOST_PIXELS),
    }.items():
        height, width = (int(side * min(1, suggestion.max_pixels / size[0] / size[1]) ** 0.5) for side in size)
        example = make_example(frames=suggestion.num_frames, size=(height, width))
        inputs = vlm.encode([example]).prompts.inputs
        count = int(sum((inputs["input_ids"] == token).sum() for token in vlm.placeholder_ids))
        assert visual_tokens(suggestion)[name] == pytest.approx(count, rel=0.1)
