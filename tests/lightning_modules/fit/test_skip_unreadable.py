"""The callback that skips unreadable clips: it names and counts them, and ends a fit that has lost too many.

It is one of the trainer's, and the trainer's own choice of it comes first.
"""

import warnings
from pathlib import Path

import pytest
import torch
from covering import sample
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from stage_world import GreyClips, LostClips, parameters

from vidreason.callbacks.throughput import Throughput
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.resume import ResumeFit
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable, TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.signals import StopRequested

LOST = ("train_1", "train_4")
ONE = ("train_4",)
ALL = tuple(f"train_{i}" for i in range(6))


def from_yaml(max_fraction: float) -> Callback:
    """The callbacks that a YAML file names under ``trainer.callbacks``."""
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    named = {"class_path": f"{SkipUnreadable.__module__}.SkipUnreadable", "init_args": {"max_fraction": max_fraction}}
    callback: Callback = parser.instantiate_classes(parser.parse_object({"callback": named})).callback
    return callback


@pytest.fixture
def fit(make_vlm, make_trainer, clip_folder):
    """``fit(*callbacks)``: the trainer after an epoch in which two of six clips cannot be read."""

    def run(*callbacks):
        module = RationaleSFTModule(make_vlm())
        trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=list(callbacks))
        trainer.fit(module, LostClips(clip_folder, LOST, encoder=module.vlm, batch_size=3))
        return trainer

    return run


@pytest.mark.filterwarnings("ignore:.*the clip cannot be read", "ignore:.*could not be read")
def test_the_one_in_the_yaml_replaces_the_stages_own(fit):
    trainer = fit()
    (own,) = (callback for callback in trainer.callbacks if isinstance(callback, SkipUnreadable))
    assert own.max_fraction == 0.5
    strict = from_yaml(max_fraction=0.2)
    with pytest.raises(TooManyUnreadableError, match="2 of 6 training clips cannot be read: .*gone"):
        fit(strict)
    lenient = from_yaml(max_fraction=1.0)
    trainer = fit(lenient)
    assert [callback for callback in trainer.callbacks if isinstance(callback, SkipUnreadable)] == [lenient]
    assert sum(isinstance(callback, ResumeFit) for callback in trainer.callbacks) == 1


@pytest.mark.filterwarnings("ignore:.*the clip cannot be read", "ignore:.*could not be read")
def test_a_subclass_replaces_it_too(fit):
    class Mine(SkipUnreadable):
        pass

    mine = Mine(max_fraction=1.0)
    assert [callback for callback in fit(mine).callbacks if isinstance(callback, SkipUnreadable)] == [mine]


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match=r"SkipUnreadable\.max_fraction must be between 0 and 1"):
        SkipUnreadable(fraction)


def sgd(trained):
    return torch.optim.SGD(trained, lr=0.1)


def label_stage(make_vlm, **options):
    return RationaleSFTModule(make_vlm(), optim=OptimOptions(sgd), updates=UpdateOptions(max_grad_norm=0), **options)


def fit_without(module, trainer, folder, lost, batch_size=2, ckpt=None, **kwargs):
    data = LostClips(folder, lost, encoder=module.vlm, batch_size=batch_size, **kwargs)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def said(caught):
    return [str(one.message) for one in caught if "train_" in str(one.message)]


def test_every_clip_is_named_and_counted(make_vlm, make_trainer, clip_folder):
    trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[Throughput()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_without(label_stage(make_vlm), trainer, clip_folder, ("train_1", "train_4"), 3)
    *each, end = said(caught)
    assert len(each) == 2 * 2
    assert all("no weight in this step, the clip cannot be read (train_" in one for one in each)
    assert str(clip_folder / "1.mp4") in each[0]
    assert end == (
        "2 training clips could not be read and had no weight (failed reads: 4; unreadable.csv): train_1; train_4"
    )
    written = (Path(trainer.default_root_dir) / "unreadable.csv").read_text().split()
    assert written == ["video_id,failed_reads", "train_1,2", "train_4,2"]
    assert float(trainer.callback_metrics["data/decode_failures"]) == 2  # of the last epoch


def test_a_clip_is_named_each_time_and_validation_is_counted_apart(make_vlm, make_trainer, clip_folder):
    class ValLost(LostClips):
        def dataset(self, clips, view, train):
            self.lost = ("train_1",) if train else ("val_0",)
            return super().dataset(clips, view, True) if train else GreyClips.dataset(self, clips, view, False)

    trainer, module = make_trainer(max_epochs=3, callbacks=[Throughput()]), label_stage(make_vlm)
    data = ValLost(clip_folder, (), broken=("val_0",), encoder=module.vlm, batch_size=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python starts: a text is shown once
        trainer.fit(module, data)
    assert sum("no weight in this step" in one for one in said(caught)) == 3
    assert float(trainer.callback_metrics["data/decode_failures"]) == 1
    assert float(trainer.callback_metrics["val/decode_failures"]) == 1


def test_a_few_damaged_clips_in_one_small_batch_end_nothing(make_vlm, make_trainer, clip_folder):
    whole, module = label_stage(make_vlm), label_stage(make_vlm)
    trainer = fit_without(whole, make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, (), 2)
    second = trainer.train_dataloader
    first_two = [clip for batch in second for clip in batch.video_ids][:2]
    trainer = fit_without(module, make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, first_two, 2)
    assert trainer.global_step == 3


def test_a_stage_that_does_not_mask_samples_is_not_fed_black_frames(make_vlm, make_trainer, clip_folder):
    class Own(RationaleSFTModule):
        supports_masked_samples = False

    with pytest.raises(DecodeError, match=r"training clips cannot be read: train_4.mp4: gone: .*masked samples"):
        fit_without(Own(make_vlm()), make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, ONE, 6)
    assert not VLMModule.supports_masked_samples, "so is every stage that says nothing"


def test_what_was_said_before_a_kill_counts_at_the_end(make_vlm, make_trainer, clip_folder, tmp_path):
    class Stopped(RationaleSFTModule):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise StopRequested
            return super().training_step(batch, batch_idx)

    def saving():
        return [StopOnSignal(), RunCheckpoint(CheckpointOptions(1), dirpath=str(tmp_path / "saved"))]

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit_without(Stopped(make_vlm()), make_trainer(max_epochs=2, callbacks=saving()), clip_folder, ONE)
    with pytest.warns(UserWarning, match=r"1 training clip could not .*failed reads: 2.*train_4"):
        fit_without(
            RationaleSFTModule(make_vlm()),
            make_trainer(max_epochs=2, callbacks=saving()),
            clip_folder,
            ONE,
            ckpt=tmp_path / "saved" / "last.ckpt",
        )


@pytest.mark.parametrize("batch_size", sample([1, 2, 6], 2, 6))
def test_a_disk_that_is_gone_ends_the_fit_where_it_can_go_on(make_vlm, make_trainer, clip_folder, tmp_path, batch_size):
    """From the first batch of the second epoch on nothing can be read; mended, the fit ends as one that was not cut."""

    def saving(name):
        return [RunCheckpoint(CheckpointOptions(99), dirpath=str(tmp_path / name))]

    def trained(name):
        trainer = make_trainer(name, max_epochs=2, limit_val_batches=0, callbacks=saving(name))
        return trainer, label_stage(make_vlm)

    trainer, whole = trained("whole")
    fit_without(whole, trainer, clip_folder, (), batch_size)
    trainer, cut = trained("cut")
    data = LostClips(clip_folder, (), encoder=cut.vlm, batch_size=batch_size)
    per_epoch, finished = 6 // batch_size, 3 // batch_size  # More than half of six clips may not be lost.
    cut.on_train_epoch_end = lambda: setattr(trainer.train_dataloader.dataset, "lost", ALL)
    number = (finished + 1) * batch_size
    with pytest.raises(TooManyUnreadableError, match=rf"^{number} of 6 training clips .*train_\d\.mp4: gone.*resume"):
        trainer.fit(cut, data)
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert saved["vidreason"]["progress"]["batches"] == per_epoch + finished
    trainer, again = trained("cut")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_without(again, trainer, clip_folder, (), batch_size, ckpt=tmp_path / "cut" / "last.ckpt")
    assert len(said(caught)) == bool(finished), "what was not trained on has not lost its weight"
    if not finished:
        for name, value in parameters(whole).items():
            assert torch.equal(value, parameters(again)[name])


def test_what_cannot_be_read_is_named_up_to_a_number(make_vlm, make_trainer, clip_folder):
    named = r"train_\d.mp4: gone; .*gone; .*gone; and 3 more: repair"
    with pytest.raises(TooManyUnreadableError, match=f"6 of 6 training clips cannot be read: {named}"):
        fit_without(label_stage(make_vlm), make_trainer(max_epochs=1), clip_folder, ALL, 6)
