import json
import signal
import sys
from argparse import ArgumentError
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from vidreason.cli.main import main
from vidreason.config import files
from vidreason.config.built_stage import build_stage
from vidreason.config.trainer_cli import build

FIT = ["fit", "--config", "configs/stage.yaml"]


@pytest.fixture
def module(project):
    return (project / "module").read_text()


def built(*options: str):
    sys.path.append(str(Path.cwd()))
    return build("fit", ["--config", "configs/stage.yaml", *options])


def test_model_and_data_share_one_vlm(project):
    cli = built()
    assert cli.model.vlm is cli.datamodule.encoder
    assert cli.model.vlm.path == "here"
    assert cli.model.net is None


@pytest.mark.parametrize("form", [["{}", "null"], ["{}=null"]])
def test_null_is_none_at_any_depth(project, form):
    options = [part.format("--vlm.init_args.vision_cache.folder") for part in form]
    cache = built("--vlm.init_args.vision_cache", "{folder: kept, max_gb: 3}", *options).model.vlm.vision_cache_options
    assert (cache.folder, cache.max_gb) == (None, 3)


def test_ctrl_c_while_the_workers_start_ends_in_order(project, capsys):
    assert main([*FIT, "--data.init_args.broken", "stopped"]) == 130
    assert "again with: vidreason fit" in capsys.readouterr().err


@pytest.fixture
def sections(project, module):
    """A section of the same class as the stage file's, one of its subclass, and an overlay."""
    Path("mine.yaml").write_text(f"class_path: {module}.Numbers\ninit_args: {{task: mine}}\n")
    Path("vlm.yaml").write_text(f"class_path: {module}.Recipe\ninit_args: {{path: mine}}\n")
    Path("overlay.yaml").write_text("data: {init_args: {num_workers: 1}}\nvlm: {init_args: {freeze_vision: false}}\n")


def data_of(cli):
    data = cli.datamodule
    return data.task, data.batch_size, data.where, data.num_workers


@pytest.mark.usefixtures("sections")
def test_a_section_file_replaces_the_stage_file_s_section_of_the_same_class(project):
    assert data_of(built()) == (None, 4, {"subset": "a"}, 0)
    cli = built("--data", "mine.yaml", "--vlm", "vlm.yaml")
    assert data_of(cli) == ("mine", 2, None, 0), "the class's own defaults where the file says nothing"
    assert cli.model.vlm.path == "mine"


def test_a_section_file_replaces_one_of_another_class(project):
    cli = built("--data", "configs/data/other.yaml")
    assert type(cli.datamodule).__name__ == "OtherNumbers"
    assert (cli.datamodule.extra, cli.datamodule.batch_size) == (7, 3)


STAGE, OVERLAY, FLAG = ["--config", "configs/stage.yaml"], ["-c", "overlay.yaml"], ["--data.init_args.task=flag"]
ORDERS = [
    [*STAGE, "--data", "mine.yaml", *OVERLAY, *FLAG],
    [*FLAG, "--data=mine.yaml", "--config=configs/stage.yaml", *OVERLAY],
    [*STAGE, *OVERLAY, *FLAG, "--data", "mine.yaml"],
    ["--data", "configs/data/other.yaml", *STAGE, *FLAG, *OVERLAY, "--data", "mine.yaml"],
]


@pytest.mark.usefixtures("sections")
@pytest.mark.parametrize("options", ORDERS)
def test_stage_file_section_overlay_flag_count_in_this_order_wherever_they_stand(project, options):
    sys.path.append(str(Path.cwd()))
    cli = build("fit", options)
    assert data_of(cli) == ("flag", 2, None, 1)
    assert cli.run_dir == Path("runs/stage"), "named after the stage file"


@pytest.mark.usefixtures("sections")
def test_the_saved_config_says_what_a_replaced_section_came_to(project):
    assert main([*FIT, "--data", "mine.yaml", "--config", "overlay.yaml", "--run_dir", "runs/r"]) == 0
    saved = yaml.safe_load(Path("runs/r/config.yaml").read_text())["data"]["init_args"]
    assert (saved["task"], saved["batch_size"], saved["where"], saved["num_workers"]) == ("mine", 2, None, 1)
    again = ["fit", "--config", "runs/r/config.yaml", "--run_dir", "runs/again"]
    assert main([*again, "--data", "configs/data/numbers.yaml"]) == 0
    saved = yaml.safe_load(Path("runs/again/config.yaml").read_text())["data"]["init_args"]
    assert (saved["task"], saved["batch_size"], saved["num_workers"]) == (None, 4, 0), "a saved config is a stage file"


@pytest.mark.usefixtures("sections")
def test_what_else_a_stage_file_says_stays_where_a_section_is_replaced(project):
    text = Path("configs/stage.yaml").read_text()
    assert "lr: 0.1" in text
    Path("configs/stage.yaml").write_text(text.replace("lr: 0.1", "lr: 1e-1"))  # a number to the parser, text to PyYAML
    Path("configs/data/numbers.yaml").unlink()
    cli = built("--data", "mine.yaml")
    assert cli.trainer.max_steps == 2, "from trainer/cpu.yaml beside it"
    assert cli.config["fit"]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1


@pytest.fixture
def sized(module):
    """A stage with a batch size of its own."""
    with Path(f"{module}.py").open("a") as code:
        code.write("\n\nclass Sized(Stage):\n    def __init__(self, vlm: VLM, batch_size: int | None = None):\n")
        code.write("        super().__init__(vlm)\n        self.batch_size = batch_size\n")
    return ["--model", f"{module}.Sized", "--model.init_args.batch_size", "16"]


def test_a_batch_size_of_the_data_that_does_not_count_is_said(project, sized, capsys):
    for given, named in ((["--data", "configs/data/numbers.yaml"], "configs/data/numbers.yaml"),
                         (["--data.init_args.batch_size", "4"], "the command line")):  # fmt: skip
        built(*sized, *given)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "batch" in line]
        assert "model.init_args.batch_size: 16 counts, not data.init_args.batch_size: 4" in line
        assert f"({named})" in line


def test_a_batch_size_that_counts_or_that_nobody_gave_is_not_mentioned(project, sized, capsys):
    built(*sized)
    built(*sized, "--data", "configs/data/other.yaml")
    built(*sized[:2], "--data", "configs/data/numbers.yaml")
    built(*sized[:3], "4", "--data", "configs/data/numbers.yaml")
    assert "batch" not in capsys.readouterr().err


def test_an_overlay_merges_and_appends(project):
    Path("overlay.yaml").write_text(
        "data: {init_args: {batch_size: 6}}\ntrainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.Timer}]}\n"
    )
    cli = built("--config", "overlay.yaml")
    assert cli.datamodule.batch_size == 6
    assert [type(callback).__name__ for callback in cli.trainer.callbacks].count("Timer") == 1
    assert cli.run_dir == Path("runs/stage")


def test_a_module_without_vlm_is_left_alone(project, module):
    cli = built("--model", f"{module}.WithoutVLM")
    assert cli.datamodule.encoder.path == "here"


def test_fit_fills_the_run_folder_and_can_be_repeated(project, capsys):
    argv = [*FIT, "--run_dir", "runs/x y"]
    assert main(argv) == 0
    run = Path("runs/x y")
    assert (run / "command.txt").read_text() == "vidreason fit --config configs/stage.yaml --run_dir 'runs/x y'\n"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "tb").glob("events*"))
    assert not Path("lightning_logs").exists()
    assert main([*argv, "--force"]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["run_dir"] == "runs/x y"
    assert main(["fit", "--config", str(run / "config.yaml"), "--run_dir", "runs/again"]) == 0
    again = yaml.safe_load(Path("runs/again/config.yaml").read_text())
    assert {**again, "run_dir": None} == {**saved, "run_dir": None}


def test_tensorboard_holds_config_settings_and_outcome(project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*FIT, "--data.init_args.batch_size", "3", "--data.init_args.num_workers=0"]) == 0
    events = EventAccumulator("runs/stage/tb", size_guidance={"tensors": 0})
    events.Reload()
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "vidreason fit --config configs/stage.yaml" in config
    assert "batch_size: 3" in config
    started = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"data.batch_size" in started
    assert b"seed_everything" in started
    assert b"data.where" not in started  # no command line sets it, so that its column would be constant


def test_a_logger_by_name(project, capsys):
    assert main([*FIT, "--logger", "csv"]) == 0
    assert [path.name for path in Path("runs/stage").iterdir() if path.name in ("csv", "tb")] == ["csv"]
    with patch("vidreason.config.loggers.find_spec", lambda name: None):
        assert main([*FIT, "--logger", "wandb"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: --logger wandb: the package wandb is missing: pip install wandb, or --logger csv"
    )
    assert main([*FIT, "--logger", "csv", "--trainer.logger", "false"]) == 2
    assert "trainer.logger is set in the configuration, too" in capsys.readouterr().err


def test_a_test_leaves_the_record_of_training(project):
    assert main(FIT) == 0
    before = Path("runs/stage/config.yaml").read_text()
    assert main(["test", "--config", "configs/stage.yaml"]) == 0
    assert Path("runs/stage/command.txt").read_text().startswith("vidreason fit")
    assert Path("runs/stage/command_test.txt").read_text().startswith("vidreason test")
    last = "runs/stage/checkpoints/last.ckpt"
    assert main(["test", "--config", "configs/stage.yaml", "--ckpt_path", last]) == 0
    assert Path("runs/stage/command_test.txt").read_text().endswith(f"--ckpt_path {last}\n")
    assert yaml.safe_load(Path("runs/stage/config_test.yaml").read_text())["ckpt_path"] == str(Path(last).absolute())
    assert Path("runs/stage/config.yaml").read_text() == before


def test_the_yaml_decides_where_it_says_so(project):
    path = Path("configs/trainer/cpu.yaml")
    path.write_text(path.read_text() + "logger: false\nenable_checkpointing: false\ndefault_root_dir: runs/from_yaml\n")
    assert main(FIT) == 0
    assert {file.name for file in Path("runs/from_yaml").iterdir()} == {"command.txt", "config.yaml", "finished.json"}


@pytest.fixture
def interruptible():
    """A process that was started in the background of a script ignores Ctrl-C, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_run_says_how_to_resume_and_does(project, capsys, module):
    argv = [*FIT, "--run_dir", "runs/i", "--trainer.max_steps", "5"]
    assert main([*argv, "--model.init_args.interrupt_at", "3"]) == 130
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    assert "--ckpt_path runs/i/checkpoints/last.ckpt" in capsys.readouterr().err
    import torch

    last = "runs/i/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4  # the batch it came in is finished
    assert main([*argv, "--ckpt_path", last]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 5


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_the_system_ends_is_interrupted_and_not_finished(project, capsys):
    argv = [*FIT, "--run_dir", "runs/k", "--trainer.max_steps", "50", "--model.init_args.killed", "true"]
    assert main([*argv, "--model.init_args.interrupt_at", "3"]) == 130
    assert "--ckpt_path runs/k/checkpoints/last.ckpt" in capsys.readouterr().err
    import torch

    assert torch.load("runs/k/checkpoints/last.ckpt", weights_only=True)["global_step"] in (3, 4)


def test_configs_of_the_package_are_found_and_named(project, module, monkeypatch, capsys):
    package = project / "package"
    Path("configs").rename(package)
    (package / "tasks").mkdir()
    (package / "tasks" / "t.yaml").write_text("name: t\n")
    monkeypatch.setattr(files, "shipped_folder", lambda: package)
    cli = built("--data=configs/data/other.yaml", "--data.init_args.extra=9")
    assert cli.datamodule.extra == 9
    error = capsys.readouterr().err
    assert str(package / "stage.yaml") in error
    assert str(package / "data" / "other.yaml") in error
    cli = built("--data.init_args.task", "configs/tasks/t.yaml")
    assert cli.datamodule.task == str(package / "tasks" / "t.yaml")


MISTAKES = {
    "missing config": (["--config", "configs/nope.yaml"], "no such file: configs/nope.yaml"),
    "abbreviation": (["--trainer.max_epoch", "3"], "unknown key 'trainer.max_epoch': did you mean 'max_epochs'?"),
    "unknown option": (["--datum", "3"], "unknown key 'datum': did you mean 'data'?"),
    "unknown argument": (["--data.init_args.bach_size", "3"], "no argument 'bach_size': did you mean 'batch_size'?"),
    "wrong type": (["--data.init_args.batch_size", "four"], "batch_size: Expected a <class 'int'>"),
    "no such class": (["--model", "nowhere.Model"], "nowhere"),
    "missing section": (["--data", "configs/data/nope.yaml"], "no such file: configs/data/nope.yaml"),
    "missing checkpoint": (["--ckpt_path", "nope.ckpt"], "--ckpt_path nope.ckpt: no such file"),
    "two run folders": (["--run_dir", "a", "--trainer.default_root_dir", "b"], "run_dir is a but"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_command_line_is_one_line(project, capsys, name):
    options, expected = MISTAKES[name]
    assert main([*FIT, *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_a_section_is_looked_for_beside_the_file_that_names_it(project, capsys):
    Path("mine").mkdir()
    Path("mine/stage.yaml").write_text("vlm: configs/vlm/other.yaml\n")
    assert main(["fit", "--config", "mine/stage.yaml"]) == 2
    assert "no such file: configs/vlm/other.yaml in mine/stage.yaml: paths in a YAML" in capsys.readouterr().err


BROKEN_YAML = {
    "unknown trainer key": ("trainer/cpu.yaml", "max_epoch: 3\n", "max_epoch"),
    "unknown argument": ("data/numbers.yaml", "init_args: {bach_size: 3}\n", "configs/data/numbers.yaml"),
    "not YAML": ("stage.yaml", "model: {{\n", "configs/stage.yaml, line"),
    "unknown section": ("stage.yaml", "trainr: {max_steps: 1}\n", "configs/stage.yaml: did you mean 'trainer'?"),
    "unset variable": (
        "stage.yaml",
        "run_dir: ${oc.env:VIDREASON_NOWHERE}\n",
        "VIDREASON_NOWHERE, which configs/stage",
    ),
    "unset in section": (
        "data/numbers.yaml",
        "init_args: {task: '${oc.env:VIDREASON_NOWHERE}/t'}\n",
        "which configs/data",
    ),
}


@pytest.mark.parametrize("name", BROKEN_YAML)
def test_a_wrong_yaml_is_one_line_that_names_it(project, capsys, name, module):
    file, text, expected = BROKEN_YAML[name]
    path = Path("configs") / file
    kept = f"class_path: {module}.Numbers\n" if file.startswith("data/") else path.read_text()
    path.write_text(kept + text)
    assert main(FIT) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_without_a_config_the_remedy_is_named(project, capsys):
    assert main(["fit"]) == 2
    assert "--config configs/<stage>.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_errors_of_the_data_are_one_line(project, capsys, workers):
    assert main([*FIT, "--data.init_args.broken", "read", "--data.init_args.num_workers", workers]) == 1
    assert "error: clip_0.mp4: cannot be read\n" in capsys.readouterr().err


def test_errors_on_construction_are_one_line_unless_a_traceback_is_wanted(project, capsys, monkeypatch):
    argv = [*FIT, "--data.init_args.broken", "init"]
    assert main(argv) == 2
    assert "error: clips.csv, row 3: unknown label 'dog'\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="row 3"):
        main([*argv, "--debug"])
    monkeypatch.setenv("VIDREASON_TRACEBACK", "1")
    with pytest.raises(ValueError, match="row 3"):
        main(argv)


def test_trainer_refusals_are_one_line(project, capsys):
    assert main([*FIT, "--trainer.gradient_clip_algorithm", "nope"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_bugs_of_libraries_keep_their_traceback(project, module):
    with pytest.raises(json.JSONDecodeError):
        main([*FIT, "--model", f"{module}.LibraryBug"])


def test_a_stage_without_a_trainer_needs_no_callbacks_or_loggers(project):
    """A run of another version is loaded for decisions, whatever options the watchers of its training had."""
    path, stage = Path("configs/stage.yaml"), yaml.safe_load(Path("configs/stage.yaml").read_text())
    watcher = {"class_path": "vidreason.callbacks.throughput.Throughput", "init_args": {"gone": 1}}
    stage["trainer"] = {"callbacks": [watcher], "gone": 1, "precision": "bf16-true", "accelerator": "cpu"}
    path.write_text(yaml.safe_dump({**stage, "logger": "gone", "checkpoint": {"gone": 1}}))
    sys.path.append(str(Path.cwd()))
    found = build_stage("fit", ["--config", str(path)])
    assert (found.model.vlm.path, found.accelerator, found.precision) == ("here", "cpu", "bf16-true")
    assert main(["fit", "--config", str(path)]) == 2
    stage["model"]["init_args"]["gone"] = 1
    path.write_text(yaml.safe_dump(stage))
    with pytest.raises(ArgumentError, match="gone"):
        build_stage("fit", ["--config", str(path)])
