"""What the real commands say of a stage before it runs."""

import pytest

from vidreason.cli import lightning
from vidreason.cli.pipeline_commands import StageSize, trainer_commands
from vidreason.lightning_modules.work import Work

SMALL = ["--config", "configs/debug.yaml", "--trainer.accelerator", "cpu"]


def debug(tmp_path, *options):
    return ["fit", "--config", "configs/sft_label.yaml", *SMALL, "--run_dir", str(tmp_path / "run"),
            "--data.init_args.data_dir", str(tmp_path / "porch"), *options]  # fmt: skip


def test_a_stage_is_sized_from_its_config_and_its_data(tmp_path, capfd):
    size = trainer_commands().size(debug(tmp_path, "--model.init_args.batch_size", "4"))
    said = capfd.readouterr()
    assert size == StageSize(16, Work(clips_learnt=8, texts_learnt=8)), "two steps of four clips, no epoch ends"
    assert "rendering" in said.err, "what takes long is seen"
    more = ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1.0"]
    size = trainer_commands().size(debug(tmp_path, "--model.init_args.batch_size", "4", *more))
    assert size.work == Work(clips_read=8, clips_learnt=16, texts_scored=64, texts_learnt=16)  # eight classes


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
    assert trainer_commands().size(line) == StageSize()


def test_what_cannot_be_built_here_has_no_size(tmp_path):
    line = debug(tmp_path, "--trainer.devices", "64", "--trainer.accelerator", "gpu")  # finished elsewhere, say
    with pytest.raises(ValueError, match="accelerator is gpu|devices"):
        lightning.build(line[0], line[1:])
    assert trainer_commands().size(line) == StageSize()


def test_a_command_is_built_once(tmp_path, monkeypatch):
    built = []
    build = lightning.build

    def counted(command, argv):
        built.append(argv)
        return build(command, argv)

    monkeypatch.setattr(lightning, "build", counted)
    commands = trainer_commands()
    line = debug(tmp_path)
    assert commands.check(line) is None
    assert commands.size(line).train_clips == 16
    assert commands.size([*line, "--trainer.max_steps", "1"]).work is not None
    assert len(built) == 2
