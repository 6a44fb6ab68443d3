"""Tests what GRPO logs about rollouts and about the time of a step."""

import math
import statistics
from dataclasses import replace

import pytest
import small_grpo
import torch

from vidreason.lightning_modules.rl.metrics import RolloutTable, Stopwatch, prefix_statistics, rollout_statistics
from vidreason.lightning_modules.rl.rollouts import reward_tensor
from vidreason.lightning_modules.vlms.text.context import prompt_tokens
from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import parse_completion, render_completion


class Length(RewardFn):
    def __call__(self, item: RewardInput) -> float:
        return len(item.completion) / 10


class Fickle(RewardFn):
    """Knows nothing about texts of even length."""

    def __call__(self, item: RewardInput) -> float | None:
        return None if len(item.completion) % 2 == 0 else 1.0 + len(item.completion)


def make(vlm, **options):
    return small_grpo.make(vlm, **{"rewards": [Length()], **options})


def fit(module, make_data, make_trainer, **options):
    trainer = make_trainer(**{"max_steps": 2, "limit_val_batches": 0, **options})
    trainer.fit(module, make_data(module.vlm))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_statistics(rolled):
    module, scored = rolled
    rewards = reward_tensor(scored.groups)
    values = rollout_statistics(RolloutTable.of(scored.groups, module.data.label_names, [True] * 3))
    completions = [r.completion for g in scored.groups for r in g.rollouts]
    assert float(values["train/reward"]) == pytest.approx(float(rewards.mean()))
    assert float(values["train/completions/mean_length"]) == pytest.approx(
        sum(c.n_tokens for c in completions) / len(completions)
    )
    tokens = torch.cat([c.logprobs for c in completions])
    assert float(values["train/entropy"]) == pytest.approx(-float(tokens.mean()), rel=1e-5)


def test_an_answer_that_names_no_class_has_not_parsed(rolled):
    """A base that has spelt tags writes an empty or a made-up answer now and then; no reward can teach it either."""
    module, scored = rolled
    said = [render_completion("x", answer) for answer in ("delierer", module.data.label_names[0])]
    (first, second, *_), names = scored.groups[0].rollouts, module.data.label_names
    rollouts = tuple(
        replace(r, completion=replace(r.completion, text=text, parsed=parse_completion(text)))
        for r, text in zip((first, second), said, strict=True)
    )
    table = RolloutTable.of([replace(scored.groups[0], rollouts=rollouts)], names, [True])
    assert table.column("parsed").tolist() == [[0.0, 1.0]]


def test_training_goes_on_without_the_rewards_that_fail(make_vlm, make_data, make_trainer):
    logged = fit(make(make_vlm(), rewards=[Length(), Fickle()]), make_data, make_trainer)
    assert logged["train/rewards/fickle/failures"] > 0
    assert logged["train/rewards/length/failures"] == 0
    assert math.isfinite(logged["train/loss"])
    assert logged["train/grad_norm"] > 0


def test_a_step_of_nothing_but_truncated_completions_changes_nothing(make_vlm, make_data, make_trainer):
    logged = fit(make(make_vlm(), mask_truncated=True), make_data, make_trainer)
    assert logged["train/completions/clipped_ratio"] == 1
    assert logged["train/grad_norm"] == 0
    assert logged["train/loss"] == 0
    assert fit(make(make_vlm()), make_data, make_trainer)["train/grad_norm"] > 0


@pytest.mark.slow
def test_the_times_add_up_and_every_key_is_there(make_vlm, make_data, make_trainer):
    options = {"kl_coef": 0.1, "inner_epochs": 2, "minibatches": 3, "resample": 1}
    module, shares = make(make_vlm(), **options), []

    def times():
        logged = module.trainer.callback_metrics.items()
        return {key.removeprefix("timing_s/"): float(value) for key, value in logged if key.startswith("timing_s/")}

    module.on_train_batch_end = lambda *_: shares.append(sum(times().values()) / times()["step"] - 1)
    logged = fit(module, make_data, make_trainer, max_steps=60)
    assert times().keys() == {"gen", "reward", "old_log_prob", "ref", "update_actor", "step"}
    assert len(shares) == 10
    assert max(shares) < 1.01
    assert statistics.median(shares) > 0.95, "of single steps other programs may take a part"
    assert logged["rollout_mismatch/max"] >= logged["rollout_mismatch/mean"] > 0
    assert logged["rollout_mismatch/max"] < 1e-4, "sampler and trainer are the same model in float32"


def test_prefix_counts_what_the_naive_route_repeats(rolled):
    module, scored = rolled
    prompts = scored.batch.prompts
    tokens = prompt_tokens(prompts)
    assert tokens.tolist() == prompts.inputs["attention_mask"].sum(1).tolist()
    lengths = torch.tensor([10, 30])
    assert prefix_statistics(lengths, 20, 4, True) == {"prefix/dedup_ratio": 180 / 60, "prefix/saved_tokens": 120.0}
    assert prefix_statistics(lengths, 20, 4, False) == {"prefix/dedup_ratio": 1.0, "prefix/saved_tokens": 0.0}
    written = RolloutTable.of(scored.groups, module.data.label_names, [True] * 3)
    for route, saves in (("auto", True), ("naive", False)):
        logged = {}
        module.vlm.route = route
        module.log_dict, module.log = (lambda values, into=logged, **_: into.update(values)), lambda *_, **__: None
        module.log_rollouts(written, written, [scored], Stopwatch())
        assert (logged["prefix/saved_tokens"] > 0) == saves
