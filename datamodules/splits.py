"""Splits that share no group: they are made if none are given, completed if some are missing, and always checked.

A group (a person, a source video) is never divided. Groups are assigned greedily, largest first, each to the split
that is furthest from its share of the group's classes; the seed decides between groups of equal size. A group that is
the only one with a class stays in train.
"""

from __future__ import annotations

import csv
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vidreason.datamodules.atomic_files import atomic_file
from vidreason.datamodules.split_names import STANDARD_SPLITS
from vidreason.datamodules.types import Clip

_LOG = logging.getLogger(__name__)

DEFAULT_FRACTIONS: Mapping[str, float] = {"val": 0.15, "cal": 0.15, "test": 0.2}
"""Share of the clips that each split other than train gets if it has to be made."""


def make_splits(clips: Sequence[Clip], fractions: Mapping[str, float], seed: int) -> dict[str, tuple[Clip, ...]]:
    """Divides clips into train and the named splits, group by group.

    Args:
        clips: All clips; a clip with an empty group is a group of its own.
        fractions: Share of each split but train, which gets the rest.
        seed: Decides between groups that fit equally well.

    Returns:
        Clips by split, train first, in the order given, with their ``split`` set.

    Raises:
        ValueError: If the shares leave train nothing, or there are fewer groups than splits.
    """
    shares = {"train": 1.0 - sum(fractions.values()), **fractions}
    if any(share <= 0 for share in shares.values()) or "train" in fractions:
        raise ValueError(
            f"split fractions must be positive, name no train and sum to less than 1, got {dict(fractions)}"
        )
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[group_key(clip)].append(clip)
    if len(groups) < len(shares):
        raise ValueError(
            f"{len(clips)} clips in {len(groups)} groups cannot fill {', '.join(shares)}: a group is never divided; "
            "bring more groups or a split column"
        )
    split_of = _deal(groups, shares, seed)
    return {
        split: tuple(replace(clip, split=split) for clip in clips if split_of[group_key(clip)] == split)
        for split in shares
    }


def complete_splits(
    given: Mapping[str, Sequence[Clip]], fractions: Mapping[str, float], seed: int
) -> tuple[dict[str, tuple[Clip, ...]], tuple[str, ...]]:
    """Makes ``val`` and ``cal`` from groups of train if they are missing; all other splits stay unchanged.

    Args:
        given: Clips by split.
        fractions: Shares of the clips of train that val and cal get.
        seed: Decides between groups that fit equally well.

    Returns:
        All splits, standard ones first, and the names of those that were made. Where train has too few groups they stay
        missing, with a warning.
    """
    splits = {name: tuple(clips) for name, clips in given.items() if clips}
    train = splits.get("train", ())
    missing = tuple(name for name in ("val", "cal") if name not in splits) if train else ()
    if missing and len({group_key(clip) for clip in train}) <= len(missing):
        _LOG.warning("train has too few groups to take %s from it; the data have none", " and ".join(missing))
        missing = ()
    if missing:
        shares = {name: fractions.get(name, DEFAULT_FRACTIONS[name]) for name in missing}
        splits |= make_splits(train, shares, seed)
    order = [name for name in STANDARD_SPLITS if name in splits]
    return {name: splits[name] for name in (*order, *sorted(splits.keys() - order))}, missing


def check_labels(label_names: Sequence[str], given: Mapping[str, Sequence[Clip]]) -> None:
    """Checks that every label of the splits is one of ``label_names``; None is none.

    Raises:
        ValueError: If one is not; the message names where such clips are.
    """
    wrong = [clip for clips in given.values() for clip in clips if clip.label not in (*label_names, None)]
    if wrong:
        rows = [f"{clip.where or clip.video_id}: {clip.label!r}" for clip in wrong]
        raise ValueError(f"label that label_names ({', '.join(label_names)}) lacks: {first_five(rows)}")


def check_disjoint(splits: Mapping[str, Sequence[Clip]]) -> None:
    """Checks that no video id occurs twice and no group is in two splits.

    Raises:
        ValueError: If one does; the message names the rows.
    """
    rows: dict[str, Clip] = {}
    homes: dict[str, Clip] = {}
    repeated, torn = [], []
    for clip in (clip for clips in splits.values() for clip in clips):
        first = rows.setdefault(clip.video_id, clip)
        if first is not clip:
            repeated.append(f"{_place(clip)}: {clip.video_id!r}, as in {_place(first)}")
        home = homes.setdefault(clip.group, clip) if clip.group else clip
        if home.split != clip.split:
            torn.append(f"{_place(clip)}: {clip.group!r} in {clip.split}, but in {home.split} in {_place(home)}")
    if repeated:
        raise ValueError(f"duplicate video_id: {first_five(repeated)}")
    if torn:
        raise ValueError(
            f"a group lies in two splits, so that test clips would be known from training: {first_five(torn)}"
        )


def limit_clips(clips: Sequence[Clip], limit: int, seed: int) -> tuple[Clip, ...]:
    """Returns at most ``limit`` clips, balanced over classes, drawn by the seed and in the order given."""
    by_class: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_class[clip.label or ""].append(clip)
    for label in sorted(by_class):
        random.Random(f"{seed}/{label}").shuffle(by_class[label])
    kept: set[str] = set()
    for place in range(max(map(len, by_class.values()), default=0)):
        for label in sorted(by_class):
            if len(kept) < limit and place < len(by_class[label]):
                kept.add(by_class[label][place].video_id)
    return tuple(clip for clip in clips if clip.video_id in kept)


def write_splits(path: Path, splits: Mapping[str, Sequence[Clip]]) -> None:
    """Writes the split of each clip as CSV with columns video_id, split, group, label."""
    with atomic_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("video_id", "split", "group", "label"))
        for split, clips in splits.items():
            writer.writerows((clip.video_id, split, clip.group, clip.label or "") for clip in clips)


def first_five(rows: Sequence[str]) -> str:
    """Returns the first five rows as text, with the number of further ones."""
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    return "; ".join(rows[:5]) + more


def group_key(clip: Clip) -> str:
    """Returns the key of a clip's group, which is its own if it has none; of any two groups the keys differ."""
    return f"group {clip.group}" if clip.group else f"clip {clip.video_id}"


def _place(clip: Clip) -> str:
    return clip.where or str(clip.path)


def _deal(groups: Mapping[str, Sequence[Clip]], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Returns the split of each group; each group goes where class counts get closest to the wanted ones."""
    counts = {key: Counter(clip.label or "" for clip in clips) for key, clips in groups.items()}
    total = sum(counts.values(), Counter[str]())
    rng = random.Random(f"splits/{seed}")
    # Sorted first, so that the shuffle depends on the seed and not on the order of rows.
    order = sorted(counts)
    rng.shuffle(order)
    order.sort(key=lambda key: -counts[key].total())
    filled: dict[str, Counter[str]] = {split: Counter() for split in shares}
    split_of: dict[str, str] = {}

    # Increase of the relative squared deviation from the wanted class counts:
    # ((f + n - w)^2 - (f - w)^2) / w = n (2 (f - w) + n) / w for f clips filled, w wanted and n added.
    def cost(split: str, key: str) -> float:
        return sum(
            n * (2 * (filled[split][label] - shares[split] * total[label]) + n) / (shares[split] * total[label])
            for label, n in counts[key].items()
        )

    def place(key: str, split: str) -> None:
        split_of[key] = split
        filled[split] += counts[key]

    # Groups with all clips of a class, which could not be learnt if they were not in train.
    alone = {key for key in order if any(counts[key][label] == total[label] for label in counts[key])}
    for key in order:
        if key in alone:
            place(key, "train")
    for key in order:
        if key not in alone:
            place(key, min(shares, key=lambda split: (cost(split, key), -shares[split])))
    # A split without a group gets the smallest group of the split with the most groups.
    for split in shares:
        if split not in split_of.values():
            giver = Counter(split_of.values()).most_common(1)[0][0]
            smallest = [key for key in reversed(order) if split_of[key] == giver]
            split_of[min(smallest, key=lambda key: key in alone)] = split
    return split_of
