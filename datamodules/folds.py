"""Folds of split train, for cross-fitting: what is written about a fold comes from weights that have not seen it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vidreason.datamodules.splits import group_key
from vidreason.datamodules.types import Clip

HELD_OUT = "held_out"
"""The split of held-out clips in ``splits.csv``."""


@dataclass(frozen=True)
class FoldOptions:
    """The part of split train that a stage gets; other splits stay whole.

    Args:
        of: Number of folds that train is divided into; 0 keeps it whole.
        leave_out: Number of a fold, from 1, whose clips are left out of train.
        only: Number of a fold, from 1, that is all of train.
    """

    of: int = 0
    leave_out: int | None = None
    only: int | None = None

    def __post_init__(self) -> None:
        numbers = [number for number in (self.leave_out, self.only) if number is not None]
        if self.of == 0 and not numbers:
            return
        if self.of < 2:
            raise ValueError(f"fold.of must be at least 2 folds, or 0 for the whole of train, got {self.of}")
        if len(numbers) != 1 or not 1 <= numbers[0] <= self.of:
            raise ValueError(
                f"fold: give leave_out or only, a number from 1 to {self.of}, got leave_out {self.leave_out} and only "
                f"{self.only}"
            )

    def __str__(self) -> str:
        held_out = f"fold {self.leave_out} is" if self.only is None else f"all folds but {self.only} are"
        return f"train in {self.of} folds, of which {held_out} held out"

    def divide(self, train: Sequence[Clip], seed: int) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
        """Returns (the clips of train that the stage gets, those that are held out), both in the order given.

        Raises:
            ValueError: If train is empty, or a class has clips in fewer groups than there are folds.
        """
        if not self.of:
            return tuple(train), ()
        fold_of = deal_folds(train, self.of, seed)
        asked = self.only or self.leave_out
        inside = [clip for clip in train if fold_of[clip.video_id] == asked]
        outside = [clip for clip in train if fold_of[clip.video_id] != asked]
        return (tuple(inside), tuple(outside)) if self.only else (tuple(outside), tuple(inside))


def deal_folds(clips: Sequence[Clip], folds: int, seed: int) -> dict[str, int]:
    """Deals clips to folds, group by group, largest first, so that every class is spread evenly.

    Args:
        clips: Clips of one split; a clip with an empty group is a group of its own.
        folds: Number of folds, at least 2.
        seed: Decides the order of groups of equal size; the order of ``clips`` has no influence.

    Returns:
        The fold of each clip, 1 to ``folds``, by video id.

    Raises:
        ValueError: If there are no clips, or a class has clips in fewer groups than there are folds.
    """
    counts: Mapping[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        counts[group_key(clip)][clip.label or ""] += 1
    total = sum(counts.values(), Counter[str]())
    if not total:
        raise ValueError("fold: split train has no clips to divide into folds")
    groups = Counter(label for count in counts.values() for label in count if label)
    label, most = min(groups.items(), key=lambda item: (item[1], item[0]), default=("", folds))
    if most < folds:
        remedy = f"take at most {most} folds" if most > 1 else "do without folds"
        raise ValueError(
            f"fold: {folds} folds of train are too many: the clips of class {label!r} are in {most} "
            f"group{'s'[: most > 1]}, and a group is never divided; {remedy}, or bring more clips"
        )
    order = sorted(counts)  # so that only the seed decides
    random.Random(f"folds/{seed}").shuffle(order)
    order.sort(key=lambda key: -counts[key].total())
    filled = [Counter[str]() for _ in range(folds)]
    fold_of: dict[str, int] = {}
    for key in order:

        def cost(fold: int, own: Counter[str] = counts[key]) -> tuple[float, int]:
            # increase of the summed squares of the classes' shares of a fold, then the size of the fold
            squares = sum(n * (2 * filled[fold][label] + n) / total[label] ** 2 for label, n in own.items())
            return squares, filled[fold].total()

        fold_of[key] = min(range(folds), key=cost)
        filled[fold_of[key]] += counts[key]
    return {clip.video_id: fold_of[group_key(clip)] + 1 for clip in clips}
