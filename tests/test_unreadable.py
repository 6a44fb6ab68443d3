"""Training clips that cannot be read: nothing is learnt from them, nothing else changes, and nothing is hidden."""

import math
import warnings
from functools import partial

import pytest
import small_grpo
import strategy_ranks as ranks
import torch
from covering import sample
from safetensors.torch import load_file

from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.functional.aggregation import LOSS_TYPES
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.testing.samples import relative_gap

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
    """Returns what is learnt with a clip that cannot be read, and where it was never there."""
    with pytest.warns(UserWarning, match=r"train_4\.mp4: gone"):
        lost = run(clips_of=partial(world.LostClips, lost=LOST))
    return lost, run(clips_of=partial(world.FewerClips, gone=LOST))


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft_label", {}),
        ("sft_trace", {}),
        pytest.param("sft_trace", {"targets": TargetOptions("trace", answer_weight=None)}, marks=pytest.mark.slow),
        pytest.param("calibration", {}, marks=pytest.mark.slow),
        pytest.param("calibration", {"objective": "classes"}, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("case", sample(list(GRPO), "bnpo"))
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


@pytest.mark.parametrize("loss_type", sample(LOSS_TYPES, "bnpo"))
def test_a_minibatch_of_nothing_else_changes_nothing(small_base, clip_folder, tmp_path, monkeypatch, loss_type):
    """Whatever its terms are divided by."""
    monkeypatch.setitem(grpo.CASES, "alone", {"loss_type": loss_type, "minibatches": 6})
    found = grpo.run("alone", small_base, clip_folder, tmp_path, 1, clips_of=partial(world.LostClips, lost=LOST))
    assert all(map(math.isfinite, found["norms"]))
    assert sum(norm == 0 for norm in found["norms"]) >= 2, "one of six in each of two epochs"
    assert max(found["norms"]) > 0
    for logged in found["logged"]:
        assert all(math.isfinite(value) for name, value in logged.items() if name.startswith("train/")), loss_type


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


@pytest.mark.parametrize("lost", [LOST, pytest.param((), marks=pytest.mark.slow)])
def test_a_cache_never_takes_black_frames_for_the_clip(make_vlm, make_trainer, clip_folder, tmp_path, lost):
    """A clip that one fit could not read counts in the next fit, which can read it."""
    weights = {}
    for name, folder in (("cached", str(tmp_path / "cache")), ("plain", None)):
        for now in (lost, ()):
            vlm = make_vlm()
            vlm.vision_cache_options = None if folder is None else VisionCacheOptions(folder=folder)
            module = RationaleSFTModule(vlm, optim=SGD)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = make_trainer(name, max_epochs=1, limit_val_batches=0)
                trainer.fit(module, world.LostClips(clip_folder, now, encoder=vlm, batch_size=3))
            weights[name] = world.parameters(module)
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["cached"][name], value, rtol=1e-5, atol=1e-7)
    kept = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(kept) == 3 + len(lost)  # greys, and black
