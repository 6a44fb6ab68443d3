"""Keys that have moved are answered with their new place, in one line."""

import json
from pathlib import Path

import pytest
import yaml
from errors_page import rows_that_say

from vidreason.cli.main import main
from vidreason.config.errors import explain
from vidreason.config.moved_keys import MODEL, MOVED, moved_settings, new_place
from vidreason.pipelines.spec import read_pipeline

GROUPED = """

from dataclasses import dataclass


@dataclass(frozen=True)
class Optim:
    schedule: str = "constant"


@dataclass(frozen=True)
class Loss:
    kl_coef: float = 0.0


@dataclass(frozen=True)
class Decide:
    by: str = "likelihood"


@dataclass(frozen=True)
class Traces:
    samples: int = 1


class Grouped(L.LightningModule):
    def __init__(
        self,
        vlm: VLM,
        optim: Optim = Optim(),
        loss: Loss = Loss(),
        decide: Decide = Decide(),
        traces: Traces = Traces(),
        traces_file: str | None = None,
        adapter_path: str | None = None,
    ):
        super().__init__()
"""


@pytest.fixture
def grouped(project):
    """Writes ``mine.yaml``, a stage with some of the new groups and the given arguments."""
    module = (project / "module").read_text()
    with Path(f"{module}.py").open("a") as code:
        code.write(GROUPED)

    def write(**arguments):
        stage = yaml.safe_load(Path("configs/stage.yaml").read_text())
        stage["model"] = {"class_path": f"{module}.Grouped", "init_args": arguments}
        Path("configs/mine.yaml").write_text(yaml.safe_dump(stage))
        return ["fit", "--config", "configs/mine.yaml"]

    return write


OLD = {
    "kl_coef": (0.1, "loss.kl_coef"),
    "schedule": ("cosine", "optim.schedule"),
    "optimizer": ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, "optim.optimizer"),
    "decide": ("answer", "decide.by"),
    "samples": (2, "decide.samples"),
    "traces": ("t.jsonl", "traces_file"),
    "traces_sampled": ({"samples": 2}, "traces"),
    "predict": ("reason", "traces.kind"),
}


@pytest.mark.parametrize("key", OLD)
def test_an_old_key_of_a_file_is_one_line_that_names_the_new_one(grouped, capsys, key):
    value, new = OLD[key]
    assert main(grouped(**{key: value})) == 2
    expected = f"error: model.init_args.{key} has moved to model.init_args.{new} (in configs/mine.yaml)\n"
    error = capsys.readouterr().err
    assert error == expected
    assert rows_that_say(error.removeprefix("error: "), "Commands and runs")


@pytest.mark.parametrize("key", OLD)
def test_an_old_key_of_the_command_line_is_one_line_that_names_the_new_one(grouped, capsys, key):
    value, new = OLD[key]
    text = value if isinstance(value, str) else json.dumps(value)
    assert main([*grouped(), f"--model.init_args.{key}", text]) == 2
    assert capsys.readouterr().err == f"error: model.init_args.{key} has moved to model.init_args.{new}\n"


def test_a_key_within_an_old_key_is_named_whole(grouped, capsys):
    assert main([*grouped(), "--model.init_args.traces_sampled.samples=3"]) == 2
    line = "error: model.init_args.traces_sampled.samples has moved to model.init_args.traces.samples\n"
    assert capsys.readouterr().err == line


def test_an_old_key_of_a_model_section_or_an_overlay_is_found(grouped, capsys):
    argv = grouped()
    Path("model.yaml").write_text("init_args: {kl_coef: 0.1}\n")
    Path("overlay.yaml").write_text("model: {init_args: {kl_coef: 0.1}}\n")
    for options, file in ((["--model", "model.yaml"], "model.yaml"), (["--config", "overlay.yaml"], "overlay.yaml")):
        assert main([*argv, *options]) == 2
        assert f"model.init_args.loss.kl_coef (in {file})" in capsys.readouterr().err


def test_new_groups_are_accepted(grouped, capsys):
    argv = grouped(loss={"kl_coef": 0.1}, decide={"by": "answer"}, traces={"samples": 2}, traces_file="t.jsonl")
    assert main([*argv, "--trainer.max_stps", "1"]) == 2
    assert "max_stps" in capsys.readouterr().err


def test_a_stage_that_still_takes_the_key_is_asked_about_its_own_mistake(project, capsys):
    assert main(["fit", "--config", "configs/stage.yaml", "--model.init_args.interupt_at", "1"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'interrupt_at'?" in error
    assert "moved" not in error


def test_every_old_key_has_a_place():
    assert {new_place(MODEL + key) for key in MOVED} >= {"trainer.max_steps", MODEL + "rollouts.max_unparsed_steps"}
    assert new_place("data.init_args.loss") is None
    assert new_place(MODEL + "adapter_path") is None
    assert list(moved_settings({"model": {"init_args": {"loss": {"kl_coef": 1}}, "class_path": "x"}})) == []
    assert list(moved_settings({"model.init_args.kl_coef": 1})) == [(MODEL + "kl_coef", MODEL + "loss.kl_coef")]


def test_a_message_about_another_key_is_left_alone():
    message = (
        "Parser key \"model\":\n  class_path 'vidreason.lightning_modules.base.VLMModule'\nOption 'x' is not accepted"
    )
    assert "moved" not in explain(message, (), ["--model.init_args.kl_coef", "1", "--model.init_args.x", "1"])


def test_an_old_key_of_a_pipeline_file_is_answered_likewise(tmp_path):
    path = tmp_path / "p.yaml"
    stage = {"name": "a", "command": "fit", "config": "configs/grpo.yaml", "on_cold_policy": "skip"}
    path.write_text(yaml.safe_dump({"stages": [stage]}))
    with pytest.raises(ValueError, match=r"^on_cold_policy has moved to on_unparsed \(in .*p\.yaml: stages\[1\]\)$"):
        read_pipeline(str(path))
