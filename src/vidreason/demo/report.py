"""The report of the demo: methods by levels as tables and a picture, and a few decisions in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vidreason.datamodules.atomic_files import write_text
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.pipelines.spec import read_pipeline
from vidreason.pipelines.summary import SummaryRow, load_rows, save_rows
from vidreason.pipelines.table import decimal, percent, render_table
from vidreason.run_folder import PIPELINE_FILE, SUMMARY_FILE, SUMMARY_TABLE, RunState, artefact_path

if TYPE_CHECKING:
    from vidreason.datamodules.types import Clip

REASONER = "deepintuit"
"""The method whose traces are shown."""
BASELINE = "label_sft"
"""The method that it is compared with."""
DECIDING_SPLIT = "test_L1"
"""New clips with the shortcut of the training clips broken and nothing else changed."""
EXAMPLES = 5
"""Maximum number of decisions shown."""
CHANCE_LABEL = "chance"


@dataclass(frozen=True)
class Worked:
    """One decision to show, with its clip and the picture of its frames."""

    clip: Clip
    prediction: Prediction
    strip: Path


def write_report(run_dir: Path, methods: Sequence[str]) -> str:
    """Writes the joint ``summary.json``, ``summary.txt``, the picture and the examples.

    Args:
        run_dir: Folder of the demo, with one finished run folder per method.
        methods: Names of the methods, in the order of the table.

    Returns:
        The text to print, the same as ``summary.txt``.
    """
    rows = [row for method in methods for row in load_rows(run_dir / method / SUMMARY_FILE)]
    save_rows(run_dir / SUMMARY_FILE, rows)
    predictions = _test_predictions(run_dir / methods[-1])
    classes = len({name for p in predictions for name in p.probs}) or len({p.label for p in predictions})
    picture = run_dir / "accuracy.png"
    draw_accuracy(rows, 1 / classes, picture)
    examples = [] if REASONER not in methods else work_examples(run_dir / REASONER, run_dir / "examples")
    parts = [render_comparison(rows), *map(render_example, examples), _where(run_dir, methods, picture)]
    if {REASONER, BASELINE} <= set(methods):
        reasoned, labelled = (_test_predictions(run_dir / method) for method in (REASONER, BASELINE))
        parts.append(render_verdict(reasoned, labelled))
    text = "\n\n".join(parts)
    write_text(run_dir / SUMMARY_TABLE, text + "\n")
    return text


def render_comparison(rows: Sequence[SummaryRow]) -> str:
    """Returns three tables, method by level: accuracy with its interval, twin accuracy, ECE."""
    methods, levels = _unique(row.method for row in rows), _unique(_level(row) for row in rows)
    cells = {(row.method, _level(row)): row for row in rows}
    sizes = {level: sorted({row.n for row in rows if _level(row) == level}) for level in levels}
    header = [f"{level} (n={'/'.join(map(str, sizes[level]))})" for level in levels]

    def table(title: str, head: Sequence[str], show: Mapping[tuple[str, str], str]) -> str:
        body = [[method, *(show.get((method, level), "-") for level in levels)] for method in methods]
        return f"{title}\n{render_table(['method', *head], body)}"

    parts = [
        table("accuracy % (95 % interval)", header, {key: _interval(row) for key, row in cells.items()}),
        table("twin accuracy % (both of a pair right)", levels, {k: percent(r.twin_acc) for k, r in cells.items()}),
        table("expected calibration error", levels, {key: decimal(row.ece) for key, row in cells.items()}),
        *_unique(f"{row.method}: {note}" for row in rows for note in row.note.split("; ") if note),
    ]
    return "\n\n".join(parts)


def draw_accuracy(rows: Sequence[SummaryRow], chance: float, path: Path) -> None:
    """Draws accuracy against level, one curve per method, with 95 % intervals.

    Args:
        rows: One per method and level.
        chance: Accuracy of guessing.
        path: PNG to write.
    """
    from matplotlib.figure import Figure  # unlike pyplot, it draws with Agg and needs no display

    methods, levels = _unique(row.method for row in rows), _unique(_level(row) for row in rows)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        # shifted, so that the intervals of two methods do not hide each other
        x = [levels.index(_level(row)) + 0.06 * (index - (len(methods) - 1) / 2) for row in own]
        y = [100 * row.acc for row in own]
        bars = [[100 * (r.acc - r.acc_lo) for r in own], [100 * (r.acc_hi - r.acc) for r in own]]
        axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=method)
    axes.axhline(100 * chance, linestyle=":", color="grey", label=CHANCE_LABEL)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylim(0, 100)
    axes.set_xlabel("level of openness (training clips are L0)")
    axes.set_ylabel("accuracy %, 95 % interval")
    axes.legend()
    figure.savefig(path)


def choose_examples(predictions: Sequence[Prediction], count: int = EXAMPLES) -> list[Prediction]:
    """Selects decisions to show: the first right one of each split, and the last wrong one if there is one.

    Args:
        predictions: All predictions of a run, split by split.
        count: Maximum number of decisions, including the wrong one.
    """
    readable = [p for p in predictions if p.traces and not p.failed]
    splits = _unique(p.split for p in readable)
    right = [next((p for p in readable if p.split == split and p.right), None) for split in splits]
    wrong = [p for p in reversed(readable) if not p.right]
    chosen = [p for p in right if p is not None][: count - bool(wrong)]
    return chosen + wrong[: min(count - len(chosen), 1)]


def work_examples(run_dir: Path, folder: Path) -> list[Worked]:
    """Selects examples of a run and draws their film strips.

    Args:
        run_dir: A finished run folder.
        folder: Folder for the pictures.
    """
    chosen = choose_examples(_test_predictions(run_dir))
    if not chosen:
        return []
    from torchvision.transforms.v2.functional import to_pil_image

    from vidreason.callbacks.film_strip import film_strip
    from vidreason.config import trainer_cli
    from vidreason.datamodules.base import VideoDataModule

    state = RunState.load(run_dir)
    assert state is not None
    command = state.stages[_test_stage(run_dir)].command
    data = trainer_cli.build(command[0], command[1:]).datamodule
    assert isinstance(data, VideoDataModule)
    data.prepare_data()
    folder.mkdir(parents=True, exist_ok=True)
    worked = []
    for number, prediction in enumerate(chosen, 1):
        clip = next(clip for clip in data.clips(prediction.split) if clip.video_id == prediction.video_id)
        strip = folder / f"{number}_{prediction.split}_{prediction.label}.png"
        picture = film_strip(clip.path, clip.stretch)
        assert picture is not None, f"{clip.path} was read for its prediction"
        to_pil_image(picture).save(strip)
        worked.append(Worked(clip, prediction, strip))
    return worked


def render_verdict(reasoned: Sequence[Prediction], labelled: Sequence[Prediction]) -> str:
    """Returns one sentence: is reasoning better than fine-tuning on the labels, and what could the clips show?

    Args:
        reasoned: Test predictions of the method that reasons, about all splits.
        labelled: Test predictions of the baseline about the same clips.
    """
    from vidreason.evaluation.decisions import Decisions
    from vidreason.evaluation.intervals import compare

    split = DECIDING_SPLIT if any(p.split == DECIDING_SPLIT for p in reasoned) else reasoned[-1].split
    both = [[p for p in predictions if p.split == split] for predictions in (reasoned, labelled)]
    names = sorted({str(p.label) for own in both for p in own} | {p.pred for own in both for p in own if p.pred})
    first, second = ([Decisions.read(own, names)] for own in both)
    found = compare(first, second)
    points, margin, shown = 100 * found.mean, 100 * found.margin, 100 * found.detectable
    verdict = "is not shown to be better" if not found.shown else "is better" if points > 0 else "is worse"
    return (
        f"reasoning ({REASONER}) {verdict} than label SFT: {points:+.1f} ± {margin:.1f} points at "
        f"{split.removeprefix('test_')} (95 % interval, {found.clips} clips, one run); this many clips could show a "
        f"difference of {shown:.0f} points"
    )


def render_example(example: Worked) -> str:
    """Returns one decision in words."""
    from vidreason.rewards.completion import parse_completion

    p = example.prediction
    reasoning = parse_completion(p.traces[0].text).reasoning or p.traces[0].text
    verdict = "right" if p.right else f"wrong, it is {p.label}"
    return "\n".join(
        [
            f"{p.split}  {example.clip.path}",
            f"  frames     {example.strip}",
            *textwrap.wrap(reasoning, 110, initial_indent="  thinks     ", subsequent_indent=" " * 13),
            f"  answers    {p.traces[0].answer or '(nothing that can be parsed)'}",
            f"  decides    {p.pred} with calibrated probability {p.probs.get(p.pred or '', 0.0):.2f}: {verdict}",
        ]
    )


def _where(run_dir: Path, methods: Sequence[str], picture: Path) -> str:
    lines = [
        f"picture      {picture}",
        f"table        {run_dir / 'summary.txt'}, {run_dir / 'summary.json'}",
        f"logs         tensorboard --logdir {run_dir}",
        *(f"run folder   {run_dir / method}" for method in methods),
    ]
    return "\n".join(lines)


def _test_stage(run_dir: Path) -> str:
    return next(s.name for s in read_pipeline(str(run_dir / PIPELINE_FILE)).stages if s.command == "test")


def _test_predictions(run_dir: Path) -> list[Prediction]:
    state = RunState.load(run_dir)
    path = artefact_path(run_dir / state.stages[_test_stage(run_dir)].folder, "predictions") if state else None
    if path is None:
        raise ValueError(f"{run_dir}: no finished test stage")
    return read_predictions(path)


def _interval(row: SummaryRow) -> str:
    return f"{percent(row.acc)} ({100 * row.acc_lo:.0f}-{100 * row.acc_hi:.0f})"


def _level(row: SummaryRow) -> str:
    return row.split.removeprefix("test_")


def _unique(items: Iterable[str]) -> list[str]:
    """Returns the distinct items in order of appearance."""
    return list(dict.fromkeys(items))
