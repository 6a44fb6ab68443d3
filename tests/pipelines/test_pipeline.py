"""Pipelines with a stand-in for the trainer commands: order, hand-over, skipping, resuming."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pipeline_world
import pytest
import yaml
from pipeline_world import PIPELINE, FakeTrainer, option, options, run, state_of

from vidreason import exit_codes
from vidreason.cli.pipeline import list_pipelines, main
from vidreason.config.files import shipped_folder
from vidreason.pipelines.call import read_call, run_pipeline
from vidreason.pipelines.spec import read_pipeline
from vidreason.pipelines.state import run_notes
from vidreason.run_folder import find_stage_folder

project, trainer = pipeline_world.project, pipeline_world.trainer


def test_stages_run_in_order_and_hand_over(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trainer, "--seed", "7", "--grpo.trainer.max_steps", "5", "--data.init_args.limit={train: 4}") == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]
    generate, cold, grpo, test = trainer.calls
    assert generate[0] == "predict"
    assert test[0] == "test"
    assert option(cold, "model.init_args.traces") == "runs/x/stages/01_generate/traces.jsonl"
    assert option(grpo, "model.init_args.adapter_path") == "runs/x/stages/02_cold/adapter"
    assert option(test, "model.init_args.adapter_path") == "runs/x/stages/03_grpo/adapter"
    assert option(grpo, "trainer.max_steps") == "5"
    assert "trainer.max_steps" not in options(cold)
    for argv in trainer.calls:
        assert (option(argv, "seed_everything"), option(argv, "data.init_args.num_workers")) == ("7", "0")
        assert yaml.safe_load(option(argv, "data.init_args.limit")) == {"train": 4}
    saved = shlex.split(Path("runs/x/stages/03_grpo/command.txt").read_text())
    assert saved == ["vidreason", *grpo]
    assert shlex.join(saved) in capsys.readouterr().out
    (row,) = json.loads(Path("runs/x/summary.json").read_text())
    assert (row["method"], row["n"], row["acc"], row["train_clips"], row["seed"]) == ("three", 1, 1.0, 128, 7)
    assert row["note"].startswith("test: not better than always answering"), "there is one clip"
    assert "three" in Path("runs/x/summary.txt").read_text()


def test_a_second_run_skips_everything(project: Path, trainer: FakeTrainer) -> None:
    run(trainer)
    assert run(trainer) == 0
    assert trainer.calls == []
    (project / "train.yaml").write_text("# a comment\ntrainer:\n  max_steps: 3\ndata: data.yaml\n")
    assert run(trainer) == 0
    assert trainer.calls == []


@pytest.mark.parametrize(
    ("file", "text", "again"),
    [
        ("generate.yaml", "model: {init_args: {samples: 2}}", ["generate", "cold", "grpo", "test"]),
        ("train.yaml", "data: data.yaml\ntrainer: {max_steps: 4}", ["cold", "grpo", "test"]),
        ("data.yaml", "init_args: {manifest: clips.csv, limit: {}}", ["cold", "grpo", "test"]),
        ("clips.csv", "path,label\na.mp4,b\n", ["cold", "grpo", "test"]),
    ],
)
def test_a_changed_file_runs_what_depends_on_it(
    project: Path, trainer: FakeTrainer, file: str, text: str, again: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(trainer)
    (project / file).write_text(text)
    assert run(trainer) == 0
    assert trainer.stages == again
    assert f"file {file}" in capsys.readouterr().out


def test_a_changed_override_runs_the_stage_and_what_follows(project: Path, trainer: FakeTrainer) -> None:
    run(trainer)
    assert run(trainer, "--grpo.trainer.max_steps", "5") == 0
    assert trainer.stages == ["grpo", "test"]
    assert Path("runs/x/stages/03_grpo.old/adapter").is_dir()
    assert run(trainer, "--seed", "1") == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]


def test_what_follows_is_kept_where_the_artefact_came_out_the_same(project: Path, trainer: FakeTrainer) -> None:
    run(trainer)
    (Path("runs/x/stages/01_generate") / "traces.jsonl").unlink()
    assert run(trainer) == 0
    assert trainer.stages == ["generate"]


def test_an_edited_artefact_is_kept_and_used(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(trainer)
    (Path("runs/x/stages/01_generate") / "traces.jsonl").write_text("picked by hand")
    assert run(trainer) == 0
    assert trainer.stages == ["cold", "grpo", "test"]
    assert "edited" in capsys.readouterr().out


def test_what_a_stage_went_without_is_said_whenever_it_is_passed_over(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(folder: Path) -> int:
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text("w")
        (folder / "unreadable.csv").write_text("video_id,times\na,3\nb,3\n")
        return 0

    trainer.before["cold"] = damaged
    run(trainer)
    capsys.readouterr()
    run(trainer)
    said = "[2/4] cold: finished, inputs unchanged; went without 2 training clips that could not be read: runs/x/stages"
    assert said in capsys.readouterr().out
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert "cold went without 2 training clips" in json.dumps(summary)


LANGUAGE = """
name: two_ways
stages:
  - {name: generate, command: predict, config: generate.yaml}
  - {name: cold, when: generate.language, command: fit, config: train.yaml}
  - {name: test, when: generate.language, command: test, config: train.yaml, inputs: {a.b: "{cold.adapter}"}}
  - {name: label, command: fit, config: train.yaml, inputs: {a.b: "{cold.adapter|none}"}}
  - {name: tested, when: not generate.language, command: test, config: train.yaml, inputs: {a.b: "{label.adapter}"}}
"""


def test_without_language_the_run_goes_on_with_labels_and_says_so(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "p.yaml").write_text(LANGUAGE)

    def soup(folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "traces.jsonl").write_text("soup")
        (folder / "text_quality.json").write_text(json.dumps({"faults": ["they are letters"]}))
        return 0

    trainer.before["generate"] = soup
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "label", "tested"]
    assert "a.b" not in options(trainer.calls[1])
    assert "[2/5] cold: left out, since the texts of generate are no language" in capsys.readouterr().out
    (row,) = json.loads(Path("runs/x/summary.json").read_text())
    assert row["method"] == "two_ways"
    said = "generate wrote no language about these clips (they are letters): name a model that can, --vlm; "
    assert row["note"].startswith(f"{said}test: not better")
    assert run_notes(Path("runs/x")) == [row["note"]]
    Path("runs/x/stages/05_tested/config.yaml").touch()
    assert find_stage_folder(Path("runs/x")).name == "05_tested"
    assert run(trainer) == 0
    assert trainer.stages == []
    assert "generate: finished, inputs unchanged; wrote no language" in capsys.readouterr().out

    trainer.before.clear()
    (project / "generate.yaml").write_text("model: {init_args: {samples: 2}}")
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "cold", "test", "label"], "texts of another model are language"
    assert option(trainer.calls[-1], "a.b") == "runs/x/stages/02_cold/adapter"
    assert state_of()["tested"]["status"] == "skipped"
    assert "language" not in json.loads(Path("runs/x/summary.json").read_text())[0]["note"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("when: generate.language,", "when: language,", r"\(cold\): key 'when': must read STAGE.language or not STAGE"),
        ("when: generate.language,", "when: generat.language,", r"no earlier stage 'generat'.*did you mean 'generate'"),
        ("|none}", "}", r"may end without an artefact \(when: generate.language\).*\"\{cold.adapter\|none\}\""),
    ],
)
def test_a_condition_that_cannot_be_is_refused(project: Path, before: str, after: str, message: str) -> None:
    assert before in LANGUAGE
    (project / "p.yaml").write_text(LANGUAGE.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        read_pipeline("p.yaml")


def test_an_interrupted_fit_resumes_from_its_last_checkpoint(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(folder: Path) -> int:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").write_text("half way")
        raise KeyboardInterrupt

    trainer.before["cold"] = interrupted
    assert run(trainer) == 130
    assert state_of()["cold"]["status"] == "interrupted"
    assert "vidreason pipeline --config p.yaml --run_dir runs/x" in capsys.readouterr().err
    trainer.before.clear()
    assert run(trainer) == 0
    assert trainer.stages == ["cold", "grpo", "test"]
    assert option(trainer.calls[0], "ckpt_path") == "runs/x/stages/02_cold/checkpoints/last.ckpt"
    assert state_of()["cold"]["status"] == "finished"


def test_a_killed_stage_is_resumed_too(project: Path, trainer: FakeTrainer) -> None:
    run(trainer)
    content = json.loads(Path("runs/x/state.json").read_text())
    content["stages"]["grpo"]["status"] = "running"  # what a SIGKILL leaves behind
    Path("runs/x/state.json").write_text(json.dumps(content))
    assert run(trainer) == 0
    assert trainer.stages == ["grpo"]


def test_an_interrupted_stage_with_changed_inputs_starts_anew(project: Path, trainer: FakeTrainer) -> None:
    def interrupted(folder: Path) -> int:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").write_text("half way")
        return 130

    trainer.before["cold"] = interrupted
    assert run(trainer) == 130
    trainer.before.clear()
    assert run(trainer, "--cold.trainer.max_steps", "9") == 0
    assert "ckpt_path" not in options(trainer.calls[0])


def test_a_cold_policy_ends_its_stage_only(project: Path, trainer: FakeTrainer) -> None:
    trainer.before["grpo"] = lambda folder: exit_codes.UNPARSED
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]
    assert option(trainer.calls[-1], "model.init_args.adapter_path") == "runs/x/stages/02_cold/adapter"
    (row,) = json.loads(Path("runs/x/summary.json").read_text())
    assert "grpo" in row["note"]
    assert "grpo" in Path("runs/x/summary.txt").read_text()
    assert run(trainer) == 0
    assert trainer.calls == []


def test_a_cold_policy_stops_where_the_pipeline_does_not_allow_it(project: Path, trainer: FakeTrainer) -> None:
    (project / "p.yaml").write_text(PIPELINE.replace("on_unparsed: skip", "").replace("grpo.adapter|", ""))
    trainer.before["grpo"] = lambda folder: exit_codes.UNPARSED
    assert run(trainer) == exit_codes.UNPARSED
    assert trainer.stages[-1] == "grpo"


def test_a_failing_stage_stops_the_pipeline(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.before["cold"] = lambda folder: 3
    assert run(trainer) == 3
    assert trainer.stages == ["generate", "cold"]
    assert "go on with" in capsys.readouterr().err

    def broken(folder: Path) -> int:
        raise ValueError("clips.csv, row 2: label")

    trainer.before["cold"] = broken
    with pytest.raises(ValueError, match="row 2"):
        run(trainer)
    assert state_of()["cold"]["status"] == "failed"
    assert "go on with" in capsys.readouterr().err


def test_a_stage_that_writes_nothing_is_an_error(project: Path, trainer: FakeTrainer) -> None:
    trainer.before["cold"] = lambda folder: 0
    with pytest.raises(ValueError, match=r"cold.*wrote no adapter into runs/x/stages/02_cold"):
        run(trainer)
    assert state_of()["cold"]["status"] == "failed"


def test_until_stops_behind_a_stage(project: Path, trainer: FakeTrainer) -> None:
    assert run(trainer, "--until", "02_cold") == 0
    assert trainer.stages == ["generate", "cold"]
    assert run(trainer) == 0
    assert trainer.stages == ["grpo", "test"]


@pytest.mark.parametrize("folder", ["runs/x", "runs/x/stages/01_generate"])
def test_a_finished_stage_is_taken_from_another_run(project: Path, trainer: FakeTrainer, folder: str) -> None:
    run(trainer)
    trainer.calls.clear()
    argv = ["--config", "p.yaml", "--run_dir", "runs/y", "--use", f"generate={folder}"]
    assert run_pipeline(argv, trainer.commands) == 0
    assert trainer.stages == ["cold", "grpo", "test"]
    assert option(trainer.calls[0], "model.init_args.traces") == "runs/x/stages/01_generate/traces.jsonl"
    assert state_of("runs/y")["generate"]["taken"] is True
    trainer.calls.clear()
    assert run_pipeline(argv, trainer.commands) == 0
    assert trainer.calls == []


def test_a_stage_made_on_other_inputs_is_not_taken(project: Path, trainer: FakeTrainer) -> None:
    run(trainer)
    argv = ["--config", "p.yaml", "--run_dir", "runs/y", "--use", "generate=runs/x", "--seed", "1"]
    with pytest.raises(ValueError, match=r"other inputs.*seed_everything"):
        run_pipeline(argv, trainer.commands)
    with pytest.raises(ValueError, match="no state.json"):
        run_pipeline([*argv[:4], "--use", "generate=elsewhere"], trainer.commands)


def test_another_pipeline_does_not_run_into_the_same_folder(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(trainer)
    (project / "p.yaml").write_text(PIPELINE.replace("name: three", "name: four"))
    assert run(trainer) == 2
    assert "'three'" in capsys.readouterr().err


def test_the_saved_pipeline_runs_again_as_it_is(project: Path, trainer: FakeTrainer) -> None:
    run(trainer, "--seed", "3", "--grpo.trainer.max_steps", "5", "--data", "data.yaml")
    trainer.calls.clear()
    assert run_pipeline(["--config", "runs/x/pipeline.yaml", "--run_dir", "runs/x"], trainer.commands) == 0
    assert trainer.calls == []


def test_shipped_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    specs = {path.stem: read_pipeline(str(path)) for path in (shipped_folder() / "pipelines").glob("*.yaml")}
    methods = {"zero_shot", "label_sft", "rb_ft", "deepintuit", "teacher"}
    assert set(specs) == {*methods, "baselines", "ablation_calibration"}
    assert all(name == spec.name for name, spec in specs.items())
    baseline, own = specs["label_sft"].stage("sft_label"), specs["rb_ft"].stage("sft_label")
    assert (baseline.config, baseline.args, baseline.command) == (own.config, own.args, own.command)
    # Both methods start from the same descriptions, so that the demo can make them once.
    assert specs["rb_ft"].stages[0] == specs["deepintuit"].stages[0]
    assert main([]) == 0
    assert all(f"configs/pipelines/{name}.yaml" in list_pipelines() for name in specs)
    assert capsys.readouterr().out.strip() == list_pipelines().strip()
    assert all(spec.needs and spec.needs in list_pipelines() for spec in specs.values())
    assert "configs/data/porch.yaml" in specs["teacher"].needs


def test_help_names_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read_call(["--help"])
    assert "--STAGE.dotted.key" in capsys.readouterr().out


def test_a_finished_pipeline_says_what_to_do_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = [0, 0, 1]
    monkeypatch.setattr("vidreason.cli.pipeline.run_pipeline", lambda argv: calls.pop(0))
    whole = ["--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "runs/my run"]
    said = "next: vidreason classify new_clip.mp4 --run 'runs/my run'"
    for argv, expected in ((whole, True), ([*whole, "--until", "test"], False), (whole, False)):
        main(argv)
        assert (said in capsys.readouterr().out) is expected
