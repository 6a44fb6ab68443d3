import logging

import numpy as np
import pytest
import torch

from vidreason.datamodules.clips import decoding, reading
from vidreason.datamodules.clips.decoded import DecodeError, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames

READERS = ["decord", "pyav"]


@pytest.fixture(autouse=True)
def _decord_or_skip(request):
    if request.node.callspec.params.get("reader") == "decord" if hasattr(request.node, "callspec") else False:
        pytest.importorskip("decord", reason="decord has no wheel for this platform")


def indices_shown(frames: torch.Tensor) -> tuple[int, ...]:
    """Reads the index that each frame carries as six stripes."""
    height, width = frames.shape[2:]
    centres = [round((i + 0.5) * width / 6) for i in range(6)]
    bits = frames[:, 1, height // 2, centres] > 128
    return tuple(int(sum(bool(bit) << (5 - place) for place, bit in enumerate(row))) for row in bits)


@pytest.mark.parametrize("reader", READERS)
def test_frames_are_the_ones_asked_for(write_clip, tmp_path, reader):
    path = write_clip(tmp_path / "clip.mp4", frames=40, fps=20)
    video = read_frames(path, FrameOptions(num_frames=8, reader=reader))
    assert video.reader == reader
    assert video.frames.shape == (8, 3, 64, 96)
    assert video.frames.dtype == torch.uint8
    assert indices_shown(video.frames) == (2, 7, 12, 17, 22, 27, 32, 37) == video.timing.indices
    assert (video.timing.total_frames, video.timing.fps, video.timing.duration) == (40, 20.0, 2.0)
    assert not video.partial


@pytest.mark.parametrize("reader", READERS)
def test_short_clip_repeats_frames(write_clip, tmp_path, reader):
    video = read_frames(write_clip(tmp_path / "clip.mp4", frames=3), FrameOptions(num_frames=6, reader=reader))
    assert indices_shown(video.frames) == (0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize("reader", READERS)
def test_fps_sampling(write_clip, tmp_path, reader):
    path = write_clip(tmp_path / "clip.mp4", frames=30, fps=10)
    video = read_frames(path, FrameOptions(num_frames=32, sampling="fps", fps=2.0, reader=reader))
    assert indices_shown(video.frames) == (0, 5, 10, 15, 20, 25)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("start", [0.0, 100.0])
def test_frames_of_a_variable_rate_are_chosen_by_their_times(write_clip, tmp_path, reader, start):
    """Ten frames in the first second, then five frames two seconds apart: 15 frames, the last at 10.9 s."""
    times = [start + t for t in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 2.9, 4.9, 6.9, 8.9, 10.9)]
    path = write_clip(tmp_path / "clip.mkv", frames=15, times=times)
    every_second = read_frames(path, FrameOptions(num_frames=32, sampling="fps", fps=1.0, reader=reader))
    assert indices_shown(every_second.frames) == (0, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13)
    seconds = [position / every_second.timing.fps for position in every_second.timing.indices]
    assert seconds == pytest.approx(list(range(11)))
    # the middles of three thirds lie at 1.6, 5.5 and 9.3 seconds; by position frames 2, 7 and 12 would be taken
    assert indices_shown(read_frames(path, FrameOptions(num_frames=3, reader=reader)).frames) == (9, 11, 13)


@pytest.mark.parametrize("reader", READERS)
def test_segment_sampling_jitters_with_a_generator_only(write_clip, tmp_path, reader):
    path = write_clip(tmp_path / "clip.mp4", frames=60)
    options = FrameOptions(num_frames=4, sampling="segment", reader=reader)
    assert indices_shown(read_frames(path, options).frames) == (7, 22, 37, 52)
    jittered = read_frames(path, options, torch.Generator().manual_seed(5))
    again = read_frames(path, options, torch.Generator().manual_seed(5))
    assert jittered.timing.indices == again.timing.indices != (7, 22, 37, 52)
    assert indices_shown(jittered.frames) == jittered.timing.indices


def test_readers_agree(write_clip, tmp_path):
    pytest.importorskip("decord", reason="decord has no wheel for this platform")
    path = write_clip(tmp_path / "clip.mp4", frames=25)
    both = [read_frames(path, FrameOptions(reader=reader, max_pixels=2000)) for reader in READERS]
    assert torch.equal(both[0].frames, both[1].frames)
    assert both[0].timing == both[1].timing


def test_auto_takes_decord_and_says_so_once(write_clip, tmp_path, caplog):
    pytest.importorskip("decord", reason="decord has no wheel for this platform")
    reading._report.cache_clear()
    path = write_clip(tmp_path / "clip.mp4")
    with caplog.at_level(logging.INFO, logger="vidreason"):
        assert {read_frames(path, FrameOptions()).reader for _ in range(3)} == {"decord"}
    assert [record.message for record in caplog.records] == [
        "videos are read with decord, and with PyAV where decord fails or is slower"
    ]


def test_auto_goes_without_decord(write_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "decord", lambda: None)
    path = write_clip(tmp_path / "clip.mp4")
    assert read_frames(path, FrameOptions(timeout=None)).reader == "pyav"
    with pytest.raises(DecodeError, match="not installed"):
        read_frames(path, FrameOptions(reader="decord", timeout=None))


def test_pyav_takes_over_what_decord_cannot_read(write_clip, tmp_path):
    path = write_clip(
        tmp_path / "clip.gif", frames=[np.full((48, 64, 3), 30 * i, np.uint8) for i in range(6)], codec="gif"
    )
    assert read_frames(path, FrameOptions(num_frames=3)).reader == "pyav"


def test_pixel_budget_only_shrinks(write_clip, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", size=(96, 64))
    assert read_frames(path, FrameOptions(max_pixels=1536)).frames.shape[2:] == (32, 48)
    assert read_frames(path, FrameOptions(max_pixels=10**6)).frames.shape[2:] == (64, 96)


@pytest.mark.parametrize("size", [(1, 1), (1080, 1920), (640, 16), (16, 640), (3, 100_000)])
@pytest.mark.parametrize("budget", [1, 7, 1000, 200_704])
def test_fit_size_holds_the_budget(size, budget):
    height, width = fit_size(*size, budget)
    assert height >= 1
    assert width >= 1
    assert height * width <= max(budget, 1)
    if size[0] * size[1] <= budget:
        assert (height, width) == size
    elif min(height, width) > 10:
        assert height / width == pytest.approx(size[0] / size[1], rel=0.1)


def damaged(kind: str, whole: bytes) -> bytes:
    return {"text": b"version https://git-lfs\n", "empty": b"", "cut": whole[: len(whole) // 3]}[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
@pytest.mark.parametrize("reader", ["auto", *READERS])
def test_unreadable_files_name_path_and_reader(write_clip, tmp_path, kind, reader):
    path = tmp_path / "broken.mp4"
    path.write_bytes(damaged(kind, write_clip(tmp_path / "clip.mp4").read_bytes()))
    with pytest.raises(DecodeError, match=r"broken\.mp4") as caught:
        read_frames(path, FrameOptions(reader=reader))
    assert {"text": "Git LFS", "empty": "is empty", "cut": "PyAV"}[kind] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_middle_is_read_in_part(write_clip, tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(40)]
    content = bytearray(write_clip(tmp_path / "clip.mp4", frames=noise, codec="mpeg4").read_bytes())
    start = content.index(b"mdat")
    middle = start + (len(content) - start) // 2
    content[middle : middle + 4000] = bytes(4000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(content))
    video = read_frames(path, FrameOptions(num_frames=12, reader="pyav"))
    assert len(video.frames) == 12
    assert max(video.timing.indices) < video.timing.total_frames <= 40


def test_no_video_and_no_file(tmp_path):
    with pytest.raises(DecodeError, match="no such file"):
        read_frames(tmp_path / "nothing.mp4", FrameOptions())
    with pytest.raises(DecodeError, match="no such file"):
        read_frames(tmp_path, FrameOptions())


def test_frame_count_is_not_believed(write_clip, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", frames=20)
    video = read_frames(path, FrameOptions(num_frames=4, reader="pyav"))
    assert indices_shown(video.frames) == (2, 7, 12, 17)


def test_decode_error_survives_a_worker():
    assert str(DecodeError("clip.mp4: broken")) == "clip.mp4: broken"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_frames": 0}, "num_frames"), ({"max_pixels": 0}, "max_pixels"), ({"sampling": "fps"}, "positive fps")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FrameOptions(**options)
