"""Mistakes that other projects' users report most: each is one line that names the cause and a remedy that works."""

import os
import re
import warnings
from pathlib import Path

import pytest
import yaml
from errors_page import FIT

from vidreason.cli.main import main
from vidreason.config.errors import explain
from vidreason.datamodules.clips import time_limit
from vidreason.datamodules.clips.time_limit import ReadTimeoutError
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.sources.folders import read_layout
from vidreason.datamodules.sources.listing import Listing
from vidreason.spelling import printable


def said(capfd, argv) -> str:
    """The error of a command that is refused with status 2."""
    capfd.readouterr()
    assert main(list(argv)) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


SLIPS = {
    "blank": (lambda text: text.replace("  batch", "   batch", 1).encode(), "bad.yaml, line 4, column 3: not"),
    "tab": (lambda text: text.replace("  batch_size", "\tbatch_size", 1).encode(), "bad.yaml, line 3, column 1: not"),
    "utf-16": (lambda text: text.encode("utf-16"), "bad.yaml: not in UTF-8 (byte 0): save it as UTF-8"),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("option", ["--data", "--config"])
def test_a_slip_in_yaml_has_line_and_column(here, capfd, slip, option):
    break_it, message = SLIPS[slip]
    Path("bad.yaml").write_bytes(break_it("class_path: x\ninit_args:\n  batch_size: 2\n  manifest: a\n"))
    assert said(capfd, [*FIT, option, "bad.yaml"]).startswith(message)


@pytest.mark.parametrize(("value", "what"), [("t.csv", "a table"), ("clips", "a folder")])
def test_data_that_are_no_section_are_named_with_the_command_that_writes_one(here, capfd, value, what):
    message = said(capfd, [*FIT, "--data", value])
    assert f"--data {value}: a section file (.yaml with class_path and init_args) is expected, not {what}" in message
    assert f"`vidreason init {value} --out task` writes one: --data task/data.yaml" in message
    pipeline = ["pipeline", "--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "x", "--data", value]
    assert what in said(capfd, pipeline)


def test_a_logger_without_its_package(here, capfd):
    message = said(capfd, [*FIT, "--trainer.logger", "lightning.pytorch.loggers.WandbLogger"])
    assert message.startswith("lightning.pytorch.loggers.WandbLogger: needs a package: pip install 'wandb")


@pytest.mark.parametrize(
    ("content", "what"),
    [("- {a: 1}\n", "a list"), ("hello\n", "a single value"), ("", "an empty file"), ("name: t\n", "one with name")],
)
@pytest.mark.parametrize("option", ["--data", "--vlm", "--model", "--trainer", "--config"])
def test_a_yaml_file_with_something_else_on_top(here, capfd, option, content, what):
    Path("odd.yaml").write_text(content)
    if "name" in content and option in ("--trainer", "--config"):
        assert re.match("unknown key '(trainer.)?name'", said(capfd, [*FIT, option, "odd.yaml"]))
    else:
        assert re.match(f"{option} odd.yaml: a .* is expected, not {what}", said(capfd, [*FIT, option, "odd.yaml"]))


TASK = "name: falls\nquestion: Does someone fall?\nclasses: [fall, walk]\n"
OTHER_KINDS = {
    "task": (TASK, "a task file; name it in the data section: --data.init_args.task odd.yaml"),
    "pipeline": ("name: x\nstages: []\n", "a pipeline; it is run by: vidreason pipeline --config odd.yaml"),
    "data": ("class_path: a.B\ninit_args: {manifest: t.csv}\n", "a section with class_path; give it as --data"),
    "vlm": ("class_path: a.B\ninit_args: {path: x}\n", "a section with class_path; give it as --vlm"),
    "stage": ("trainer: {max_steps: 1}\n", "a file of several sections; give it as --config odd.yaml"),
}


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        *((option, kind) for option in ("--config", "-c") for kind in OTHER_KINDS if kind != "stage"),
        *(("--trainer", kind) for kind in OTHER_KINDS),
        *(("--data", kind) for kind in ("task", "pipeline", "stage")),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_option(here, capfd, option, kind):
    content, what = OTHER_KINDS[kind]
    Path("odd.yaml").write_text(content)
    assert re.match(f"{option} odd.yaml: a .* is expected, not {what}", said(capfd, [*FIT, option, "odd.yaml"]))


def test_a_pipeline_and_a_stage_are_told_apart(here, capfd):
    Path("odd.yaml").write_text(OTHER_KINDS["stage"][0])
    message = said(capfd, ["pipeline", "--config", "odd.yaml", "--run_dir", "x"])
    assert message.startswith("--config odd.yaml: a pipeline (stages: ...) is expected, not a file of several sections")
    assert message.endswith("it is run by: vidreason fit --config odd.yaml")


NO_CLASS = "no class 'WandbLoger' in lightning.pytorch.loggers{}: did you mean 'WandbLogger'?"


@pytest.mark.parametrize("name", ["WandbLoger", "lightning.pytorch.loggers.WandbLoger"])
def test_a_misspelt_logger(here, capfd, name):
    Path("logger.yaml").write_text(f"trainer: {{logger: {{class_path: {name}}}}}\n")
    message = f"trainer.logger: {NO_CLASS}"
    assert said(capfd, [*FIT, "--trainer.logger", name]) == message.format("")
    assert said(capfd, [*FIT, "--config", "logger.yaml"]) == message.format(" in logger.yaml")


def test_a_class_of_no_key_has_no_empty_subject():
    assert explain("class_path 'nowhere.Thing': No module named 'nowhere'", []).startswith("no class nowhere.Thing:")


def test_a_class_without_an_argument_that_it_needs(here, capfd):
    logger = ["--trainer.logger", "TensorBoardLogger"]
    message = said(capfd, [*FIT, *logger])
    (remedy,) = re.findall(r"TensorBoardLogger needs save_dir: .*, or give (--\S+) VALUE$", message)
    no_bar = ["--trainer.enable_progress_bar", "false"]  # which removes that of the shipped YAML
    assert main([*FIT, *logger, remedy, "logs", "--trainer.fast_dev_run", "true", *no_bar]) == 0
    Path("bare.yaml").write_text("class_path: vidreason.datamodules.manifest.ManifestDataModule\ninit_args: {}\n")
    assert "needs manifest: " in said(capfd, [*FIT, "--data", "bare.yaml"])


NAMING = {
    "config": [*FIT, "--config", "PLACE"],
    "data": [*FIT, "--data", "PLACE"],
    "equals": [*FIT, "--data.init_args.manifest=PLACE"],
    "checkpoint": [*FIT, "--ckpt_path", "PLACE"],
    "pipeline": ["pipeline", "--run_dir", "x", "--config", "PLACE"],
    "init": ["init", "PLACE", "--out", "task"],
    "check": ["data", "check", "PLACE"],
    "run": ["classify", "clips/a/0.mp4", "--run", "PLACE"],
}


@pytest.mark.parametrize("where", NAMING)
def test_a_pipe_and_a_place_that_does_not_answer_are_named(here, capfd, monkeypatch, where):
    os.mkfifo("pipe.yaml")
    argv = [word.replace("PLACE", "pipe.yaml") for word in NAMING[where]]
    assert re.match(r"(--\S+ )?pipe.yaml: a pipe or a device, and no ordinary file; save its", said(capfd, argv))
    looks = time_limit.call_reader

    def stuck(function, path, *args, timeout):
        if path.name == "dead.yaml":
            raise ReadTimeoutError(f"{path}: still not read")
        return looks(function, path, *args, timeout=timeout)

    monkeypatch.setattr(time_limit, "call_reader", stuck)
    argv = [word.replace("PLACE", "dead.yaml") for word in NAMING[where]]
    assert said(capfd, argv).startswith("dead.yaml: no answer within 20 seconds: repair the disk or network mount")


def test_a_manifest_in_a_yaml_file_may_be_a_pipe(here, capfd):
    os.mkfifo("pipe.csv")
    Path("data.yaml").write_text(Path("data.yaml").read_text().replace("t.csv", "pipe.csv"))
    assert said(capfd, FIT).startswith("pipe.csv: a pipe or a device")


@pytest.mark.parametrize("key", ["task", "adapter_path"])
def test_a_place_in_a_yaml_file_that_does_not_answer_is_named(here, capfd, monkeypatch, key):
    looks = time_limit.call_reader

    def stuck(function, path, *args, timeout):
        if "dead" in path.parts:
            raise ReadTimeoutError(f"{path}: still not read")
        return looks(function, path, *args, timeout=timeout)

    monkeypatch.setattr(time_limit, "call_reader", stuck)
    section = {"task": "data", "adapter_path": "model"}[key]
    Path("more.yaml").write_text(yaml.safe_dump({section: {"init_args": {key: "dead/it"}}}))
    assert re.match(r"dead/it\S*: no answer within 20 seconds: repair", said(capfd, [*FIT, "--config", "more.yaml"]))


def test_a_clip_of_classify_that_does_not_answer_costs_itself(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")

    def stuck(*args, **kwargs):
        raise ReadTimeoutError("still not read")

    monkeypatch.setattr(time_limit, "call_reader", stuck)
    listing = Listing([tmp_path / "a.mp4", tmp_path])
    assert [clip.path for clip in listing.clips()] == [tmp_path / "a.mp4", tmp_path]


def test_an_interval_that_lightning_refuses(here, capfd):
    assert "`val_check_interval` (50) must be less than" in said(capfd, [*FIT, "--trainer.val_check_interval", "50"])


def test_backslashes_are_separators_where_no_file_has_that_name(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4", "odd\\c.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"x")
    table = tmp_path / "t.csv"
    table.write_text("path,label,split\nclips\\a.mp4,a,train\nclips\\b.mp4,b,train\nclips/odd\\c.mp4,b,train\n")
    data = ManifestDataModule(table)
    found = {clip.path.relative_to(tmp_path).as_posix() for split in data.splits() for clip in data.samples(split)}
    assert found == {"clips/a.mp4", "clips/b.mp4", "clips/odd\\c.mp4"}
    table.write_text("path,label,split\nC:\\clips\\a.mp4,a,train\nclips/b.mp4,b,train\n")
    with pytest.raises(ValueError, match="a path of a Windows drive; make it relative to root"):
        ManifestDataModule(table).samples("train")


@pytest.mark.parametrize("option", ["--data", "--vlm"])
def test_a_backslash_in_an_option_is_named(here, capfd, option):
    message = f"{option} sub\\x.yaml: no such file; folders are separated by / here, not by \\"
    assert said(capfd, [*FIT, option, "sub\\x.yaml"]) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.check_val_every_n_epoch", "0"), "trainer.check_val_every_n_epoch is 0: raise it"),
        (("--trainer.val_check_interval", "0"), "trainer.val_check_interval is 0: raise it"),
        (("--model.init_args.optim.optimizer.init_args.lr", ".nan"), "optim.optimizer: Invalid learning rate: nan"),
    ],
)
def test_numbers_that_cannot_be_are_named(here, capfd, options, message):
    assert message in said(capfd, [*FIT, *options])


def test_no_file_of_a_class_folder_is_passed_over_without_being_listed(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.mp4").write_bytes(b"x")
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    (tmp_path / "b" / "lost.mp4").symlink_to("nowhere")
    layout = read_layout(tmp_path)
    assert len(layout.clips) == 2
    assert layout.others == {"pipe.mp4 (not a regular file)": 1, "lost.mp4 (not a regular file)": 1}


def test_names_are_printed_without_control_characters(here, capfd):
    task = {"name": "t", "question": "what?", "classes": ["a", "b\x1b[2J"]}
    Path("task.yaml").write_text(yaml.safe_dump(task))
    message = said(capfd, [*FIT, "--data.init_args.task", "task.yaml"])
    assert "\x1b" not in message
    assert printable("走路 é\n") == "走路 é\n"


def test_warnings_of_libraries_to_programmers_are_hidden(monkeypatch, capfd):
    from vidreason.cli import configs

    def noisy(argv):
        warnings.warn("will be removed in v6", FutureWarning, stacklevel=2)
        warnings.warn("this one is for you", UserWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(configs, "main", noisy)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        assert main(["configs"]) == 0
    assert [str(one.message) for one in seen] == ["this one is for you"]
