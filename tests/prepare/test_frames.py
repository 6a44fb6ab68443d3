"""Frames and pixels that ``vidreason init`` suggests, from what was measured of the clips."""

import pytest

from vidreason.datamodules.sources.probing import ClipProbe
from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
from vidreason.prepare import frames
from vidreason.prepare.frames import suggest_frames


def probes(seconds=4.0, sizes=((320, 240),)):
    return [ClipProbe("x", int(seconds * 10), 10.0, w, h, False) for w, h in sizes]


@pytest.mark.parametrize(("seconds", "frames", "more"), [(1, 8, None), (5.0, 10, None), (9.0, 12, 18), (300, 12, 32)])
def test_frames_follow_from_the_median_duration(seconds, frames, more):
    suggestion = suggest_frames(probes(seconds))
    assert suggestion.num_frames == frames
    assert (f"num_frames {more}" in suggestion.why_frames) == (more is not None)
    assert ("num_frames" in suggestion.why_frames) == (more is not None)


def test_pixels_follow_from_the_measured_sizes():
    assert suggest_frames(probes(sizes=[(320, 240)] * 10)).max_pixels == 320 * 240
    one_large = suggest_frames(probes(sizes=[(320, 240)] * 19 + [(1920, 1080)]))
    assert one_large.max_pixels == 320 * 240
    assert "up to 1920 x 1080" in one_large.why_pixels
    assert suggest_frames(probes(sizes=[(1920, 1080)] * 3)).max_pixels == 448 * 448


def test_the_embedded_base_takes_the_suggested_frames():
    assert TinyVLMConfig().max_frames == frames.EMBEDDED_FRAMES
