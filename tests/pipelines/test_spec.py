"""Mistakes in a pipeline file or command line: one clear error, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pipeline_world
import pytest
from pipeline_world import PIPELINE, FakeTrainer, run

from vidreason.pipelines.spec import read_pipeline

project, trainer = pipeline_world.project, pipeline_world.trainer


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stage:", "unknown key 'stage'; did you mean 'stages'"),
        ("name: cold\n    command: fit", "name: cold", r"stages\[2\]: key 'command' is missing"),
        ("command: predict", "command: train", r"stages\[1\] \(generate\): key 'command' must be one of"),
        ("config: generate.yaml", "config: generat.yaml", r"stages\[1\] \(generate\): key 'config': no such file"),
        ("{cold.adapter}", "{colt.adapter}", r"inputs.model.init_args.adapter_path: no earlier stage 'colt'.*'cold'"),
        ("{cold.adapter}", "{cold.traces}", r"stage cold \(fit\) writes 'adapter' only"),
        ("{grpo.adapter|cold.adapter}", "{grpo.adapter}", "may end without an artefact"),
        ("name: grpo", "name: cold", "there is a stage 'cold' already"),
        ("name: grpo", "name: data", "a stage's name"),
        ("on_unparsed: skip", "on_unparsed: maybe", "key 'on_unparsed' must be stop or skip"),
        ("name: three", "name: [three", "not valid YAML"),
    ],
)
def test_a_wrong_pipeline_file_is_one_clear_error(
    project: Path, trainer: FakeTrainer, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "p.yaml").write_text(PIPELINE.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_pipeline("p.yaml")
    assert str(caught.value).startswith(("p.yaml: ", "p.yaml, line "))
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
        (["--sed", "5"], "unknown option '--sed': did you mean '--seed'?"),
        (["--nothing_like_it", "5"], "unknown option '--nothing_like_it': settings read --STAGE.dotted.key VALUE"),
        (["--data", "missing.yaml"], "no such file: missing.yaml"),
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
