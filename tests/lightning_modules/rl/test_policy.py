"""The policy under GRPO, on fixed completions: its loss, the reference, groups sampled again, what is logged."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from small_grpo import make

from vidreason.lightning_modules.functional.advantages import group_relative_advantages
from vidreason.lightning_modules.functional.losses import grpo_loss
from vidreason.lightning_modules.grpo_parts import Part, Rolled, count_step, split_evenly
from vidreason.lightning_modules.grpo_resuming import REFERENCE
from vidreason.lightning_modules.grpo_statistics import RolloutTable, rollout_statistics
from vidreason.lightning_modules.rollout import reward_tensor, score_rollouts
from vidreason.lightning_modules.vlms.loading.adapters import use_adapter
from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import parse_completion, render_completion


class Length(RewardFn):
    """Tells all texts of different length apart."""

    def __call__(self, item: RewardInput) -> float:
        return float(len(item.completion))


@pytest.fixture
def rolled(make_vlm, ready):
    """A module and one batch of its rollouts, fixed."""
    module = ready(make(make_vlm(), kl_coef=0.1))
    batch = next(iter(module.data.train_dataloader()))
    (sampled,) = module.generate(batch)
    groups = score_rollouts(sampled, module.rewards, module.data.label_names)
    advantages = group_relative_advantages(reward_tensor(groups)).flatten().float()
    return module, Part(sampled, groups, advantages)


def test_loss_is_the_function_on_fixed_completions(rolled):
    module, part = rolled
    part = Part(part.batch, part.groups, part.advantages, module.frozen_logprobs(part, None) - 0.3)
    count = part.batch.texts.loss_mask.sum()
    texts = part.batch.texts
    module.kl_coef = 0.0

    def value():
        with torch.no_grad():
            scores = module.score(part, with_entropy=module.entropy_coef != 0)
            return float(module.loss(part, scores, count_step([part])).loss)

    with torch.no_grad():
        logprobs = module.vlm.score(module.policy, part.batch.prompts, texts).logprobs
    by_hand = 0.0
    for n in range(len(texts)):
        advantage = float(part.advantages[n])
        for t in texts.loss_mask[n].nonzero().flatten().tolist():
            ratio = math.exp(float(logprobs[n, t] - part.old_logprobs[n, t]))
            clipped = min(max(ratio, 0.8), 1.28)
            term = -min(ratio * advantage, clipped * advantage)
            if advantage < 0:
                term = min(term, -3 * advantage)
            by_hand += term * min(math.exp(float(part.old_logprobs[n, t] - part.batch.logprobs[n, t])), 2.0)
    assert value() == pytest.approx(by_hand / int(count), rel=1e-4, abs=1e-6)

    plain = value()
    for flag, other in [("clip_eps_high", 0.5), ("clip_eps_low", 0.9), ("importance_cap", None), ("entropy_coef", 0.5)]:
        before = getattr(module, flag)
        setattr(module, flag, other)
        if flag != "clip_eps_low":  # log-ratio +0.3 never meets the lower bound
            assert value() != pytest.approx(plain, abs=1e-7), flag
        setattr(module, flag, before)
    assert value() == pytest.approx(plain)


def test_on_policy_ratio_is_one(rolled):
    """Without old log-probs the loss is the advantage-weighted importance, whatever the policy."""
    module, part = rolled
    module.kl_coef, module.importance_cap = 0.0, None
    count = part.batch.texts.loss_mask.sum()
    loss = module.loss(part, module.score(part), count_step([part]))
    lengths = part.batch.texts.loss_mask.sum(1)
    assert loss.loss.item() == pytest.approx(-float((part.advantages * lengths).sum() / count), abs=1e-6)
    explicit = grpo_loss(
        module.score(part).logprobs,
        part.advantages,
        part.batch.texts.loss_mask,
        normalizer=count,
        old_logprobs=module.frozen_logprobs(part, None),
    )
    assert loss.loss.item() == pytest.approx(explicit.loss.item(), abs=1e-6)


def test_sampler_and_trainer_agree(rolled):
    module, part = rolled
    again = module.frozen_logprobs(part, None)
    torch.testing.assert_close(again, part.batch.logprobs, rtol=1e-4, atol=1e-4)


def test_reference_is_the_policy_at_the_start(rolled):
    module, part = rolled
    at_start = module.frozen_logprobs(part, None)
    torch.testing.assert_close(module.frozen_logprobs(part, REFERENCE), at_start)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    torch.testing.assert_close(module.frozen_logprobs(part, REFERENCE), at_start)
    assert not torch.allclose(module.frozen_logprobs(part, None), at_start, atol=1e-3)
    with use_adapter(module.policy, "policy"):
        pass
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert names
    assert not [n for n in names if REFERENCE in n]


def test_reference_after_full_fine_tuning_is_a_copy(make_vlm, ready):
    module = ready(make(make_vlm(lora=False), kl_coef=0.1))
    assert module.reference is not None
    assert not [p for p in module.reference.parameters() if p.requires_grad]
    assert module.reference is not module.policy
    assert not any("reference" in n for n, p in module.named_parameters() if p.requires_grad)


def test_resampling_tries_dead_groups_again_and_leaves_the_others_where_they_are(rolled):
    module, part = rolled
    old = [[c.text for c in group] for group in part.batch.completions]

    class FirstClip(RewardFn):
        """Tells the completions of one clip apart, and none of the others."""

        def __call__(self, item: RewardInput) -> float:
            return float(len(item.completion)) if item.completion in old[0] else 1.2

    module.rewards = [FirstClip()]
    groups = score_rollouts(part.batch, module.rewards, module.data.label_names)
    assert len(set(map(len, old[0]))) > 1
    (again,) = module.resample_dead([Rolled(part.batch, groups)])
    new = [[c.text for c in group] for group in again.batch.completions]
    assert new[0] == old[0]
    assert new[1] != old[1]
    assert new[2] != old[2]
    assert [g.clip for g in again.groups] == [g.clip for g in groups] == list(again.batch.clips)
    assert again.groups[0] == groups[0]
    assert [[r.completion.text for r in g.rollouts] for g in again.groups] == new
    for n, completion in enumerate(c for group in again.batch.completions for c in group):
        mask = again.batch.texts.loss_mask[n]
        assert again.batch.texts.ids[n][mask].tolist() == completion.ids.tolist()
        torch.testing.assert_close(again.batch.logprobs[n][mask], completion.logprobs)
    (other,) = module.resample_dead([Rolled(part.batch, groups)], attempt=2)
    assert [[c.text for c in group] for group in other.batch.completions][1:] != new[1:]
    (kept,) = module.resample_dead([Rolled(part.batch, groups)], fillers=(1,))
    kept_texts = [[c.text for c in group] for group in kept.batch.completions]
    assert kept_texts[1] == old[1], "what stands for a clip that counts nothing is not worth a sample"
    assert kept_texts[2] == new[2]
    one, two = (Rolled(part.batch.take(module.vlm, rows), groups[rows[0] : rows[-1] + 1]) for rows in ([0], [1, 2]))
    cut = module.resample_dead([one, two], fillers=(1,))
    assert [[c.text for c in group] for item in cut for group in item.batch.completions] == kept_texts
    alive = Rolled(part.batch, score_rollouts(part.batch, [Length()], module.data.label_names))
    assert module.resample_dead([alive]) == [alive]


def test_an_answer_that_names_no_class_has_not_parsed(rolled):
    """A base that has spelt tags writes an empty or a made-up answer now and then; no reward can teach it either."""
    module, part = rolled
    said = [render_completion("x", answer) for answer in ("delierer", module.data.label_names[0])]
    (first, second, *_), names = part.groups[0].rollouts, module.data.label_names
    rollouts = tuple(
        replace(r, completion=replace(r.completion, text=text, parsed=parse_completion(text)))
        for r, text in zip((first, second), said, strict=True)
    )
    table = RolloutTable.of([replace(part.groups[0], rollouts=rollouts)], names)
    assert table.fact("parsed").tolist() == [[0.0, 1.0]]


def test_clips_without_a_label_are_left_out(make_vlm, ready, caplog):
    module = ready(make(make_vlm()))
    train = module.data._clips["train"]
    module.data._clips = {**module.data._clips, "train": (replace(train[0], label=None), *train[1:])}
    with caplog.at_level(logging.WARNING):
        seen = [video_id for batch in module.data.train_dataloader() for video_id in batch.video_ids]
    assert set(seen) == {clip.video_id for clip in train[1:]}
    assert train[0].video_id in caplog.text


def test_minibatches_are_even_and_never_empty(rolled):
    _, part = rolled
    sizes = [[len(m) for m in split_evenly([part] * n, k)] for n, k in [(4, 2), (5, 2), (1, 3), (3, 3)]]
    assert sizes == [[2, 2], [2, 3], [1], [1, 1, 1]]


def test_statistics(rolled):
    module, part = rolled
    rewards = reward_tensor(part.groups)
    values = rollout_statistics(RolloutTable.of(part.groups, module.data.label_names))
    completions = [r.completion for g in part.groups for r in g.rollouts]
    assert float(values["train/reward"]) == pytest.approx(float(rewards.mean()))
    assert float(values["train/completions/mean_length"]) == pytest.approx(
        sum(c.n_tokens for c in completions) / len(completions)
    )
    tokens = torch.cat([c.logprobs for c in completions])
    assert float(values["train/entropy"]) == pytest.approx(-float(tokens.mean()), rel=1e-5)
