"""A NaN or an infinity stops a run where it arises, and nothing of it is handed on."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from small_grpo import make
from stage_world import SHORT, run_dir

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.functional.finite import NonFiniteError
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.rl.sampler import RolloutOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.rewards.accuracy import AccuracyReward


def optim(rate):
    return OptimOptions(lambda parameters: torch.optim.AdamW(parameters, lr=rate))


class Poison(Callback):
    """Makes a number NaN in one optimizer step."""

    def __init__(self, what, step):
        self.what, self.step = what, step

    def on_before_backward(self, trainer, pl_module, loss):
        if self.what == "loss" and trainer.global_step == self.step:
            loss.data.fill_(math.nan)  # the backward pass does not read it, so that gradients stay finite

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradient" and trainer.global_step == self.step:
            next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = math.inf

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.parameter = next(p for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.what == "weight" and trainer.global_step == self.step + 1:
            next(p for p in pl_module.parameters() if p.requires_grad).data[0] = math.nan


WHERE = {"loss": "the loss is not", "gradient": "the gradient is not", "weight": "the trained weights are not"}


@pytest.mark.parametrize("what", WHERE)
def test_the_first_number_that_is_not_finite_stops_the_fit(make_vlm, make_data, make_trainer, what):
    module = RationaleSFTModule(make_vlm(), optim=optim(0.125))
    saving = RunCheckpoint(CheckpointOptions(every_n_batches=1))
    callbacks = [Poison(what, 2), AdapterCheckpoint(), saving]
    trainer = make_trainer(max_steps=5, limit_val_batches=0, callbacks=callbacks)
    with pytest.raises(NonFiniteError, match=WHERE[what]) as stopped:
        trainer.fit(module, make_data(module.vlm, batch_size=2))
    message = str(stopped.value)
    assert message.startswith("stage sft_label, optimizer step 3, learning rate 0.125: ")
    assert message.count("train_") == 2, "the two clips of the batch"
    assert "\n" not in message
    last = torch.load(saving.last_model_path, weights_only=True)
    assert last["global_step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in last["state_dict"].values())
    assert not (run_dir(module) / "adapter").exists()


@pytest.fixture
def broken_adapter(make_vlm, make_data, make_trainer):
    """An adapter with one NaN, as another program may have written it."""
    module = RationaleSFTModule(make_vlm(), optim=optim(0.01))
    trainer = make_trainer("a", max_steps=1, limit_val_batches=0, callbacks=[AdapterCheckpoint()])
    trainer.fit(module, make_data(module.vlm))
    file = run_dir(module) / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, file)
    return module, file.parent


def test_weights_that_are_not_finite_are_neither_accepted_nor_exported(broken_adapter, make_vlm, tmp_path):
    module, folder = broken_adapter
    with pytest.raises(NonFiniteError, match="1 of .* weights are not finite.*give the weights of an earlier step"):
        make_vlm().build(str(folder))
    next(p for p in module.parameters() if p.requires_grad).data[0] = math.nan
    before = (folder / "vidreason.json").read_bytes()
    with pytest.raises(NonFiniteError, match="no weights are written"):
        module.export(folder.parent)
    assert (folder / "vidreason.json").read_bytes() == before


def broken(module):
    """The module with a NaN among the weights it starts from."""
    build = module.build_model

    def made():
        model = build()
        next(p for p in model.parameters() if not p.requires_grad).data.fill_(math.nan)
        return model

    module.build_model = made
    return module


def test_what_cannot_be_scored_or_sampled_is_neither_a_prediction_nor_a_text(make_vlm, make_data, make_trainer):
    module = broken(RationaleSFTModule(make_vlm(), traces=TraceOptions(sampling=SHORT)))
    with pytest.raises(NonFiniteError, match="stage sft_label.*class log-probabilities are not finite, clips test_a_0"):
        make_trainer("t").test(module, make_data(module.vlm))
    with pytest.raises(NonFiniteError, match="stage sft_label.*sampled tokens are not finite, clips train_0"):
        make_trainer("p").predict(module, make_data(module.vlm))


def test_texts_of_weights_that_were_not_finite_are_refused(tmp_path):
    header = {
        "vidreason_traces": 1,
        "external": False,
        "base_sha": "",
        "adapter_sha": "",
        "prompt_sha": "",
        "task_sha": "",
    }
    record = {"video_id": "a", "sample": 0, "text": "x", "reasoning": None, "answer": None, "finish_reason": "stop"}
    lines = [header, {**record, "logprob_sum": math.nan, "n_tokens": 1}]
    path = Path(tmp_path, "traces.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"traces.jsonl, line 2: logprob_sum is nan"):
        TraceStore.open(path).records()


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("sampling.temperature", lambda: Sampling(temperature=math.nan)),
        ("updates.max_grad_norm", lambda: UpdateOptions(max_grad_norm=math.nan)),
        ("optim.warmup", lambda: OptimOptions(warmup=math.nan)),
        ("loss.dual_clip", lambda: PolicyLoss(dual_clip=math.nan)),
        ("loss.kl_coef", lambda: PolicyLoss(kl_coef=math.nan)),
        ("vlm.lora.alpha", lambda: LoRAOptions(alpha=math.nan)),
    ],
)
def test_a_setting_that_is_no_number_is_refused(option, given):
    with pytest.raises(ValueError, match=f"{option} must .*, got nan"):
        given()


def test_what_cannot_learn_is_refused(make_vlm, make_data, make_trainer):
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        RolloutOptions(group_size=1)
    with pytest.raises(ValueError, match="every weight is 0"):
        make(make_vlm(), rewards=[AccuracyReward(weight=0.0)])
    with pytest.raises(ValueError, match="vlm.lora.r must be at least 1, got 0"):
        LoRAOptions(r=0)
    module = RationaleSFTModule(make_vlm(), optim=optim(0.0))
    with pytest.raises(ValueError, match="lr is 0"):
        make_trainer(max_steps=1).fit(module, make_data(module.vlm))
    for option in ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval"):
        module = RationaleSFTModule(make_vlm())
        with pytest.raises(ValueError, match=f"trainer.{option} is 0"):
            make_trainer(**{"max_steps": 1, option: 0}).fit(module, make_data(module.vlm))
