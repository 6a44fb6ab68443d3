"""The loss equals what TRL's own ``GRPOTrainer._compute_loss`` returns on the same tensors, in value and gradient.

The method is TRL's, called on a stub that stands in for the trainer: one process, one micro-batch, float64.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import StepCounts, loss_normalizer
from vidreason.lightning_modules.functional.losses import PolicyLossOutput, grpo_loss
from vidreason.rewards.base import RewardInput
from vidreason.rewards.completion import parse_completion
from vidreason.rewards.overlong import OverlongReward

trl = pytest.importorskip("trl")

N, L, LONGEST = 6, 9, 12
VARIANTS = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo")


class Case:
    """Six completions of different lengths, none, one or all of them cut and therefore masked."""

    def __init__(self, seed: int, masked: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise() -> Tensor:
            return torch.randn(N, L, generator=generator, dtype=torch.float64)

        lengths = torch.tensor([9, 4, 7, 1, 3, 2])
        self.mask = torch.arange(L) < lengths[:, None]
        self.mask[list(masked)] = False
        self.old = -noise().abs() - 0.1
        self.logprobs = self.old + 0.7 * noise()
        self.ref = self.old + 0.4 * noise()
        self.rollout = self.old + 0.5 * noise()
        self.entropy = noise().abs()
        self.advantages = torch.tensor([1.3, -0.7, -2.0, 0.4, 1.0, 0.0], dtype=torch.float64)


def trl_loss(case: Case, logprobs: Tensor, entropy: Tensor, o: dict[str, Any]) -> tuple[Tensor, dict[str, list[float]]]:
    """Calls TRL's method; ``o`` holds our names."""
    level = o["ratio_level"] or ("sequence" if o["loss_type"] == "gspo" else "token")
    loss_type = "grpo" if o["loss_type"] == "gspo" else o["loss_type"]
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    corrects = o["importance_cap"] is not None
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        args=SimpleNamespace(
            delta=o["dual_clip"], use_bias_correction_kl=o["kl_bias_correction"], steps_per_generation=1
        ),
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=o["kl_coef"],
        epsilon_low=o["clip_eps_low"],
        epsilon_high=o["cispo_clip_max"] if loss_type == "cispo" else o["clip_eps_high"],
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        entropy_coef=o["entropy_coef"],
        _entropy_bonus_enabled=o["entropy_coef"] != 0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=corrects,
        vllm_importance_sampling_correction=corrects,
        _metrics=metrics,
    )
    inputs = {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.long),
        "prompt_mask": torch.ones(N, 1, dtype=torch.long),
        "completion_ids": torch.zeros(N, L, dtype=torch.long),
        "completion_mask": case.mask.long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old if o["off_policy"] else None,
        "ref_per_token_logps": case.ref,
        "num_items_in_batch": case.mask.sum(),
    }
    if corrects:  # what TRL computes beside the rollouts, mode token_truncate
        old = case.old if o["off_policy"] else logprobs.detach()
        inputs["importance_sampling_ratio"] = torch.exp((old - case.rollout) * case.mask).clamp(max=o["importance_cap"])
    loss = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    return loss, dict(metrics["train"])


def our_loss(case: Case, logprobs: Tensor, entropy: Tensor, o: dict[str, Any]) -> PolicyLossOutput:
    options = {name: value for name, value in o.items() if name != "off_policy"}
    counts = StepCounts(case.mask.sum().double(), torch.tensor(float(N)), torch.tensor(1.0))
    corrects = o["importance_cap"] is not None
    return grpo_loss(
        logprobs,
        case.advantages,
        case.mask,
        normalizer=loss_normalizer(o["loss_type"], counts, LONGEST),
        token_count=counts.tokens.clamp(min=1),
        old_logprobs=case.old if o["off_policy"] else None,
        rollout_logprobs=case.rollout if corrects else None,
        ref_logprobs=case.ref if o["kl_coef"] else None,
        entropy=entropy,
        **options,
    )


DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "ratio_level": None,
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.28,
    "cispo_clip_max": 5.0,
    "dual_clip": 3.0,
    "importance_cap": 2.0,
    "kl_coef": 0.04,
    "kl_bias_correction": False,
    "entropy_coef": 0.01,
    "off_policy": True,
}


def compare(case: Case, o: dict[str, Any]) -> tuple[PolicyLossOutput, dict[str, list[float]]]:
    """Asserts that both losses and their gradients are equal; returns what each says of itself."""
    leaves = [[t.clone().requires_grad_() for t in (case.logprobs, case.entropy)] for _ in range(2)]
    theirs, metrics = trl_loss(case, *leaves[0], o)
    ours = our_loss(case, *leaves[1], o)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-9, atol=1e-12)
    theirs.backward()
    ours.loss.backward()
    for a, b in zip(leaves[1], leaves[0], strict=True):
        wanted = torch.zeros_like(a) if b.grad is None else b.grad
        got = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    return ours, metrics


CLIPS = (
    {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0, "cispo_clip_max": 5.0},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.1, "dual_clip": None, "cispo_clip_max": 1.2},
    {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "dual_clip": 1.5, "cispo_clip_max": 0.9},
)
KLS = (
    {"kl_coef": 0.0},
    {"kl_coef": 0.1, "kl_bias_correction": False},
    {"kl_coef": 0.1, "kl_bias_correction": True},
)
MASKS = ((), (0, 3), tuple(range(N)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_clip_kl_and_masking(variant: str) -> None:
    for seed, (clip, kl, masked) in enumerate(itertools.product(CLIPS, KLS, MASKS)):
        given = {"entropy_coef": (0.0, 0.05)[seed % 2], "importance_cap": (None, 2.0, 1.1)[seed // 2 % 3]}
        compare(Case(seed, masked), DEFAULTS | {"loss_type": variant} | clip | kl | given)


LEVELS = [(variant, level) for variant in VARIANTS for level in ("token", "sequence") if variant != "gspo"]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "level"), [*LEVELS, ("gspo", None)])
def test_every_combination(variant: str, level: str | None) -> None:
    rest = itertools.product(CLIPS, KLS, (0.0, 0.05), MASKS, (None, 2.0, 1.1), (True, False))
    for seed, (clip, kl, entropy_coef, masked, cap, off_policy) in enumerate(rest):
        given = {"entropy_coef": entropy_coef, "importance_cap": cap, "off_policy": off_policy}
        options = DEFAULTS | {"loss_type": variant, "ratio_level": level} | clip | kl | given
        compare(Case(seed, masked), options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "flag",
    [
        {"clip_eps_low": 0.05},
        {"clip_eps_high": 0.02},
        {"dual_clip": 1.3},
        {"cispo_clip_max": 1.05},
        {"importance_cap": None},
        {"importance_cap": 1.05},
        {"kl_coef": 0.0},
        {"kl_bias_correction": True},
        {"entropy_coef": 0.0},
        {"off_policy": False},
    ],
    ids=lambda flag: "-".join(f"{k}={v}" for k, v in flag.items()),
)
def test_every_flag_flips_both_numbers(variant: str, flag: dict[str, Any]) -> None:
    case, options = Case(7), DEFAULTS | {"loss_type": variant, "ratio_level": "token"}
    plain = compare(case, options)[0].loss.item()
    flipped = compare(case, options | flag)[0].loss.item()
    only_cispo, never_cispo = {"cispo_clip_max"}, {"clip_eps_low", "clip_eps_high", "dual_clip"}
    has_no_effect = set(flag) & (never_cispo if variant == "cispo" else only_cispo)
    assert (flipped == plain) == bool(has_no_effect)


def test_every_variant_is_another_number() -> None:
    case = Case(3)
    losses = {variant: compare(case, DEFAULTS | {"loss_type": variant})[0].loss.item() for variant in VARIANTS}
    assert losses.pop("bnpo") == pytest.approx(losses["dapo"]), "with one micro-batch they are the same"
    assert len({round(loss, 9) for loss in losses.values()}) == len(losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_are_those_of_trl(variant: str) -> None:
    ours, theirs = compare(Case(2), DEFAULTS | {"loss_type": variant, "ratio_level": "token"})
    assert theirs["kl"] == pytest.approx([ours.kl.item()])
    assert theirs["entropy"] == pytest.approx([ours.entropy.item()])
    if variant == "cispo":
        assert theirs["cispo_clip_ratio"] == pytest.approx([ours.clip_high.item()])
    else:
        assert theirs["clip_ratio/low_mean"] == pytest.approx([ours.clip_low.item()])
        assert theirs["clip_ratio/high_mean"] == pytest.approx([ours.clip_high.item()])
        assert theirs["clip_ratio/region_mean"] == pytest.approx([ours.clip_region.item()])
        assert ours.clip_low.item() > 0
        assert ours.clip_high.item() > 0


def test_the_soft_length_penalty_is_that_of_trl() -> None:
    rewards = pytest.importorskip("trl.rewards")
    lengths = list(range(1, 31))
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=12)(
        completion_ids=[[0] * n for n in lengths]
    )
    ours = OverlongReward(max_tokens=30, buffer=12)
    for n, expected in zip(lengths, theirs, strict=True):
        item = RewardInput("", parse_completion(""), "a", ("a", "b"))
        assert ours(RewardInput(**(vars(item) | {"n_tokens": n}))) == pytest.approx(expected)
