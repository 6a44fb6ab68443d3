"""The model card of an exported folder, ``README.md``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import vidreason
from vidreason.answering.exported import ExportInfo
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.export.script import Kinds
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.lightning_modules.weights.lineage import REVIEWED
from vidreason.pipelines.summary import SummaryRow, summarise_split
from vidreason.pipelines.table import decimal, percent
from vidreason.run_folder import COMMAND_FILE, PREDICTIONS_FILE, RunState

CARD_FILE = "README.md"
_ABSOLUTE = re.compile(r"(?<![\w.])/(?:[^\s/'\"\]]+/)+")


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card."""

    run: Path
    stage_folder: Path
    task: Task
    info: Mapping[str, Any]
    """Content of ``vidreason.json``."""
    entry: ExportInfo
    kinds: Kinds
    clips: Sequence[Clip]
    data_sha: str | None
    """Hash of ids, splits and labels of the data set; None if it is gone."""
    script: str | None
    four_bit: bool
    """True if the run held its base in 4 bits."""


def write_card(folder: Path, facts: CardFacts) -> None:
    """Writes ``README.md``."""
    parts = [
        _what(facts),
        _how(facts),
        _data(facts),
        _metrics(facts),
        _limits(facts),
        _lineage(facts),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _what(facts: CardFacts) -> str:
    task, entry = facts.task, facts.entry
    base = entry.base["name"]
    front = ["---", "library_name: " + ("peft" if facts.kinds.own == "adapter" else "transformers")]
    if facts.kinds.own == "adapter" and entry.base["path"] is None and facts.script is not None:
        front.append(f"base_model: {base}")
    front += ["pipeline_tag: video-classification", "---"]
    form = {
        "adapter": f"a PEFT adapter of {base}",
        "model": f"a whole model, trained from {base}",
    }[facts.kinds.own]
    policy = {
        "adapter": " Its traces are written by the adapter in `policy/`.",
        "model": " Its traces are written by the model in `policy/`.",
        None: "",
    }[facts.kinds.policy if _reads_traces(entry) else None]
    rows = [f"- `{spec.name}`" + (f": {spec.definition}" if spec.definition else "") for spec in task.classes]
    lines = [
        "\n".join(front),
        f"# {task.name}",
        f'Answers the question "{task.question}" about a video clip with one of {len(rows)} classes:',
        "\n".join(rows),
        f"This folder is {form}, exported by vidreason {vidreason.__version__} "
        f"(stage `{entry.run['stage']}` of run `{entry.run['name']}`).{policy} {_decides(entry)}",
    ]
    return "\n\n".join(lines)


def _reads_traces(entry: ExportInfo) -> bool:
    """Returns whether a model writes texts before the decision; it need not, even behind a reviewer's prompt."""
    decide = entry.decide
    return bool(decide["by"] == "answer" or (decide["by"] == "review" and decide["input"] != "video"))


def _decides(entry: ExportInfo) -> str:
    decide: Any = entry.decide
    scaled = f"divided by a temperature of {decide.get('temperature', 1.0):.4g}."
    by = {
        "likelihood": "It decides by the likelihoods of the class names behind the prompt.",
        "video": f"It decides by the likelihoods of the class names behind the prompt, {scaled}",
        "answer": f"It decides by the answers of {decide.get('samples')} sampled completions.",
        "review": "It reads a trace and then decides by the likelihoods of the class names, "
        f"averaged over {decide.get('samples')} traces and {scaled}",
    }["video" if decide["by"] == "review" and not _reads_traces(entry) else decide["by"]]
    if entry.threshold is None:
        return by
    limit: Any = entry.threshold
    return (
        f"{by}\n\nIt abstains below a confidence of {limit['confidence']:.3f} at a temperature of "
        f"{limit['temperature']:.4g}. Of its other decisions at most {limit['error']:.0%} are wrong, with 95 % "
        f"certainty, on clips like those of split `cal`, of which {limit['coverage']:.0%} were accepted."
    )


def _how(facts: CardFacts) -> str:
    base = "" if facts.entry.base["path"] is None or "model" in facts.kinds else " BASE_FOLDER"
    told = f', base="{base.strip()}"' if base else ""
    ours = (
        "## Use\n\nWith vidreason:\n\n```python\nfrom vidreason import VideoClassifier\n\n"
        f'classify = VideoClassifier.from_export("DIR"{told})\nclassify("clip.mp4").probs\n```'
    )
    if facts.script is None:
        return (
            f"{ours}\n\nThe embedded base is an architecture of vidreason, for which transformers has no class: this "
            "folder is loaded by vidreason only."
        )
    kind = "transformers and peft" if "adapter" in facts.kinds else "transformers"
    versions = (
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__.split('+')[0]}"
    )
    sampled = _reads_traces(facts.entry)
    others = (
        "\n\nA program that takes the processor of the base for an adapter, such as vLLM (`mm_processor_kwargs`), "
        "needs the arguments `inputs.processor` of `vidreason.json`."
    )
    return (
        f"{ours}\n\nWith {kind} alone (`python script.py DIR clip.mp4{base}`; written with {versions}):\n\n"
        f"```python\n{facts.script}```\n\n"
        "It takes clips with a constant frame rate that need no rotation; vidreason also takes others."
        + (" The noise of a trace depends on the path of the clip as it is given." if sampled else "")
        + (others if "adapter" in facts.kinds else "")
    )


def _data(facts: CardFacts) -> str:
    if facts.data_sha is None:
        return "## Data\n\nThe data set was not there when the model was exported."
    counts = Counter(clip.split for clip in facts.clips)
    splits = ", ".join(f"{number} {split}" for split, number in counts.items())
    return (
        f"## Data\n\nClips by split: {splits}. SHA-256 of their ids, splits and labels: `{facts.data_sha}`.\n\n"
        "`clips.json` holds ids of these clips by a hash of their content"
        + (", so that `from_export` gives them the traces that the run gave" if _reads_traces(facts.entry) else "")
        + ". It may be deleted."
    )


def _metrics(facts: CardFacts) -> str:
    path = facts.stage_folder / PREDICTIONS_FILE
    if not path.is_file():
        return "## Metrics\n\nThis stage was not tested; nothing is known about its accuracy."
    by_split: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in read_predictions(path):
        by_split[prediction.split].append(prediction)
    rows = [summarise_split(found, method="") for found in by_split.values() if found]
    head = "| split | clips | accuracy % (95 %, Wilson) | balanced % | macro F1 % | ECE | NLL | Brier | unparsed % |"
    lines = [head, "| --- " * 9 + "|", *map(_metrics_row, rows)]
    notes = [f"- {row.note}" for row in rows if row.note]
    return "## Metrics\n\n" + "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def _metrics_row(row: SummaryRow) -> str:
    interval = f"{percent(row.acc)} ({percent(row.acc_lo)}–{percent(row.acc_hi)})"
    cells = [row.split, str(row.n), interval, percent(row.balanced_acc), percent(row.macro_f1)]
    cells += [decimal(value) for value in (row.ece, row.nll, row.brier)] + [percent(row.unparsed_rate)]
    return f"| {' | '.join(cells)} |"


def _limits(facts: CardFacts) -> str:
    check, merged = facts.entry.check, facts.entry.merged
    measured = (
        f"{check['difference']:.2g} nats (largest of {check['values']} values on {check['clips']} clips of noise)"
    )
    lines = [
        "- It was trained for these classes and clips like those of its training split, and knows no other answer.",
        f"- Log-probabilities of this folder differ from those of the run by at most {measured}.",
    ]
    if merged and facts.four_bit:
        lines.append(
            "- The run held its base in 4 bits (nf4); the adapter was merged into the weights in full precision. The "
            "difference above is that of the two bases, and the metrics are those of the run in 4 bits."
        )
    elif merged and check["difference"] > 1e-4:
        lines.append("- The difference comes from rounding the merged weights to the precision of the base.")
    if _reads_traces(facts.entry):
        lines.append("- Its traces are texts that a model wrote, and not the cause of its decision.")
    if facts.info.get("note"):
        lines.append(f"- {facts.info['note']}. The script replaces these positions.")
    return "## Limits\n\n" + "\n".join(lines)


def _lineage(facts: CardFacts) -> str:
    info: Any = facts.info
    rows = [
        ("stage", f"`{info['stage']}`, {info['global_step']} optimizer steps, seed {info['seed']}"),
        ("base", f"{facts.entry.base['name']}, SHA-256 `{info['base_sha']}`"),
        ("started from", f"`{info['parent_sha']}`" if info.get("parent_sha") else "the base"),
        ("task", f"SHA-256 `{info['task_sha']}`"),
        ("weights", f"SHA-256 `{facts.entry.weights_sha}`"),
    ]
    if info.get(REVIEWED) and facts.entry.policy_sha:
        rows.append(("policy", f"SHA-256 `{facts.entry.policy_sha}`"))
    commands = [_without_places(command) for command in _commands(facts.run, facts.stage_folder)]
    return (
        "## Lineage\n\n"
        + "\n".join(f"- {name}: {value}" for name, value in rows)
        + "\n\nCommands, without folders of the machine that they ran on:\n\n```\n"
        + "\n".join(commands)
        + "\n```"
    )


def _commands(run: Path, stage_folder: Path) -> list[str]:
    """Returns the commands of a run's stages in order, up to the one that is exported."""
    state = RunState.load(run)
    folders = [run / record.folder for record in state.stages.values() if record.status == "finished"] if state else []
    resolved = [folder.resolve() for folder in folders]
    here = stage_folder.resolve()
    folders = folders[: resolved.index(here) + 1] if here in resolved else [stage_folder]
    files = [folder / COMMAND_FILE for folder in folders]
    return [file.read_text(encoding="utf-8").strip() for file in files if file.is_file()]


def _without_places(command: str) -> str:
    """Returns a command without the folders of absolute paths."""
    return _ABSOLUTE.sub("", command)
