"""The table of methods, over one run or over several seeds, with differences and cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vidreason.evaluation.intervals import over_seeds
from vidreason.evaluation.rows import EvaluationRow
from vidreason.evaluation.run import Comparison
from vidreason.pipelines.table import decimal, percent
from vidreason.report.runs import ReportRun
from vidreason.report.verdict import gains

HEADER = (
    "method", "n", "acc. %", "95 %", "differs by", "p", "could show", "F1 %", "sure %", "NLL", "ECE", "ECE scaled",
    "AURC", "at 10 % error", "no answer %", "tokens", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def method_tables(
    rows: Sequence[EvaluationRow], comparisons: Sequence[Comparison], reference: str | None, prefix: str = ""
) -> list[Table]:
    """Returns a table of the methods for each split, without probes; names are shown without ``prefix``."""
    found = []
    whole = [row for row in rows if row.group is None and row.who.probe_of is None]
    for split in dict.fromkeys(row.split for row in whole):
        by_name: dict[str, list[EvaluationRow]] = defaultdict(list)
        for row in whole:
            if row.split == split:
                by_name[row.name].append(row)
        lines = [
            (name.removeprefix(prefix), *_cells(own, _difference(name, split, rows, comparisons, reference)))
            for name, own in by_name.items()
        ]
        seeds = max(map(len, by_name.values()))
        found.append(Table(split + f", mean of {seeds} seeds" * (seeds > 1), HEADER, tuple(lines)))
    return found


def probe_table(rows: Sequence[EvaluationRow], comparisons: Sequence[Comparison], prefix: str = "") -> Table | None:
    """Returns the table of the probes beside their methods; None without probes."""
    whole = {(row.name, row.who.seed, row.split): row for row in rows if row.group is None}
    lines = []
    for row in whole.values():
        if row.who.probe_of is None:
            continue
        own = whole.get((f"{row.who.pipeline}: {row.who.probe_of}", row.who.seed, row.split))
        if own is None:
            continue
        points, sure, detectable = _difference(row.name, row.split, rows, comparisons, own.name)
        cells = [(percent(r.scores["acc"]), percent(r.confidence)) for r in (own, row)]
        accuracy, confidence = (f"{before} → {after}" for before, after in zip(*cells, strict=True))
        lines.append((row.name.removeprefix(prefix), row.split, accuracy, points, sure, detectable, confidence))
    header = ("probe", "split", "accuracy %", "differs by", "p", "could show", "confidence %")
    return Table("Probes", header, tuple(lines)) if lines else None


def cost_table(runs: Sequence[ReportRun]) -> Table | None:
    """Returns what the stages took; None for runs of single stages, which have no record of it."""
    lines = []
    for run in runs:
        for stage in run.stages:
            r = stage.record
            if r is not None:
                times = (f"{seconds / 60:.1f}" for seconds in (r.wall_seconds, r.cpu_seconds, r.gpu_seconds))
                lines.append((f"{run.name}: {stage.name}", *times, "yes" if r.taken else "", r.note))
    header = ("stage", "minutes", "CPU minutes", "GPU minutes", "of another run", "note")
    return Table("What the stages took", header, tuple(lines)) if lines else None


def _difference(
    name: str, split: str, rows: Sequence[EvaluationRow], comparisons: Sequence[Comparison], reference: str | None
) -> tuple[str, str, str]:
    """Returns the difference from the reference in points, how sure it is, and what could be shown."""
    if name == reference:
        return "reference", "", ""
    found = next((gain for gain in gains(name, reference, comparisons, rows) if gain.split == split), None)
    return (
        (found.points.removesuffix(" points"), found.sure.removeprefix("p "), found.detectable) if found else ("-",) * 3
    )


def _cells(own: Sequence[EvaluationRow], difference: tuple[str, str, str]) -> tuple[str, ...]:
    acc, interval = over_seeds([row.scores["acc"] or 0.0 for row in own])
    if len(own) == 1 and own[0].intervals is not None:
        low, high = own[0].intervals["acc"]
        interval = (low, high)

    def mean(value: Callable[[EvaluationRow], float | None]) -> float | None:
        known = [found for row in own if (found := value(row)) is not None]
        return sum(known) / len(known) if len(known) == len(own) else None

    def score(key: str) -> float | None:
        return mean(lambda row: row.scores.get(key))

    tokens, seconds = mean(lambda row: row.cost.tokens_per_clip), mean(lambda row: row.cost.seconds_per_clip)
    return (
        str(own[0].clips),
        percent(acc),
        "-" if interval is None else f"{percent(interval[0])} – {percent(interval[1])}",
        *difference,
        percent(score("macro_f1")),
        percent(score("confidence")),
        decimal(score("nll")),
        decimal(score("ece")),
        decimal(mean(lambda row: (row.scaled or {}).get("ece"))),
        decimal(score("aurc")),
        percent(score("coverage_at_10")),
        percent(score("unparsed")),
        "-" if tokens is None else f"{tokens:.0f}",
        "-" if seconds is None else f"{seconds:.2f}",
    )
