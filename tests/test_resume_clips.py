"""A fit goes on with the training clips that it was cut off with; others are refused or named."""

from dataclasses import replace

import pytest
import stage_world as world
import torch

from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions

small_base, clip_folder, make_vlm = world.small_base, world.clip_folder, world.make_vlm
make_trainer, adamw = world.make_trainer, world.adamw

EVERY = CheckpointOptions(every_n_batches=1)
OWN = TraceOptions("reason", samples=2, sampling=world.SHORT)


class Cut(BaseException):
    """Stands for a kill: nothing may be written any more."""


def cut():
    raise Cut


class Listed(world.GreyClips):
    """Training clips by number."""

    def __init__(self, folder, numbers, **kwargs):
        super().__init__(folder, **kwargs)
        self.numbers = numbers

    def samples(self, split):
        clips = super().samples(split)
        if split != "train":
            return clips
        others = [replace(clip, video_id=f"late_{i}", group=f"late_{i}") for i, clip in enumerate(clips)]
        return [(*clips, *others)[number] for number in self.numbers]


def test_a_clip_that_was_mended_is_not_learnt_from_half_way(make_vlm, make_trainer, clip_folder, tmp_path, monkeypatch):
    """It had no trace, and so no place in the order; written about now, it would shift all others."""
    monkeypatch.setattr(RunCheckpoint, "on_exception", lambda *_: None)

    def fit(broken, cut_at=None, **kwargs):
        module = CalibrationModule(make_vlm(), optim=OptimOptions(adamw), traces=OWN)
        saving = RunCheckpoint(EVERY, dirpath=str(tmp_path / "saved"))
        trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[saving])
        if cut_at is not None:
            module.on_train_batch_end = lambda *_: trainer.global_step == cut_at and cut()
        trainer.fit(module, world.GreyClips(clip_folder, broken, encoder=module.vlm, batch_size=1), **kwargs)
        return trainer.global_step

    with pytest.raises(Cut):
        fit(("train_1",), cut_at=3)
    last = {"ckpt_path": tmp_path / "saved" / "last.ckpt", "weights_only": True}
    with pytest.raises(ValueError, match="when 5 training clips had something to learn, now 6 have"):
        fit((), **last)


@pytest.fixture
def resumed_over(make_vlm, make_trainer, clip_folder, tmp_path):
    """``resumed_over(batches, numbers)``: six clips in twos, cut after some batches, gone on with other clips."""

    def fit(numbers, **kwargs):
        module = RationaleSFTModule(make_vlm(), optim=OptimOptions(adamw))
        saving = RunCheckpoint(EVERY, dirpath=str(tmp_path / "saved"))
        trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[saving])
        if not kwargs:
            module.on_train_batch_start = lambda batch, _: trainer.global_step == fit.until and cut()
        trainer.fit(module, Listed(clip_folder, numbers, encoder=module.vlm, batch_size=2), **kwargs)
        return trainer

    def run(batches, numbers, **written):
        fit.until = batches
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RunCheckpoint, "on_exception", lambda *_: None)
            with pytest.raises(Cut):
                fit(range(6))
        last = tmp_path / "saved" / "last.ckpt"
        if written:
            saved = torch.load(last, weights_only=True)
            torch.save({**saved, **written}, last)
        return fit(numbers, ckpt_path=last, weights_only=True).global_step

    return run


@pytest.mark.parametrize(
    ("numbers", "now"),
    [
        ((0, 1, 2, 3, 5), "hold 5:"),
        pytest.param((0, 1, 2, 3, 4, 5, 6), "hold 7:", marks=pytest.mark.slow),
        pytest.param((0, 1, 2, 3, 4, 6), "hold 6, others or in another order:", marks=pytest.mark.slow),
        ((1, 0, 2, 3, 4, 5), "hold 6, others or in another order:"),
    ],
)
def test_within_an_epoch_the_training_clips_stay_the_same(resumed_over, numbers, now):
    with pytest.raises(
        ValueError, match=f"written with 6 training clips, but the data now {now} .*without --ckpt_path"
    ):
        resumed_over(4, numbers)


def test_between_epochs_clips_may_give_way_to_as_many_others(resumed_over):
    with pytest.warns(UserWarning, match="the training clips are others"):
        assert resumed_over(3, (0, 1, 2, 3, 4, 6)) == 6


def test_between_epochs_their_number_stays_the_same(resumed_over):
    with pytest.raises(ValueError, match="now hold 4: .*put them back"):
        resumed_over(3, (0, 1, 2, 3))


def test_the_same_clips_go_on(resumed_over):
    assert resumed_over(4, range(6)) == 6


def test_a_fit_refuses_an_older_checkpoint(resumed_over):
    older = {"vidreason": {"progress": {"batches": 4}}, "vidreason_stage": "sft_label"}
    with pytest.raises(ValueError, match="by an older version of vidreason, not in format 2: start the stage again"):
        resumed_over(4, range(6), **older)
