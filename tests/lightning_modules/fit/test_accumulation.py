"""A user's stage that returns its loss to Lightning, with one optimizer step on three batches of two clips."""

import signal
import warnings

import pytest
import torch
from covering import sample
from stage_world import LostClips, parameters

from vidreason.lightning_internals import forward_sigterm
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.weights.parameters import trainable
from vidreason.signals import handle_signals

LEARNING_RATE = 0.1


class AutomaticStage(VLMModule):
    """Returns its loss and stores, for every batch, its clips and the gradient of its loss."""

    supports_masked_samples = True

    def __init__(self, vlm, signal_at=None):
        super().__init__(vlm, optim=OptimOptions(lambda trained: torch.optim.SGD(trained, lr=LEARNING_RATE)))
        self.signal_at = signal_at
        self.batches = []
        self.gradients = []

    def training_step(self, batch, batch_idx):
        texts = batch.valid_texts
        scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
        loss = -(scores.logprobs * texts.loss_mask).sum()
        self.gradients.append(torch.autograd.grad(loss, list(trainable(self)), retain_graph=True))
        self.batches.append(batch.video_ids)
        if len(self.batches) - 1 == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        return loss


@pytest.fixture
def fit(make_vlm, make_trainer, clip_folder):
    """``fit(lost=(), epochs=1, **arguments)``: the stage after a fit without the clips ``lost``."""

    def run(lost=(), epochs=1, signal_at=None, checkpoint=None, **kwargs):
        module = AutomaticStage(make_vlm(), signal_at)
        data = LostClips(clip_folder, lost, encoder=module.vlm, batch_size=2)
        kwargs = {"max_epochs": epochs, "limit_val_batches": 0, "accumulate_grad_batches": 3, **kwargs}
        trainer = make_trainer(**kwargs)
        forward_sigterm(trainer)  # As the command line does; Lightning's own handler would stop within a step.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cannot be read|.*could not be read")
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module

    return run


@pytest.mark.parametrize("unreadable", [0, 2], ids=["first_batch", "last_batch"])
def test_unreadable_batches_leave_the_gradient_of_the_others(fit, make_vlm, unreadable):
    lost = fit().batches[unreadable]
    module = fit(lost)
    assert not any(gradient.any() for gradient in module.gradients[unreadable])
    torch.manual_seed(0)
    start = AutomaticStage(make_vlm())
    start.model = start.build_model()
    moved = False
    for parameter, before, *each in zip(trainable(module), trainable(start), *module.gradients, strict=True):
        expected = before - LEARNING_RATE * sum(each) / 3
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
        moved |= bool((parameter != before).any())
    assert moved


def test_a_step_without_a_readable_clip_changes_no_weight(fit, make_vlm):
    everything = [clip for batch in fit().batches for clip in batch]
    half = [clip for batch in fit().batches[:1] for clip in batch]
    assert len(everything) == 6
    stopped = fit(half, accumulate_grad_batches=1, max_steps=1)
    torch.manual_seed(0)
    start = AutomaticStage(make_vlm())
    start.model = start.build_model()
    for name, value in parameters(stopped).items():
        assert torch.equal(value, parameters(start)[name])


@pytest.mark.parametrize("signal_at", sample([3, 4, 5], 4))
def test_a_signal_stops_the_fit_between_two_steps(fit, tmp_path, signal_at):
    """After a signal no clip is read any more, so that a step whose clips are not all there yet is repeated."""

    def callbacks(name):
        return [StopOnSignal(), RunCheckpoint(CheckpointOptions(1), dirpath=str(tmp_path / name))]

    whole = fit(epochs=3, callbacks=callbacks("whole"))
    with handle_signals(), pytest.raises(SystemExit):
        fit(epochs=3, signal_at=signal_at, callbacks=callbacks("cut"))
    path = tmp_path / "cut" / "last.ckpt"
    done = 6 if signal_at == 5 else 3
    assert torch.load(path, weights_only=True)["vidreason"]["progress"]["batches"] == done
    resumed = fit(epochs=3, checkpoint=path, callbacks=callbacks("cut"))
    assert resumed.batches == whole.batches[done:]
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name])
