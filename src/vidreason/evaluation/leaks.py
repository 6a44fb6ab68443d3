"""Refuses evaluations on clips that a run has used before."""

from __future__ import annotations

from collections.abc import Sequence

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import Clip

USED_SPLITS = ("train", "val", "cal")
"""Splits that weights, checkpoints and temperatures come from."""


def check_unseen(data: VideoDataModule, splits: Sequence[str]) -> None:
    """Checks that no clip to evaluate was used to train, to choose a checkpoint or to fit a temperature.

    Args:
        data: The run's data module, set up.
        splits: The splits to evaluate.

    Raises:
        ValueError: If a split is none of test, or one of its clips has the same content as a clip of train, val or cal.
    """
    for split in splits:
        if split in USED_SPLITS:
            raise ValueError(f"--splits {split}: the run has trained, chosen or calibrated on these clips")
        if not data.clips(split):
            raise ValueError(f"--splits {split}: has no clips; test splits are {', '.join(data.test_split_names)}")
    seen = {_content(clip): (split, clip) for split in USED_SPLITS for clip in data.clips(split)}
    both = [(clip, *seen[key]) for split in splits for clip in data.clips(split) if (key := _content(clip)) in seen]
    if both:
        listed = [f"{clip.video_id} is {known.video_id} of {split}" for clip, split, known in both]
        raise ValueError(
            f"{len(both)} clips of {', '.join(splits)} have the same content as clips that the run has used: "
            f"{first_five(listed)}; take them out of the test (`vidreason data check` lists them) and evaluate again"
        )


def _content(clip: Clip) -> tuple[str, object]:
    """Returns what a clip shows, as a key: the hash of its file, and its stretch of it."""
    return content_sha(clip.path) if clip.path.exists() else clip.video_id, clip.stretch
