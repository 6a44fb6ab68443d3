"""Fits that are cut off at any moment, and stopped by signals: they go on as if nothing had happened."""

import contextlib
import os
import signal

import pytest
import small_grpo
import stage_world as world
import torch
from covering import sample
from kill_compare import same

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.lightning_internals import forward_sigterm
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.rewards.base import RewardFn
from vidreason.signals import handle_signals

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
make_trainer, adamw = world.make_trainer, world.adamw

EVERY = CheckpointOptions(every_n_batches=1)


class EvenLength(RewardFn):
    """Differs within most groups, and is equal within some."""

    def __call__(self, item):
        return float(len(item.completion) % 2)


class Cut(BaseException):
    """Stands for a kill: nothing may be written any more."""


class Logbook:
    """The record of a stage's actions, in order; something happens at one entry."""

    def __init__(self, at=None, what=None):
        self.entries, self.at, self.what = [], at, what

    def add(self, *entry):
        if len(self.entries) == self.at and self.what is not None:
            self.what()
        self.entries.append(entry)


class WatchedSFT(RationaleSFTModule):
    log_book: Logbook

    def training_step(self, batch, batch_idx):
        self.log_book.add("train", self.current_epoch, batch_idx, *batch.video_ids)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log_book.add("val", self.global_step, *batch.video_ids)
        return super().validation_step(batch, batch_idx)


class WatchedGRPO(GRPOModule):
    log_book: Logbook

    def setup(self, stage):
        super().setup(stage)
        generate = self._sampler._generate

        def noted(model, prompts, clips, seed, step):
            self.log_book.add("rollout", step, seed, *(clip.video_id for clip in clips))
            return generate(model, prompts, clips, seed, step)

        self._sampler._generate = noted

    def update(self, minibatch):
        ids = [clip.video_id for part in minibatch for clip in part.batch.clips]
        self.log_book.add("update", self.global_step, *ids)
        super().update(minibatch)

    def validation_step(self, batch, batch_idx):
        self.log_book.add("val", self.global_step, *batch.video_ids)
        return super().validation_step(batch, batch_idx)


def cut():
    raise Cut


def state_of(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def fit(make_vlm, make_data, make_trainer, tmp_path):
    """``fit(folder, make, book)``: trains, going on from ``last.ckpt`` where there is one; returns the checkpoint."""

    def run(folder, make, book, **kwargs):
        last = tmp_path / folder / "checkpoints" / "last.ckpt"
        module = make(make_vlm())
        module.log_book = book
        kwargs = {"max_epochs": 2, "check_val_every_n_epoch": 2, **kwargs}
        saving = RunCheckpoint(kwargs.pop("options", EVERY), dirpath=str(last.parent))
        callbacks = [StopOnSignal(), AdapterCheckpoint("val/acc"), saving]
        trainer = make_trainer(folder, callbacks=callbacks, **kwargs)
        forward_sigterm(trainer)
        if last.is_file():
            torch.manual_seed(17)  # nothing may hang on it, LoRA's first weights included
        with handle_signals():
            data = make_data(module.vlm, batch_size=2 if isinstance(module, WatchedSFT) else 3)
            trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
        return state_of(last)

    run.saved = lambda folder: state_of(tmp_path / folder / "checkpoints" / "last.ckpt")
    return run


def sft(vlm):
    vlm.lora = type(vlm.lora)(**{**vars(vlm.lora), "dropout": 0.2})
    return WatchedSFT(vlm, optim=OptimOptions(adamw, "cosine", warmup=0.2))


def grpo(vlm):
    return small_grpo.make(
        vlm,
        WatchedGRPO,
        rewards=[EvenLength()],
        group_size=3,
        inner_epochs=2,
        minibatches=2,
        kl_coef=0.1,
        resample=1,
        optimizer=adamw,
        warmup=10,
    )


def check(whole, ended):
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(whole[key], ended[key]), key
    assert same(whole["vidreason"]["progress"], ended["vidreason"]["progress"])


def points(entries, kinds):
    """The middle entry of each kind."""
    places = {kind: [i for i, entry in enumerate(entries) if entry[0] == kind] for kind in kinds}
    return [found[len(found) // 2] for found in places.values()]


STOPS = [(sft, ("train", "val")), (grpo, ("rollout", "update", "val"))]
CUTS = [(sft, ("train", "val")), (grpo, ("update",))]


def cut_off(fit, make, whole, entries, at):
    book, resumed = Logbook(at, cut), Logbook()
    with pytest.raises(Cut):
        fit(f"cut{at}", make, book)
    ended = fit(f"cut{at}", make, resumed)
    check(whole, ended)
    done = len(entries) - len(resumed.entries)
    assert done <= at
    assert book.entries == entries[:at]
    assert resumed.entries == entries[done:]


def stop(fit, make, whole, entries, at, number):
    book, resumed = Logbook(at, lambda: os.kill(os.getpid(), number)), Logbook()
    with contextlib.suppress(SystemExit):
        fit(f"stopped{at}", make, book)
    if entries[at][0] == "update":  # The four on a rollout batch are finished first.
        saved, batches = fit.saved(f"stopped{at}"), entries[at][1] // 4 + 1
        assert (saved["global_step"], saved["vidreason"]["progress"]["batches"]) == (4 * batches, batches)
    ended = fit(f"stopped{at}", make, resumed)
    check(whole, ended)
    redone = len(book.entries) + len(resumed.entries) - len(entries)
    limit = {"train": 0, "update": 0, "rollout": 4, "val": 2}[entries[at][0]]  # what was half done is done again
    assert redone <= limit, (entries[at], book.entries, resumed.entries)
    assert resumed.entries == entries[len(entries) - len(resumed.entries) :]


@pytest.mark.parametrize(("make", "kinds"), sample(CUTS, CUTS[0]))
def test_a_fit_that_is_cut_off_ends_as_one_that_is_not(fit, make, kinds, monkeypatch):
    """No handler runs: what is there is what was written in time."""
    book = Logbook()
    whole = fit("whole", make, book)
    assert any(".reference." in name for name in whole["state_dict"]) == (make is grpo)
    monkeypatch.setattr(RunCheckpoint, "on_exception", lambda *_: None)
    for at in points(book.entries, kinds):
        cut_off(fit, make, whole, book.entries, at)


@pytest.mark.parametrize(("make", "kinds"), sample(STOPS, STOPS[0]))
def test_sigterm_stops_a_fit_where_it_can_go_on(fit, make, kinds):
    """In a rollout, after the updates on it, in a validation and between batches; little is done twice."""
    book = Logbook()
    whole = fit("whole", make, book)
    for at in points(book.entries, kinds):
        stop(fit, make, whole, book.entries, at, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, grpo])
def test_any_moment_will_do(fit, make, monkeypatch):
    book = Logbook()
    whole = fit("whole", make, book)
    for at in range(len(book.entries)):
        if at > 0:
            stop(fit, make, whole, book.entries, at, signal.SIGINT if at % 2 else signal.SIGTERM)
        with monkeypatch.context() as patched:
            patched.setattr(RunCheckpoint, "on_exception", lambda *_: None)
            cut_off(fit, make, whole, book.entries, at)
