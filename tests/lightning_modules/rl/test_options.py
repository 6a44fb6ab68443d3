"""The options of GRPO around its objective: what is left out, replaced, named, and logged."""

import logging
import math
import statistics
from dataclasses import replace

import pytest
import small_grpo
import torch
from small_grpo import SHORT

from vidreason.lightning_modules.functional.aggregation import LOSS_TYPES
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.grpo_parts import Rolled, count_step, make_parts, whole_completions
from vidreason.lightning_modules.grpo_replay import ReplayBuffer
from vidreason.lightning_modules.grpo_statistics import RolloutTable, prefix_statistics, rollout_statistics
from vidreason.lightning_modules.rollout import score_rollouts
from vidreason.lightning_modules.vlms.text.context import prompt_tokens
from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import CompletionForm


class Length(RewardFn):
    def __call__(self, item: RewardInput) -> float:
        return len(item.completion) / 10


class Fickle(RewardFn):
    """Knows nothing about texts of even length."""

    def __call__(self, item: RewardInput) -> float | None:
        return None if len(item.completion) % 2 == 0 else 1.0 + len(item.completion)


class Same(RewardFn):
    def __call__(self, item: RewardInput) -> float:
        return 1.0


def make(vlm, **options):
    return small_grpo.make(vlm, **{"rewards": [Length()], **options})


@pytest.fixture
def rolled(make_vlm, ready):
    """A module and the scored rollouts of one batch of three clips."""
    module = ready(make(make_vlm()))
    (sampled,) = module.generate(next(iter(module.data.train_dataloader())))
    return module, Rolled(sampled, score_rollouts(sampled, module.rewards, module.data.label_names))


def fit(module, make_data, make_trainer, **options):
    trainer = make_trainer(**{"max_steps": 2, "limit_val_batches": 0, **options})
    trainer.fit(module, make_data(module.vlm))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_truncated_completions_may_be_left_out(rolled):
    module, item = rolled
    groups = [[replace(c, finish_reason="length") for c in group] for group in item.batch.completions]
    for b, g in ((0, 1), (2, 3)):
        groups[b][g] = replace(groups[b][g], finish_reason="stop")
    batch = replace(item.batch, completions=tuple(map(tuple, groups)))
    mask = whole_completions(batch)
    lengths = mask.sum(1).tolist()
    assert [n for n, length in enumerate(lengths) if length] == [1, 11]
    assert torch.equal(mask[1], batch.texts.loss_mask[1])
    advantages = torch.ones(3, 4, dtype=torch.float64)
    kept, cut = (make_parts([Rolled(batch, item.groups)], advantages, masked) for masked in (False, True))
    assert int(count_step(kept).tokens) == int(batch.texts.loss_mask.sum())
    assert int(count_step(cut).tokens) == int(mask.sum())
    assert float(count_step(cut).completions) == 12, "what is masked is still a completion of the step"
    scores = module.score(cut[0])
    losses = [module.loss(part, scores, count_step([part])).loss for part in (kept[0], cut[0])]
    (gradient,) = torch.autograd.grad(losses[1], scores.logprobs)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_a_step_of_nothing_but_truncated_completions_changes_nothing(make_vlm, make_data, make_trainer):
    logged = fit(make(make_vlm(), mask_truncated=True), make_data, make_trainer)
    assert logged["train/completions/clipped_ratio"] == 1
    assert logged["train/grad_norm"] == 0
    assert logged["train/loss"] == 0
    assert fit(make(make_vlm()), make_data, make_trainer)["train/grad_norm"] > 0


def test_rewards_that_cannot_be_told_are_counted_named_and_left_out(rolled, caplog):
    module, item = rolled
    module.rewards = [Fickle()]
    with caplog.at_level(logging.WARNING):
        scored = module.rewarded(item.batch)
        module.rewarded(item.batch)
    named = [record.getMessage() for record in caplog.records if "fickle" in record.getMessage()]
    assert len(named) == 1
    assert item.batch.clips[0].video_id[:6] in named[0]
    texts = [[r.completion.text for r in group.rollouts] for group in scored.groups]
    known = [[1.0 + len(t) for t in group if len(t) % 2] for group in texts]
    failures = sum(len(t) % 2 == 0 for group in texts for t in group)
    assert 0 < failures < 12
    table = RolloutTable.of(scored.groups, module.data.label_names)
    logged = rollout_statistics(table)
    flat = [value for group in known for value in group]
    assert float(logged["train/rewards/fickle/failures"]) == failures
    assert float(logged["train/rewards/fickle/mean"]) == pytest.approx(sum(flat) / len(flat))
    assert float(logged["train/rewards/fickle/std"]) == pytest.approx(float(torch.tensor(flat).std()), rel=1e-5)
    assert float(logged["train/reward"]) == pytest.approx(sum(flat) / len(flat))
    assert float(logged["train/unscored"]) == failures
    advantages = module.advantages(table, 3)
    for b, group in enumerate(texts):
        for g, text in enumerate(group):
            if len(text) % 2 == 0:
                assert float(advantages[b, g]) == 0
        assert float(advantages[b].sum()) == pytest.approx(0, abs=1e-9), "the baseline is that of the known ones"


def test_training_goes_on_without_the_rewards_that_fail(make_vlm, make_data, make_trainer):
    logged = fit(make(make_vlm(), rewards=[Length(), Fickle()]), make_data, make_trainer)
    assert logged["train/rewards/fickle/failures"] > 0
    assert logged["train/rewards/length/failures"] == 0
    assert math.isfinite(logged["train/loss"])
    assert logged["train/grad_norm"] > 0


def parts_of(module, item, rewards, step=0):
    """Parts with old log-probs, advantages from ``rewards``."""
    scored = Rolled(item.batch, score_rollouts(item.batch, rewards, module.data.label_names))
    advantages = module.advantages(RolloutTable.of(scored.groups, module.data.label_names), 3)
    (part,) = make_parts([scored], advantages)
    return replace(part, old_logprobs=module.frozen_logprobs(part, None))


def test_the_buffer_replaces_dead_groups_with_older_ones(rolled):
    module, item = rolled
    buffer = ReplayBuffer(capacity=2, seed=0)
    dead = parts_of(module, item, [Same()])
    assert buffer.refresh(dead, module.vlm, 0, 0) == [dead], "there is nothing to replay yet"
    assert len(buffer) == 0
    live = parts_of(module, item, [Length()])
    assert buffer.refresh(live, module.vlm, 1, 0) == [live]
    assert len(buffer) == 2, "the capacity bounds what is kept"
    kept, *drawn = buffer.refresh(dead, module.vlm, 2, 0)
    assert [len(part.groups) for part in (kept, *drawn)] == [1, 1, 1]
    assert kept.groups == dead.groups[2:]
    newest = {group.clip.video_id: b for b, group in enumerate(live.groups)}
    for part in drawn:
        b = newest[part.groups[0].clip.video_id]
        rows = slice(4 * b, 4 * b + 4)
        assert part.groups[0] == live.groups[b]
        assert torch.equal(part.advantages, live.advantages[rows])
        torch.testing.assert_close(part.old_logprobs, live.old_logprobs[rows])
        again = module.score(part).logprobs
        torch.testing.assert_close(again, live.old_logprobs[rows], rtol=1e-4, atol=1e-4)
    assert {part.groups[0].clip.video_id for part in drawn} == {g.clip.video_id for g in live.groups[1:]}
    first, second = ([p.groups[0].clip.video_id for p in buffer.refresh(dead, module.vlm, s, 0)[1:]] for s in (5, 5))
    assert first == second, "the draw depends on seed and step alone"


@pytest.mark.parametrize("prompts_per_forward", [None, 1])
def test_replayed_groups_train(make_vlm, make_data, make_trainer, prompts_per_forward):
    class Fading(GRPOModule):
        """Its rewards are all equal from the second step on."""

        def rewarded(self, batch):
            self.rewards = [Length()] if self.global_step == 0 else [Same()]
            return super().rewarded(batch)

    norms = {}
    for capacity in (0, 8):
        module = Fading(
            make_vlm(),
            group_size=4,
            train_sampling=SHORT,
            warmup=0,
            cold_steps=10**6,
            replay=capacity,
            prompts_per_forward=prompts_per_forward,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        )
        logged = fit(module, make_data, make_trainer, folder=f"replay{capacity}")
        norms[capacity] = logged["train/grad_norm"]
        assert logged["train/frac_reward_zero_std"] == 1
        assert logged.get("train/replayed_groups", 0.0) == (3 if capacity else 0)
    assert norms[0] == 0
    assert norms[8] > 0


@pytest.mark.parametrize("mode", ["think", "no_think", "answer_first"])
def test_a_mode_reaches_prompt_grammar_and_reward(make_vlm, ready, mode):
    module = ready(make(make_vlm(), rewards=None, completion=CompletionForm(mode)))
    assert module.data.view.form.mode == mode
    batch = next(iter(module.data.train_dataloader()))
    (sampled,) = module.generate(batch)
    texts = {
        "think": "<think>a</think><answer>visit</answer>",
        "no_think": "<answer>visit</answer>",
        "answer_first": "<answer>visit</answer><think>a</think>",
    }
    for other, text in texts.items():
        module.vlm.generate = lambda *_, made=text: made_by(sampled, made)
        again = module.sample_groups(batch.prompts, batch.clips, 0)
        assert all(c.parsed.well_formed == (other == mode) for group in again.completions for c in group)
        scored = module.rewarded(again)
        assert {r.score.parts["format"] for g in scored.groups for r in g.rollouts} == {float(other == mode)}
    del module.vlm.generate


def made_by(sampled, text):
    """What the sampler returns, with other words."""
    from vidreason.lightning_modules.vlms.base import Generated

    t, n = sampled.texts, len(sampled.texts)
    return Generated(t.ids, t.mask, sampled.logprobs, ("stop",) * n, t.owner, (text,) * n)


def test_dr_grpo_does_not_scale_unless_it_is_told_to(make_vlm):
    scales = {name: make(make_vlm(), loss_type=name).advantage_scale for name in LOSS_TYPES}
    assert scales == {name: "none" if name == "dr_grpo" else "group" for name in LOSS_TYPES}
    assert make(make_vlm(), loss_type="dr_grpo", advantage_scale="group").advantage_scale == "group"


def test_wrong_options_are_refused(make_vlm):
    with pytest.raises(ValueError, match="loss_type must be one of"):
        make(make_vlm(), loss_type="ppo")
    with pytest.raises(ValueError, match="replay"):
        make(make_vlm(), replay=-1)


def test_the_times_add_up_and_every_key_is_there(make_vlm, make_data, make_trainer):
    options = {"kl_coef": 0.1, "inner_epochs": 2, "minibatches": 3, "resample": 1, "replay": 4}
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
    module, item = rolled
    prompts = item.batch.prompts
    tokens = prompt_tokens(prompts)
    assert tokens.tolist() == prompts.inputs["attention_mask"].sum(1).tolist()
    assert module.shares_prefix()
    module.vlm.route = "naive"
    assert not module.shares_prefix()
    lengths = torch.tensor([10, 30])
    assert prefix_statistics(lengths, 20, 4, True) == {"prefix/dedup_ratio": 180 / 60, "prefix/saved_tokens": 120.0}
    assert prefix_statistics(lengths, 20, 4, False) == {"prefix/dedup_ratio": 1.0, "prefix/saved_tokens": 0.0}
