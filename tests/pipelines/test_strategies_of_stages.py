"""Pipelines with one strategy per stage, and stages that need several processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pipeline_world
import pytest
from pipeline_world import PIPELINE, run

from vidreason.config import trainer_cli
from vidreason.pipelines import commands
from vidreason.pipelines.spec import read_pipeline

project, trainer = pipeline_world.project, pipeline_world.trainer


def test_a_stage_trains_by_its_strategy(project: Path, trainer: Any) -> None:
    (project / "mine.yaml").write_text("trainer: {devices: 1}\n")
    text = PIPELINE.replace("name: cold\n", "name: cold\n    strategy: lora\n")
    (project / "p.yaml").write_text(text + "strategy: full\n")
    assert run(trainer, "--vlm", "data.yaml", "--strategy", "grpo=mine.yaml") == 0
    overlays = [[argv[i + 1] for i, word in enumerate(argv) if word == "--config"][1:] for argv in trainer.calls]
    full, lora = "configs/strategy/full.yaml", "configs/strategy/lora.yaml"
    assert overlays == [[full], [lora], ["mine.yaml"], [full]]
    assert read_pipeline("runs/x/pipeline.yaml").stage("grpo").strategy == "mine.yaml"


def test_another_strategy_runs_a_stage_again(project: Path, trainer: Any) -> None:
    (project / "mine.yaml").write_text("trainer: {devices: 1}\n")
    assert run(trainer, "--strategy", "grpo=mine.yaml") == 0
    assert run(trainer, "--strategy", "grpo=mine.yaml") == 0
    assert trainer.stages == []
    (project / "mine.yaml").write_text("trainer: {devices: 2}\n")
    assert run(trainer, "--strategy", "grpo=mine.yaml") == 0
    assert trainer.stages[0] == "grpo"
    assert run(trainer, "--strategy", "cold=lora", "--strategy", "grpo=mine.yaml") == 0
    assert trainer.stages[0] == "cold"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("grpo=qlor", "no strategy 'qlor'.*did you mean 'qlora'"),
        ("gpro=qlora", "no stage 'gpro'.*did you mean 'grpo'"),
        ("grpo=my.yaml", r"no strategy 'my\.yaml'"),
    ],
)
def test_a_strategy_that_is_not_there(
    project: Path, trainer: Any, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert run(trainer, "--strategy", option) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_strategy_of_the_pipeline_file_that_is_not_there(project: Path) -> None:
    (project / "p.yaml").write_text(PIPELINE.replace("name: cold\n", "name: cold\n    strategy: loar\n"))
    with pytest.raises(ValueError, match=r"p\.yaml: stages\[2\] \(cold\): key 'strategy'.*did you mean 'lora'"):
        read_pipeline("p.yaml")


def test_only_stages_of_several_processes_start_their_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[list[str]] = []
    here: list[str] = []

    def started(argv: list[str]) -> int:
        apart.append(argv)
        return 7

    def ran(command: str, argv: list[str]) -> int:
        here.append(command)
        return 0

    monkeypatch.setattr(commands, "run_apart", started)
    monkeypatch.setattr(trainer_cli, "run", ran)
    run_stage = commands.trainer_commands().run
    argv = ["fit", "--config", "configs/sft_label.yaml", "--config", "configs/strategy/ddp.yaml"]
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.devices"]
    assert run_stage([*argv, *on_cpu, "2"]) == 7
    assert apart == [[*argv, *on_cpu, "2"]]
    assert not here
    assert run_stage([*argv, *on_cpu, "1"]) == 0
    assert here == ["fit"]
    with pytest.raises(ValueError, match="num_nodes is 2"):
        run_stage([*argv, *on_cpu, "1", "--trainer.num_nodes", "2"])


def test_a_process_of_its_own_gives_its_exit_status(project: Path) -> None:
    assert commands.run_apart(["fitt"]) == 2
