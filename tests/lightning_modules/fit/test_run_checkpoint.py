"""Tests when checkpoints are written, what they hold, and what a crash at any moment of writing leaves."""

import contextlib
import errno
import json
import os
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from covering import sample
from safetensors.torch import load_file
from small_grpo import make
from stage_world import adamw

from vidreason.datamodules import atomic_files as whole_files
from vidreason.datamodules.atomic_files import replace_folder
from vidreason.lightning_modules.fit.checkpoint_io import AtomicCheckpointIO
from vidreason.lightning_modules.fit.resume import FORMAT, KEY
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.signals import StopNow, StopRequested

ADAMW = OptimOptions(optimizer=adamw)


class Scripted(RationaleSFTModule):
    """Logs the accuracies it is given."""

    accuracies = ()

    def on_validation_epoch_end(self):
        self.log("val/acc", self.accuracies[self.current_epoch])


class NotedCheckpoint(RunCheckpoint):
    """Writes down after how many optimizer steps it saved what."""

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        self.noted = [*getattr(self, "noted", []), (Path(filepath).name, trainer.global_step)]


def trained(make_vlm, make_data, make_trainer, options, epochs=4, accuracies=(0.2, 0.8, 0.5, 0.9), **kwargs):
    module = Scripted(make_vlm(), optim=ADAMW)
    module.accuracies = accuracies
    saving = NotedCheckpoint(options)
    trainer = make_trainer(max_epochs=epochs, callbacks=[saving], **kwargs)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.fit(module, make_data(module.vlm, batch_size=2))  # three batches an epoch
    return trainer, module, saving


@pytest.mark.parametrize(
    ("every", "validated", "steps"),
    sample(
        [(1, False, [1, 2, 3, 4, 5, 6]), (2, False, [2, 3, 5, 6]), (9, False, [3, 6]), (9, True, [3, 6])],
        (2, False, [2, 3, 5, 6]),
        (9, True, [3, 6]),
    ),
)
def test_batches_and_epochs_count(make_vlm, make_data, make_trainer, every, validated, steps):
    limits = {} if validated else {"limit_val_batches": 0}
    _, _, saving = trained(make_vlm, make_data, make_trainer, CheckpointOptions(every), 2, **limits)
    assert saving.noted == [("last.ckpt", step) for step in steps]


@pytest.mark.parametrize(
    ("exception", "steps"), [(RuntimeError("x"), [3]), (StopNow(), [3]), (StopRequested(), [3, 4])], ids=repr
)
def test_nothing_is_saved_within_a_batch_unless_the_fit_stops_where_it_is_consistent(
    make_vlm, make_data, make_trainer, exception, steps
):
    """A stage may have counted a batch before its optimizer step; a second Ctrl-C writes nothing."""

    class Cut(Scripted):
        def training_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise exception
            return super().training_step(batch, batch_idx)

    module = Cut(make_vlm(), optim=ADAMW)
    module.accuracies = (0.1, 0.1)
    saving = NotedCheckpoint(CheckpointOptions(9))
    trainer = make_trainer(max_epochs=2, callbacks=[saving])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(module, make_data(module.vlm, batch_size=2))  # three batches an epoch
    assert saving.noted == [("last.ckpt", step) for step in steps]


def test_several_optimizer_steps_per_batch_are_one(make_vlm, make_data, make_trainer):
    """Lightning's every_n_train_steps=2 would miss all of these."""
    module = make(make_vlm(), group_size=2, inner_epochs=3, optimizer=adamw)
    saving = NotedCheckpoint(CheckpointOptions(1))
    make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[saving]).fit(module, make_data(module.vlm))
    assert saving.noted == [("last.ckpt", 3), ("last.ckpt", 6)]


def test_the_best_are_kept_each_with_its_adapter(make_vlm, make_data, make_trainer):
    options = CheckpointOptions(every_n_batches=99, monitor="val/acc", top_k=2)
    trainer, module, saving = trained(make_vlm, make_data, make_trainer, options)
    folder = Path(saving.dirpath)
    names = {path.stem for path in folder.glob("*.ckpt")}
    assert names == {"last", "epoch=1-step=6", "epoch=3-step=12"}  # 0.8 and 0.9
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {f"{name}_adapter" for name in names}
    assert trainer.checkpoint_callback.best_model_path.endswith("epoch=3-step=12.ckpt")
    for name in names:
        saved = torch.load(folder / f"{name}.ckpt", weights_only=True)
        beside = load_file(folder / f"{name}_adapter" / "adapter_model.safetensors")
        assert len(beside) == len(saved["state_dict"])
        for key, value in saved["state_dict"].items():
            assert torch.equal(beside[key.removeprefix("model.").replace(".policy.", ".")], value)
        info = json.loads((folder / f"{name}_adapter" / "vidreason.json").read_text())
        assert info["global_step"] == saved["global_step"]
    loaded = make_vlm().build(str(folder / "last_adapter"))
    wanted = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    for name, parameter in loaded.named_parameters():
        assert name not in wanted or torch.equal(parameter, wanted[name])


def test_a_checkpoint_holds_plain_things(make_vlm, make_data, make_trainer, caplog):
    caplog.set_level("INFO")
    trainer, _, saving = trained(make_vlm, make_data, make_trainer, CheckpointOptions(1), 1)
    path = Path(saving.dirpath) / "last.ckpt"
    saved = torch.load(path, weights_only=True)[KEY]
    assert (saved["format"], saved["stage"]) == (FORMAT, "sft_label")
    assert saved["progress"] == {"batches": 3, "per_epoch": 3, "accumulated": 1, "validation_due": False}
    assert (saved["clips_per_batch"], saved["traces"], saved["parent_sha"]) == (2, 0, "")
    (rank,) = saved["random"]
    assert torch.equal(rank["torch"], torch.get_rng_state())
    said = [record.message for record in caplog.records if "last.ckpt" in record.message]
    assert f"{path.stat().st_size / 1e6:.3g} MB" in said[-1]
    assert trainer.global_step == 3


def adapter_step(folder):
    load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "vidreason.json").read_text())["global_step"]


def test_a_crash_at_any_write_leaves_what_can_be_loaded(make_vlm, make_data, make_trainer):
    """The process ends (``os._exit``) before the nth time that it opens, renames or removes a file, or half-way in."""
    trainer, module, saving = trained(make_vlm, make_data, make_trainer, CheckpointOptions(99), 1)
    folder = Path(saving.dirpath)
    before = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    seen, at = set(), 0
    while True:
        child = os.fork()
        if child == 0:
            crash_at(at)
            saving._save(trainer)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = torch.load(folder / "last.ckpt", weights_only=True)
        fresh = [torch.equal(value, before[name] + 1) for name, value in found["state_dict"].items()]
        old = [torch.equal(value, before[name]) for name, value in found["state_dict"].items()]
        assert all(fresh) or all(old)
        assert adapter_step(folder / "last_adapter") == 3
        seen.add(all(fresh))
        if status == 0:
            break
        assert status == 77
        at += 1
    assert seen == {True, False}
    assert at > 10
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "last_adapter"}  # nothing is left of them


class Killed(BaseException):
    """Stands for a kill: nothing may be written any more."""


@pytest.mark.parametrize(
    ("step", "limit"),
    sample(
        list(product([3, 4, 6], [{"max_epochs": 2}, {"max_steps": 6}])), (4, {"max_steps": 6}), (6, {"max_epochs": 2})
    ),
)
def test_a_kill_between_checkpoint_and_adapter_is_mended_on_resume(
    make_vlm, make_data, make_trainer, monkeypatch, step, limit
):
    """Also where the checkpoint is the fit's last, after which there is nothing left to train."""

    def fit(**more):
        module = RationaleSFTModule(make_vlm(), optim=ADAMW)
        saving = RunCheckpoint(CheckpointOptions(1))
        trainer = make_trainer(limit_val_batches=0, callbacks=[saving], **limit)
        saving.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        trainer.fit(module, make_data(module.vlm, batch_size=2), **more)  # three batches an epoch

    def export_adapter(module, folder, state=None):
        if module.trainer.global_step == step:
            raise Killed
        written(module, folder, state)

    written = RationaleSFTModule.export_adapter
    with monkeypatch.context() as patched:
        patched.setattr(RationaleSFTModule, "export_adapter", export_adapter)
        patched.setattr(RunCheckpoint, "on_exception", lambda *_: None)
        with pytest.raises(Killed):
            fit()
    folder = next(Path(make_trainer().default_root_dir).glob("checkpoints"))
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert not (folder / "last_adapter").exists() or adapter_step(folder / "last_adapter") == step - 1

    def killed(*_):
        raise Killed

    def resumed_and_killed_at_once():
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(RunCheckpoint, "on_train_batch_start", killed)
            patched.setattr(RunCheckpoint, "on_exception", lambda *_: None)
            fit(ckpt_path=folder / "last.ckpt", weights_only=True)

    resumed_and_killed_at_once()
    assert adapter_step(folder / "last_adapter") == step
    beside = load_file(folder / "last_adapter" / "adapter_model.safetensors")
    assert len(beside) == len(saved["state_dict"])
    for key, value in saved["state_dict"].items():
        assert torch.equal(beside[key.removeprefix("model.").replace(".policy.", ".")], value)
    written_at = (folder / "last_adapter" / "vidreason.json").stat().st_mtime_ns
    resumed_and_killed_at_once()
    assert (folder / "last_adapter" / "vidreason.json").stat().st_mtime_ns == written_at, "it is right, and stays"


def crash_at(number):
    """In a child: the nth write-like event ends the process; a file's content is cut in half."""
    count = [0]
    write_bytes = Path.write_bytes

    def event(name, arguments):
        writes = name == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wxa+")
        if writes or name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            if count[0] == number:
                os._exit(77)
            count[0] += 1

    def half(path, content):
        if count[0] == number:
            write_bytes(path, bytes(content)[: len(content) // 2])
            os._exit(77)
        count[0] += 1
        return write_bytes(path, content)

    Path.write_bytes = half
    sys.addaudithook(event)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(whole_files, "_exchange", lambda *_: False)
    for number in range(3):
        draft = tmp_path / "draft"
        draft.mkdir()
        (draft / "a").write_text(str(number))
        replace_folder(draft, tmp_path / "folder")
        assert (tmp_path / "folder" / "a").read_text() == str(number)
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_write_is_not_tried_again(make_vlm, make_data, make_trainer, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        trained(make_vlm, make_data, make_trainer, CheckpointOptions(1))


@pytest.mark.parametrize("options", [{"every_n_batches": 0}, {"top_k": -2}])
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=f"checkpoint.{next(iter(options))}"):
        CheckpointOptions(**options)
