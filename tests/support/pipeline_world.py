"""A pipeline of four stages and a stand-in for the trainer commands that run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vidreason.config.files import find_config
from vidreason.pipelines import inputs
from vidreason.pipelines.call import run_pipeline
from vidreason.pipelines.commands import Commands

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
    on_unparsed: skip
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
        return Commands(self.run, self.check, lambda argv: 128)

    @property
    def stages(self) -> list[str]:
        return [option(argv, "run_dir").rsplit("_", 1)[-1] for argv in self.calls]

    def check(self, argv: list[str]) -> str | None:
        self.checked.append(Path(option(argv, "run_dir")).name)
        return "unknown key max_step" if "trainer.max_step" in options(argv) else None

    def run(self, argv: list[str]) -> int:
        self.calls.append(argv)
        folder = Path(option(argv, "run_dir"))
        name = folder.name[3:]
        if name in self.before:
            return self.before[name](folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in options(argv).items() if key not in ("run_dir", "ckpt_path")}
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


def options(argv: list[str]) -> dict[str, str]:
    words = [part for word in argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def option(argv: list[str], key: str) -> str:
    return options(argv)[key]


def _content(path: Path) -> str:
    return path.read_text() if path.is_file() else (path / "weights").read_text()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "fingerprint_embedded_weights", lambda: "base")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "generate.yaml").write_text("model: {init_args: {samples: 1}}\n")
    (tmp_path / "train.yaml").write_text("data: data.yaml\ntrainer: {max_steps: 3}\n")
    (tmp_path / "data.yaml").write_text("class_path: mine.Clips\ninit_args: {manifest: clips.csv}\n")
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
