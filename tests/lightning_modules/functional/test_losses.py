"""GRPO's loss against a slow per-token loop in plain Python floats and scalars, in value and gradient."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidreason.lightning_modules.functional.losses import PolicyLossOutput, grpo_loss


@dataclass(frozen=True)
class Rollouts:
    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    entropy: Tensor

    @staticmethod
    def make(seed: int = 0, spread: float = 0.6) -> "Rollouts":
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        old = -noise(6, 9).abs() - 2.0
        mask = torch.arange(9) < torch.tensor([9, 5, 1, 7, 0, 4]).unsqueeze(1)
        return Rollouts(
            logprobs=old + spread * noise(6, 9),
            advantages=torch.tensor([1.3, -0.7, -2.0, 0.4, 1.0, 0.0], dtype=torch.float64),
            mask=mask,
            old=old,
            rollout=old + 0.5 * noise(6, 9),
            ref=old + 0.4 * noise(6, 9),
            entropy=noise(6, 9).abs(),
        )

    def loss(self, **options: Any) -> PolicyLossOutput:
        arguments: dict[str, Any] = {
            "normalizer": 26.0,
            "old_logprobs": self.old,
            "rollout_logprobs": self.rollout,
            "ref_logprobs": self.ref,
            "entropy": self.entropy,
            "kl_coef": 0.04,
            "entropy_coef": 0.01,
        }
        return grpo_loss(self.logprobs, self.advantages, self.mask, **(arguments | options))


def slow_grpo(r: Rollouts) -> Tensor:
    """The formulas of the paper, one token at a time."""
    normalizer, low, high, dual, cap, beta, bonus = 26.0, 0.2, 0.28, 3.0, 2.0, 0.04, 0.01
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(r.logprobs)):
        advantage = r.advantages[i].item()
        for t in range(r.logprobs.shape[1]):
            if not r.mask[i, t]:
                continue
            ratio = torch.exp(r.logprobs[i, t] - r.old[i, t])
            clipped = ratio if 1 - low < ratio.item() < 1 + high else ratio.detach().clamp(1 - low, 1 + high)
            plain, bounded = ratio * advantage, clipped * advantage
            loss = -(plain if plain.item() < bounded.item() else bounded)
            if advantage < 0 and loss.item() > -dual * advantage:
                loss = torch.tensor(-dual * advantage, dtype=torch.float64)
            loss = loss * min(math.exp(r.old[i, t].item() - r.rollout[i, t].item()), cap)
            rho = torch.exp(r.ref[i, t] - r.logprobs[i, t])
            total = total + loss + beta * (rho - torch.log(rho) - 1) - bonus * r.entropy[i, t]
    return total / normalizer


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.05, 0.6, 1.5])
def test_grpo_equals_the_slow_loop_in_value_and_gradient(seed: int, spread: float) -> None:
    rollouts = Rollouts.make(seed, spread)
    fast, slow = (
        replace(
            rollouts,
            logprobs=rollouts.logprobs.clone().requires_grad_(),
            entropy=rollouts.entropy.clone().requires_grad_(),
        )
        for _ in range(2)
    )
    loss, expected = fast.loss().loss, slow_grpo(slow)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name in ("logprobs", "entropy"):
        gradient, wanted = getattr(fast, name).grad, getattr(slow, name).grad
        torch.testing.assert_close(gradient, wanted)
        assert (gradient[~rollouts.mask] == 0).all()


def test_grpo_gradcheck() -> None:
    rollouts = Rollouts.make(5, 0.6)
    assert torch.autograd.gradcheck(
        lambda logprobs, entropy: replace(rollouts, logprobs=logprobs, entropy=entropy).loss().loss,
        (rollouts.logprobs.clone().requires_grad_(), rollouts.entropy.clone().requires_grad_()),
    )


def one_token(ratio: float, advantage: float, **options: Any) -> float:
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    new = old + math.log(ratio)
    loss = grpo_loss(
        new,
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([[True]]),
        normalizer=1,
        old_logprobs=old,
        **options,
    )
    return loss.loss.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.2, 1.0, -1.2),
        (1.5, 1.0, -1.28),
        (0.5, 1.0, -0.5),
        (0.9, -1.0, 0.9),
        (0.5, -1.0, 0.8),
        (2.0, -1.0, 2.0),
        (5.0, -1.0, 3.0),
        (5.0, -2.0, 6.0),
        (5.0, 1.0, -1.28),
        (5.0, 0.0, 0.0),
    ],
)
def test_policy_term_by_hand(ratio: float, advantage: float, expected: float) -> None:
    assert one_token(ratio, advantage) == pytest.approx(expected)


def test_every_option_by_hand() -> None:
    assert one_token(0.5, -1.0, clip_eps_low=0.4) == pytest.approx(0.6)
    assert one_token(1.5, 1.0, clip_eps_high=0.4) == pytest.approx(-1.4)
    assert one_token(5.0, -1.0, dual_clip=4.0) == pytest.approx(4.0)
    assert one_token(5.0, -1.0, dual_clip=None) == pytest.approx(5.0)
    sampler = torch.tensor([[-1.0 - math.log(1.5)]], dtype=torch.float64)
    assert one_token(1.0, 1.0, rollout_logprobs=sampler) == pytest.approx(-1.5)
    assert one_token(1.0, 1.0, rollout_logprobs=sampler - 1) == pytest.approx(-2.0)
    assert one_token(1.0, 1.0, rollout_logprobs=sampler - 1, importance_cap=None) == pytest.approx(-1.5 * math.e)
    assert one_token(5.0, -1.0, rollout_logprobs=sampler) == pytest.approx(4.5), "the weight comes after the dual clip"
    reference = torch.tensor([[-1.0 + math.log(2.0)]], dtype=torch.float64)
    assert one_token(1.0, 0.0, ref_logprobs=reference, kl_coef=0.5) == pytest.approx(0.5 * (2 - math.log(2) - 1))
    entropy = torch.tensor([[0.7]], dtype=torch.float64)
    assert one_token(1.0, 0.0, entropy=entropy, entropy_coef=0.1) == pytest.approx(-0.07)
    assert one_token(1.0, 0.0, entropy=entropy, ref_logprobs=reference) == 0.0
    assert one_token(math.exp(30), -1.0, dual_clip=None) == pytest.approx(math.exp(20))
    assert one_token(math.exp(9), -1.0, dual_clip=None, log_ratio_clamp=2.0) == pytest.approx(math.exp(2))


@pytest.mark.parametrize(
    "option",
    [
        {"clip_eps_low": 0.1},
        {"clip_eps_high": 0.1},
        {"dual_clip": 1.5},
        {"dual_clip": None},
        {"importance_cap": 1.1},
        {"rollout_logprobs": None},
        {"kl_coef": 0.0},
        {"entropy_coef": 0.0},
        {"log_ratio_clamp": 0.3},
        {"normalizer": 13},
        {"old_logprobs": None},
        {"importance_sampling": False},
        {"kl_bias_correction": True},
        {"loss_type": "cispo"},
        {"loss_type": "cispo", "cispo_clip_max": 1.1},
        {"loss_type": "grpo", "normalizer": 6, "token_count": 26},
        {"loss_type": "gspo", "normalizer": 6, "token_count": 26},
        {"loss_type": "dr_grpo", "normalizer": 6 * 12, "token_count": 26},
        {"ratio_level": "sequence"},
        {"token_count": 13},
    ],
)
def test_every_flag_changes_the_loss(option: dict[str, Any]) -> None:
    rollouts = Rollouts.make(1, 1.5)
    assert rollouts.loss(**option).loss.item() != pytest.approx(rollouts.loss().loss.item(), rel=1e-6)


def test_first_update_is_plain_policy_gradient() -> None:
    """Without old log-probabilities every ratio is 1: the gradient is -A / normalizer, nothing is clipped."""
    rollouts = Rollouts.make(2)
    logprobs = rollouts.logprobs.clone().requires_grad_()
    loss = grpo_loss(logprobs, rollouts.advantages, rollouts.mask, normalizer=26)
    loss.loss.backward()
    expected = -(rollouts.advantages.unsqueeze(1) * rollouts.mask) / 26
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected)
    assert (loss.clip_region.item(), loss.dual_clip.item(), loss.rollout_gap.item()) == (0.0, 0.0, 0.0)
    assert loss.importance.item() == pytest.approx(1.0)


def test_statistics_against_counts() -> None:
    r = Rollouts.make(3, 1.5)
    loss = r.loss()
    tokens = [(i, t) for i in range(6) for t in range(9) if r.mask[i, t]]
    assert len(tokens) == 26
    ratio = {k: math.exp((r.logprobs[k] - r.old[k]).item()) for k in tokens}
    sign = {k: r.advantages[k[0]].item() for k in tokens}
    weight = [min(2.0, math.exp((r.old[k] - r.rollout[k]).item())) for k in tokens]
    kl = [(r.ref[k] - r.logprobs[k]).item() for k in tokens]
    low = sum(ratio[k] < 0.8 and sign[k] < 0 for k in tokens)
    high = sum(ratio[k] > 1.28 and sign[k] > 0 for k in tokens)
    dual = sum(ratio[k] > 3 and sign[k] < 0 for k in tokens)
    assert min(low, high, dual) > 0, "the example must exercise every statistic"
    assert loss.clip_low.item() == pytest.approx(low / 26)
    assert loss.clip_high.item() == pytest.approx(high / 26)
    assert loss.clip_region.item() == pytest.approx((low + high) / 26)
    assert loss.dual_clip.item() == pytest.approx(dual / 26)
    assert loss.importance.item() == pytest.approx(sum(weight) / 26)
    assert loss.rollout_gap.item() == pytest.approx(sum(abs((r.old[k] - r.rollout[k]).item()) for k in tokens) / 26)
    assert loss.kl.item() == pytest.approx(sum(math.exp(x) - x - 1 for x in kl) / 26)
    assert loss.entropy.item() == pytest.approx(sum(r.entropy[k].item() for k in tokens) / 26)
    assert loss.loss.item() == pytest.approx((loss.policy + 0.04 * loss.kl - 0.01 * loss.entropy).item())


def test_micro_batches_add_up() -> None:
    rollouts = Rollouts.make(4, 1.0)
    whole = rollouts.loss()
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.append(Rollouts(**{name: value[rows] for name, value in vars(rollouts).items()}).loss())
    for name in PolicyLossOutput._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.parametrize("clamp", [20.0, math.inf])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", [("logprobs",), ("logprobs", "old", "rollout", "ref", "entropy")])
def test_padding_may_hold_anything(spoiled: tuple[str, ...], rubbish: float, clamp: float) -> None:
    rollouts = Rollouts.make(0)

    def spoil(values: Tensor) -> Tensor:
        return values.masked_fill(~rollouts.mask, rubbish)

    fields = {name: spoil(getattr(rollouts, name)) for name in spoiled}
    logprobs = fields["logprobs"].requires_grad_()
    loss = replace(rollouts, **fields).loss(log_ratio_clamp=clamp)
    for value, expected in zip(loss, rollouts.loss(log_ratio_clamp=clamp), strict=True):
        torch.testing.assert_close(value.detach(), expected.detach())
    loss.loss.backward()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_dead_groups_still_train_kl_and_entropy() -> None:
    rollouts = replace(Rollouts.make(0), advantages=torch.zeros(6, dtype=torch.float64))
    logprobs = rollouts.logprobs.clone().requires_grad_()
    replace(rollouts, logprobs=logprobs).loss(kl_coef=0.0, entropy_coef=0.0).loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad == 0).all()
    replace(rollouts, logprobs=logprobs).loss().loss.backward()
    assert (logprobs.grad[rollouts.mask] != 0).all()


def test_only_the_policy_gets_a_gradient() -> None:
    rollouts = Rollouts.make(0)
    constants = {
        name: getattr(rollouts, name).clone().requires_grad_() for name in ("old", "rollout", "ref", "advantages")
    }
    loss = replace(rollouts, logprobs=rollouts.logprobs.clone().requires_grad_(), **constants).loss()
    loss.loss.backward()
    assert all(tensor.grad is None for tensor in constants.values())
    assert [name for name in PolicyLossOutput._fields if getattr(loss, name).requires_grad] == ["loss"]


def test_grpo_errors() -> None:
    rollouts = Rollouts.make(0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ref_logprobs": None}, "kl_coef is 0.04 but"),
        ({"entropy": None}, "entropy_coef is 0.01 but"),
        ({"normalizer": 0}, "normalizer"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"old_logprobs": rollouts.old[:, :3]}, "expected"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            rollouts.loss(**options)
    with pytest.raises(ValueError, match="advantages"):
        replace(rollouts, advantages=torch.zeros(5)).loss()
    with pytest.raises(ValueError, match="bool"):
        replace(rollouts, mask=rollouts.mask.double()).loss()
