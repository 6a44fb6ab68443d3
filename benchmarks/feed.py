"""Clips a second through the data module: cold, with decoded frames, and with known vision embeddings.

    make links && PYTHONPATH=.typing python benchmarks/feed.py --json benchmarks/results/DATE_feed.json

Clips of 640 x 480 pixels with moving noise, H.264, of which 32 frames of at most 200,704 pixels are taken, and the
processor of Qwen2.5-VL (4,032 visual tokens a clip). The model behind it is tiny, since no epoch that is timed runs it;
it only fills the cache. An epoch is timed from the first batch asked for to the last one received.

- *cold*: every clip is decoded and preprocessed.
- *frames only*: decoded frames are in memory, as with a cache of frames that costs nothing; clips are preprocessed.
- *warm*: the embeddings of every clip are in the vision cache, on disk. Nothing is decoded or preprocessed.

Decodes and calls of the processor are counted in epochs without workers. Bytes are those of a clip's pixels on their
way to the device, in the processor's float32, in bfloat16 for a bfloat16 vision tower, and warm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import torch
from figures import versions, write_json
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import vlm_builders

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import ClipView, LabelView
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions

PACKAGES = ("torch", "transformers", "lightning", "av")
LABELS = ("left", "right")
PIXELS = 448 * 448


class NoiseClips(VideoDataModule):
    """Synthetic clips; ``frames_in_memory`` holds decoded clips, which are not decoded again."""

    def __init__(self, paths: Sequence[Path], counts: Counter[str], **options: Any) -> None:
        super().__init__(**options)
        self.paths, self.counts = tuple(paths), counts
        self.frames_in_memory: dict[str, DecodedVideo] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        """The two labels."""
        return LABELS

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns all clips as split train."""
        paths = self.paths if split == "train" else ()
        return [Clip(path, LABELS[i % 2], path.stem, group=path.stem) for i, path in enumerate(paths)]

    def setup(self, stage: str) -> None:
        """Takes the clips as they are, without other splits."""
        self._clips = {"train": tuple(self.samples("train"))}

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Returns a dataset that counts what it decodes."""
        made = _Counted(clips, view, self.frames, self.seed, train)
        made.counts, made.in_memory = self.counts, self.frames_in_memory
        return made


class _Counted(ClipDataset):
    counts: Counter[str]
    in_memory: dict[str, DecodedVideo]

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Returns the frames of a clip, from memory if they are there."""
        if clip.video_id in self.in_memory:
            return self.in_memory[clip.video_id]
        self.counts["decodes"] += 1
        return super().read(clip, jitter)


def write_clips(folder: Path, count: int, seconds: float, size: tuple[int, int]) -> list[Path]:
    """Writes clips of noise that moves, 25 frames a second."""
    width, height = size
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        canvas = rng.integers(0, 255, (height // 8 + 64, width // 8 + 64, 3), np.uint8)
        path = folder / f"clip{number:03d}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"threads": "1", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(round(25 * seconds)):
                shift = index % 64
                part = canvas[shift : shift + height // 8, shift : shift + width // 8]
                picture = part.repeat(8, axis=0).repeat(8, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        paths.append(path)
    return paths


class Feed:
    """The data module with its model, and what is counted."""

    def __init__(self, folder: Path, paths: Sequence[Path], frames: int, pixels: int, workers: int) -> None:
        self.counts: Counter[str] = Counter()
        cache = VisionCacheOptions(folder=str(folder / "embeddings"), memory_gb=0)
        self.vlm = QwenVL(str(folder / "model"), dtype="bfloat16", max_pixels=pixels, vision_cache=cache)
        self.data = NoiseClips(
            paths,
            self.counts,
            encoder=self.vlm,
            frames=FrameOptions(num_frames=frames, max_pixels=pixels),
            batch_size=4,
            num_workers=workers,
        )
        self.model: nn.Module = self.vlm.build().eval()

    def warm(self) -> None:
        """Fills the vision cache."""
        with torch.no_grad():
            for batch in self.data.loader("train", self.view, batch_size=1):
                self.vlm.score(self.model, batch.prompts, batch.texts)

    @property
    def view(self) -> ClipView:
        """Returns the view of the measured loaders, whose prompt asks for the label of a clip."""
        return LabelView(self.data.task)

    def epochs(self, repeats: int) -> list[float]:
        """Returns clips per second of epochs after a first one, in which workers start."""
        loader = self.data.loader("train", self.view)
        rates = []
        for _ in range(1 + repeats):
            self.counts.clear()
            start = time.perf_counter()
            clips = sum(len(batch) for batch in loader)
            rates.append(clips / (time.perf_counter() - start))
        return rates[1:]

    def pixel_bytes(self) -> int:
        """Returns the bytes of the pixels of a clip."""
        batch: VideoBatch = next(iter(self.data.loader("train", self.view, batch_size=1)))
        return sum(v.nbytes for name, v in batch.prompts.inputs.items() if name.startswith("pixel"))

    @contextmanager
    def counting_processor(self) -> Iterator[None]:
        """Counts the videos that the processor gets in this process."""
        kind, real = type(self.vlm.processor), type(self.vlm.processor).__call__

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts["processed"] += kwargs.get("videos") is not None
            return real(*args, **kwargs)

        with patch.object(kind, "__call__", counted):
            yield


def measure(
    folder: Path, paths: Sequence[Path], frames: int, pixels: int, workers: int, repeats: int
) -> dict[str, Any]:
    """Measures the three kinds of epochs with a number of workers."""
    feed = Feed(folder, paths, frames, pixels, workers)
    found: dict[str, Any] = {"workers": workers}

    def timed(name: str) -> None:
        with feed.counting_processor():
            rates = feed.epochs(repeats)
        found[name] = {"clips_per_s": statistics.median(rates), "rates": rates}
        if not workers:
            found[name] |= {"decodes": feed.counts["decodes"], "processed": feed.counts["processed"]}

    with patch.object(QwenVL, "knows_videos", False):
        timed("cold")
        found["bf16_bytes"], feed.vlm.pixel_dtype = feed.pixel_bytes(), None
        found["fp32_bytes"], feed.vlm.pixel_dtype = feed.pixel_bytes(), torch.bfloat16
        dataset = feed.data.loader("train", feed.view).dataset
        assert isinstance(dataset, ClipDataset)
        feed.data.frames_in_memory = {clip.video_id: dataset.read(clip, None) for clip in dataset.clips}
        timed("frames_only")
        feed.data.frames_in_memory.clear()
    if not feed.vlm.knows_videos:
        feed.warm()
    timed("warm")
    found["warm_bytes"] = feed.pixel_bytes()
    for name in ("frames_only", "warm"):
        found[name]["times_cold"] = found[name]["clips_per_s"] / found["cold"]["clips_per_s"]
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures without and with workers; returns the content of the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small clips, for a test")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    frames, pixels, size = (4, 56 * 56, (96, 64)) if options.tiny else (32, PIXELS, (640, 480))
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        vlm_builders.write_qwen(folder / "model", max_position_embeddings=32768)
        paths = write_clips(folder, options.clips, 0.5 if options.tiny else 10.0, size)
        for workers in (0, 2):
            row = measure(folder, paths, frames, pixels, workers, options.repeats)
            rows.append(row)
            rates = ", ".join(f"{k} {row[k]['clips_per_s']:.2f}" for k in ("cold", "frames_only", "warm"))
            print(
                f"{workers} workers, clips a second: {rates}; warm {row['warm']['times_cold']:.0f} x cold", flush=True
            )
    print(f"bytes a clip: {row['fp32_bytes']} in float32, {row['bf16_bytes']} in bfloat16, {row['warm_bytes']} warm")
    where = {"date": date.today().isoformat(), "cores": os.cpu_count(), "load_average": os.getloadavg()}
    result = {**where, "versions": versions(PACKAGES), "clips": options.clips, "frames": frames, "rows": rows}
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
