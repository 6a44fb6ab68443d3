"""GRPO under a trainer: what moves the policy, how a step is cut up, what is refused."""

import math

import pytest
import torch
from small_grpo import make
from stage_world import parameters

from vidreason.lightning_modules import base
from vidreason.lightning_modules.fit.schedule import count_steps
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.rollouts import NoParsedCompletionsError, reward_tensor
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.base import RewardFn, RewardInput


class Nothing(RewardFn):
    def __call__(self, item: RewardInput) -> float:
        return 1.2


def distance(before, after):
    return math.sqrt(sum(float((before[name] - after[name]).square().sum()) for name in after))


def fit(module, make_data, make_trainer, **kwargs):
    before = {}
    module.on_train_start = lambda: before.update(parameters(module))
    kwargs = {"max_steps": 2, "limit_val_batches": 0, **kwargs}
    trainer = make_trainer(**kwargs)
    trainer.fit(module, make_data(module.vlm))
    return trainer, distance(before, parameters(module))


@pytest.mark.parametrize("lora", [True, False])
def test_policy_moves(make_vlm, make_data, make_trainer, lora):
    trainer, moved = fit(make(make_vlm(lora)), make_data, make_trainer)
    assert moved > 0
    assert trainer.global_step == 2
    logged = set(trainer.callback_metrics)
    wanted = """reward reward_std frac_reward_zero_std rewards/even_tokens/mean rewards/even_tokens/std
        completions/mean_length completions/clipped_ratio kl entropy clip_ratio/low_mean clip_ratio/high_mean
        clip_ratio/region_mean num_tokens grad_norm learning_rate rewards/even_tokens/failures"""
    assert {f"train/{name}" for name in wanted.split()} <= logged
    assert {"timing_s/gen", "timing_s/reward", "timing_s/update_actor", "timing_s/step"} <= logged
    assert {"rollout_mismatch/mean", "rollout_mismatch/max", "prefix/dedup_ratio", "prefix/saved_tokens"} <= logged


def test_dead_groups_leave_the_policy_as_it_is(make_vlm, make_data, make_trainer):
    trainer, moved = fit(make(make_vlm(), rewards=[Nothing()]), make_data, make_trainer)
    assert moved == 0
    assert float(trainer.callback_metrics["train/grad_norm"]) == 0
    assert float(trainer.callback_metrics["train/frac_reward_zero_std"]) == 1


def test_dead_groups_still_feel_entropy(make_vlm, make_data, make_trainer):
    _, moved = fit(make(make_vlm(), rewards=[Nothing()], entropy_coef=1.0), make_data, make_trainer)
    assert moved > 0


def test_kl_term_trains_once_the_policy_has_left(make_vlm, make_data, make_trainer):
    kl = {}
    for coefficient in (0.0, 0.5):
        trainer, _ = fit(
            make(make_vlm(), kl_coef=coefficient, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)),
            make_data,
            make_trainer,
            max_steps=3,
            folder=f"kl{coefficient}",
        )
        kl[coefficient] = float(trainer.callback_metrics["train/kl"])
    assert kl[0.0] == 0
    assert kl[0.5] > 0


def test_inner_epochs_and_minibatches_count_as_optimizer_steps(make_vlm, make_data, make_trainer, monkeypatch):
    module = make(make_vlm(), inner_epochs=2, minibatches=3)
    totals = []
    monkeypatch.setattr(base, "count_steps", lambda *given: totals.append(count_steps(*given)) or totals[-1])
    trainer, moved = fit(module, make_data, make_trainer, max_steps=-1, max_epochs=1)
    assert trainer.global_step == 2 * 2 * 3
    assert totals == [12]
    assert moved > 0
    assert "timing_s/old_log_prob" in trainer.callback_metrics


def test_a_policy_that_never_parses_stops_the_stage(make_vlm, make_data, make_trainer):
    with pytest.raises(NoParsedCompletionsError, match=r"(?s)first 2 steps.*sft_cold_start\.yaml.*adapter_path"):
        fit(make(make_vlm(), cold_steps=2), make_data, make_trainer, max_steps=5)


def test_without_adapter_path_it_says_so(make_vlm, ready):
    module = make(make_vlm())
    said = []
    module.print = said.append
    ready(module)
    assert any("starts from the base" in line for line in said)


def test_wrong_arguments_are_refused(make_vlm):
    with pytest.raises(ValueError, match="temperature"):
        make(make_vlm(), train_sampling=Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="group_size"):
        make(make_vlm(), group_size=0)


@pytest.mark.slow
def test_reward_of_an_easy_task_rises(make_vlm, make_data, make_trainer):
    rewards = []

    class Watched(GRPOModule):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            rewards.append(float(reward_tensor(output["rollouts"].groups).mean()))
            return output

    module = make(make_vlm(lora=False), Watched, group_size=8, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, make_data, make_trainer, max_steps=60)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
