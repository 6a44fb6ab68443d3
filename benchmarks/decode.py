"""Reads the frames of a clip: readers used by hand, this package without anything cached, and from its cache.

    python benchmarks/decode.py [--json FILE] [--repeats 5] [--max_pixels 50176] [--videos 480p,720p,long_gop]

Videos are made by x264: 10 s of 854 x 480 and 60 s of 1280 x 720 with a key frame every two seconds, and the first with
a single key frame (``long_gop``). By hand are decord (which resizes in FFmpeg) and PyAV, from start to end and by
seeking to key frames; the best of them in each row is compared. ``cold`` hashes the file, decodes and stores;
``cached`` looks whether the file has changed and reads the entry. Figures are medians of CPU-seconds, of all threads
and of the helper process, since wall time depends on what else the machine does; wall times are given, too. Variants
take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import av
import decord
import numpy as np
from figures import versions, write_json

from vidreason.datamodules.clips import helper_process, reading
from vidreason.datamodules.clips.decoded import Pixels, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.sampling import uniform_indices

FPS = 30


@dataclass(frozen=True)
class Video:
    """A video to be made."""

    width: int
    height: int
    seconds: int
    gop: int
    """Frames from one key frame to the next."""


VIDEOS = {
    "480p": Video(854, 480, 10, 60),
    "720p": Video(1280, 720, 60, 60),
    "long_gop": Video(854, 480, 10, 10_000),
}


@dataclass(frozen=True)
class Row:
    """The figures of one video and number of frames."""

    video: str
    frames: int
    cpu_s: dict[str, float]
    """Median CPU-seconds by variant."""
    wall_s: dict[str, float]
    """Median seconds by variant."""
    best_by_hand: str
    cached_ratio: float
    """CPU-seconds of the best reader by hand over those of ``cached``."""
    cold_ratio: float


def make_video(path: Path, video: Video) -> None:
    """Writes a video of a textured background that drifts, with noise, so that nothing is trivial to decode."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (video.height // 20 + 2, video.width // 20 + 2, 3), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((20, 20, 1), np.uint8))
    texture = np.concatenate([texture, texture[:, ::-1]], axis=1)
    noise = rng.integers(0, 12, (8, video.height, video.width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "26", "g": str(video.gop), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        for index in range(video.seconds * FPS):
            left = (3 * index) % video.width
            frame = texture[: video.height, left : left + video.width] // 2 + noise[index % 8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def with_decord(path: Path, count: int, size: tuple[int, int], threads: int) -> Pixels:
    """Returns frames [T, H, W, 3] by decord."""
    reader = decord.VideoReader(str(path), width=size[1], height=size[0], num_threads=threads)
    frames: Pixels = reader.get_batch(list(uniform_indices(len(reader), count))).asnumpy()
    return frames


def with_pyav(path: Path, count: int, size: tuple[int, int]) -> Pixels:
    """Returns frames [T, H, W, 3] by PyAV, which decodes the whole file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = set(uniform_indices(stream.frames, count))
        kept = [frame for index, frame in enumerate(container.decode(stream)) if index in wanted]
        return np.stack([frame.to_ndarray(format="rgb24", width=size[1], height=size[0]) for frame in kept])


def with_seeking_pyav(path: Path, count: int, size: tuple[int, int]) -> Pixels:
    """Returns frames [T, H, W, 3] by PyAV, which seeks to the key frame before each."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        for index in uniform_indices(stream.frames, count):
            pts = int(index / FPS / stream.time_base)
            container.seek(pts, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= pts)
            found.append(frame.to_ndarray(format="rgb24", width=size[1], height=size[0]))
    return np.stack(found)


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """Returns CPU-seconds, with those of the helper process, and seconds of a call."""
    helper = helper_process.call(os.getpid, timeout=60)
    cpu, wall = time.process_time() + _cpu_of(helper), time.perf_counter()
    run()
    return time.process_time() + _cpu_of(helper) - cpu, time.perf_counter() - wall


def _cpu_of(process: int) -> float:
    """Returns the CPU-seconds of all threads of a process, those that have ended as well (Linux)."""
    return time.clock_gettime((~process << 3) | 2)  # as clock_getcpuclockid(3) does


def compare(name: str, path: Path, count: int, max_pixels: int, repeats: int, cache: Path) -> Row:
    """Measures all variants on one video."""
    video = VIDEOS[name]
    size = fit_size(video.height, video.width, max_pixels)
    options = FrameOptions(num_frames=count, max_pixels=max_pixels, cache=str(cache))

    def cold() -> object:
        return reading.read_frames(path, options).frames

    variants: dict[str, Callable[[], object]] = {
        "decord": lambda: with_decord(path, count, size, 1),
        "decord, all cores": lambda: with_decord(path, count, size, 0),
        "PyAV": lambda: with_pyav(path, count, size),
        "PyAV, seeking": lambda: with_seeking_pyav(path, count, size),
        "cold": cold,
        "cached": cold,
    }
    taken: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, run in variants.items():
            if variant == "cold":
                shutil.rmtree(cache, ignore_errors=True)
                reading.forget_contents()
            taken[variant].append(measure(run))
    cpu = {variant: statistics.median(times[0] for times in found) for variant, found in taken.items()}
    wall = {variant: statistics.median(times[1] for times in found) for variant, found in taken.items()}
    best = min(list(variants)[:4], key=lambda variant: cpu[variant])
    return Row(name, count, cpu, wall, best, cpu[best] / cpu["cached"], cpu[best] / cpu["cold"])


def main() -> None:
    """Prints one row for each video and number of frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max_pixels", type=int, default=224 * 224)
    parser.add_argument("--frames", default="8,16,32")
    parser.add_argument("--videos", default=",".join(VIDEOS))
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.videos.split(","):
            path = Path(folder, f"{name}.mp4")
            make_video(path, VIDEOS[name])
            for count in map(int, options.frames.split(",")):
                rows.append(compare(name, path, count, options.max_pixels, options.repeats, Path(folder, "cache")))
                print(_text(rows[-1]), flush=True)
    headline = {
        "cached_ratio": min(row.cached_ratio for row in rows),
        "cold_ratio": min(row.cold_ratio for row in rows),
    }
    print("  ".join(f"{key} {value:.2f} at least" for key, value in headline.items()))
    details = {"date": str(date.today()), "repeats": options.repeats, "max_pixels": options.max_pixels}
    details |= {"versions": versions(("av", "decord", "torch")), "rows": [asdict(row) for row in rows]}
    write_json(options.json, {**headline, "details": details})


def _text(row: Row) -> str:
    times = ", ".join(f"{name} {1000 * cpu:.1f}" for name, cpu in row.cpu_s.items())
    ratios = f"cached {row.cached_ratio:.1f}x, cold {row.cold_ratio:.2f}x of {row.best_by_hand}"
    return f"{row.video}, {row.frames} frames: {ratios}; CPU ms: {times}"


if __name__ == "__main__":
    main()
