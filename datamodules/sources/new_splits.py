"""Assigns groups and splits to the clips of a new data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vidreason.datamodules.splits import (
    DEFAULT_FRACTIONS,
    check_disjoint,
    complete_splits,
    first_five,
    make_splits,
)
from vidreason.datamodules.types import Clip


@dataclass(frozen=True)
class Assignment:
    """Clips by split."""

    splits: dict[str, tuple[Clip, ...]]
    made: tuple[str, ...]
    """Splits that the source did not have"""


def group_by_content(clips: Sequence[Clip], shas: Sequence[str]) -> tuple[Clip, ...]:
    """Gives every clip a group: its own, or else its content hash; groups that share a clip are merged.

    Args:
        clips: With the groups of the source, or empty ones.
        shas: Content hash of each.

    Returns:
        The clips in the order given; joined groups carry the name that comes first.
    """
    home: dict[str, str] = {}

    def find(key: str) -> str:
        while home.setdefault(key, key) != key:
            home[key] = home[home[key]]
            key = home[key]
        return key

    named = [f"group {clip.group}" if clip.group else f"sha {sha}" for clip, sha in zip(clips, shas, strict=True)]
    first: dict[str, str] = {}
    for name, sha in zip(named, shas, strict=True):
        one, other = sorted((find(name), find(first.setdefault(sha, name))))
        home[other] = one
    return tuple(replace(clip, group=find(name).partition(" ")[2]) for clip, name in zip(clips, named, strict=True))


def assign_splits(clips: Sequence[Clip], shas: Sequence[str], seed: int) -> Assignment:
    """Makes missing splits; the splits of the source stay as they are.

    Without any split all are made; else whole groups of train become val, cal and test where these are missing.

    Args:
        clips: With the splits of the source, or empty ones; with groups.
        shas: Content hash of each, to tell copies of a clip in two splits.
        seed: Decides between groups that fit equally well.

    Raises:
        ValueError: If splits share a clip or a group, there is no train, or there are too few groups.
    """
    if not any(clip.split for clip in clips):
        assignment = Assignment(make_splits(clips, DEFAULT_FRACTIONS, seed), ("train", *DEFAULT_FRACTIONS))
        check_disjoint(assignment.splits)
        return assignment
    _check_no_copies(clips, shas)
    names = dict.fromkeys(clip.split for clip in clips)
    given = {name: tuple(clip for clip in clips if clip.split == name) for name in names}
    check_disjoint(given)
    if "train" not in given:
        raise ValueError(f"no split is called train; there are {', '.join(sorted(given))}")
    if any(name.startswith("test") for name in given):
        return Assignment(*complete_splits(given, DEFAULT_FRACTIONS, seed))
    missing = {name: share for name, share in DEFAULT_FRACTIONS.items() if name not in given}
    splits = {**given, **make_splits(given["train"], missing, seed)}
    return Assignment(complete_splits(splits, DEFAULT_FRACTIONS, seed)[0], tuple(missing))


def _check_no_copies(clips: Sequence[Clip], shas: Sequence[str]) -> None:
    first: dict[str, Clip] = {}
    torn = []
    for clip, sha in zip(clips, shas, strict=True):
        other = first.setdefault(sha, clip)
        if other.split != clip.split:
            torn.append(f"{other.video_id} ({other.split}) and {clip.video_id} ({clip.split})")
    if torn:
        raise ValueError(f"the same clip lies in two splits, so that test clips would be known: {first_five(torn)}")
