"""Charts of training and of probes."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from vidreason.evaluation.rows import EvaluationRow
from vidreason.report.charts import BELOW, Chart, figure, label, percent_axis
from vidreason.report.curves import Panel, read_curves
from vidreason.report.runs import ReportRun

_FEW = 20
"""Curves of fewer points have markers."""


def training(runs: Sequence[ReportRun]) -> Chart | None:
    """Draws the training curves, one variant per stage that trained; None if no stage has any."""
    variants = []
    for run in runs:
        for stage in run.stages:
            panels = read_curves(stage.folder)
            if panels:
                name = f"{run.name}: {stage.name}" if len(runs) > 1 else stage.name
                variants.append((name, tuple(map(_panel, panels))))
    note = "Over the steps of the stage, as TensorBoard has them."
    return Chart("Training curves", note, tuple(variants)) if variants else None


def probes(run: ReportRun, first: str) -> Chart | None:
    """Draws accuracy and confidence of methods with and without what a probe takes away; None without probes.

    Args:
        run: The run.
        first: The method that is shown first.
    """
    variants = []
    for split in dict.fromkeys(row.split for row in run.rows):
        rows = [row for row in run.rows if row.split == split and row.group is None]
        for name in dict.fromkeys(row.who.probe_of for row in rows if row.who.probe_of):
            own = [row for row in rows if name in (row.who.method, row.who.probe_of)]
            variants.append((f"{name}, {split}", (_probe_bars(own, name),)))
    variants.sort(key=lambda variant: not variant[0].startswith(f"{first}, "))
    note = "A model that looks at the video loses accuracy and confidence without it."
    return Chart(f"Probes of {run.name}", note, tuple(variants)) if variants else None


def _probe_bars(rows: Sequence[EvaluationRow], name: str) -> dict[str, object]:
    what = [label(row.who.method.removeprefix(f"{name}, ")) if row.who.probe_of else "as it is" for row in rows]
    bars = [go.Bar(x=what, y=[row.scores["acc"] for row in rows], name="accuracy")]
    if any(row.confidence is not None for row in rows):
        bars.append(go.Bar(x=what, y=[row.confidence for row in rows], name="mean confidence"))
    return figure(bars, 340, xaxis={"type": "category"}, yaxis=percent_axis(""), legend=BELOW, showlegend=True)


def _panel(panel: Panel) -> dict[str, object]:
    traces = [
        go.Scatter(
            x=list(curve.steps),
            y=list(curve.values),
            name=label(curve.name),
            mode="lines+markers" if len(curve.steps) < _FEW else "lines",
        )
        for curve in panel.curves
    ]
    axes = {"xaxis": {"rangemode": "tozero"}, "yaxis": {"rangemode": "tozero"}}
    title = {"text": label(panel.title), "font": {"size": 14}, "x": 0.02}
    return figure(traces, 270, title=title, showlegend=len(traces) > 1, legend=BELOW, **axes)
