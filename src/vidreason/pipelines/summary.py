"""From ``predictions.jsonl`` to ``summary.json`` and ``summary.txt``: one row per method and test split.

Every labelled clip of a split counts, as it does in the logs of the test stage. A clip that could not be read, or an
answer that could not be parsed, is wrong and unparsed; where it has no probabilities it stands with equal ones in ECE,
NLL and Brier.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vidreason.datamodules.atomic_files import write_text
from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.table import decimal, percent, render_table
from vidreason.run_folder import SUMMARY_FILE, SUMMARY_TABLE, RunState, artefact_path

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Trace:
    """One generated text of a clip."""

    text: str
    answer: str | None


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``."""

    video_id: str
    split: str
    group: str
    label: str
    pred: str | None
    probs: Mapping[str, float]
    """Class to probability; empty where the method gives none or the clip failed"""
    unparsed: bool
    failed: bool
    traces: tuple[Trace, ...] = ()

    @property
    def right(self) -> bool:
        """Whether it counts as right."""
        return self.pred == self.label and not self.failed


@dataclass(frozen=True)
class SummaryRow:
    """One row of ``summary.json``."""

    method: str
    split: str
    n: int
    acc: float
    acc_lo: float
    acc_hi: float
    balanced_acc: float
    macro_f1: float
    ece: float | None
    nll: float | None
    brier: float | None
    unparsed_rate: float
    twin_acc: float | None
    train_clips: int | None
    cpu_seconds: float
    gpu_seconds: float
    seed: int
    note: str = ""
    """Not written where empty"""


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of ``right`` successes in ``n``.

    >>> tuple(round(bound, 4) for bound in wilson_interval(8, 10))
    (0.4902, 0.9433)
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z * _Z
    centre = share + z2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def recall_and_f1(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """Recall averaged over the classes that occur, and F1 averaged over the classes that occur or are predicted."""
    labels = {p.label for p in predictions}
    recalls, f1s = [], []
    for name in labels | {p.pred for p in predictions if p.pred is not None}:
        hits = sum(p.right and p.label == name for p in predictions)
        truly = sum(p.label == name for p in predictions)
        predicted = sum(p.pred == name for p in predictions)
        f1s.append(2 * hits / (truly + predicted))
        if name in labels:
            recalls.append(hits / truly)
    return sum(recalls) / len(recalls), sum(f1s) / len(f1s)


def probability_scores(predictions: Sequence[Prediction]) -> tuple[float, float, float] | None:
    """Returns ECE over 15 equal bins, NLL and Brier score (summed over classes); None where no clip has probabilities.

    They come from the metrics of the test stage, so that the summary says what the logs say.
    """
    import torch  # seconds to import: a pipeline that has nothing to summarise does without

    from vidreason.lightning_modules.decisions.metrics import UNDECIDED, ClassificationMetrics

    classes = next((tuple(p.probs) for p in predictions if p.probs), None)
    if classes is None:
        return None
    metrics = ClassificationMetrics(classes)
    equal = dict.fromkeys(classes, 1 / len(classes))
    metrics.update(
        torch.tensor([[(p.probs or equal)[name] for name in classes] for p in predictions]),
        torch.tensor([classes.index(p.label) for p in predictions]),
        torch.tensor([UNDECIDED if p.pred is None else classes.index(p.pred) for p in predictions]),
    )
    values = metrics.compute()
    return float(values["ece"]), float(values["nll"]), float(values["brier"])


def twin_accuracy(predictions: Sequence[Prediction]) -> float | None:
    """Share of twin pairs with both clips right; None where the split is not made of pairs.

    A pair is a group of two clips with different labels; where a group is anything else (three clips of a person, two
    of one label), groups are not twins. A clip alone in its group is left out.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if p.group:
            groups[p.group].append(p)
    pairs = [members for members in groups.values() if len(members) == len({p.label for p in members}) == 2]
    if not pairs or any(len(members) > 1 and members not in pairs for members in groups.values()):
        return None
    return sum(all(p.right for p in pair) for pair in pairs) / len(pairs)


def read_predictions(path: Path) -> list[Prediction]:
    """Reads ``predictions.jsonl``; clips without a label are left out.

    Raises:
        ValueError: A line is damaged or lacks a key; the message names file and line.
    """
    predictions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            traces = tuple(Trace(trace["text"], trace["answer"]) for trace in row["traces"] or ())
            names = ("video_id", "split", "group", "label", "pred", "unparsed", "failed")
            fields = {name: row[name] for name in names}
            predictions.append(Prediction(**fields, probs=row["probs"] or {}, traces=traces))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a prediction ({error!r}); run its test stage again"
            ) from error
    return [p for p in predictions if p.label is not None]


def summarise_split(
    predictions: Sequence[Prediction],
    *,
    method: str,
    train_clips: int | None = None,
    cpu_seconds: float = 0.0,
    gpu_seconds: float = 0.0,
    seed: int = 0,
    note: str = "",
) -> SummaryRow:
    """The row of one split; ``predictions`` must not be empty."""
    n, right = len(predictions), sum(p.right for p in predictions)
    low, high = wilson_interval(right, n)
    balanced_acc, macro_f1 = recall_and_f1(predictions)
    ece, nll, brier = probability_scores(predictions) or (None, None, None)
    return SummaryRow(
        method=method,
        split=predictions[0].split,
        n=n,
        acc=right / n,
        acc_lo=low,
        acc_hi=high,
        balanced_acc=balanced_acc,
        macro_f1=macro_f1,
        ece=ece,
        nll=nll,
        brier=brier,
        unparsed_rate=sum(p.pred is None for p in predictions) / n,
        twin_acc=twin_accuracy(predictions),
        train_clips=train_clips,
        cpu_seconds=round(cpu_seconds, 1),
        gpu_seconds=round(gpu_seconds, 1),
        seed=seed,
        note=note,
    )


def summarise_run(run_dir: Path, spec: PipelineSpec, state: RunState) -> list[SummaryRow]:
    """The rows of a run: every finished test stage, every split, in the order of the predictions."""
    tests = [stage for stage in spec.stages if stage.command == "test"]
    has_fit = any(stage.command == "fit" for stage in spec.stages)
    note = "; ".join(f"{name} {r.note}" for name, r in state.stages.items() if r.note and not r.taken)
    rows: list[SummaryRow] = []
    for stage in tests:
        record = state.stages.get(stage.name)
        path = artefact_path(run_dir / record.folder, "predictions") if record and record.status == "finished" else None
        if path is None:
            continue
        by_split: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in read_predictions(path):
            by_split[prediction.split].append(prediction)
        rows += [
            summarise_split(
                predictions,
                method=spec.name if len(tests) == 1 else f"{spec.name}/{stage.name}",
                train_clips=state.train_clips if has_fit else 0,
                cpu_seconds=sum(record.cpu_seconds for record in state.stages.values()),
                gpu_seconds=sum(record.gpu_seconds for record in state.stages.values()),
                seed=spec.seed,
                note=note,
            )
            for predictions in by_split.values()
        ]
    return rows


def render_summary(rows: Sequence[SummaryRow]) -> str:
    """The rows as a table, notes below it."""
    header = ["method", "split", "n", "acc %", "95 %", "bal acc", "F1", "twins", "ECE", "NLL", "Brier", "unparsed"]
    cells = [
        [
            row.method,
            row.split,
            str(row.n),
            percent(row.acc),
            f"{percent(row.acc_lo)}-{percent(row.acc_hi)}",
            percent(row.balanced_acc),
            percent(row.macro_f1),
            percent(row.twin_acc),
            *(decimal(value) for value in (row.ece, row.nll, row.brier)),
            percent(row.unparsed_rate),
        ]
        for row in rows
    ]
    notes = dict.fromkeys(f"{row.method}: {row.note}" for row in rows if row.note)
    return "\n".join([render_table(header, cells), *notes])


def save_rows(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Writes rows as JSON."""
    listed = [{key: value for key, value in asdict(row).items() if key != "note" or value} for row in rows]
    write_text(path, json.dumps(listed, indent=1) + "\n")


def load_rows(path: Path) -> list[SummaryRow]:
    """Reads rows that :func:`save_rows` wrote."""
    return [SummaryRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def write_summary(run_dir: Path, spec: PipelineSpec, state: RunState) -> list[SummaryRow]:
    """Writes ``summary.json`` and ``summary.txt`` into the run folder and prints the table."""
    rows = summarise_run(run_dir, spec, state)
    save_rows(run_dir / SUMMARY_FILE, rows)
    text = render_summary(rows)
    write_text(run_dir / SUMMARY_TABLE, text + "\n")
    print(text)
    return rows
