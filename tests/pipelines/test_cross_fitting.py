"""Cross-fitted traces: who wrote what the calibrator learns from, by a stand-in for the trainer that keeps account."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pipeline_world
import pytest
import yaml
from pipeline_world import option, options, state_of

from vidreason.datamodules.folds import FoldOptions
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.pipelines.call import open_pipeline, read_call
from vidreason.pipelines.commands import Commands
from vidreason.pipelines.spec import read_pipeline

project = pipeline_world.project

DEEP = """
name: deep
stages:
  - {name: generate, command: predict, config: generate.yaml, args: {data.init_args.predict_splits: [train]}}
  - {name: cold, command: fit, config: train.yaml, inputs: {model.init_args.traces_file: "{generate.traces}"}}
  - {name: grpo, command: fit, config: train.yaml, on_unparsed: skip,
     inputs: {model.init_args.adapter_path: "{cold.adapter}"}}
  - {name: traces, command: predict, config: generate.yaml, args: {data.init_args.predict_splits: [train, val]},
     inputs: {model.init_args.adapter_path: "{grpo.adapter|cold.adapter}"}}
  - name: calibration
    command: fit
    config: train.yaml
    inputs:
      model.init_args.adapter_path: "{grpo.adapter|cold.adapter}"
      model.init_args.traces_file: "{traces.traces}"
  - {name: test, command: test, config: train.yaml, inputs: {model.init_args.calibrator_path: "{calibration.adapter}"}}
"""


class Account:
    """A trainer whose weights are the list of the clips that they and their starting weights were trained on."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.stop_at = ""

    @property
    def commands(self) -> Commands:
        return Commands(self.run, lambda argv: None, lambda argv: None)

    def run(self, argv: list[str]) -> int:
        given, folder = options(argv), Path(option(argv, "run_dir"))
        self.stages.append(folder.name[3:])
        if folder.name.endswith(self.stop_at or " "):
            raise KeyboardInterrupt
        folder.mkdir(parents=True, exist_ok=True)
        fold = {key: yaml.safe_load(given.get(f"data.init_args.fold.{key}", "null")) for key in ("leave_out", "only")}
        data = ManifestDataModule(
            "clips.csv", seed=0, fold=FoldOptions(int(given.get("data.init_args.fold.of", "0")), **fold)
        )
        start = given.get("model.init_args.adapter_path")
        seen = set(json.loads((Path(start) / "weights").read_text())) if start else set[str]()
        if argv[0] == "predict":
            splits = json.loads(given["data.init_args.predict_splits"])
            rows = {clip.video_id: sorted(seen) for split in splits for clip in data.clips(split)}
            (folder / "traces.jsonl").write_text(json.dumps(rows))
        elif argv[0] == "fit":
            (folder / "adapter").mkdir(exist_ok=True)
            seen |= {clip.video_id for clip in data.clips("train")}
            (folder / "adapter" / "weights").write_text(json.dumps(sorted(seen)))
            texts = given.get("model.init_args.traces_file")
            used = json.loads(Path(texts).read_text()) if texts else {}
            for file in json.loads(given.get("model.init_args.fold_traces", "[]")):
                used |= json.loads(Path(file).read_text())
            (folder / "used.json").write_text(json.dumps(used))
        else:
            (folder / "predictions.jsonl").write_text("{}\n")
        return 0


@pytest.fixture
def people(project: Path) -> dict[str, str]:
    """Writes a manifest of 7 people with 2 clips each and some alone; returns the person of each training clip."""
    rows = [("path", "label", "split", "group", "video_id")]
    for label in "ab":
        for i in range(14):
            rows.append((f"{label}{i}.mp4", label, "train", f"{label}{i // 2}" if i < 10 else "", f"{label}{i}"))
        for split in ("val", "cal", "test"):
            rows.append((f"{label}_{split}.mp4", label, split, "", f"{label}_{split}"))
    with (project / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    for row in rows[1:]:
        (project / row[0]).touch()
    (project / "p.yaml").write_text(DEEP)
    return {row[4]: row[3] or row[4] for row in rows[1:] if row[2] == "train"}


def run(account: Account, *extra: str) -> int:
    account.stages.clear()
    argv = ["--config", "p.yaml", "--run_dir", "runs/x", *extra]
    return open_pipeline(argv, account.commands).run(summarise=False)


def read_by_calibrator() -> dict[str, list[str]]:
    """Returns who had been seen by the writer of the traces of each clip that the calibrator reads."""
    folder = Path("runs/x") / str(state_of()["calibration"]["folder"])
    found: dict[str, list[str]] = json.loads((folder / "used.json").read_text())
    return found


def test_the_calibrator_reads_traces_of_policies_that_have_not_seen_the_clip(people: dict[str, str]) -> None:
    account = Account()
    run(account)
    assert account.stages == ["generate", "cold", "grpo", "traces", "calibration", "test"]
    without = read_by_calibrator()
    assert all(name in without[name] for name in people), "by default the policy has seen every clip"

    run(account, "--folds", "3")
    copies = [f"{name}_fold{fold}" for fold in (1, 2, 3) for name in ("cold", "grpo", "traces")]
    assert account.stages == ["traces", *copies, "calibration", "test"], "what came before is kept"
    found = read_by_calibrator()
    assert found.keys() == {*people, "a_val", "b_val"}
    for name, person in people.items():
        seen = set(found[name])
        assert seen < people.keys(), f"{name}: written by a policy that was trained on others"
        assert person not in {people[other] for other in seen}, f"{name}: its group was left out as a whole"
    # Independently: three policies, which have left out every clip once, and each class in equal numbers.
    held_out = {frozenset(people.keys() - set(found[name])) for name in people}
    assert sorted(name for fold in held_out for name in fold) == sorted(people)
    assert len(held_out) == 3
    for label in "ab":
        sizes = Counter(sum(name[0] == label for name in fold) for fold in held_out)
        assert sizes in (Counter({4: 1, 5: 2}), Counter({4: 2, 6: 1})), "of 14 clips, 10 of them in pairs"
    assert found["a_val"] == sorted(people), "the policy that is tested writes about val"


@pytest.mark.slow
def test_cross_fitting_goes_on_where_it_was_and_follows_its_number(people: dict[str, str]) -> None:
    account = Account()
    account.stop_at = "grpo_fold2"
    assert run(account, "--folds", "2") == 130
    account.stop_at = ""
    assert run(account, "--folds", "2") == 0
    assert account.stages == ["grpo_fold2", "traces_fold2", "calibration", "test"]
    run(account, "--folds", "2")
    assert account.stages == []
    run(account, "--folds", "2", "--grpo.trainer.max_steps", "5")
    assert [name for name in account.stages if name.startswith("grpo")] == ["grpo", "grpo_fold1", "grpo_fold2"]
    three = [f"{name}_fold{fold}" for fold in (1, 2, 3) for name in ("cold", "grpo", "traces")]
    run(account, "--folds", "3", "--grpo.trainer.max_steps", "5")
    assert account.stages == [*three, "calibration", "test"]
    read = option(state_of()["calibration"]["command"], "model.init_args.fold_traces")  # type: ignore[arg-type]
    assert json.loads(read) == [f"runs/x/stages/{4 + 3 * k:02d}_traces_fold{k}/traces.jsonl" for k in (1, 2, 3)]
    written = read_pipeline("runs/x/pipeline.yaml")
    assert (written.folds, [stage.name for stage in written.stages]) == (
        3,
        [stage.name for stage in read_pipeline("p.yaml").stages],
    )
    run(account, "--grpo.trainer.max_steps", "5")
    assert account.stages == ["traces", "calibration", "test"], "switched off again"


def test_a_stage_can_keep_the_traces_of_the_final_policy(project: Path) -> None:
    spec = read_call(["--config", "configs/pipelines/ablation_calibration.yaml", "--run_dir", "x"]).spec
    assert [stage.name for stage in spec.stages if stage.lists] == ["calibration_cross_fitted"]
    both, crossed = (spec.stage(name) for name in ("calibration", "calibration_cross_fitted"))
    assert (both.inputs, both.args, both.config) == (crossed.inputs, crossed.args, crossed.config)
    assert spec.stage("traces").args["data.init_args.predict_splits"] == ["train", "val", "cal"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: deep", "name: deep\nfolds: 1", "p.yaml: folds must be at least 2, or 0 for none, got 1"),
        ("name: deep", "name: deep\nfolds: -2", "got -2"),
        ("name: deep", "name: deep\nfolds: two", "key 'folds' must be a whole number, got 'two'"),
        (
            "- name: calibration",
            "- name: calibration\n    cross_fit: 2",
            "key 'cross_fit' must be true or false, got 2",
        ),
        ("- name: calibration", "- name: calibration\n    cross_fit: false", "folds: no stage trains on traces"),
        ("name: cold,", "name: cold_fold1, command: fit, config: train.yaml}\n  - {name: cold,", "'cold_fold1', which"),
    ],
)
def test_folds_that_cannot_be_are_one_line(people: dict[str, str], old: str, new: str, message: str) -> None:
    Path("p.yaml").write_text(DEEP.replace(old, new))
    extra = [] if "\nfolds" in new else ["--folds", "2"]
    with pytest.raises(ValueError, match=message) as caught:
        read_call(["--config", "p.yaml", "--run_dir", "runs/x", *extra])
    assert "\n" not in str(caught.value)
