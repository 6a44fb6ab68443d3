"""Tests how terms add up: each variant against its paper's formula in a slow loop, with any micro-batches."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import (
    LOSS_TYPES,
    StepCounts,
    level_of,
    log_ratio_at,
    loss_normalizer,
    summed_terms,
    token_normalizer,
)
from vidreason.lightning_modules.functional.losses import PolicyLossOutput, grpo_loss
from vidreason.lightning_modules.functional.policy_terms import largest_gap

N, L, LONGEST = 8, 7, 10
LENGTHS = [7, 2, 5, 1, 3, 6, 4, 2]
EXACT = [name for name in LOSS_TYPES if name != "bnpo"]


class Step:
    """Eight completions; the second was cut and is masked, the last group is dead."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise() -> Tensor:
            return torch.randn(N, L, generator=generator, dtype=torch.float64)

        self.mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
        self.mask[1] = False
        self.old = -noise().abs()
        self.logprobs = (self.old + 0.6 * noise()).requires_grad_()
        self.ref = self.old + 0.3 * noise()
        self.entropy = noise().abs()
        self.advantages = torch.tensor([1.2, -0.4, -1.5, 0.7, 2.0, -1.0, 0.0, 0.0], dtype=torch.float64)

    def counts(self, parts: int) -> StepCounts:
        return StepCounts(self.mask.sum().double(), torch.tensor(8.0).double(), torch.tensor(float(parts)).double())

    def loss(self, loss_type: Any, rows: slice, parts: int, **options: Any) -> PolicyLossOutput:
        counts = self.counts(parts)
        return grpo_loss(
            self.logprobs[rows],
            self.advantages[rows],
            self.mask[rows],
            normalizer=loss_normalizer(loss_type, counts, LONGEST),
            token_count=token_normalizer(counts),
            old_logprobs=self.old[rows],
            ref_logprobs=self.ref[rows],
            entropy=self.entropy[rows],
            loss_type=loss_type,
            **{"kl_coef": 0.1, "entropy_coef": 0.01, **options},
        )


def slow(step: Step, loss_type: str) -> tuple[float, list[list[float]]]:
    """The papers' sums, one completion and one token at a time; value, and gradient by hand."""
    low, high, dual, beta, longest = 0.2, 0.28, 3.0, 0.1, LONGEST
    tokens = int(step.mask.sum())
    total, gradient = 0.0, [[0.0] * L for _ in range(N)]
    for i in range(N):
        steps = [t for t in range(L) if step.mask[i, t]]
        share = {
            "dapo": 1 / tokens,
            "cispo": 1 / tokens,
            "bnpo": 1 / tokens,
            "dr_grpo": 1 / (N * longest),
            "grpo": 1 / (N * max(len(steps), 1)),
            "gspo": 1 / (N * max(len(steps), 1)),
        }[loss_type]
        gaps = {t: (step.logprobs[i, t] - step.old[i, t]).item() for t in steps}
        a = step.advantages[i].item()
        for t in steps:
            log_ratio = sum(gaps.values()) / len(steps) if loss_type == "gspo" else gaps[t]
            r = math.exp(log_ratio)
            if loss_type == "cispo":
                weight = min(r, 5.0)
                term = -weight * a * step.logprobs[i, t].item()
                slope = {t: -weight * a}
            else:
                clipped = min(max(r, 1 - low), 1 + high)
                term = -min(r * a, clipped * a)
                moves = r * a <= clipped * a and not (a < 0 and term > -dual * a)
                term = min(term, -dual * a) if a < 0 else term
                spread = steps if loss_type == "gspo" else [t]
                slope = {u: -r * a / len(spread) for u in spread} if moves else {}
            rho = math.exp((step.ref[i, t] - step.logprobs[i, t]).item())
            total += share * (term + beta * (rho - math.log(rho) - 1)) - 0.01 * step.entropy[i, t].item() / tokens
            for u, value in slope.items():
                gradient[i][u] += share * value
            gradient[i][t] += share * beta * (1 - rho)
    return total, gradient


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_variant_is_its_formula(loss_type: str, seed: int) -> None:
    step = Step(seed)
    loss = step.loss(loss_type, slice(None), 1).loss
    value, gradient = slow(step, loss_type)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(step.logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def run(loss_type: str, sizes: list[int]) -> tuple[PolicyLossOutput, Tensor]:
    """Sums and gradient of the step, cut into parts of these sizes."""
    step, start, losses = Step(5), 0, []
    for size in sizes:
        loss = step.loss(loss_type, slice(start, start + size), len(sizes))
        loss.loss.backward()
        losses.append(PolicyLossOutput(*(value.detach() for value in loss)))
        start += size
    assert step.logprobs.grad is not None
    return PolicyLossOutput(*(torch.stack(values).sum() for values in zip(*losses, strict=True))), step.logprobs.grad


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [1, 7], [3, 2, 2, 1]])
@pytest.mark.parametrize("loss_type", EXACT)
def test_micro_batches_do_not_matter(loss_type: str, sizes: list[int]) -> None:
    whole, cut = run(loss_type, [8]), run(loss_type, sizes)
    for a, b in zip((*whole[0], whole[1]), (*cut[0], cut[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_bnpo_alone_depends_on_the_micro_batches() -> None:
    whole, cut = run("bnpo", [8]), run("bnpo", [1, 7])
    assert whole[0].loss.item() != pytest.approx(cut[0].loss.item(), rel=1e-3)
    torch.testing.assert_close(whole[0].loss, run("dapo", [8])[0].loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_that_counts_is_a_loss_of_zero_with_a_gradient(loss_type: str) -> None:
    step = Step()
    step.mask[:] = False
    loss = step.loss(loss_type, slice(None), 1).loss
    assert loss.item() == 0
    loss.backward()
    assert step.logprobs.grad is not None
    assert (step.logprobs.grad == 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_may_hold_anything(loss_type: str) -> None:
    clean, spoiled = Step(1), Step(1)
    for name in ("logprobs", "old", "ref"):
        values = getattr(spoiled, name).detach().masked_fill(~spoiled.mask, math.nan)
        setattr(spoiled, name, values.requires_grad_(name == "logprobs"))
    losses = [step.loss(loss_type, slice(None), 1, kl_bias_correction=True) for step in (clean, spoiled)]
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)
    for loss in losses:
        loss.loss.backward()
    torch.testing.assert_close(clean.logprobs.grad, spoiled.logprobs.grad)


def test_normalizers_by_hand() -> None:
    counts = StepCounts(torch.tensor(30.0), torch.tensor(8.0), torch.tensor(2.0))
    wanted = {"dapo": 30, "cispo": 30, "dr_grpo": 8 * 12, "grpo": 8, "gspo": 8, "bnpo": 2}
    assert {name: float(loss_normalizer(name, counts, 12)) for name in LOSS_TYPES} == wanted
    empty = counts._replace(tokens=torch.tensor(0.0))
    assert float(loss_normalizer("dapo", empty)) == 1
    half = counts._replace(tokens=torch.tensor(0.5))
    assert float(token_normalizer(half)) == 0.5, "one token on one of two ranks"
    with pytest.raises(ValueError, match="max_completion_length"):
        loss_normalizer("dr_grpo", counts)
    with pytest.raises(ValueError, match="grpo, dr_grpo, dapo, bnpo, cispo, gspo, got 'ppo'"):
        loss_normalizer("ppo", counts)  # type: ignore[arg-type]


def test_sums_by_hand() -> None:
    terms = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert float(summed_terms(terms, mask, "dapo")) == 16
    assert float(summed_terms(terms, mask, "dr_grpo")) == 16
    assert float(summed_terms(terms, mask, "grpo")) == 12
    assert float(summed_terms(terms, mask, "bnpo")) == 4


def test_levels() -> None:
    assert [level_of("gspo", None), level_of("dapo", None), level_of("dapo", "sequence")] == [
        "sequence",
        "token",
        "sequence",
    ]
    ratios = torch.tensor([[0.1, 0.3, 9.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(log_ratio_at("sequence", ratios, mask), torch.tensor([[0.2] * 3, [1.0] * 3]))
    assert log_ratio_at("token", ratios, mask) is ratios


def test_errors() -> None:
    step = Step()
    with pytest.raises(ValueError, match="token_count"):
        grpo_loss(step.logprobs, step.advantages, step.mask, normalizer=8, loss_type="grpo")
    with pytest.raises(ValueError, match="cispo_clip_max"):
        step.loss("cispo", slice(None), 1, cispo_clip_max=0.0)
    with pytest.raises(ValueError, match="loss_type"):
        grpo_loss(step.logprobs, step.advantages, step.mask, normalizer=8, loss_type="ppo")  # type: ignore[arg-type]


def test_largest_gap() -> None:
    old, rollout = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.25, -1.5, 5.0]])
    assert float(largest_gap(old, rollout, torch.tensor([[True, True, False]]))) == 0.5
    assert float(largest_gap(old, rollout, torch.tensor([[False] * 3]))) == 0
    assert float(largest_gap(old[:0], rollout[:0], torch.zeros(0, 3, dtype=torch.bool))) == 0
