"""Tests a fit in a folder that an earlier one has used: the table of docs/resume.md, cell by cell."""

import errno
import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import errors_page
import pytest
import torch
import yaml

from vidreason.cli.main import main
from vidreason.config.fit_folder import begin_fit, mark_finished
from vidreason.config.trainer_cli import build
from vidreason.run_folder import COMMAND_FILE, CONFIG_FILE
from vidreason.run_lock import lock_run_folder

FIT = ["fit", "--config", "configs/stage.yaml", "--run_dir", "runs/x", "--trainer.max_steps", "5"]
OTHER = ["--model.init_args.optimizer.init_args.lr", "0.2"]
LAST = Path("runs/x/checkpoints/last.ckpt")


def content(folder: str = "runs/x") -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def steps() -> int:
    return int(torch.load(LAST, weights_only=True)["global_step"])


@pytest.fixture
def used(project, request):
    """The run folder as an earlier fit has left it."""
    state = request.param
    if state == "finished fit":
        assert main(FIT) == 0
        assert steps() == 5
    if state == "unfinished fit":
        assert main([*FIT, "--model.init_args.interrupt_at", "2"]) == 130
        assert steps() == 3
        # as if it had been interrupted from outside: the setting is one of these tests
        config = Path("runs/x/config.yaml")
        config.write_text(config.read_text().replace("interrupt_at: 2", "interrupt_at: -1"))
    return state


EVERY = pytest.mark.parametrize("used", ["nothing", "unfinished fit", "finished fit"], indirect=True)


def test_a_folder_that_the_fit_has_made_is_no_other_configuration(project, capsys):
    options = ["--data.init_args.task", "made/here", "--vlm.init_args.vision_cache.folder", "kept"]
    assert main([*FIT, *options]) == 0
    saved = yaml.safe_load(Path("runs/x/config.yaml").read_text())
    assert saved["vlm"]["init_args"]["vision_cache"]["folder"] == str(project / "kept"), "asked from any folder"
    Path("made/here").mkdir(parents=True)
    Path("kept").mkdir()
    assert main([*FIT, *options]) == 0
    assert main([*FIT, *options[:2], "--vlm.init_args.vision_cache.folder", "elsewhere"]) == 0
    assert capsys.readouterr().err.count("nothing to do") == 2
    assert main([*FIT, *options[2:]]) == 2, "without the option, the folder that it named is missed"
    assert "data.init_args.task is null, was" in capsys.readouterr().err


def test_a_folder_that_a_run_makes_is_absolute_before_and_after_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        config = build("fit", ["--config", "configs/sft_label.yaml", "--data.init_args.data_dir", "bare"]).saved
        assert config["data"]["init_args"]["data_dir"] == str(tmp_path / "bare")
        Path("bare").mkdir(exist_ok=True)


@EVERY
def test_the_same_configuration_starts_is_resumed_or_has_nothing_to_do(used, capsys):
    before = content()
    capsys.readouterr()
    assert main(FIT) == 0
    said = capsys.readouterr().err
    assert steps() == 5
    assert (f"resuming from {LAST}" in said) == (used == "unfinished fit")
    assert ("nothing to do" in said) == (used == "finished fit")
    assert (content() == before) == (used == "finished fit")
    # A test with this configuration decides with the weights that it names, not with a checkpoint.
    assert yaml.safe_load(Path("runs/x", CONFIG_FILE).read_text())["ckpt_path"] is None


@EVERY
def test_another_configuration_never_writes_over_a_fit(used, capsys):
    before = content()
    capsys.readouterr()
    assert main([*FIT, *OTHER]) == (0 if used == "nothing" else 2)
    if used == "nothing":
        return
    said = capsys.readouterr().err.splitlines()[-1]
    assert content() == before
    assert "model.init_args.optimizer.init_args.lr is 0.2, was 0.1" in said
    assert "--ckpt_path" not in said, "the checkpoint would be refused"
    assert re.search(r"--force .* or another --run_dir$", said)
    assert main([*FIT, *OTHER, "--force"]) == 0
    assert steps() == 5
    assert content("runs/x.old") == {name.replace("runs/x", "runs/x.old"): held for name, held in before.items()}
    assert main([*FIT, *OTHER]) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("used", ["finished fit"], indirect=True)
def test_a_finished_fit_goes_on_from_its_checkpoint_as_the_message_says(used, capsys):
    longer = [*FIT, "--trainer.max_steps", "7"]
    assert main(longer) == 2
    remedy = re.search(r"give (--ckpt_path \S+) to go on", capsys.readouterr().err)
    assert main([*longer, *remedy[1].split()]) == 0
    assert steps() == 7


@pytest.mark.parametrize("used", ["finished fit"], indirect=True)
def test_force_moves_nothing_that_the_fit_reads(used, capsys):
    before = content()
    assert main([*FIT, "--force", "--ckpt_path", str(LAST)]) == 2
    assert "ckpt_path is" in capsys.readouterr().err
    assert content() == before


@pytest.mark.usefixtures("here")
def test_a_refused_checkpoint_leaves_the_folder_as_it_is(capsys):
    fit = [*errors_page.FIT, "--run_dir", "runs/x"]
    assert main(fit) == 0
    before = content()
    longer = [*fit, "--ckpt_path", str(LAST), "--trainer.max_steps", "2"]
    assert main([*longer, "--seed_everything", "9"]) == 2
    assert content() == before
    assert "written with seed 0, now it is 9" in capsys.readouterr().err
    assert main(fit) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("used", ["finished fit"], indirect=True)
def test_fast_dev_run_writes_nothing(used, capsys):
    before = content("runs")
    assert main([*FIT, "--trainer.fast_dev_run", "true"]) == 0
    assert main([*FIT[:-4], "--run_dir", "runs/new", "--trainer.fast_dev_run", "true"]) == 0
    assert content("runs") == before


HOLD = "import sys; sys.path[:0] = [{path!r}]; from run_lock import *; from pathlib import Path\n"
HOLD += "with lock_run_folder(Path('runs/x')): print('held', flush=True); sys.stdin.read()"


def test_a_second_process_stops_and_takes_over_what_a_killed_one_left(project, capsys):
    code = HOLD.format(path=str(Path(sys.modules["vidreason"].__file__).parent))
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert main(FIT) == 2
    assert f"runs/x: process {holder.pid} on " in capsys.readouterr().err
    assert not LAST.exists()
    holder.kill()
    holder.wait()
    assert main(FIT) == 0
    assert f"taking over the lock of process {holder.pid} on " in capsys.readouterr().err
    assert steps() == 5
    assert not Path("runs/x/run.lock").exists()


def test_the_folder_may_move(project, capsys):
    assert main(FIT) == 0
    shutil.move("runs", "elsewhere")
    assert main([*FIT[:-4], "--run_dir", "elsewhere/x", *FIT[-2:]]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(ValueError, match=r"cannot be locked \(No locks available\); give a --run_dir"),
        lock_run_folder(tmp_path),
    ):
        pass


def test_how_fast_clips_come_and_where_frames_are_kept_is_the_same_fit(tmp_path):
    (tmp_path / COMMAND_FILE).write_text("vidreason fit --config x.yaml\n")
    frames = {"num_frames": 4, "cache": None, "cache_gb": 50.0, "cache_format": "raw"}
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump({"data": {"init_args": {"frames": frames}}}))
    mark_finished(tmp_path, 1, 1)
    moved = {"data": {"init_args": {"frames": {**frames, "cache": "/fast/disk", "cache_gb": 9.0}, "num_workers": 4}}}
    assert begin_fit(tmp_path, moved, None, reset=False).action == "nothing"
    other = {"data": {"init_args": {"frames": {**frames, "cache_format": "jpeg"}}}}
    with pytest.raises(ValueError, match=r"frames.cache_format is \"jpeg\", was \"raw\""):
        begin_fit(tmp_path, other, None, reset=False)
