"""Optimizer steps of every stage: how a batch is cut does not matter, and options without effect are refused."""

from functools import partial

import pytest
import torch
from covering import covering, sample
from lightning.pytorch.plugins.precision import MixedPrecision
from small_grpo import make
from stage_world import SHORT, LostClips, parameters

from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.functional.aggregation import LOSS_TYPES
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.testing.samples import relative_gap

LOST = ("train_4",)


def sgd(trained):
    return torch.optim.SGD(trained, lr=0.1)


def supervised(kind, vlm, cut):
    updates, optim = UpdateOptions(cut, max_grad_norm=0), OptimOptions(optimizer=sgd)
    own = TraceOptions(samples=2, sampling=SHORT, filter=RationaleFilter(complete=False, min_words=0))
    return RationaleSFTModule(vlm, TargetOptions(kind=kind), updates=updates, optim=optim, traces=own)


def calibration(objective, vlm, cut):
    updates, optim = UpdateOptions(cut, max_grad_norm=0), OptimOptions(optimizer=sgd)
    own = TraceOptions(kind="reason", samples=2, sampling=SHORT)
    return CalibrationModule(vlm, objective=objective, updates=updates, optim=optim, traces=own)


def grpo(loss_type, vlm, cut):
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "max_grad_norm": 0, "optimizer": sgd}
    return make(vlm, loss_type=loss_type, clips_per_forward=cut, **options)


STAGES = {
    "sft_label": partial(supervised, "label"),
    "sft_trace": partial(supervised, "trace"),
    "calibration_tokens": partial(calibration, "tokens"),
    "calibration_classes": partial(calibration, "classes"),
}
POLICIES = {f"grpo_{name}": partial(grpo, name) for name in LOSS_TYPES if name != "bnpo"}


@pytest.fixture
def learnt(make_vlm, make_trainer, clip_folder):
    """``learnt(stage, cut, lost)``: losses and gradients of two steps of three clips, and the weights after them."""

    def run(stage, cut, lost):
        module = {**STAGES, **POLICIES}[stage](make_vlm(), cut)
        gradients, losses = [], []
        module.on_before_optimizer_step = lambda _: gradients.append(
            {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        )
        trainer = make_trainer(f"{stage}{cut}", max_steps=2, limit_val_batches=0)
        module.on_train_batch_end = lambda *_: losses.append(float(trainer.callback_metrics["train/loss"]))
        trainer.fit(module, LostClips(clip_folder, lost, encoder=module.vlm, batch_size=3))
        return losses, gradients, parameters(module)

    return run


@pytest.mark.filterwarnings("ignore:.*the clip cannot be read", "ignore:.*could not be read")
@pytest.mark.parametrize(
    ("stage", "lost"),
    [*covering(list(STAGES), [(), LOST]), *sample([(name, LOST) for name in POLICIES], ("grpo_dr_grpo", LOST))],
)
@pytest.mark.parametrize("cut", sample([1, 2], 2))
def test_the_cut_of_a_batch_changes_neither_loss_nor_gradient_nor_weights(learnt, stage, lost, cut):
    """``rl/test_ranks.py`` does so for policies whose clips can all be read."""
    losses, gradients, weights = learnt(stage, None, lost)
    assert len(losses) == len(gradients) == 2
    cut_losses, cut_gradients, cut_weights = learnt(stage, cut, lost)
    # A policy loss is a sum of positive and negative terms of about 1, which may almost cancel.
    assert cut_losses == pytest.approx(losses, rel=1e-6, abs=1e-6)
    for got, wanted in zip(cut_gradients, gradients, strict=True):
        assert relative_gap(got, wanted) < 1e-6
    assert relative_gap(cut_weights, weights) < 1e-6


def test_only_the_clips_of_a_cut_go_through_the_model_at_once(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    sizes, score = [], vlm.score

    def counted(model, prompts, texts, *args, **kwargs):
        sizes.append(prompts.batch_size)
        return score(model, prompts, texts, *args, **kwargs)

    vlm.score = counted
    module = RationaleSFTModule(vlm, updates=UpdateOptions(clips_per_forward=2))
    make_trainer(max_steps=1, limit_val_batches=0).fit(module, make_data(vlm, batch_size=5))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"trainer\.gradient_clip_val .*model\.init_args\.updates\.max_grad_norm"),
        ({"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches .*model\.init_args\.batch_size"),
        ({"accumulate_grad_batches": 2}, r"model\.init_args\.updates\.clips_per_forward"),
        ({"plugins": "16-mixed"}, r"trainer\.precision is 16-mixed.*bf16-mixed"),
    ],
    ids=["clipping", "accumulation", "accumulation_memory", "loss_scaling"],
)
@pytest.mark.parametrize("stage", ["sft_label", "calibration_tokens", "grpo_dapo"])
def test_trainer_options_without_effect_are_refused(make_vlm, make_data, make_trainer, stage, options, message):
    if "plugins" in options:  # The trainer would choose bf16 on a CPU.
        options = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    module = {**STAGES, **POLICIES}[stage](make_vlm(), None)
    trainer = make_trainer(max_steps=1, **options)
    with pytest.raises(ValueError, match=message) as refused:
        trainer.fit(module, make_data(module.vlm))
    assert "\n" not in str(refused.value)
    assert module.stage_name in str(refused.value)
    assert module.model is None, "it is refused before weights are loaded"


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_precision_that_converts_weights_is_one_line(make_vlm, make_data, make_trainer, precision, run):
    module = VLMModule(make_vlm()) if run == "test" else RationaleSFTModule(make_vlm())
    trainer = make_trainer(max_steps=1, precision=precision)
    with pytest.raises(ValueError, match=rf"trainer\.precision is {precision}.*set vlm.init_args.dtype") as refused:
        getattr(trainer, run)(module, make_data(module.vlm))
    assert "\n" not in str(refused.value)
    assert module.model is None, "it is refused before weights are loaded"


@pytest.mark.parametrize("stage", ["sft_trace", "calibration_tokens", "grpo_dapo"])
def test_every_stage_trains_and_evaluates_in_bf16_mixed(make_vlm, make_data, make_trainer, stage):
    module = {**STAGES, **POLICIES}[stage](make_vlm(), 2)
    dtypes = []
    trainer = make_trainer(max_steps=2, limit_val_batches=1, precision="bf16-mixed", val_check_interval=1)
    module.on_fit_start = lambda: module.policy.get_output_embeddings().register_forward_hook(
        lambda _, args, out: dtypes.append(out.dtype)
    )
    trainer.fit(module, make_data(module.vlm))
    assert torch.bfloat16 in dtypes, "computed in bfloat16"
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert torch.isfinite(trainer.callback_metrics["val/acc"])


class ReturnsItsLoss(VLMModule):
    """A stage that returns its loss, so that Lightning runs the backward pass and the optimizer step."""

    def training_step(self, batch, batch_idx):
        return self.vlm.score(self.policy, batch.prompts, batch.texts).logprobs.sum()


def test_updates_of_a_stage_that_lightning_optimises_are_refused(make_vlm, make_data, make_trainer):
    module = ReturnsItsLoss(make_vlm(), updates=UpdateOptions(clips_per_forward=1))
    with pytest.raises(ValueError, match=r"updates has no effect in stage ReturnsItsLoss.*accumulate_grad_batches"):
        make_trainer(max_steps=1).fit(module, make_data(module.vlm))
