"""Tests what the real commands say of a stage before it runs."""

import pytest

from vidreason.config import trainer_cli
from vidreason.pipelines.commands import trainer_commands

SMALL = ["--config", "configs/debug.yaml", "--trainer.accelerator", "cpu"]


def debug(tmp_path, *options):
    return ["fit", "--config", "configs/sft_label.yaml", *SMALL, "--run_dir", str(tmp_path / "run"),
            "--data.init_args.data_dir", str(tmp_path / "porch"), *options]  # fmt: skip


def test_training_clips_are_counted_for_the_summary(tmp_path):
    assert trainer_commands().train_clips(debug(tmp_path)) == 16


def test_data_that_cannot_be_read_are_left_to_the_stage(tmp_path):
    line = debug(tmp_path, "--data.class_path", "vidreason.datamodules.manifest.ManifestDataModule")
    line = [word for word in line if "data_dir" not in word and word != str(tmp_path / "porch")]
    line += [
        "--data.init_args.manifest",
        str(tmp_path / "none.csv"),
        "--data.init_args.task",
        "configs/tasks/porch.yaml",
    ]
    assert trainer_commands().check(line) is None
    assert trainer_commands().train_clips(line) is None


def test_clips_of_a_stage_that_cannot_be_built_here_are_not_counted(tmp_path):
    line = debug(tmp_path, "--trainer.devices", "64", "--trainer.accelerator", "gpu")  # finished elsewhere, say
    with pytest.raises(ValueError, match="accelerator is gpu|devices"):
        trainer_cli.build(line[0], line[1:])
    assert trainer_commands().train_clips(line) is None


def test_a_command_is_built_once(tmp_path, monkeypatch):
    built = []
    build = trainer_cli.build

    def counted(command, argv):
        built.append(argv)
        return build(command, argv)

    monkeypatch.setattr(trainer_cli, "build", counted)
    commands = trainer_commands()
    line = debug(tmp_path)
    assert commands.check(line) is None
    assert commands.train_clips(line) == 16
    assert len(built) == 1
