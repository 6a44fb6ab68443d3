"""Whatever goes through the model at once, an optimizer step learns the same: ``updates.clips_per_forward``."""

import math
from functools import partial

import pytest
import strategy_ranks as ranks
import torch
from comparing import relative_gap

from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions

world, grpo = ranks.world, ranks.grpo
small_base, clip_folder = world.small_base, world.clip_folder

LOST = partial(world.LostClips, lost=("train_4",))
"""One of the six clips of a step cannot be read"""
CUTS = (1, 2)
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read", "ignore:.*could not be read")


@pytest.fixture
def forwards(monkeypatch):
    """Grows with every forward pass that is learnt from."""
    made, score = [], ranks.TinyVLM.score

    def counted(self, *args, **kwargs):
        made.extend([1] * torch.is_grad_enabled())
        return score(self, *args, **kwargs)

    monkeypatch.setattr(ranks.TinyVLM, "score", counted)
    return made


def learnt_alike(cut, whole):
    assert cut["steps"] == whole["steps"] > 0
    for got, wanted in zip(cut["gradients"], whole["gradients"], strict=True):
        assert relative_gap(got, wanted) < 1e-6
    assert relative_gap(cut["weights"], whole["weights"]) < 1e-6


@pytest.mark.parametrize(
    ("stage", "options", "clips_of"),
    [
        ("sft_label", {}, world.GreyClips),
        ("sft_label", {}, LOST),
        ("sft_trace", {}, LOST),
        ("calibration", {"objective": "tokens"}, LOST),
        ("calibration", {"objective": "classes"}, LOST),
    ],
)
def test_a_supervised_step_is_the_same_for_any_cut(
    small_base, clip_folder, tmp_path, forwards, stage, options, clips_of
):
    def run(size):
        updates = UpdateOptions(clips_per_forward=size, max_grad_norm=1e3)
        # The run folder is the same, so the texts are written once.
        given = (stage, "ddp", small_base, clip_folder, tmp_path, 1)
        return ranks.run(*given, clips_of=clips_of, test=False, updates=updates, **options)

    whole = run(None)
    for size in (*CUTS, 4):
        forwards.clear()
        cut = run(size)
        assert len(forwards) == 2 * math.ceil(6 / size), "two epochs"
        learnt_alike(cut, whole)
        assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert cut["norms"] == pytest.approx(whole["norms"], rel=1e-6)


@pytest.mark.parametrize(
    ("case", "clips_of"),
    [
        ({"loss_type": "dapo"}, world.GreyClips),
        ({"loss_type": "dapo", **grpo.PENALTIES}, LOST),
        ({"loss_type": "grpo"}, LOST),
        ({"loss_type": "dr_grpo"}, LOST),
        ({"loss_type": "cispo"}, LOST),
        ({"loss_type": "gspo", "inner_epochs": 2}, LOST),
    ],
)
def test_a_policy_step_is_the_same_for_any_cut(
    small_base, clip_folder, tmp_path, forwards, monkeypatch, case, clips_of
):
    def run(size):
        monkeypatch.setitem(grpo.CASES, "cut", {**case, "prompts_per_forward": size})
        return grpo.run("cut", small_base, clip_folder, tmp_path, 1, clips_of=clips_of)

    whole = run(None)
    for size in CUTS:
        forwards.clear()
        cut = run(size)
        assert len(forwards) == 2 * case.get("inner_epochs", 1) * math.ceil(6 / size), "two epochs"
        assert cut["seen"] == whole["seen"]
        learnt_alike(cut, whole)
        for got, wanted in zip(cut["logged"], whole["logged"], strict=True):
            for name in ("train/loss", "train/grad_norm"):
                assert got[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-7), (name, size)
