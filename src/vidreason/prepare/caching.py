"""``vidreason data cache``: decodes the clips of a data section into the cache of frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.frame_cache import GB, frame_cache
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.sources.probing import Unreadable, map_clips
from vidreason.datamodules.split_names import STANDARD_SPLITS
from vidreason.prepare.files import printable
from vidreason.signals import handle_signals

_MOST_LINES = 20


@dataclass(frozen=True)
class CacheReport:
    """The result of filling a cache."""

    folder: Path
    clips: int
    written: int
    """Clips that were decoded and stored."""
    found: int
    """Clips that were there already."""
    unreadable: tuple[tuple[Path, str], ...]
    """Path and reason."""
    gb: float
    max_gb: float
    stopped: str
    """The reason why not all clips are stored; empty if they are."""
    left_out: bool = False
    """True if the training split was left out."""

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        again = self.clips - self.written - self.found - len(self.unreadable)
        parts = [f"{self.written} decoded now", f"{self.found} found there"]
        parts += [f"{again} not stored"] if again else []
        parts += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        lines = [f"{self.folder}: {self.clips} clips, {', '.join(parts)}; {self.gb:.3g} of at most {self.max_gb:g} GB"]
        lines += [f"  unreadable: {printable(str(path))}: {why}" for path, why in self.unreadable[:_MOST_LINES]]
        more = len(self.unreadable) - _MOST_LINES
        lines += [f"  and {more} more"] if more > 0 else []
        if again and not self.stopped:
            lines.append("  not stored are clips of which parts cannot be decoded; each read decodes them again")
        if self.left_out:
            lines.append(
                "  left out is the split train: each epoch takes other frames of it (frames.sampling: segment)"
            )
        return lines


def fill_cache(data: VideoDataModule, workers: int) -> CacheReport:
    """Decodes the clips of all splits into the cache that ``data.frames`` names, unless they are there.

    Args:
        data: The data module; if training takes other frames in each epoch, its split is left out.
        workers: Clips decoded at the same time.

    Raises:
        ValueError: If ``frames`` names no cache.
    """
    frames = data.frames
    if frames.cache is None:
        raise ValueError(
            "data.init_args.frames.cache is null: give --data.init_args.frames.cache FOLDER, here and to the commands "
            "that shall use it, or name the folder in the data section"
        )
    splits = list(dict.fromkeys((*STANDARD_SPLITS, *data.splits())))
    if frames.jittered_in_training:
        splits.remove("train")
    clips = list(dict.fromkeys((clip.path, clip.stretch) for split in splits for clip in data.clips(split)))
    store = frame_cache(frames.cache, frames.cache_gb)
    before = store.counts.read, store.counts.written
    unreadable = []
    with handle_signals():  # Ctrl-C ends the reads, too
        results = map_clips(lambda path, stretch: read_frames(path, frames, stretch=stretch).reader, clips, workers)
        bar = tqdm(results, total=len(clips), desc="decoding", unit="clip", leave=False, disable=None)
        for (path, _), result in zip(clips, bar, strict=True):
            if isinstance(result, Unreadable):
                unreadable.append((path, result.reason))
    return CacheReport(
        store.folder.folder,
        len(clips),
        written=store.counts.written - before[1],
        found=store.counts.read - before[0],
        unreadable=tuple(unreadable),
        gb=store.folder.bytes / GB,
        max_gb=store.max_gb,
        stopped=store.stopped,
        left_out=frames.jittered_in_training,
    )
