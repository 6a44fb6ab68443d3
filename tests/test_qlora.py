"""A 4-bit base with an adapter, on a CPU: it trains, scores and writes after sampling; its checkpoints resume."""

import pytest
import small_grpo
import stage_world as world
import torch
from covering import sample

from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.completions import generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.base import RewardFn

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
make_trainer, parameters, adamw = world.make_trainer, world.parameters, world.adamw

SHORT = Sampling(max_new_tokens=6)


class Letters(RewardFn):
    def __call__(self, item):
        return float(len(item.completion) % 3)


@pytest.fixture
def make_module(small_base):
    def make(stage):
        vlm = TinyVLM(path=str(small_base), lora=LoRAOptions(r=4, alpha=8), quantize="nf4")
        if stage == "sft":
            return RationaleSFTModule(vlm, optim=OptimOptions(adamw), updates=UpdateOptions(max_grad_norm=0))
        return small_grpo.make(vlm, rewards=[Letters()], optimizer=adamw)

    return make


@pytest.mark.parametrize("stage", sample(["sft", "grpo"], "sft"))
def test_a_resumed_fit_equals_an_unbroken_one(stage, make_module, make_data, make_trainer, tmp_path):
    def fit(folder, epochs, checkpoint=None):
        module = make_module(stage)
        trainer = make_trainer(folder, max_epochs=epochs, limit_val_batches=0)
        trainer.fit(module, make_data(module.vlm), ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit("whole", 2)
    half, trainer = fit("half", 1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved), "the 4-bit base is not in the checkpoint"
    resumed, _ = fit("resumed", 2, path)
    moved = 0
    for name, wanted in parameters(whole).items():
        torch.testing.assert_close(parameters(resumed)[name], wanted, rtol=0, atol=0)
        moved += int(not torch.equal(parameters(half)[name], wanted))
    assert moved, "the second epoch changes something"


def test_it_writes_and_scores_what_it_wrote(make_module, make_data, make_trainer):
    module = make_module("sft")
    trainer = make_trainer("run", max_epochs=1)  # with a validation: forwards without gradient come first
    data = make_data(module.vlm)
    trainer.fit(module, data)
    batch = next(iter(data.train_dataloader()))
    rolled = generate_completions(module.vlm, module.policy, batch.prompts, batch.clips, 2, SHORT, seed=1)
    scores = module.vlm.score(module.policy, batch.prompts, rolled.texts)
    torch.testing.assert_close(scores.logprobs, rolled.logprobs, atol=1e-4, rtol=0)
    (-scores.logprobs.sum()).backward()
    gradients = [p.grad for n, p in module.named_parameters() if "lora_B" in n]
    assert all(g is not None and bool(g.any()) for g in gradients), "sampling has packed no weights"


def test_without_bitsandbytes_it_says_what_would_run(make_module, monkeypatch):
    monkeypatch.setattr("vidreason.lightning_modules.vlms.loading.building.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed.*strategy/lora\.yaml"):
        make_module("sft").vlm.build()
