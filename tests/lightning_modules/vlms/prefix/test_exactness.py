"""The shared prefix equals the naive route in value and gradient: families x what is trained x checkpointing x route x
chunks. Differences are relative to norms; LoRA's B is randomised, ratios are off 1 so that clipping acts.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import vlm_builders as builders
from vidreason.testing.samples import norm_of, relative_gap
from torch import Tensor, nn
from vlm_builders import make_prompts, make_texts

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions

MakeVLM = Callable[..., VLM]
LORA = LoRAOptions(r=4, alpha=8)
FAMILIES = ("tiny", "qwen", "smolvlm")
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "full": {},
    "nf4": {"lora": LORA, "quantize": "nf4"},
}
# route and gradient checkpointing
MODES = (("expand", False), ("packed", False), ("packed", True), ("expand", True))
CHUNKS = (None, 2)
EVERY = list(itertools.product(FAMILIES, TRAINED, MODES, CHUNKS))
# every value of one axis with every value of another, in twelve of the 72
PAIRS = [
    (family, tuple(TRAINED)[(f + m) % 3], mode, CHUNKS[(f + m) % 2])
    for (f, family), (m, mode) in itertools.product(enumerate(FAMILIES), enumerate(MODES))
]
# families that differ in what goes in and in positions, and share their decoder's layers with the ones above
PAIRS += [
    ("qwen3", "lora", MODES[2], None),
    ("qwen3", "full", MODES[0], 2),
    ("glm", "lora", MODES[0], 2),
    ("glm", "full", MODES[1], None),
    ("internvl", "lora", MODES[1], 2),
    ("internvl", "full", MODES[0], None),
    ("onevision", "lora", MODES[0], None),
    ("onevision", "full", MODES[2], 2),
    ("nextvideo", "lora", MODES[0], 2),
    ("glm46", "full", MODES[2], None),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in PAIRS]


class Measured(NamedTuple):
    """What one route computes."""

    logprobs: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


def build(make_vlm: MakeVLM, family: str, trained: str, **options: Any) -> tuple[VLM, nn.Module]:
    frozen = trained != "full" or family == "tiny"  # its tower's batch norm sees another batch in the naive route
    vlm = make_vlm(family, **{"dtype": "float32", "freeze_vision": frozen, **TRAINED[trained], **options})
    torch.manual_seed(0)  # LoRA's A
    model = vlm.build()
    builders.randomise_lora(model)
    return vlm, model


def measure(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, old: Tensor) -> Measured:
    """Backward through a clipped policy-gradient loss with an entropy term."""
    model.zero_grad()
    scores = vlm.score(model, prompts, texts, temperature=0.8, with_entropy=True)
    assert scores.entropy is not None
    advantages = torch.randn(len(texts), 1, generator=torch.Generator().manual_seed(1))
    ratio = (scores.logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages) + 0.1 * scores.entropy
    clipped = ratio * advantages > ratio.clamp(0.8, 1.28) * advantages
    assert 0.05 < clipped[texts.loss_mask].float().mean() < 0.8
    (-gain * texts.loss_mask).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Measured(scores.logprobs.detach(), scores.entropy.detach(), gradients)


def old_logprobs(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch) -> Tensor:
    vlm.route = "naive"
    with torch.no_grad():
        now = vlm.score(model, prompts, texts, temperature=0.8).logprobs
    return now + 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(2))


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float]:
    """How far gradients ``a`` are from ``b``: over all, and for the worst tensor above the floor."""
    overall, floor = relative_gap(a, b), 1e-6 * norm_of(b.values())
    return overall, max(float(((a[n] - b[n]).norm() - floor).clamp(min=0) / b[n].norm().clamp(min=1e-12)) for n in b)


@pytest.fixture(scope="module")
def naive(make_vlm: MakeVLM) -> Callable[[str, str], tuple[Measured, Tensor]]:
    known: dict[tuple[str, str], tuple[Measured, Tensor]] = {}

    def reference(family: str, trained: str) -> tuple[Measured, Tensor]:
        if (family, trained) not in known:
            vlm, model = build(make_vlm, family, trained)
            prompts, texts = make_prompts(vlm), make_texts(vlm)
            old = old_logprobs(vlm, model, prompts, texts)
            known[family, trained] = measure(vlm, model, prompts, texts, old), old
        return known[family, trained]

    return reference


@pytest.mark.parametrize(("family", "trained", "mode", "chunk"), [*PAIRS, *SLOW])
def test_equals_naive(
    make_vlm: MakeVLM,
    naive: Callable[[str, str], tuple[Measured, Tensor]],
    family: str,
    trained: str,
    mode: tuple[str, bool],
    chunk: int | None,
) -> None:
    expected, old = naive(family, trained)
    route, checkpointing = mode
    vlm, model = build(make_vlm, family, trained, gradient_checkpointing=checkpointing)
    vlm.route, vlm.completion_chunk = route, chunk  # type: ignore[assignment]
    prompts, texts = make_prompts(vlm), make_texts(vlm)
    found = measure(vlm, model, prompts, texts, old)

    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-5)
    assert (expected.logprobs[texts.loss_mask] != 0).all()
    assert (found.logprobs[~texts.loss_mask] == 0).all()
    overall, worst = gap(found.gradients, expected.gradients)
    print(f"log-probs {(found.logprobs - expected.logprobs).abs().max():.1e}, gradients {overall:.1e}, {worst:.1e}")
    assert overall < 1e-5
    assert worst < 1e-5
    tower = any("visual" in name or "vision" in name for name in found.gradients)
    assert tower == (trained == "full" and family != "tiny")

    with torch.no_grad():
        other = vlm.score(model, make_prompts(vlm, seed=50), texts, temperature=0.8).logprobs
    assert ((other - found.logprobs).abs() > 1e-4)[texts.loss_mask].float().mean() > 0.9, "the video matters"


HALF = [
    pytest.param(family, mode, chunk, marks=() if fast else pytest.mark.slow)
    for (f, family), (m, mode), chunk in itertools.product(enumerate(FAMILIES), enumerate(MODES), CHUNKS)
    for fast in [f == m % 3 and (chunk is None) == (f == 0)]
]


@pytest.mark.parametrize(("family", "mode", "chunk"), HALF)
def test_bfloat16_is_no_worse_than_naive(
    make_vlm: MakeVLM, family: str, mode: tuple[str, bool], chunk: int | None
) -> None:
    """Errors against naive in fp32, with the same weights."""
    route, checkpointing = mode
    measured: dict[str, Measured] = {}
    old = None
    for name, dtype in (("exact", "float32"), ("naive", "bfloat16"), ("shared", "bfloat16")):
        vlm, model = build(
            make_vlm, family, "lora", dtype=dtype, gradient_checkpointing=checkpointing and name == "shared"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        prompts, texts = make_prompts(vlm), make_texts(vlm)
        if old is None:
            old = old_logprobs(vlm, model, prompts, texts)
        vlm.route, vlm.completion_chunk = "naive", None
        if name == "shared":
            vlm.route, vlm.completion_chunk = route, chunk  # type: ignore[assignment]
        measured[name] = measure(vlm, model, prompts, texts, old)

    def error(name: str) -> tuple[float, float]:
        found, exact = measured[name], measured["exact"]
        gradients = {key: value.float() for key, value in found.gradients.items()}
        return float((found.logprobs - exact.logprobs).norm()), gap(gradients, exact.gradients)[0]

    naive, shared = error("naive"), error("shared")
    print(f"error of shared over naive: log-probs {shared[0] / naive[0]:.2f}, gradients {shared[1] / naive[1]:.2f}")
    assert naive[0] > 1e-3, "bfloat16 was used"
    assert shared[0] <= 2 * naive[0]
    assert shared[1] <= 2 * naive[1]
