"""Training clips that cannot be read: nothing is learnt from them, nothing else changes, and nothing is hidden."""

import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import small_grpo
import strategy_ranks as ranks
import torch
from comparing import relative_gap
from safetensors.torch import load_file

from vidreason.callbacks.throughput import Throughput
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable, TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.signals import StopRequested

world, grpo = ranks.world, ranks.grpo
small_base, clip_folder, make_vlm, make_trainer = (
    world.small_base,
    world.clip_folder,
    world.make_vlm,
    world.make_trainer,
)

LOST = ("train_4",)
SGD = OptimOptions(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
GRPO = {
    "grpo": {"loss_type": "grpo", "kl_coef": 0.1, "entropy_coef": 0.01},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo", "prompts_per_forward": 1},
    "batch": {"advantage_scale": "batch"},
    "resampled": {"resample": 1},
    "twice": {"inner_epochs": 2},
}


def learnt_alike(lost, fewer):
    assert lost["steps"] == fewer["steps"]
    for got, wanted in zip(lost["gradients"], fewer["gradients"], strict=True):
        assert relative_gap(got, wanted) < 1e-6
    assert relative_gap(lost["weights"], fewer["weights"]) < 1e-6


def both(run):
    """What is learnt with a clip that cannot be read, and where it was never there."""
    with pytest.warns(UserWarning, match=r"train_4\.mp4: gone"):
        lost = run(clips_of=partial(world.LostClips, lost=LOST))
    return lost, run(clips_of=partial(world.FewerClips, gone=LOST))


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft_label", {}),
        ("sft_trace", {}),
        ("sft_trace", {"targets": TargetOptions("trace", answer_weight=None)}),
        ("calibration", {}),
        ("calibration", {"objective": "classes"}),
    ],
)
def test_a_batch_teaches_what_its_readable_clips_teach(small_base, clip_folder, tmp_path, stage, options):
    def run(clips_of):
        out = tmp_path / clips_of.func.__name__
        return ranks.run(stage, "ddp", small_base, clip_folder, out, 1, clips_of=clips_of, test=False, **options)

    lost, fewer = both(run)
    learnt_alike(lost, fewer)
    for name, value in fewer["metrics"].items():
        assert lost["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert lost["losses"] == pytest.approx(fewer["losses"], rel=1e-5)


@pytest.mark.parametrize("case", GRPO)
def test_no_group_is_learnt_from_or_counted_in_its_place(small_base, clip_folder, tmp_path, monkeypatch, case):
    monkeypatch.setitem(grpo.CASES, "dead_case", GRPO[case])
    dead = ("train_0", "train_1") if case == "resampled" else ()

    def run(clips_of):
        return grpo.run("dead_case", small_base, clip_folder, tmp_path, 1, dead, clips_of=clips_of)

    lost, fewer = both(run)
    learnt_alike(lost, fewer)
    assert {name: texts for name, texts in lost["seen"].items() if name not in LOST} == fewer["seen"]
    for got, wanted in zip(lost["logged"], fewer["logged"], strict=True):
        for name, value in wanted.items():
            if name.startswith(("train/", "rollout_mismatch/")):
                assert got[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


def test_a_minibatch_of_nothing_else_changes_nothing(small_base, clip_folder, tmp_path, monkeypatch):
    """Whatever its terms are divided by."""
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"):
        monkeypatch.setitem(grpo.CASES, "alone", {"loss_type": loss_type, "minibatches": 6})
        found = grpo.run("alone", small_base, clip_folder, tmp_path, 1, clips_of=partial(world.LostClips, lost=LOST))
        assert all(map(math.isfinite, found["norms"]))
        assert sum(norm == 0 for norm in found["norms"]) >= 2, "one of six in each of two epochs"
        assert max(found["norms"]) > 0
        for logged in found["logged"]:
            assert all(math.isfinite(value) for name, value in logged.items() if name.startswith("train/")), loss_type


def label_stage(make_vlm, **options):
    return RationaleSFTModule(make_vlm(), optim=SGD, updates=UpdateOptions(max_grad_norm=0), **options)


def fit(module, trainer, folder, lost, batch_size=2, ckpt=None, **kwargs):
    data = world.LostClips(folder, lost, encoder=module.vlm, batch_size=batch_size, **kwargs)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def said(caught):
    return [str(one.message) for one in caught if "train_" in str(one.message)]


def test_every_clip_is_named_and_counted(make_vlm, make_trainer, clip_folder):
    trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[Throughput()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(label_stage(make_vlm), trainer, clip_folder, ("train_1", "train_4"), 3)
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
    class ValLost(world.LostClips):
        def dataset(self, clips, view, train):
            self.lost = ("train_1",) if train else ("val_0",)
            return super().dataset(clips, view, True) if train else world.GreyClips.dataset(self, clips, view, False)

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
    trainer = fit(whole, make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, (), 2)
    second = trainer.train_dataloader
    first_two = [clip for batch in second for clip in batch.video_ids][:2]
    trainer = fit(module, make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, first_two, 2)
    assert trainer.global_step == 3


def test_a_stage_that_does_not_mask_samples_is_not_fed_black_frames(make_vlm, make_trainer, clip_folder):
    class Own(RationaleSFTModule):
        supports_masked_samples = False

    with pytest.raises(DecodeError, match=r"training clips cannot be read: train_4.mp4: gone: .*masked samples"):
        fit(Own(make_vlm()), make_trainer(max_epochs=1, limit_val_batches=0), clip_folder, LOST, 6)
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
        fit(Stopped(make_vlm()), make_trainer(max_epochs=2, callbacks=saving()), clip_folder, LOST)
    with pytest.warns(UserWarning, match=r"1 training clip could not .*failed reads: 2.*train_4"):
        fit(
            RationaleSFTModule(make_vlm()),
            make_trainer(max_epochs=2, callbacks=saving()),
            clip_folder,
            LOST,
            ckpt=tmp_path / "saved" / "last.ckpt",
        )


ALL = tuple(f"train_{i}" for i in range(6))


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_disk_that_is_gone_ends_the_fit_where_it_can_go_on(make_vlm, make_trainer, clip_folder, tmp_path, batch_size):
    """From the first batch of the second epoch on nothing can be read; mended, the fit ends as one that was not cut."""

    def saving(name):
        return [RunCheckpoint(CheckpointOptions(99), dirpath=str(tmp_path / name))]

    def trained(name):
        trainer = make_trainer(name, max_epochs=2, limit_val_batches=0, callbacks=saving(name))
        return trainer, label_stage(make_vlm)

    trainer, whole = trained("whole")
    fit(whole, trainer, clip_folder, (), batch_size)
    trainer, cut = trained("cut")
    data = world.LostClips(clip_folder, (), encoder=cut.vlm, batch_size=batch_size)
    per_epoch, finished = 6 // batch_size, 3 // batch_size  # More than half of six clips may not be lost.
    cut.on_train_epoch_end = lambda: setattr(trainer.train_dataloader.dataset, "lost", ALL)
    number = (finished + 1) * batch_size
    with pytest.raises(TooManyUnreadableError, match=rf"^{number} of 6 training clips .*train_\d\.mp4: gone.*resume"):
        trainer.fit(cut, data)
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert saved["vidreason"]["progress"]["batches"] == per_epoch + finished
    trainer, again = trained("cut")
    with warnings.catch_warnings(record=True) as caught:
        fit(again, trainer, clip_folder, (), batch_size, ckpt=tmp_path / "cut" / "last.ckpt")
    assert len(said(caught)) == bool(finished), "what was not trained on has not lost its weight"
    if not finished:
        for name, value in world.parameters(whole).items():
            assert torch.equal(value, world.parameters(again)[name])


def test_what_cannot_be_read_is_named_up_to_a_number(make_vlm, make_trainer, clip_folder):
    named = r"train_\d.mp4: gone; .*gone; .*gone; and 3 more: repair"
    with pytest.raises(TooManyUnreadableError, match=f"6 of 6 training clips cannot be read: {named}"):
        fit(label_stage(make_vlm), make_trainer(max_epochs=1), clip_folder, ALL, 6)


def test_a_callback_of_the_trainer_replaces_the_one_of_the_stage(make_vlm, make_trainer, clip_folder):
    """Half of the clips may be unreadable unless the YAML says otherwise."""
    three = ("train_0", "train_2", "train_4")
    module, own = label_stage(make_vlm), SkipUnreadable(max_fraction=0.4)
    trainer = make_trainer("own", max_epochs=1, limit_val_batches=0, callbacks=[own])
    with pytest.raises(TooManyUnreadableError, match="3 of 6 training clips"):
        fit(module, trainer, clip_folder, three, 6)
    assert [callback for callback in trainer.callbacks if isinstance(callback, SkipUnreadable)] == [own]
    trainer = make_trainer("default", max_epochs=1, limit_val_batches=0)
    assert fit(label_stage(make_vlm), trainer, clip_folder, three, 6).global_step == 1
    trainer = make_trainer("all", max_epochs=1, limit_val_batches=0, callbacks=[SkipUnreadable(max_fraction=1)])
    assert fit(label_stage(make_vlm), trainer, clip_folder, ALL, 6).global_step == 1
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"SkipUnreadable.max_fraction must be between 0 and 1, got {wrong}"):
            SkipUnreadable(wrong)


@pytest.mark.parametrize("stage", ["sft_label", "calibration", "grpo"])
def test_a_last_batch_of_one_damaged_clip_is_a_step_on_nothing(make_vlm, make_trainer, clip_folder, tmp_path, stage):
    """It says nothing about the disk; and nothing is divided by its 0 tokens, completions or questions."""
    vlm = make_vlm()
    if stage == "grpo":
        module = small_grpo.make(
            vlm,
            grpo.Watched,
            rewards=[grpo.EvenLetters()],
            group_size=2,
            loss_type="grpo",
            resample=1,
            cold_steps=3,
            optimizer=world.adamw,
        )
    elif stage == "calibration":
        module = CalibrationModule(vlm, optim=OptimOptions(world.adamw), traces=ranks.OWN, objective="classes")
    else:
        module = RationaleSFTModule(vlm, optim=OptimOptions(world.adamw))
    weights, losses = [], []

    def note(*_):
        weights.append(world.parameters(module))
        losses.append(float(trainer.callback_metrics["train/loss"]))

    module.on_train_batch_end = note

    class FiveLost(world.LostClips):
        def samples(self, split):
            clips = super().samples(split)
            return clips[:5] if split == "train" else clips

    data = FiveLost(clip_folder, (), encoder=vlm, batch_size=4)
    data.setup("fit")
    data.connect(train_view=module_view(data))
    last = [clip for batch in data.train_dataloader() for clip in batch.video_ids][-1]
    data.lost = (last,)
    trainer = make_trainer(max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match=f"{last}.mp4: gone"):
        trainer.fit(module, data)
    assert trainer.global_step == 2
    assert losses[0] == float(trainer.callback_metrics["train/loss"]), "a step on nothing has no loss"
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    if stage == "grpo":
        assert module.counters.steps == 1, "nor is a policy colder for it"


def module_view(data):
    from vidreason.datamodules.prompts import LabelView

    return LabelView(data.task)


@pytest.mark.parametrize("lost", [LOST, ()])
def test_a_cache_never_takes_black_frames_for_the_clip(make_vlm, make_trainer, clip_folder, tmp_path, lost):
    """What one fit has kept of a clip that it could not read does not change the next fit, which can."""
    weights = {}
    for name, folder in (("cached", str(tmp_path / "cache")), ("plain", None)):
        for now in (lost, ()):
            vlm = make_vlm()
            vlm.vision_cache_options = None if folder is None else VisionCacheOptions(folder=folder)
            module = RationaleSFTModule(vlm, optim=SGD)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit(module, make_trainer(name, max_epochs=1, limit_val_batches=0), clip_folder, now, 3)
            weights[name] = world.parameters(module)
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["cached"][name], value, rtol=1e-5, atol=1e-7)
    kept = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(kept) == 3 + len(lost)  # greys, and black
