"""Does the report show what is wrong with a run? Three planted defects, by the ordinary commands.

    python benchmarks/planted_defects.py --run runs/demo/deepintuit [--out runs/defects] [--json FILE]

1. *A calibrator that ignores the video*: the calibrator of the run with ``input: trace``; finished stages are taken.
2. *Labels shuffled*: label SFT on the run's clips with the labels of train permuted, and those of val as well, so that
   validation cannot choose weights that know better.
3. *Train clips in the test*: ten test files are copies of training files under their own names.

Run it from the folder that the run was started in. Every report is about one split of 80 clips. It prints what each
report says first and warns of, or how the run is refused; beside the first, what it says of the run as it is.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from figures import versions, write_json

from vidreason.report.build import gather, write_report

SPLIT = "test_L0"
COPIES = 10
TAKEN = ("generate", "sft_cold_start", "grpo", "traces")
"""Finished stages of `deepintuit` that the first defect does not touch."""
Row = dict[str, str]


def shuffle_labels(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """Returns the rows of a manifest with the labels of train permuted, and those of val."""
    found, generator = [dict(row) for row in rows], random.Random(seed)
    for split in ("train", "val"):
        own = [row for row in found if row["split"] == split]
        labels = [row["label"] for row in own]
        generator.shuffle(labels)
        for row, label in zip(own, labels, strict=True):
            row["label"] = label
    return found


def copy_train_into_test(rows: Sequence[Row], folder: Path, copies: int = COPIES) -> list[Row]:
    """Returns the rows with ``copies`` clips of the test replaced by copies of training files of the same label."""
    found = [dict(row) for row in rows]
    train = {row["label"]: row for row in found if row["split"] == "train"}
    folder.mkdir(parents=True, exist_ok=True)
    for row in [row for row in found if row["split"] == SPLIT][:copies]:
        target = folder / f"{row['video_id'].replace('/', '_')}.mp4"
        shutil.copyfile(train[row["label"]]["path"], target)
        row["path"] = str(target.resolve())
    return found


def write_data(world: Path, folder: Path, change: Callable[[list[Row]], list[Row]]) -> Path:
    """Writes a changed copy of a world's manifest and a data file for it; returns the data file."""
    with (world / "manifest.csv").open(encoding="utf-8", newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["split"] in ("train", "val", "cal", SPLIT)]
    rows = [row | {"path": str((world / row["path"]).resolve())} for row in listed]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(change(rows))
    init = {"manifest": str(folder / "manifest.csv"), "task": "configs/tasks/porch.yaml", "num_workers": 0}
    init |= {"frames": {"num_frames": 12}, "eval_batch_size": 40}
    path = folder / "data.yaml"
    data = {"class_path": "vidreason.datamodules.manifest.ManifestDataModule", "init_args": init}
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def run(*words: str | Path) -> tuple[int, str]:
    """Runs ``vidreason``; returns its exit status and the last line of its messages."""
    line = [sys.executable, "-m", "vidreason", *map(str, words)]
    print("$ vidreason " + " ".join(map(str, words)), flush=True)
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, errors="replace")
    said = [text for text in done.stderr.splitlines() if text.strip()]
    return done.returncode, said[-1] if said else ""


def reported(folder: Path, *modes: str) -> dict[str, object]:
    """Evaluates a run with probes and writes its report; returns what this says first, and how a refusal reads."""
    status, said = run("evaluate", "--run", folder, "--splits", SPLIT, "--probes", "--modes", *modes)
    if status:
        return {"refused": said}
    report = gather([folder])
    write_report(report, folder / "report.html")
    return {"sentence": report.sentence, "warnings": list(report.warnings)}


def main(argv: Sequence[str] | None = None) -> None:
    """Plants the defects and prints what the reports say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo/deepintuit"))
    parser.add_argument("--out", type=Path, default=Path("runs/defects"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    whole, out = options.run, options.out
    (world,) = (whole.parent / "porch").iterdir()
    found: dict[str, object] = {}

    def keep(what: str, report: dict[str, object]) -> None:
        found[what] = report
        packages = ("vidreason", "torch", "lightning", "transformers")
        command = " ".join(["benchmarks/planted_defects.py", *(sys.argv[1:] if argv is None else argv)])
        top = {"command": command, "date": date.today().isoformat(), "versions": versions(packages), "split": SPLIT}
        write_json(options.json, top | found)
        print(json.dumps({what: report}, indent=1), flush=True)

    label_sft = ("--config", "configs/pipelines/label_sft.yaml", "--until", "sft_label")
    data = write_data(world, out / "leak_data", lambda rows: copy_train_into_test(rows, out / "leak_data" / "copies"))
    short = ("--sft_label.trainer.max_epochs", "1", "--sft_label.trainer.check_val_every_n_epoch", "1")
    run("pipeline", *label_sft, "--run_dir", out / "leak", "--data", data, *short)
    keep("train clips in the test", reported(out / "leak", "likelihood"))

    data = write_data(world, out / "shuffled_data", shuffle_labels)
    run("pipeline", *label_sft, "--run_dir", out / "shuffled", "--data", data)
    keep("labels shuffled", reported(out / "shuffled", "likelihood"))

    use = [word for name in TAKEN for word in ("--use", f"{name}={whole}")]
    deepintuit = ("pipeline", "--config", whole / "pipeline.yaml", "--until", "calibration", *use)
    run(*deepintuit, "--run_dir", out / "blind", "--calibration.model.init_args.input", "trace")
    keep("a calibrator that ignores the video", reported(out / "blind", "calibrated"))
    run(*deepintuit, "--run_dir", out / "as_it_is", "--use", f"calibration={whole}")
    keep("no defect: the run as it is", reported(out / "as_it_is", "calibrated"))


if __name__ == "__main__":
    main()
