"""Computes ``summary.json`` and ``summary.txt`` from ``predictions.jsonl``: one row per method and test split.

Every labelled clip of a split counts, as in the logs of the test stage. A clip that could not be read and an answer
that could not be parsed are wrong and unparsed; a clip without probabilities has uniform ones in ECE, NLL and Brier.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vidreason.datamodules.atomic_files import write_text
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.state import text_faults
from vidreason.pipelines.table import decimal, percent, render_table
from vidreason.run_folder import SUMMARY_FILE, SUMMARY_TABLE, RunState, artefact_path

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class SummaryRow:
    """One row of ``summary.json``; rates are between 0 and 1."""

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
    """Omitted from the file if empty."""


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of ``right`` successes in ``n`` trials.

    >>> tuple(round(bound, 4) for bound in wilson_interval(8, 10))
    (0.4902, 0.9433)
    """
    if n == 0:
        return 0.0, 1.0  # without trials every rate is possible
    share, z2 = right / n, _Z * _Z
    centre = share + z2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def compare_with_majority(predictions: Sequence[Prediction]) -> str:
    """Returns a sentence if the clips do not show that the result is better than the largest class, else an empty text.

    The result counts as better if the lower bound of its 95 % interval is above the share of the largest class.
    """
    n, right = len(predictions), sum(p.right for p in predictions)
    label, most = Counter(p.label for p in predictions).most_common(1)[0]
    if wilson_interval(right, n)[0] > most / n:
        return ""
    always = f"always answering {label!r}, right in {percent(most / n)} %"
    return f"{predictions[0].split}: not better than {always}, as far as {n} clip{'s' * (n > 1)} can tell"


def recall_and_f1(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """Returns (balanced accuracy, macro F1).

    Recall is averaged over the classes that occur, F1 over those that occur or are predicted, as in scikit-learn.
    """
    import torch  # seconds to import: a pipeline that has nothing to summarise does without

    from vidreason.lightning_modules.decisions.metrics import CountScores

    names = sorted({p.label or "" for p in predictions} | {p.pred for p in predictions if p.pred is not None})
    counts = torch.zeros(len(names), len(names) + 1, dtype=torch.float64)
    for p in predictions:
        counts[names.index(p.label or ""), -1 if p.pred is None else names.index(p.pred)] += 1
    found = CountScores.of(counts)
    return float(found.balanced_acc), float(found.macro_f1)


def probability_scores(predictions: Sequence[Prediction]) -> tuple[float, float, float] | None:
    """Returns ECE over 15 equal bins, NLL and Brier score (summed over classes); None where no clip has probabilities.

    They come from the metrics of the test stage, so that the summary says what the logs say.
    """
    import torch

    from vidreason.lightning_modules.decisions.metrics import UNDECIDED, ClassificationMetrics

    classes = next((tuple(p.probs) for p in predictions if p.probs and not p.failed), None)
    if classes is None:  # single sampled answers; what could not be read has uniform ones
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
    """Returns the share of twin pairs with both clips right; None if the split does not consist of pairs.

    A pair is a group of two clips with different labels; if any group is another one (three clips of a person, two of
    one label), groups are not twins. A clip that is alone in its group is ignored.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if p.group:
            groups[p.group].append(p)
    pairs = [members for members in groups.values() if len(members) == len({p.label for p in members}) == 2]
    if not pairs or any(len(members) > 1 and members not in pairs for members in groups.values()):
        return None
    return sum(all(p.right for p in pair) for pair in pairs) / len(pairs)


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
    """Returns the row of one split; ``predictions`` must not be empty."""
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
        note="; ".join(filter(None, (note, compare_with_majority(predictions)))),
    )


def summarise_run(run_dir: Path, spec: PipelineSpec, state: RunState) -> list[SummaryRow]:
    """Returns one row per finished test stage and split, in the order of the predictions."""
    tests = [stage for stage in spec.stages if stage.command == "test"]
    has_fit = any(stage.command == "fit" for stage in spec.stages)
    alone = len({stage.when for stage in tests}) == len(tests)  # of tests under different conditions one is made
    notes = {
        name: r.note if not r.taken else "wrote no language about these clips" * bool(text_faults(run_dir / r.folder))
        for name, r in state.stages.items()
    }
    note = "; ".join(f"{name} {told}" for name, told in notes.items() if told)
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
                method=spec.name if alone else f"{spec.name}/{stage.name}",
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
    """Returns the rows as a table with notes below it."""
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
