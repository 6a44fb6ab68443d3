"""Charts of an evaluation, as plotly figures without colours of text and background, which the page sets.

Texts of the user are escaped: plotly reads a part of HTML in names and labels.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.evaluation.decisions import Decisions, Floats
from vidreason.evaluation.rows import Evaluated, EvaluationRow
from vidreason.evaluation.scores import BINS, confusion, risk_coverage
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.report.runs import ReportRun
from vidreason.report.verdict import Headline, majority

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Distinct for colour-blind eyes (Okabe and Ito, 2008), on white and on black."""
_SYMBOLS = ("circle", "diamond-open", "square-open", "x-thin-open", "triangle-up-open")
_SHOWN = 2
"""Lines that are shown at first where there are many."""
_CHANCE = {"color": "#7f7f7f", "dash": "dot", "width": 1}


@dataclass(frozen=True)
class Chart:
    """A chart, with variants to choose from."""

    title: str
    note: str
    variants: tuple[tuple[str, tuple[dict[str, Any], ...]], ...]
    """Name and plotly figures that stand beside each other; a chart of a single variant needs no name."""


def label(text: str) -> str:
    """Returns a text of the user as plotly shows it unchanged."""
    return html.escape(text, quote=False)  # plotly shows &quot; as written


def figure(traces: Sequence[Any], height: int, **layout: Any) -> dict[str, Any]:
    """Returns a figure as JSON values, checked by plotly."""
    found = go.Figure(list(traces), layout={"template": "none", "colorway": COLOURS, "height": height, **layout})
    content: dict[str, Any] = found.to_plotly_json()
    return content


def percent_axis(title: str, **more: Any) -> dict[str, Any]:
    """Returns an axis of shares."""
    return {"title": {"text": title}, "tickformat": ".0%", "range": [0, 1.02], "dtick": 0.2, **more}


def by_split(rows: Sequence[EvaluationRow], headline: Headline, prefix: str = "") -> Chart | None:
    """Draws accuracy against the split; None for a single one."""
    splits = list(dict.fromkeys(row.split for row in rows if row.group is None))
    if len(splits) < 2:
        return None
    shown = (headline.name, headline.reference, f"{headline.run.evaluated.pipeline}: zero_shot likelihood")
    traces = []
    for name in dict.fromkeys(row.name for row in rows if row.who.probe_of is None):
        own = {row.split: row for row in rows if row.name == name and row.group is None}
        traces.append(
            go.Scatter(
                x=[label(split) for split in splits if split in own],
                y=[own[split].scores["acc"] for split in splits if split in own],
                error_y=_errors([own[split] for split in splits if split in own]),
                name=label(name.removeprefix(prefix)),
                mode="lines+markers",
                cliponaxis=False,
                visible=True if name in shown else "legendonly",
            )
        )
    traces.append(_chance_line(splits, headline.method.decisions))
    layout = {"xaxis": {"type": "category"}, "yaxis": percent_axis("accuracy"), "legend": BELOW}
    note = "Bars are 95 % intervals where there are enough groups. A tap on a name shows or hides its line."
    return Chart("Accuracy by test split", note, (("", (figure(traces, 460, **layout),)),))


def by_group(rows: Sequence[EvaluationRow], headline: Headline, prefix: str = "") -> Chart | None:
    """Draws the accuracy of the headline and its reference in each group; None without rows of groups."""
    variants = []
    for split in dict.fromkeys(row.split for row in rows if row.group is not None):
        traces = []
        for name in (headline.name, headline.reference):
            own = [row for row in rows if row.name == name and row.split == split and row.group is not None]
            names = [label(f"{row.group} ({row.clips})") for row in own]
            traces.append(
                go.Bar(x=names, y=[row.scores["acc"] for row in own], name=label(str(name).removeprefix(prefix)))
            )
        layout = {"xaxis": {"type": "category"}, "yaxis": percent_axis("accuracy"), "legend": BELOW}
        variants.append((split, (figure([trace for trace in traces if len(trace.x or ())], 380, **layout),)))
    return (
        Chart("Accuracy by group", "The number of clips stands behind a group.", tuple(variants)) if variants else None
    )


def by_stage(run: ReportRun) -> Chart:
    """Draws the accuracy of every method of a run, in the order of its stages."""
    rows = [row for row in run.rows if row.who.probe_of is None and row.group is None]
    names = list(dict.fromkeys(row.who.method for row in rows))
    traces = []
    for number, split in enumerate(dict.fromkeys(row.split for row in rows)):
        own = [row for row in rows if row.split == split]
        traces.append(
            go.Scatter(
                x=[row.scores["acc"] for row in own],
                y=[label(row.who.method) for row in own],
                error_x=_errors(own),
                name=label(split),
                mode="markers",
                marker={"size": 11, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
                cliponaxis=False,
            )
        )
    axis = {"type": "category", "range": [len(names) - 0.5, -0.5]}
    layout = {"xaxis": percent_axis("accuracy"), "yaxis": axis, "legend": BELOW}
    return Chart(run.name, "", (("", (figure(traces, 170 + 34 * len(names), **layout),)),))


def reliability(methods: Sequence[tuple[str, Evaluated]]) -> Chart | None:
    """Draws how often decisions of a confidence are right, before and after the temperature."""
    variants = []
    for name, one in methods:
        for split, own in one.decisions.items():
            if split == CALIBRATION_SPLIT or own.probs is None:
                continue
            before = _bins_trace(own, "as the model gives it")
            after = [] if one.temperature is None else [_bins_trace(one.scaled(split), _scaled_by(one))]
            ideal = go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=_CHANCE, name="perfect", hoverinfo="skip")
            layout = {"xaxis": percent_axis("confidence"), "yaxis": percent_axis("right"), "legend": BELOW}
            variants.append((f"{name}, {split}", (figure([before, *after, ideal], 430, **layout),)))
    note = f"{BINS} bins of confidence; the area of a point is its number of clips. Above the line: too modest."
    return Chart("Reliability before and after the temperature", note, tuple(variants)) if variants else None


def risk(methods: Sequence[tuple[str, Evaluated]], thresholds: Mapping[str, Threshold]) -> Chart | None:
    """Draws the error among the clips that are surer than a threshold, against their share.

    Args:
        methods: Names and methods.
        thresholds: Thresholds by name of the method, drawn where they cut these clips.
    """
    splits = dict.fromkeys(s for _, one in methods for s in one.decisions if s != CALIBRATION_SPLIT)
    variants = []
    for split in splits:
        traces = []
        sure = [(n, o) for n, o in methods if split in o.decisions and o.decisions[split].confidence is not None]
        for number, (name, one) in enumerate(sure):
            own, colour = one.decisions[split], COLOURS[number % len(COLOURS)]
            confidence = one.scaled(split).confidence
            assert confidence is not None
            coverage, error = risk_coverage(confidence, own.right.astype(np.float64))
            line = {"color": colour, "shape": "hv"}
            curve = {"x": coverage.tolist(), "y": error.tolist(), "mode": "lines+markers", "line": line}
            shown = True if number < _SHOWN else "legendonly"
            traces.append(go.Scatter(**curve, marker={"size": 4}, name=label(name), cliponaxis=False, visible=shown))
            if name in thresholds:
                traces.append(_threshold_point(own, thresholds[name], label(name), colour))
        if traces:
            layout = {"xaxis": percent_axis("share of clips decided"), "yaxis": percent_axis("error among them")}
            variants.append((split, (figure(traces, 460, legend=BELOW, **layout),)))
    note = (
        "The surest clips first. A tap on a name shows or hides its line. A star is where the threshold of the run, "
        "found on split cal, cuts these clips."
    )
    return Chart("Error among the surest clips", note, tuple(variants)) if variants else None


def confusions(methods: Sequence[tuple[str, Evaluated]]) -> Chart:
    """Draws which classes are taken for which."""
    variants = []
    for name, one in methods:
        for split, own in one.decisions.items():
            if split == CALIBRATION_SPLIT:
                continue
            counts = confusion(own)
            last = slice(None) if counts[:, -1].any() else slice(-1)
            names = [label(text) for text in own.label_names]
            heat = go.Heatmap(
                z=counts[:, last].tolist(),
                text=[[str(count) if count else "" for count in row] for row in counts[:, last].tolist()],
                x=[*names, "no answer"][last],
                y=names,
                colorscale=[[0, "rgba(0,114,178,0.04)"], [1, "rgba(0,114,178,1)"]],
                texttemplate="%{text}",
                showscale=False,
                hovertemplate="%{y} taken for %{x}: %{z}<extra></extra>",
            )
            size = max(320, 150 + 34 * len(names))
            axes = {
                "xaxis": {"title": {"text": "decision"}, "type": "category", "showgrid": False},
                "yaxis": {"title": {"text": "label"}, "type": "category", "autorange": "reversed", "showgrid": False},
            }
            variants.append((f"{name}, {split}", (figure([heat], size, **axes),)))
    return Chart("What is taken for what", "Rows are labels, columns decisions; numbers are clips.", tuple(variants))


BELOW = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}


def _errors(rows: Sequence[EvaluationRow]) -> dict[str, Any] | None:
    """Returns the intervals of accuracies as error bars; None where no row has one."""
    if all(row.intervals is None for row in rows):
        return None
    above, below = [], []
    for row in rows:
        acc = row.scores["acc"] or 0.0
        low, high = row.intervals["acc"] if row.intervals else (acc, acc)
        above.append(high - acc)
        below.append(acc - low)
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def _chance_line(splits: Sequence[str], decisions: Mapping[str, Decisions]) -> Any:
    known = [split for split in splits if split in decisions]
    shares = [majority(decisions[split]) for split in known]
    x = [label(split) for split in known]
    return go.Scatter(x=x, y=shares, mode="lines", line=_CHANCE, name="always the largest class")


def _scaled_by(one: Evaluated) -> str:
    return f"with temperature {one.temperature:.2f} from cal"


def _bins_trace(own: Decisions, name: str) -> Any:
    assert own.confidence is not None
    right = own.right.astype(np.float64)
    place = np.minimum((own.confidence * BINS).astype(int), BINS - 1)
    used = [b for b in range(BINS) if (place == b).any()]
    counts = [int((place == b).sum()) for b in used]
    mean = [_mean(own.confidence[place == b]) for b in used]
    share = [_mean(right[place == b]) for b in used]
    sizes = [max(5.0, 46 * float(np.sqrt(count / len(own)))) for count in counts]
    return go.Scatter(
        x=mean,
        y=share,
        customdata=counts,
        mode="lines+markers",
        line={"width": 1},
        cliponaxis=False,
        marker={"size": sizes, "opacity": 0.75},
        name=name,
        hovertemplate="confidence %{x:.1%}, right %{y:.1%}, %{customdata} clips<extra></extra>",
    )


def _mean(values: Floats) -> float:
    return float(values.mean())


def _threshold_point(own: Decisions, threshold: Threshold, name: str, colour: str) -> Any:
    scaled = own.scaled(threshold.temperature)
    assert scaled.probs is not None
    accepted = scaled.probs.max(1) >= threshold.confidence
    error = 1 - _mean(own.right[accepted].astype(np.float64)) if accepted.any() else 0.0
    told = f"{name}: threshold {threshold.confidence:.3f} for at most {threshold.error:.0%} errors"
    marker = {"symbol": "star", "size": 16, "color": colour}
    return go.Scatter(x=[_mean(accepted.astype(np.float64))], y=[error], mode="markers", marker=marker, name=told)
