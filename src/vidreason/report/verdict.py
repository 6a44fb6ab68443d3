"""The first sentence of a report, and what speaks against trusting its numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.evaluation.decisions import Decisions, Floats
from vidreason.evaluation.intervals import FEWEST_GROUPS, Difference, compare
from vidreason.evaluation.rows import Evaluated, EvaluationRow
from vidreason.evaluation.run import LABEL_SFT, Comparison
from vidreason.pipelines.summary import wilson_interval
from vidreason.pipelines.table import percent
from vidreason.report.runs import ReportRun

_MANY_UNPARSED = 0.05


@dataclass(frozen=True)
class Headline:
    """The method that the report is about, and what it is compared with."""

    run: ReportRun
    method: Evaluated
    reasons: bool
    """True if the method decides from traces; otherwise the report has no method that reasons."""
    reference: str | None
    """``pipeline: method``; None if there is nothing to compare it with."""

    @property
    def name(self) -> str:
        """``pipeline: method``."""
        return f"{self.run.evaluated.pipeline}: {self.method.method.name}"


@dataclass(frozen=True)
class Gain:
    """The difference in accuracy between two methods on one split, in words."""

    split: str
    points: str
    """``+3.1 ± 8.2 points``; without ± where there are too few groups for an interval."""
    sure: str
    """The p-value, or over how many seeds the interval is."""
    detectable: str
    """Smallest true difference in points that this many clips, or seeds, would show."""
    clips: int
    better: bool
    worse: bool


def choose_headline(runs: Sequence[ReportRun], comparisons: Sequence[Comparison]) -> Headline:
    """Chooses the method that the report is about by what it is, never by how well it does on the test clips.

    A calibrator comes first, then a vote, then an answer; without any, a likelihood. Of several calibrators, or votes,
    it is that of the stage that the run answers with (the one that its last test tests), over the most traces.

    Raises:
        ValueError: If no run has the decisions of a method.
    """
    candidates = [(run, one) for run in runs for one in run.methods()]
    if not candidates:
        raise ValueError(f"{runs[0].folder}: its evaluation has no decisions left; run vidreason evaluate again")
    ranks = {"likelihood": 0, "answer": 1, "vote": 2, "calibrated": 3}

    def rank(place: int) -> tuple[int, int, bool, int, int]:
        run, one = candidates[place]
        answers = one.method.name.startswith(f"{run.answers_with} ")
        # of several pipelines the first, of equal stages of one the last
        return ranks[one.method.mode], -_order(runs, run), answers, one.method.samples, place

    run, one = candidates[max(range(len(candidates)), key=rank)]
    name = f"{run.evaluated.pipeline}: {one.method.name}"
    reference = next((c.second for c in comparisons if c.first == name), None)
    return Headline(run, one, one.method.mode != "likelihood", reference)


def gains(
    first: str, second: str | None, comparisons: Sequence[Comparison], rows: Sequence[EvaluationRow]
) -> list[Gain]:
    """Returns the differences between two methods, one per split."""
    groups = {(row.name, row.split): row.groups for row in rows if row.group is None}
    return [
        _gain(one.split, one.difference, groups.get((first, one.split), 0))
        for one in comparisons
        if (one.first, one.second) == (first, second)
    ]


def sentence(headline: Headline, found: Sequence[Gain]) -> str:
    """Returns the sentence that answers the question of the report."""
    what = f"Reasoning ({headline.name})" if headline.reasons else headline.name
    if headline.reference is None or not found:
        return f"{what} has nothing to be compared with here."
    other = headline.reference
    if other in LABEL_SFT:
        other = "label SFT"
    elif other.endswith(": zero_shot likelihood"):
        other = "the untrained base"
    better, worse = sum(gain.better for gain in found), sum(gain.worse for gain in found)
    if better == len(found):
        verb = "is better than"
    elif worse == len(found):
        verb = "is worse than"
    else:
        verb = "is not shown to be better than"
    by = "; ".join(f"{gain.points} on {gain.split}" for gain in found)
    mixed = f" (better on {better}, worse on {worse} of {len(found)} splits)" if better + worse else ""
    return f"{what} {verb} {other} on your clips: {by}{mixed if verb.startswith('is not') else ''}."


def warnings(headline: Headline, runs: Sequence[ReportRun], comparisons: Sequence[Comparison]) -> list[str]:
    """Returns what speaks against trusting the numbers: chance, few clips, probes, and notes of the runs themselves."""
    own = [row for run in runs for row in run.rows if row.name == headline.name and row.group is None]
    told = [
        *_about_chance(headline.method.decisions),
        *_about_size(own),
        *_about_answers(own),
        *_about_probes(headline, runs, comparisons),
        *_about_seeds(headline, comparisons),
        *_about_training(headline, runs),
        *(f"{run.name}: {note}" for run in runs for note in run.notes if "not better than always" not in note),
    ]
    return list(dict.fromkeys(told))


def majority(decisions: Decisions) -> float:
    """Returns the accuracy of always answering the largest class of these clips."""
    return float(np.bincount(decisions.labels).max() / len(decisions))


def _order(runs: Sequence[ReportRun], run: ReportRun) -> int:
    return list(dict.fromkeys(one.evaluated.pipeline for one in runs)).index(run.evaluated.pipeline)


def _gain(split: str, difference: Difference, groups: int) -> Gain:
    d, seeds = difference, difference.low is not None
    half = d.margin if seeds or groups >= FEWEST_GROUPS else None
    p = 1.0 if d.p_value is None else d.p_value
    sure = f"95 %, {d.seeds} seeds" if seeds else _p(p)
    better, worse = d.shown and d.mean > 0, d.shown and d.mean < 0
    points = f"{100 * d.mean:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
    return Gain(split, f"{points} points", sure, f"{100 * d.detectable:.1f}", d.clips, better, worse)


def _about_chance(decisions: Mapping[str, Decisions]) -> list[str]:
    found = []
    for split, own in decisions.items():
        share = majority(own)
        low, _ = wilson_interval(int(own.right.sum()), len(own))
        if split != CALIBRATION_SPLIT and low <= share:
            found.append(
                f"At chance on {split}: {percent(float(own.right.mean()))} % right is, as far as {len(own)} clips can "
                f"tell, not better than always answering the largest class ({percent(share)} %)."
            )
    return found


def _about_size(rows: Sequence[EvaluationRow]) -> list[str]:
    sizes = dict.fromkeys((row.split, row.clips, row.groups) for row in rows if row.groups < FEWEST_GROUPS)
    return [
        f"Too few clips on {split}: {clips} clips in {groups} groups; intervals need at least {FEWEST_GROUPS} groups."
        for split, clips, groups in sizes
    ]


def _about_answers(rows: Sequence[EvaluationRow]) -> list[str]:
    found = []
    for row in rows:
        missing = row.scores.get("unparsed") or 0.0
        if missing > _MANY_UNPARSED:
            found.append(f"{row.name} gave no answer for {percent(missing)} % of the clips of {row.split}.")
    return found


def _about_training(headline: Headline, runs: Sequence[ReportRun]) -> list[str]:
    """Says where the method that is compared with was trained on another number of clips."""
    other = (headline.reference or "").partition(": ")[0]
    return [
        f"{run.name} was trained on {run.train_clips} clips, {headline.run.name} on {headline.run.train_clips}: their "
        "difference is not that of the methods alone."
        for run in runs
        if run.evaluated.pipeline == other and run.train_clips != headline.run.train_clips
    ]


def _about_seeds(headline: Headline, comparisons: Sequence[Comparison]) -> list[str]:
    """Says where a difference rests on one training run of each method, however many runs one of them has."""
    pipeline = headline.run.evaluated.pipeline
    compared = [one for one in comparisons if (one.first, one.second) == (headline.name, headline.reference)]
    if compared and all(one.difference.seeds > 1 for one in compared):
        return []
    return [
        f"A single training run of {pipeline}: the differences hold for its weights on other clips, not for another "
        "training run. Run the pipelines with other seeds (--seed), evaluate them, and give all runs to the report."
    ]


def _about_probes(headline: Headline, runs: Sequence[ReportRun], comparisons: Sequence[Comparison]) -> list[str]:
    """Says where a loss of accuracy or confidence without the video is not shown, or that nothing was probed."""
    probed = {f"{row.who.pipeline}: {row.who.probe_of}" for run in runs for row in run.rows}
    if headline.name not in probed:
        folder, splits = headline.run.folder, dict.fromkeys(row.split for row in headline.run.rows)
        command = shlex.join(["vidreason", "evaluate", "--run", str(folder), "--splits", *splits, "--probes"])
        return [f"No probes were run, so that it is not known whether the model looks at the video: {command}"]
    found = []
    for one in comparisons:
        probe, _, what = one.first.rpartition(", ")
        if what != "no video" or probe != one.second:
            continue
        change = one.difference
        if not (change.shown and change.mean < 0):
            found.append(
                f"{probe} is not shown to lose accuracy without the video on {one.split}: "
                f"{100 * change.mean:+.1f} points{_sure(change)}; {change.clips} clips could show "
                f"{100 * change.detectable:.1f}."
            )
        surer = _change_of_confidence(one, runs)
        if surer is not None and not (surer.shown and surer.mean < 0):
            found.append(
                f"{probe} is as sure without the video on {one.split}, as far as {surer.clips} clips can tell: mean "
                f"confidence {100 * surer.mean:+.1f} points{_sure(surer)}."
            )
    return found


def _change_of_confidence(probe: Comparison, runs: Sequence[ReportRun]) -> Difference | None:
    """Returns the change in confidence that a probe brings, over the seeds; None without confidences."""
    pairs = []
    for run in runs:
        named = {f"{run.evaluated.pipeline}: {one.method.name}": one for one in run.evaluated.methods}
        both = [named[name] for name in (probe.first, probe.second) if name in named]
        if len(both) == 2 and all(probe.split in one.decisions for one in both):
            pairs.append([one.scaled(probe.split) for one in both])
    if not pairs or any(own.confidence is None for pair in pairs for own in pair):
        return None
    return compare([pair[0] for pair in pairs], [pair[1] for pair in pairs], _confidence)


def _confidence(decisions: Decisions) -> Floats:
    assert decisions.confidence is not None
    return decisions.confidence


def _sure(difference: Difference) -> str:
    """Returns how sure a difference is, in brackets: its p-value, or its interval over seeds."""
    if difference.low is not None and difference.high is not None:
        return f" ({100 * difference.low:+.1f} to {100 * difference.high:+.1f} over {difference.seeds} seeds)"
    return "" if difference.p_value is None else f" ({_p(difference.p_value)})"


def _p(value: float) -> str:
    return f"p {value:.3f}" if value >= 0.001 else "p < 0.001"
