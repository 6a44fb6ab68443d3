"""Tests how rollouts are sampled: the form of a completion, rewards that fail, groups that are sampled again."""

import logging
from dataclasses import replace

import pytest
import torch
from small_grpo import make

from vidreason.lightning_modules.functional.advantages import group_relative_advantages
from vidreason.lightning_modules.rl.metrics import RolloutTable, Stopwatch, rollout_statistics
from vidreason.lightning_modules.vlms.base import Generated
from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import CompletionForm


class Length(RewardFn):
    """Tells all texts of different length apart."""

    def __call__(self, item: RewardInput) -> float:
        return float(len(item.completion))


class Fickle(RewardFn):
    """Knows nothing about texts of even length."""

    def __call__(self, item: RewardInput) -> float | None:
        return None if len(item.completion) % 2 == 0 else 1.0 + len(item.completion)


def texts_of(parts):
    return [[c.text for c in group] for part in parts for group in part.batch.completions]


def test_rewards_that_cannot_be_told_are_counted_named_and_left_out(rolled, caplog):
    module, item = rolled
    sampler = replace(module._sampler, rewards=[Fickle()])
    batch = next(iter(module.data.train_dataloader()))
    with caplog.at_level(logging.WARNING):
        (scored,) = sampler.sample(module.policy, batch, 3, 0, Stopwatch())
        sampler.sample(module.policy, batch, 3, 0, Stopwatch())
    named = [record.getMessage() for record in caplog.records if "fickle" in record.getMessage()]
    assert len(named) == 1
    assert item.batch.clips[0].video_id[:6] in named[0]
    texts = texts_of([scored])
    known = [[1.0 + len(t) for t in group if len(t) % 2] for group in texts]
    failures = sum(len(t) % 2 == 0 for group in texts for t in group)
    assert 0 < failures < 12
    table = RolloutTable.of(scored.groups, module.data.label_names, [True] * 3)
    logged = rollout_statistics(table)
    flat = [value for group in known for value in group]
    assert float(logged["train/rewards/fickle/failures"]) == failures
    assert float(logged["train/rewards/fickle/mean"]) == pytest.approx(sum(flat) / len(flat))
    assert float(logged["train/rewards/fickle/std"]) == pytest.approx(float(torch.tensor(flat).std()), rel=1e-5)
    assert float(logged["train/reward"]) == pytest.approx(sum(flat) / len(flat))
    assert float(logged["train/unscored"]) == failures
    advantages = group_relative_advantages(table.total_rewards(), scale=module.loss.scale)
    for b, group in enumerate(texts):
        for g, text in enumerate(group):
            if len(text) % 2 == 0:
                assert float(advantages[b, g]) == 0
        assert float(advantages[b].sum()) == pytest.approx(0, abs=1e-9), "the baseline is that of the known ones"


def test_resampling_tries_dead_groups_again_and_leaves_the_others_where_they_are(rolled):
    module, item = rolled
    old = texts_of([item])
    batch = next(iter(module.data.train_dataloader()))
    assert batch.clips == item.batch.clips

    class FirstClip(RewardFn):
        """Tells the completions of one clip apart, and none of the others."""

        def __call__(self, item: RewardInput) -> float:
            return float(len(item.completion)) if item.completion in old[0] else 1.2

    def sample(resample, batch=batch, clips_per_forward=3, reward=None):
        options = replace(module.rollouts, resample=resample)
        sampler = replace(module._sampler, options=options, rewards=[reward or FirstClip()])
        return sampler.sample(module.policy, batch, clips_per_forward, 0, Stopwatch())

    (first,), (again,) = sample(0), sample(1)
    assert len(set(map(len, old[0]))) > 1
    assert texts_of([first]) == old
    new = texts_of([again])
    assert new[0] == old[0]
    assert new[1] != old[1]
    assert new[2] != old[2]
    assert [g.clip for g in again.groups] == [g.clip for g in first.groups] == list(again.batch.clips)
    kept, before = again.groups[0].rollouts, first.groups[0].rollouts
    assert [(r.completion.text, r.score) for r in kept] == [(r.completion.text, r.score) for r in before]
    assert [[r.completion.text for r in g.rollouts] for g in again.groups] == new
    for n, completion in enumerate(c for group in again.batch.completions for c in group):
        mask = again.batch.texts.loss_mask[n]
        assert again.batch.texts.ids[n][mask].tolist() == completion.ids.tolist()
        torch.testing.assert_close(again.batch.logprobs[n][mask], completion.logprobs)
    other = texts_of(sample(2))
    assert other[0] == old[0]
    assert other[1:] != new[1:]
    masked = replace(batch, sample_mask=torch.tensor([True, False, True]))
    kept_texts = texts_of(sample(1, masked))
    assert kept_texts[1] == old[1], "what stands for a clip that does not count is not worth a sample"
    assert kept_texts[2] == new[2]
    cut = sample(1, masked, clips_per_forward=2)
    assert [len(part.groups) for part in cut] == [2, 1]
    assert texts_of(cut) == kept_texts
    assert texts_of(sample(1, reward=Length())) == old


@pytest.mark.parametrize("mode", ["think", "no_think", "answer_first"])
def test_a_mode_reaches_prompt_grammar_and_reward(make_vlm, ready, mode):
    module = ready(make(make_vlm(), rewards=None, completion=CompletionForm(mode)))
    assert module.data.view.form.mode == mode
    batch = next(iter(module.data.train_dataloader()))
    (sampled,) = module.sample(batch, Stopwatch())
    texts = {
        "think": "<think>a</think><answer>visit</answer>",
        "no_think": "<answer>visit</answer>",
        "answer_first": "<answer>visit</answer><think>a</think>",
    }
    for other, text in texts.items():
        module.vlm.generate = lambda *_, made=text: made_by(sampled.batch, made)
        (again,) = module.sample(batch, Stopwatch())
        assert all(c.parsed.well_formed == (other == mode) for group in again.batch.completions for c in group)
        assert {r.score.parts["format"] for g in again.groups for r in g.rollouts} == {float(other == mode)}
    del module.vlm.generate


def made_by(sampled, text):
    """The result of the sampler, with other words."""
    t, n = sampled.texts, len(sampled.texts)
    return Generated(t.ids, t.mask, sampled.logprobs, ("stop",) * n, t.owner, (text,) * n)


def test_clips_without_a_label_are_left_out(make_vlm, ready, caplog):
    module = ready(make(make_vlm()))
    train = module.data._clips["train"]
    module.data._clips = {**module.data._clips, "train": (replace(train[0], label=None), *train[1:])}
    with caplog.at_level(logging.WARNING):
        seen = [video_id for batch in module.data.train_dataloader() for video_id in batch.video_ids]
    assert set(seen) == {clip.video_id for clip in train[1:]}
    assert train[0].video_id in caplog.text
