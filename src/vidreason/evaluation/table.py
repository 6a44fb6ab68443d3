"""The tables of an evaluation for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from vidreason.evaluation.intervals import over_seeds
from vidreason.evaluation.rows import EvaluationRow
from vidreason.evaluation.run import Comparison
from vidreason.pipelines.table import decimal, percent, render_table

_HEADER = (
    "method", "n", "acc %", "95 %", "F1", "sure %", "NLL", "ECE", "scaled", "ideal", "AURC", "<=10 %", "unparsed",
    "tokens", "s/clip",
)  # fmt: skip


def render_evaluation(rows: Sequence[EvaluationRow], comparisons: Sequence[Comparison]) -> str:
    """Returns one table per split, one of the comparisons, and what the columns mean."""
    by_split: dict[str, dict[tuple[str, str], list[EvaluationRow]]] = defaultdict(lambda: defaultdict(list))
    several = len({row.who.pipeline for row in rows}) > 1
    for row in rows:
        title = row.split if row.group is None else f"{row.split}, group {row.group}"
        by_split[title][row.who.pipeline, row.who.method].append(row)
    parts = []
    for title, methods in by_split.items():
        seeds = max(len(found) for found in methods.values())
        head = f"{title}: mean of {seeds} seeds" if seeds > 1 else title
        parts.append(
            f"{head}\n"
            + render_table(_HEADER, [_cells(": ".join(key[not several :]), found) for key, found in methods.items()])
        )
    if comparisons:
        parts.append(_compared(comparisons))
    seeds = len({row.who.seed for row in rows}) > 1
    interval = "other training runs (Student t over seeds)" if seeds else "other clips (bootstrap over groups)"
    parts.append(
        f"95 %: for {interval}; '-' where there are too few. sure: mean confidence.\n"
        "likelihood: the direct decision, without a trace; with a fitted temperature it has the ECE under 'scaled'.\n"
        "scaled: ECE with the temperature fitted on cal. ideal: mean ECE of a perfectly calibrated model with these\n"
        "confidences. <=10 %: largest share of these clips with at most 10 % errors. A single answer has none of these."
    )
    return "\n\n".join(parts)


def _cells(name: str, rows: Sequence[EvaluationRow]) -> list[str]:
    """Returns the cells of one method: its scores, or over several seeds their means."""
    acc, interval = over_seeds([row.scores["acc"] or 0.0 for row in rows])
    if len(rows) == 1 and rows[0].intervals is not None:
        interval = rows[0].intervals["acc"]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(rows) else None

    def score(name: str) -> float | None:
        return mean([row.scores[name] for row in rows])

    scaled = mean([None if row.scaled is None else row.scaled["ece"] for row in rows])
    return [
        name,
        str(rows[0].clips),
        percent(acc),
        "-" if interval is None else f"{percent(interval[0])}-{percent(interval[1])}",
        percent(score("macro_f1")),
        percent(score("confidence")),
        decimal(score("nll")),
        decimal(score("ece")),
        decimal(scaled),
        decimal(score("ece_if_calibrated")),
        decimal(score("aurc")),
        percent(score("coverage_at_10")),
        percent(score("unparsed")),
        _number(mean([row.cost.tokens_per_clip for row in rows]), 0),
        _number(mean([row.cost.seconds_per_clip for row in rows]), 2),
    ]


def _compared(comparisons: Sequence[Comparison]) -> str:
    """Returns a table for each method that others are compared with."""
    header = ("method", "split", "points", "95 % or p", "could show", "seeds", "n")
    by_second: dict[str, list[list[str]]] = defaultdict(list)
    for one in comparisons:
        d = one.difference
        sure = f"{_points(d.low)} to {_points(d.high)}" if d.low is not None else _p_value(d.p_value)
        row = [one.first, one.split, _points(d.mean), sure, f"{100 * d.detectable:.1f}", str(d.seeds), str(d.clips)]
        by_second[one.second].append(row)
    tables = [
        f"accuracy minus that of {name}, on the same clips\n{render_table(header, rows)}"
        for name, rows in by_second.items()
    ]
    return "\n\n".join(
        [
            *tables,
            "could show: smallest true difference that is found with probability 0.8 at the 5 % level, at this spread",
        ]
    )


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _p_value(value: float | None) -> str:
    return "-" if value is None else "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
