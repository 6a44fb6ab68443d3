"""The planted defects: what they change in a manifest, and which commands show them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import planted_defects
import pytest
import yaml
from planted_defects import SPLIT, copy_train_into_test, shuffle_labels

from vidreason.pipelines.call import read_call
from vidreason.pipelines.spec import read_pipeline


def rows(folder: Path) -> list[dict[str, str]]:
    found = []
    for split in ("train", "val", "cal", SPLIT):
        for i in range(12):
            path = folder / f"{split}_{i}.mp4"
            path.write_text(path.name)
            row = {"path": str(path), "label": "ab"[i % 2], "split": split, "group": "", "video_id": f"{split}/{i}"}
            found.append(row)
    return found


def test_labels_of_train_and_val_are_permuted_and_no_others(tmp_path: Path) -> None:
    before = rows(tmp_path)
    after = shuffle_labels(before)
    changed = {row["split"] for row, other in zip(before, after, strict=True) if row != other}
    assert changed == {"train", "val"}
    for split in changed:
        counts = [Counter(row["label"] for row in one if row["split"] == split) for one in (before, after)]
        assert counts[0] == counts[1]


def test_test_files_become_copies_of_training_files_with_the_same_label(tmp_path: Path) -> None:
    before = rows(tmp_path)
    after = copy_train_into_test(before, tmp_path / "copies", copies=3)
    label_of = {Path(row["path"]).name: row["label"] for row in before if row["split"] == "train"}
    changed = [(row, other) for row, other in zip(before, after, strict=True) if row != other]
    assert [row["split"] for row, _ in changed] == [SPLIT] * 3
    for row, other in changed:
        assert label_of[Path(other["path"]).read_text()] == row["label"]
        assert other == row | {"path": other["path"]}


def test_every_command_is_one_of_the_pipelines_and_every_report_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(*words: str | Path) -> tuple[int, str]:
        commands.append([str(word) for word in words])
        return (1, "10 clips have the same content") if "leak" in str(words) and words[0] == "evaluate" else (0, "")

    monkeypatch.setattr(planted_defects, "run", run)
    monkeypatch.setattr(planted_defects, "gather", lambda folders: type("R", (), {"sentence": "s", "warnings": ("w",)}))
    monkeypatch.setattr(planted_defects, "write_report", lambda report, path: None)
    world = tmp_path / "porch" / "seed0"
    world.mkdir(parents=True)
    with (world / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split", "group", "video_id"])
        writer.writeheader()
        writer.writerows(row | {"path": Path(row["path"]).name} for row in rows(world))
    (tmp_path / "deepintuit").mkdir()
    shipped = read_pipeline("configs/pipelines/deepintuit.yaml").as_yaml()
    (tmp_path / "deepintuit" / "pipeline.yaml").write_text(shipped)
    options = [
        "--run",
        str(tmp_path / "deepintuit"),
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "f.json"),
    ]
    planted_defects.main(options)

    specs = {
        Path(words[words.index("--run_dir") + 1]).name: read_call(words[1:])
        for words in commands
        if words[0] == "pipeline"
    }
    assert list(specs) == ["leak", "shuffled", "blind", "as_it_is"]
    args = [specs[name].spec.stage("calibration").args for name in ("blind", "as_it_is")]
    assert [one.get("model.init_args.input") for one in args] == ["trace", None]
    assert specs["blind"].use.keys() == {"generate", "sft_cold_start", "grpo", "traces"}
    data = yaml.safe_load(Path(specs["leak"].spec.data or "").read_text())
    assert data["init_args"]["manifest"] == str(tmp_path / "out" / "leak_data" / "manifest.csv")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["train clips in the test"] == {"refused": "10 clips have the same content"}
    for name in ("labels shuffled", "a calibrator that ignores the video", "no defect: the run as it is"):
        assert found[name] == {"sentence": "s", "warnings": ["w"]}
