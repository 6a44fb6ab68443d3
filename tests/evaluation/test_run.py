"""Tests the methods of an evaluation, their comparisons, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pipeline_world import options

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.datamodules.types import Clip
from vidreason.evaluation import leaks
from vidreason.evaluation import run as evaluation
from vidreason.evaluation.plan import MODES, SwappedTraces, plan_evaluation
from vidreason.evaluation.run import (
    EvaluatedRun,
    EvaluateOptions,
    compare_methods,
    evaluate_run,
    rows_of_run,
)
from vidreason.evaluation.table import render_evaluation
from vidreason.evaluation.together import check_distinct, check_together
from vidreason.pipelines.commands import Commands

LABELS = ("fall", "walk")
ALL = EvaluateOptions(splits=None, modes=MODES, samples=3, probes=True)
RIGHT = {"zero_shot": 0.5, "cold_likelihood": 0.6, "cold_answer": 0.7, "calibration_2_traces": 0.9}
"""Share of right decisions by the beginning of a test stage's name; 0.75 for others."""


class Clips(VideoDataModule):
    """24 clips of two classes in every split, each a file of its own content."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def label_names(self) -> tuple[str, ...]:
        return LABELS

    def samples(self, split: str) -> Sequence[Clip]:
        clips = []
        for number in range(24):
            path = self.folder / f"{split}{number}.mp4"
            if not path.exists():
                path.write_text(path.name)
            clips.append(Clip(path, LABELS[number % 2], f"{split}{number}", split=split))
        return clips


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clips:
    (tmp_path / "clips").mkdir()
    found = Clips(tmp_path / "clips")
    monkeypatch.setattr(evaluation, "_data_of", lambda run: found)
    return found


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished pipeline: a reasoner and a calibrator of two traces at temperature 2."""
    run, stages = tmp_path / "runs" / "x", {}
    for number, name in enumerate(("cold", "calibration"), 1):
        folder = run / "stages" / f"{number:02d}_{name}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(name)
        init: dict[str, object] = {"adapter_path": None, "decide": {"by": "answer"}}
        if name == "calibration":
            init = {"adapter_path": None, "calibrator_path": None, "traces": {"samples": 2}}
            info = {"stage": "calibration", "temperature": 2.0}
            (folder / "adapter" / "vidreason.json").write_text(json.dumps(info))
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": init}}))
        (folder / "finished.json").write_text("{}")
        Task.from_labels("t", ("x", "y")).to_yaml(folder / "task.yaml")
        record = {"status": "finished", "folder": f"stages/{number:02d}_{name}", "inputs": {}, "command": ["fit"]}
        stages[name] = record
    state = {"vidreason_state": 1, "pipeline": "deepintuit", "train_clips": 24, "stages": stages}
    (run / "state.json").write_text(json.dumps(state))
    (run / "pipeline.yaml").write_text(yaml.safe_dump({"seed": 7, "stages": []}))
    return run


class FakeTests:
    """Stands in for ``vidreason test``: writes predictions that are right as often as ``RIGHT`` says."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []

    @property
    def commands(self) -> Commands:
        return Commands(self.run, lambda argv: None, lambda argv: None)

    def run(self, argv: list[str]) -> int:
        given = options(argv)
        self.calls.append(given)
        folder = Path(given["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        name = folder.name[3:]
        share = next((value for key, value in RIGHT.items() if name.startswith(key)), 0.75)
        samples = int(given.get("model.init_args.decide.samples", given.get("model.init_args.traces.samples", "0")))
        rows, records = [], []
        for split in json.loads(given["data.init_args.test_splits"]):
            for number in range(24):
                label = LABELS[number % 2]
                pred = label if number < 24 * share else LABELS[1 - number % 2]
                probs = {name: 0.8 if name == pred else 0.2 for name in LABELS}
                traces = [{"text": pred, "answer": pred, "n_tokens": 5}] * samples
                row: dict[str, object] = {"video_id": f"{split}{number}", "split": split, "group": "", "label": label}
                row |= {"pred": pred, "probs": probs, "answer": pred, "unparsed": False, "failed": False}
                rows.append(json.dumps(row | {"traces": traces}) + "\n")
                records += [
                    TraceRecord(f"{split}{number}", k, f"{label} {k}", None, label, "stop", 0.0, 5)
                    for k in range(samples)
                ]
        (folder / "predictions.jsonl").write_text("".join(rows))
        if "model.init_args.traces.samples" in given and "model.init_args.traces_file" not in given:
            TraceStore.create(folder / "traces.jsonl", TraceHeader(False, "", "", "", "")).append(records)
        return 0


def test_every_stage_decides_in_every_way_that_it_can(finished: Path, data: Clips) -> None:
    tests = FakeTests()
    found = evaluate_run(finished, ALL, tests.commands, "again")
    names = [one.method.name for one in found.methods]
    assert names == [
        "majority",
        "zero_shot likelihood",
        "cold likelihood",
        "cold answer",
        "cold answer, no video",
        "cold answer, frames shuffled",
        "cold vote of 3",
        "calibration 2 traces",
        "calibration 1 trace",
        "calibration 2 traces, no video",
        "calibration 2 traces, frames shuffled",
        "calibration 2 traces, another clip's traces",
    ]
    assert [call["data.init_args.test_splits"] for call in tests.calls[:2]] == ['["cal", "test"]'] * 2
    base, cold = tests.calls[0], tests.calls[1]
    assert base["model.init_args.adapter_path"] == "null"
    assert {call["ckpt_path"] for call in tests.calls} == {"null"}, "a checkpoint would replace the weights"
    assert cold["model.init_args.adapter_path"] == str(finished / "stages/01_cold/adapter")
    assert cold["seed_everything"] == "7"
    # The traces are written once, and one of them or all of them are read again.
    own = finished / "evaluation/stages/07_calibration_2_traces/traces.jsonl"
    assert [call.get("model.init_args.traces_file") for call in tests.calls[6:10]] == [None, *[str(own)] * 3]
    # A second call decides nothing again.
    tests.calls.clear()
    assert [one.method.name for one in evaluate_run(finished, ALL, tests.commands, "again").methods] == names
    assert tests.calls == []


def test_policies_that_left_out_a_fold_have_no_rows(finished: Path) -> None:
    def methods() -> list[str]:
        return [method.name for method in plan_evaluation(finished, ["test"], ("answer", "calibrated"), 3).methods]

    before, state = methods(), json.loads((finished / "state.json").read_text())
    folder = finished / "stages" / "03_cold_fold1"
    shutil.copytree(finished / "stages" / "01_cold", folder)
    state["stages"]["cold_fold1"] = state["stages"]["cold"] | {"folder": "stages/03_cold_fold1"}
    (finished / "state.json").write_text(json.dumps(state))
    assert sorted(methods()) == sorted([*before, "cold_fold1 answer"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"init_args": {"fold": {"of": 2, "leave_out": 1, "only": None}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert methods() == before


def test_what_has_finished_is_evaluated_though_the_pipeline_has_not(
    finished: Path, data: Clips, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = EvaluateOptions(None, ("answer",), 3, probes=False)
    evaluate_run(finished, answers, FakeTests().commands, "again")
    assert "not finished" not in capsys.readouterr().out
    (finished / "pipeline.yaml").write_text(
        "seed: 7\nstages:\n" + "".join(f"- name: {name}\n" for name in ("cold", "calibration", "later_test"))
    )
    found = evaluate_run(finished, answers, FakeTests().commands, "again")
    assert [one.method.name for one in found.methods] == ["majority", "cold answer"]
    assert "later_test not finished: what has finished is evaluated" in capsys.readouterr().out


def test_a_calibrator_of_the_video_alone_and_a_linear_probe_have_rows(finished: Path, data: Clips) -> None:
    config = finished / "stages" / "02_calibration" / "config.yaml"
    init = {"adapter_path": None, "calibrator_path": None, "traces": {"samples": 2}, "input": "video"}
    config.write_text(yaml.safe_dump({"model": {"init_args": init}}))
    folder = finished / "stages" / "03_linear_probe"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"penalties": [1.0]}}}))
    (folder / "predictions.jsonl").write_text("{}")
    (folder / "command.txt").write_text("vidreason test")
    state = json.loads((finished / "state.json").read_text())
    record = {"status": "finished", "folder": "stages/03_linear_probe", "inputs": {}, "command": ["test"]}
    state["stages"]["linear_probe"] = record
    (finished / "state.json").write_text(json.dumps(state))
    tests = FakeTests()
    found = evaluate_run(
        finished, EvaluateOptions(None, ("likelihood", "calibrated"), 3, True), tests.commands, "again"
    )
    assert [one.method.name for one in found.methods] == [
        "majority",
        "zero_shot likelihood",
        "linear_probe",
        "linear_probe, no video",
        "linear_probe, frames shuffled",
        "cold likelihood",
        "calibration without traces",
        "calibration without traces, no video",
        "calibration without traces, frames shuffled",
    ]
    assert not any("model.init_args.traces_file" in call for call in tests.calls)


def test_always_the_largest_class_of_train(finished: Path, data: Clips) -> None:
    data.setup("test")
    clips = data.clips("train")
    data._clips = {**data._clips, "train": (*clips, *clips[:1] * 3)}  # 15 of "fall", 12 of "walk"
    found = evaluate_run(finished, ALL, FakeTests().commands, "again").methods[0]
    own = found.decisions["test"]
    assert own.right.tolist() == [number % 2 == 0 for number in range(24)]
    assert own.probs is not None
    assert own.probs[0].tolist() == pytest.approx([16 / 29, 13 / 29])
    assert found.temperature is not None


def test_rows_have_scores_before_and_after_the_temperature_of_cal(finished: Path, data: Clips) -> None:
    found = evaluate_run(finished, ALL, FakeTests().commands, "again")
    rows = {row.who.method: row for row in rows_of_run(found, by_group=False)}
    assert {row.split for row in rows.values()} == {"test"}
    assert {name: row.scores["acc"] for name, row in rows.items()} == pytest.approx(
        {
            "majority": 12 / 24,
            "zero_shot likelihood": 12 / 24,
            "cold likelihood": 15 / 24,
            "cold answer": 17 / 24,
            "cold answer, no video": 17 / 24,
            "cold answer, frames shuffled": 17 / 24,
            "cold vote of 3": 18 / 24,
            "calibration 2 traces": 22 / 24,
            "calibration 1 trace": 18 / 24,
            "calibration 2 traces, no video": 22 / 24,
            "calibration 2 traces, frames shuffled": 22 / 24,
            "calibration 2 traces, another clip's traces": 22 / 24,
        },
        abs=0.03,
    )
    likelihood, calibrated = rows["cold likelihood"], rows["calibration 2 traces"]
    assert likelihood.scaled is not None
    assert calibrated.scaled is not None
    # On cal, 62.5 % (92 %) are right: the temperature brings the confidence there.
    assert likelihood.scaled["confidence"] == pytest.approx(15 / 24, abs=0.01)
    assert calibrated.scaled["confidence"] == pytest.approx(22 / 24, abs=0.01)
    # The calibrator had scaled by 2: before that, 0.8 to 0.2 was 16 to 1.
    assert calibrated.scores["confidence"] == pytest.approx(16 / 17)
    answer = rows["cold answer"]
    assert answer.temperature is answer.scaled is answer.scores["nll"] is None
    assert answer.cost.tokens_per_clip == 5
    assert rows["calibration 2 traces, no video"].temperature == calibrated.temperature


def test_methods_are_compared_over_seeds(finished: Path, data: Clips) -> None:
    found = evaluate_run(finished, ALL, FakeTests().commands, "again")
    single = {one.first: one.difference for one in compare_methods([found], None)}
    assert "deepintuit: zero_shot likelihood" not in single
    seconds = {one.first: one.second for one in compare_methods([found], None)}
    assert seconds["deepintuit: cold answer, no video"] == "deepintuit: cold answer"
    assert seconds["deepintuit: cold answer"] == "deepintuit: zero_shot likelihood"
    gain = single["deepintuit: calibration 2 traces"]
    assert gain.mean == pytest.approx(10 / 24)
    assert gain.p_value == pytest.approx(2 / 2**10)
    assert gain.low is None
    other = EvaluatedRun(found.folder, found.pipeline, 8, found.methods, found.label_names)
    several = {one.first: one.difference for one in compare_methods([found, other], "cold answer")}
    assert several["deepintuit: calibration 2 traces"].low == pytest.approx(5 / 24, abs=0.03)
    with pytest.raises(ValueError, match="no such method; there are deepintuit: majority; deepintuit: zero_shot"):
        compare_methods([found], "hot answer")
    text = render_evaluation(rows_of_run(found, False), compare_methods([found], None))
    assert "calibration 2 traces, another clip's traces" in text
    assert "deepintuit: zero_shot likelihood" in text


def test_one_run_is_no_two_seeds_and_another_label_is_another_clip(finished: Path, data: Clips, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    with pytest.raises(ValueError, match="other: is deepintuit with seed 7, like .*; leave one of them out"):
        check_distinct([finished, other])
    (other / "pipeline.yaml").write_text("seed: 8\nstages: []\n")
    check_distinct([finished, other])
    third = Path(shutil.copytree(other, tmp_path / "third"))
    (third / "pipeline.yaml").write_text("seed: 9\nstages: []\n")
    Task.from_labels("t", ("x", "z")).to_yaml(third / "stages" / "02_calibration" / "task.yaml")
    with pytest.raises(ValueError, match="third: has other classes than .*; look at each task by itself"):
        check_distinct([finished, third])
    found = evaluate_run(finished, EvaluateOptions(None, ("answer",), 3, False), FakeTests().commands, "again")
    again = replace(found, seed=8)
    check_together([found, again])
    method = again.methods[0]
    turned = {split: replace(own, labels=1 - own.labels) for split, own in method.decisions.items()}
    with pytest.raises(ValueError, match="clip .* of cal has another label than in the other runs"):
        check_together([found, replace(again, methods=(replace(method, decisions=turned),))])


def test_a_row_for_each_group_of_five_clips(finished: Path, data: Clips) -> None:
    found = evaluate_run(finished, ALL, FakeTests().commands, "again")
    assert {row.group for row in rows_of_run(found, by_group=True)} == {None}  # every clip is a group of its own


def test_test_clips_that_the_run_has_used_are_refused(finished: Path, data: Clips) -> None:
    commands = FakeTests().commands
    with pytest.raises(ValueError, match="--splits cal: the run has trained, chosen or calibrated"):
        evaluate_run(finished, EvaluateOptions(("cal",), MODES, 3, False), commands, "again")
    data.setup("test")
    (data.folder / "test3.mp4").write_text("train5.mp4")
    with pytest.raises(ValueError, match="1 clips of test have the same content .*test3 is train5 of train"):
        evaluate_run(finished, ALL, commands, "again")


def test_clips_that_an_ancestor_of_the_weights_has_used_are_refused(
    finished: Path, data: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that the cold start began with were trained elsewhere, on what is a test clip here."""
    elsewhere = tmp_path / "other_run"
    (elsewhere / "adapter").mkdir(parents=True)
    (elsewhere / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"folder": "b"}}, "model": {}}))
    cold = finished / "stages" / "01_cold" / "config.yaml"
    init = {"adapter_path": str(elsewhere / "adapter"), "decide": {"by": "answer"}}
    cold.write_text(yaml.safe_dump({"model": {"init_args": init}}))
    (tmp_path / "b").mkdir()
    other = Clips(tmp_path / "b")
    other.setup("test")
    built: list[Path] = []
    monkeypatch.setattr(leaks, "_data_of", lambda folder: built.append(folder) or other)
    commands = FakeTests().commands
    for path in other.folder.iterdir():
        path.write_text(f"another {path.name}")
    assert evaluate_run(finished, ALL, commands, "again").methods
    assert built == [elsewhere]
    (other.folder / "cal7.mp4").write_text((data.folder / "test4.mp4").read_text())
    with pytest.raises(ValueError, match=f"1 clips of test .* that {elsewhere} has used: test4 is cal7 of cal"):
        evaluate_run(finished, ALL, commands, "again")


def test_clips_that_were_not_in_the_test_when_the_stage_ran_are_refused(finished: Path, data: Clips) -> None:
    splits = finished / "stages" / "01_cold" / "splits.csv"
    splits.write_text("video_id,split\ntest5,val\ntrain1,train\ntest6,test\n")
    with pytest.raises(ValueError, match="splits.csv: 1 of the test clips .*: test5 was in val; give the clips"):
        evaluate_run(finished, ALL, FakeTests().commands, "again")


def test_another_clips_traces_are_those_of_another_label(tmp_path: Path) -> None:
    clips = [Clip(Path(f"{i}.mp4"), label, f"v{i}") for i, label in enumerate(["a", "a", "b", "a", "b"])]
    store = TraceStore.create(tmp_path / "own.jsonl", TraceHeader(False, "", "", "", ""))
    store.append(
        TraceRecord(c.video_id, k, f"{c.video_id} {k}", None, None, "stop", 0.0, 1) for c in clips for k in (0, 1)
    )
    swap = SwappedTraces("t", tmp_path / "own.jsonl", tmp_path / "other.jsonl")
    evaluation.write_swapped(swap, [clips])
    found = TraceStore.open(swap.target).by_video()
    texts = {name: [record.text for record in group] for name, group in found.items()}
    assert texts == {
        "v0": ["v2 0", "v2 1"],
        "v1": ["v2 0", "v2 1"],
        "v2": ["v3 0", "v3 1"],
        "v3": ["v4 0", "v4 1"],
        "v4": ["v0 0", "v0 1"],
    }
