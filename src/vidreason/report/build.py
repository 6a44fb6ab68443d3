"""Builds the report: gathers what its sections show, and writes the page."""

from __future__ import annotations

import platform
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.evaluation.rows import Evaluated
from vidreason.evaluation.run import Comparison, compare_methods
from vidreason.report import charts, training_charts
from vidreason.report.gallery import Gallery, show_clips
from vidreason.report.methods import Table, cost_table, method_tables, probe_table
from vidreason.report.runs import ReportRun, model_name, read_runs
from vidreason.report.verdict import Gain, Headline, choose_headline, gains, sentence, warnings

LIMIT = 20_000_000
"""Most bytes of the file."""
_PACKAGES = ("vidreason", "torch", "transformers", "peft", "lightning", "plotly")


@dataclass(frozen=True)
class Section:
    """One section of charts and tables, in the order of the page."""

    title: str
    text: str
    charts: tuple[charts.Chart, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    headline: Headline
    sentence: str
    gains: tuple[Gain, ...]
    warnings: tuple[str, ...]
    runs: tuple[ReportRun, ...]
    sections: tuple[Section, ...]
    gallery: Gallery


def gather(folders: Sequence[Path]) -> Report:
    """Gathers the report of evaluated runs.

    Raises:
        ValueError: If a run was not evaluated, or the runs do not belong together.
    """
    runs = read_runs(folders)
    comparisons = compare_methods([run.evaluated for run in runs], None)
    headline = choose_headline(runs, comparisons)
    rows = [row for run in runs for row in run.rows]
    found = gains(headline.name, headline.reference, comparisons, rows)
    return Report(
        headline=headline,
        sentence=sentence(headline, found),
        gains=tuple(found),
        warnings=tuple(warnings(headline, runs, comparisons)),
        runs=tuple(runs),
        sections=tuple(_sections(runs, comparisons, headline)),
        gallery=show_clips(headline, runs),
    )


def write_report(report: Report, path: Path) -> None:
    """Writes the report as one HTML file that loads nothing else, with fewer clips where it would be above 20 MB.

    Raises:
        ValueError: If the charts and tables alone are too large.
    """
    content, clips = render(report), len(report.gallery.clips)
    if len(content) > LIMIT:
        # the clips are what can be left out; the size of the page grows with their number
        fitting = bisect_right(range(clips), LIMIT, key=lambda kept: len(render(_with_clips(report, kept)))) - 1
        if fitting < 0:
            raise ValueError(
                f"{path}: charts and tables alone are larger than the {LIMIT / 1e6:.0f} MB of a report; give it fewer "
                "runs, or runs that were evaluated on fewer splits (--splits)"
            )
        content = render(_with_clips(report, fitting))
    write_text(path, content.decode("utf-8"))


def _with_clips(report: Report, kept: int) -> Report:
    return replace(report, gallery=report.gallery.first(kept))


def render(report: Report) -> bytes:
    """Returns the page of a report in UTF-8."""
    page = files("vidreason.report").joinpath("page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(page.joinpath("report.html").read_text(encoding="utf-8"))
    figures = [[list(each) for _, each in chart.variants] for section in report.sections for chart in section.charts]
    text = template.render(
        report=report,
        marked={report.headline.name, report.headline.reference}
        | {(name or "").partition(": ")[2] for name in (report.headline.name, report.headline.reference)},
        models={model_name(stage): None for run in report.runs for stage in run.stages if model_name(stage)},
        sizes=_sizes(report.headline),
        versions=[("Python", platform.python_version()), *((name, version(name)) for name in _PACKAGES)],
        # plotly escapes "<" and "/" for a script element
        figures=Markup(to_json_plotly(figures)),
        css=Markup(page.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(page.joinpath("report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )
    # a model can write half of a surrogate pair, which UTF-8 cannot hold
    return text.encode("utf-8", "replace")


def _sections(runs: Sequence[ReportRun], comparisons: Sequence[Comparison], headline: Headline) -> list[Section]:
    """Returns the sections that have something to show."""
    rows = [row for run in runs for row in run.rows]
    pipelines = {run.evaluated.pipeline for run in runs}
    prefix = f"{headline.run.evaluated.pipeline}: " if len(pipelines) == 1 else ""
    methods = [(name.removeprefix(prefix), one) for name, one in _named(runs, headline)]
    thresholds = {
        f"{run.evaluated.pipeline}: {name}".removeprefix(prefix): found
        for run in runs
        for name, found in run.thresholds.items()
    }
    probed = probe_table(rows, comparisons, prefix)
    spent = cost_table(runs)
    tables = [*method_tables(rows, comparisons, headline.reference, prefix), *([spent] if spent else [])]
    looks = [training_charts.probes(run, headline.method.method.name) for run in runs]
    where = _some(charts.by_split(rows, headline, prefix), charts.by_group(rows, headline, prefix))
    trust = _some(charts.reliability(methods), charts.risk(methods, thresholds))
    listed = [
        Section("Methods", _METHODS.format(reference=headline.reference or "nothing"), (), tuple(tables)),
        Section("Accuracy by split and group", "", where),
        Section("Which stage brings what", _STAGES, tuple(map(charts.by_stage, runs))),
        Section("How far to trust a confidence", "", trust),
        Section("Confusion", "", _some(charts.confusions(methods))),
        Section("Training", "", _some(training_charts.training(runs))),
        Section("Does it look at the video?", _PROBES, _some(*looks), (probed,) if probed else ()),
    ]
    return [section for section in listed if section.charts or section.tables]


def _named(runs: Sequence[ReportRun], headline: Headline) -> list[tuple[str, Evaluated]]:
    """Returns the methods of all runs by name, that of the headline and its reference first.

    The name has the seed where there are several.
    """
    several = len({run.evaluated.seed for run in runs}) > 1
    every = [(run, one) for run in runs for one in run.methods()]
    reference = [
        (run, one) for run, one in every if f"{run.evaluated.pipeline}: {one.method.name}" == headline.reference
    ]
    first = [(headline.run, headline.method), *reference]
    others = [(run, one) for run, one in every if all(one is not known for _, known in first)]
    return [
        (f"{run.evaluated.pipeline}: {one.method.name}" + f", seed {run.evaluated.seed}" * several, one)
        for run, one in (*first, *others)
    ]


def _some(*found: charts.Chart | None) -> tuple[charts.Chart, ...]:
    return tuple(chart for chart in found if chart is not None)


def _sizes(headline: Headline) -> list[tuple[str, int, int]]:
    """Returns (split, clips, groups) of the splits that were decided about; ``cal`` is for the temperature."""
    decisions = headline.method.decisions
    order = sorted(decisions, key=lambda split: split == CALIBRATION_SPLIT)
    return [(split, len(decisions[split]), len(set(decisions[split].groups))) for split in order]


_METHODS = (
    "Differences are in points of accuracy from {reference}, on the same clips. One run: 95 % intervals are for other "
    "clips and this model (bootstrap over groups), the p-value is of a sign-flip test over groups. Several seeds: for "
    "other training runs (Student t). Could show: the smallest true difference that is found with probability 0.8. "
    "Sure: mean confidence. At 10 % error: largest share of these clips with at most 10 % errors. Tokens and seconds "
    "are for a clip. Likelihood: the direct decision, without a trace; ECE scaled: with a temperature fitted on cal."
)
_STAGES = "Every stage decides about the same clips, from the untrained base on."
_PROBES = "The same model decides again with something taken away; its temperature stays."
