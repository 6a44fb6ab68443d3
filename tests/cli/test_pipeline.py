"""Pipelines with a stand-in for the trainer commands: order, hand-over, skipping, resuming, errors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vidreason.cli import stage_inputs
from vidreason.cli.configs import find_config, shipped_folder
from vidreason.cli.pipeline import list_pipelines, main, read_call, run_pipeline
from vidreason.cli.pipeline_commands import COLD_POLICY_STATUS, Commands, StageSize
from vidreason.cli.pipeline_spec import read_pipeline

PIPELINE = """
name: three
description: a test
args: {data.init_args.num_workers: 0}
stages:
  - {name: generate, command: predict, config: generate.yaml}
  - name: cold
    command: fit
    config: train.yaml
    inputs: {model.init_args.traces: "{generate.traces}"}
  - name: grpo
    command: fit
    config: train.yaml
    inputs: {model.init_args.adapter_path: "{cold.adapter}"}
    on_cold_policy: skip
  - name: test
    command: test
    config: train.yaml
    inputs: {model.init_args.adapter_path: "{grpo.adapter|cold.adapter}"}
"""


class FakeTrainer:
    """Writes what a stage would write; its content follows from the settings that count."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.before: dict[str, Callable[[Path], int]] = {}
        """Stage name to what happens instead of a run; returns the exit status"""
        self.checked: list[str] = []

    @property
    def commands(self) -> Commands:
        return Commands(self.run, self.check, lambda argv: StageSize(128))

    @property
    def stages(self) -> list[str]:
        return [_option(argv, "run_dir").rsplit("_", 1)[-1] for argv in self.calls]

    def check(self, argv: list[str]) -> str | None:
        self.checked.append(Path(_option(argv, "run_dir")).name)
        return "unknown key max_step" if "trainer.max_step" in _options(argv) else None

    def run(self, argv: list[str]) -> int:
        self.calls.append(argv)
        folder = Path(_option(argv, "run_dir"))
        name = folder.name[3:]
        if name in self.before:
            return self.before[name](folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in _options(argv).items() if key not in ("run_dir", "ckpt_path")}
        for key in ("model.init_args.traces", "model.init_args.adapter_path"):
            if key in settings:
                settings[key] = _content(Path(settings[key]))
        files = [find_config(argv[i + 1]) for i, word in enumerate(argv) if word == "--config"]
        settings["config"] = "\n".join(file.read_text() for file in files if file is not None)
        text = json.dumps(settings, sort_keys=True)
        if argv[0] == "predict":
            (folder / "traces.jsonl").write_text(text)
        elif argv[0] == "fit":
            (folder / "adapter").mkdir(exist_ok=True)
            (folder / "adapter" / "weights").write_text(text)
        else:
            row: dict[str, object] = {"video_id": "v", "split": "test", "group": "", "label": "a", "pred": "a"}
            row |= {"probs": {"a": 1, "b": 0}, "answer": "a", "unparsed": False, "failed": False, "traces": []}
            (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
        return 0


def _options(argv: list[str]) -> dict[str, str]:
    words = [part for word in argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def _option(argv: list[str], key: str) -> str:
    return _options(argv)[key]


def _content(path: Path) -> str:
    return path.read_text() if path.is_file() else (path / "weights").read_text()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_inputs, "fingerprint_embedded_weights", lambda: "base")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "generate.yaml").write_text("model: {init_args: {samples: 1}}\n")
    (tmp_path / "train.yaml").write_text("data: data.yaml\ntrainer: {max_steps: 3}\n")
    (tmp_path / "data.yaml").write_text("init_args: {manifest: clips.csv}\n")
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,a\n")
    return tmp_path


@pytest.fixture
def trainer() -> FakeTrainer:
    return FakeTrainer()


def run(trainer: FakeTrainer, *extra: str) -> int:
    trainer.calls.clear()
    return run_pipeline(["--config", "p.yaml", "--run_dir", "runs/x", *extra], trainer.commands)


def state_of(run_dir: str = "runs/x") -> dict[str, dict[str, object]]:
    stages: dict[str, dict[str, object]] = json.loads((Path(run_dir) / "state.json").read_text())["stages"]
    return stages


def test_stages_run_in_order_and_hand_over(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trainer, "--seed", "7", "--grpo.trainer.max_steps", "5", "--data.init_args.limit={train: 4}") == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]
    generate, cold, grpo, test = trainer.calls
    assert generate[0] == "predict"
    assert test[0] == "test"
    assert _option(cold, "model.init_args.traces") == "runs/x/stages/01_generate/traces.jsonl"
    assert _option(grpo, "model.init_args.adapter_path") == "runs/x/stages/02_cold/adapter"
    assert _option(test, "model.init_args.adapter_path") == "runs/x/stages/03_grpo/adapter"
    assert _option(grpo, "trainer.max_steps") == "5"
    assert "trainer.max_steps" not in _options(cold)
    for argv in trainer.calls:
        assert (_option(argv, "seed_everything"), _option(argv, "data.init_args.num_workers")) == ("7", "0")
        assert yaml.safe_load(_option(argv, "data.init_args.limit")) == {"train": 4}
    saved = shlex.split(Path("runs/x/stages/03_grpo/command.txt").read_text())
    assert saved == ["vidreason", *grpo]
    assert shlex.join(saved) in capsys.readouterr().out
    (row,) = json.loads(Path("runs/x/summary.json").read_text())
    assert (row["method"], row["n"], row["acc"], row["train_clips"], row["seed"]) == ("three", 1, 1.0, 128, 7)
    assert "note" not in row
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
    assert _option(trainer.calls[0], "ckpt_path") == "runs/x/stages/02_cold/checkpoints/last.ckpt"
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
    assert "ckpt_path" not in _options(trainer.calls[0])


def test_a_cold_policy_ends_its_stage_only(project: Path, trainer: FakeTrainer) -> None:
    trainer.before["grpo"] = lambda folder: COLD_POLICY_STATUS
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]
    assert _option(trainer.calls[-1], "model.init_args.adapter_path") == "runs/x/stages/02_cold/adapter"
    (row,) = json.loads(Path("runs/x/summary.json").read_text())
    assert "grpo" in row["note"]
    assert "grpo" in Path("runs/x/summary.txt").read_text()
    assert run(trainer) == 0
    assert trainer.calls == []


def test_a_cold_policy_stops_where_the_pipeline_does_not_allow_it(project: Path, trainer: FakeTrainer) -> None:
    (project / "p.yaml").write_text(PIPELINE.replace("on_cold_policy: skip", "").replace("grpo.adapter|", ""))
    trainer.before["grpo"] = lambda folder: COLD_POLICY_STATUS
    assert run(trainer) == COLD_POLICY_STATUS
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
    assert _option(trainer.calls[0], "model.init_args.traces") == "runs/x/stages/01_generate/traces.jsonl"
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stage:", "unknown key 'stage'; did you mean 'stages'"),
        ("name: cold\n    command: fit", "name: cold", r"stages\[2\]: key 'command' is missing"),
        ("command: predict", "command: train", r"stages\[1\] \(generate\): key 'command' must be one of"),
        ("config: generate.yaml", "config: generat.yaml", r"stages\[1\] \(generate\): key 'config': no file"),
        ("{cold.adapter}", "{colt.adapter}", r"inputs.model.init_args.adapter_path: no earlier stage 'colt'.*'cold'"),
        ("{cold.adapter}", "{cold.traces}", r"stage cold \(fit\) writes 'adapter' only"),
        ("{grpo.adapter|cold.adapter}", "{grpo.adapter}", "may end without an artefact"),
        ("name: grpo", "name: cold", "there is a stage 'cold' already"),
        ("name: grpo", "name: data", "a stage's name"),
        ("on_cold_policy: skip", "on_cold_policy: maybe", "key 'on_cold_policy' must be stop or skip"),
        ("name: three", "name: [three", "not valid YAML"),
    ],
)
def test_a_wrong_pipeline_file_is_one_clear_error(
    project: Path, trainer: FakeTrainer, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "p.yaml").write_text(PIPELINE.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_pipeline("p.yaml")
    assert str(caught.value).startswith("p.yaml: ")
    assert run(trainer) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert trainer.calls == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gpro.trainer.max_steps", "5"], "did you mean 'grpo'"),
        (["--until", "gprp"], "no stage 'gprp'; did you mean 'grpo'"),
        (["--use", "generat=runs/z"], "no stage 'generat'"),
        (["--use", "generate"], "STAGE=DIR"),
        (["--grpo.model.init_args.adapter_path", "z"], "--use cold=FOLDER"),
        (["--grpo.trainer.max_steps"], "a value is missing"),
        (["--sed", "5"], "unknown option '--sed': did you mean --seed?"),
        (["--nothing_like_it", "5"], "unknown option '--nothing_like_it': settings read --STAGE.dotted.key VALUE"),
        (["--data", "missing.yaml"], "no file 'missing.yaml'"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(
    project: Path, trainer: FakeTrainer, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trainer, *extra) == 2
    assert message in capsys.readouterr().err
    assert trainer.calls == []


def test_a_typo_in_a_late_stage_shows_before_anything_runs(
    project: Path, trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trainer, "--grpo.trainer.max_step", "5") == 2
    assert capsys.readouterr().err == "error: stage grpo: unknown key max_step\n"
    assert trainer.calls == []
    run(trainer)
    trainer.checked.clear()
    run(trainer, "--grpo.trainer.max_steps", "5")
    assert trainer.checked == ["03_grpo"]  # what is finished on these settings was checked then


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
    assert set(specs) == {"zero_shot", "label_sft", "rb_ft", "deepintuit", "teacher"}
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
