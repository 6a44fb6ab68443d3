"""Memory is bounded: too large frames and archives are refused, and few frames are in memory at full size."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from vidreason.datamodules.clips import decoded, decord_reader, pyav_packets
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, decode


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_too_large_frames_are_refused_before_they_are_decoded(tmp_path, write_clip, monkeypatch, reader):
    path = write_clip(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr(decoded, "MAX_FRAME_PIXELS", 96 * 64 - 1)
    for module, name in ((pyav_packets, "packets_of"), (decord_reader, "decord")):
        monkeypatch.setattr(module, name, None)  # calling it would be an error
    with pytest.raises(DecodeError, match=r"clip\.mp4: frames of 96 x 64 pixels, more than"):
        decode(path, FrameOptions(reader=reader))


def test_too_large_pictures_are_refused_by_their_header(tmp_path):
    Image.fromarray(np.zeros((8001, 8001), np.uint8)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "clip.zip", "w") as file:
        file.write(tmp_path / "a.png", "a.png")
    with pytest.raises(DecodeError, match=r"clip\.zip: a\.png: frames of 8001 x 8001 pixels, more than the 64"):
        decode(tmp_path / "clip.zip", FrameOptions())


def test_an_archive_that_expands_too_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "clip.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.bmp", bytes(3_000_000))
    with pytest.raises(DecodeError, match="expands to 3000000, more than 2 GB or 100 times"):
        decode(tmp_path / "clip.zip", FrameOptions())


PEAK = """
import resource, sys
from pathlib import Path
from vidreason.datamodules.clips.decoding import FrameOptions, decode
decode(Path(sys.argv[1]), FrameOptions(num_frames=2, max_pixels=10_000, reader=sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(Path(sys.argv[1]), FrameOptions(num_frames=40, max_pixels=10_000, reader=sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_the_peak_does_not_grow_with_the_number_of_frames(tmp_path, write_clip, reader):
    """Forty frames of 24 MB each; a reader that keeps them at full size needs 900 MB more than for two."""
    frames = [np.full((2160, 3840, 3), i * 6, np.uint8) for i in range(40)]
    path = write_clip(tmp_path / "large.mp4", frames)
    run = subprocess.run([sys.executable, "-c", PEAK, str(path), reader], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 250, f"{run.stdout.strip()} MB"


OPENS = """
import os, sys
from pathlib import Path
from vidreason.datamodules.clips.decoding import FrameOptions, decode
def state():
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return rss, len(os.listdir("/proc/self/fd"))
for i in range(int(sys.argv[3])):
    if i == 500:
        before = state()
    decode(Path(sys.argv[1]), FrameOptions(num_frames=2, reader=sys.argv[2]))
print(*before, *state())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_ten_thousand_opens_leave_memory_and_files_flat(tmp_path, write_clip, reader):
    path = write_clip(tmp_path / "clip.mp4", 4)
    command = [sys.executable, "-c", OPENS, str(path), reader, "10000"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rss, files, later, files_later = map(float, run.stdout.split())
    assert files_later == files
    assert later < rss + 30, f"{rss:.0f} MB grew to {later:.0f} MB"
