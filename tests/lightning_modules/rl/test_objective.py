"""The policy loss on fixed completions, with the log-probabilities that an optimizer step computes."""

import math
from dataclasses import replace

import pytest
import torch

from vidreason.lightning_modules.fit.optimizer_step import StepResult
from vidreason.lightning_modules.functional.advantages import group_relative_advantages
from vidreason.lightning_modules.functional.aggregation import LOSS_TYPES
from vidreason.lightning_modules.functional.losses import grpo_loss
from vidreason.lightning_modules.rl.microbatch import make_micro_batches
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.rl.reference import policy_logprobs
from vidreason.lightning_modules.rl.rollouts import reward_tensor

ALL = torch.ones(3, dtype=torch.bool)


@pytest.fixture
def fixed(rolled):
    """A stage and a micro-batch of its rollouts."""
    module, scored = rolled
    advantages = group_relative_advantages(reward_tensor(scored.groups))
    assert bool((advantages != 0).any())
    (micro_batch,) = make_micro_batches([scored], advantages, ALL)
    return module, micro_batch


def loss_of(module, micro_batch):
    """The loss that ``update`` computes and logs; the weights stay as they are."""
    logged = {}

    def without_a_step(micro_batches, loss, has_samples):
        assert has_samples
        assert [loss(m).ndim for m in micro_batches] == [0]
        return StepResult(torch.zeros(()), 0.0)

    module.optimizer_step_on, module.log_dict, module.log = without_a_step, logged.update, lambda *_: None
    with torch.no_grad():
        module.update([micro_batch])
    return float(logged["train/loss"])


def test_loss_is_the_function_on_fixed_completions(fixed):
    module, micro_batch = fixed
    texts = micro_batch.batch.texts
    old = policy_logprobs(module.vlm, module.policy, micro_batch, 1.0) - 0.3
    micro_batch = replace(micro_batch, old_logprobs=old)
    module.loss = PolicyLoss()
    with torch.no_grad():
        logprobs = module.vlm.score(module.policy, micro_batch.batch.prompts, texts).logprobs
    by_hand = 0.0
    for n in range(len(texts)):
        advantage = float(micro_batch.advantages[n])
        for t in texts.loss_mask[n].nonzero().flatten().tolist():
            ratio = math.exp(float(logprobs[n, t] - old[n, t]))
            clipped = min(max(ratio, 0.8), 1.28)
            term = -min(ratio * advantage, clipped * advantage)
            if advantage < 0:
                term = min(term, -3 * advantage)
            by_hand += term * min(math.exp(float(old[n, t] - micro_batch.batch.logprobs[n, t])), 2.0)
    plain = loss_of(module, micro_batch)
    assert plain == pytest.approx(by_hand / int(texts.loss_mask.sum()), rel=1e-4, abs=1e-6)
    for flag, other in [("clip_eps_high", 0.5), ("importance_cap", None), ("entropy_coef", 0.5)]:
        module.loss = PolicyLoss(**{flag: other})
        assert loss_of(module, micro_batch) != pytest.approx(plain, abs=1e-7), flag
    module.loss = PolicyLoss(clip_eps_low=0.9)  # A log-ratio of +0.3 never meets the lower bound.
    assert loss_of(module, micro_batch) == pytest.approx(plain)


def test_on_policy_ratio_is_one(fixed):
    """Without old log-probs the loss is the advantage-weighted importance, whatever the policy."""
    module, micro_batch = fixed
    module.loss = PolicyLoss(importance_cap=None)
    mask = micro_batch.batch.texts.loss_mask
    loss = loss_of(module, micro_batch)
    assert loss == pytest.approx(-float((micro_batch.advantages * mask.sum(1)).sum() / mask.sum()), abs=1e-6)
    logprobs = policy_logprobs(module.vlm, module.policy, micro_batch, 1.0)
    explicit = grpo_loss(logprobs, micro_batch.advantages, mask, normalizer=mask.sum(), old_logprobs=logprobs)
    assert loss == pytest.approx(explicit.loss.item(), abs=1e-6)


def test_a_loss_of_ones_own_is_what_the_step_computes(fixed):
    module, micro_batch = fixed

    class Twice(PolicyLoss):
        def __call__(self, inputs):
            output = super().__call__(inputs)
            return output._replace(loss=2 * output.loss)

    module.loss = PolicyLoss(importance_cap=None)
    once = loss_of(module, micro_batch)
    module.loss = Twice(importance_cap=None)
    assert loss_of(module, micro_batch) == pytest.approx(2 * once)


def test_dr_grpo_does_not_scale_unless_it_is_told_to():
    scales = {name: PolicyLoss(type=name).scale for name in LOSS_TYPES}
    assert scales == {name: "none" if name == "dr_grpo" else "group" for name in LOSS_TYPES}
    assert PolicyLoss(type="dr_grpo", advantage_scale="group").scale == "group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "ppo"}, "loss_type must be one of"),
        ({"dual_clip": 1.0}, r"loss\.dual_clip"),
        ({"importance_cap": 0.0}, r"loss\.importance_cap"),
        ({"cispo_clip_max": 0.0}, r"loss\.cispo_clip_max"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)
