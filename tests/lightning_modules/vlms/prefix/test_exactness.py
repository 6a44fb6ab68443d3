"""Differences between routes are rounding: in float64 they vanish, and in bfloat16 no route is worse than naive.

``test_contract.py`` has fp32, where two orders of the same sums differ by up to 1e-5 in ill-conditioned decoders.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from vlm_builders import gradients, make_prompts, make_texts, randomise_lora

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.testing.samples import relative_gap

MakeVLM = Callable[..., VLM]
# route, gradient checkpointing and chunks
MODES = (("expand", False, None), ("packed", True, 2), ("packed", False, 2), ("expand", True, None))
ONLY_EXPANDED = ("gemma4", "qwen3_5")
CASES = [
    pytest.param(family, mode, marks=() if (family, mode) == ("qwen", MODES[1]) else pytest.mark.slow)
    for family in FAMILIES
    for mode in MODES
    if mode[0] == "expand" or family not in ONLY_EXPANDED
]


class WideTorch:
    """``torch`` with float64 in the place of float32, for a module whose linear attention computes in float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)


@pytest.mark.parametrize(
    "family", [family if family == "qwen3_5" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_float64_leaves_no_difference(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Trees behind prompts, with checkpointing and chunks; what is left is the head's softmax, in float32."""
    monkeypatch.setattr("transformers.models.qwen3_5.modeling_qwen3_5.torch", WideTorch())
    found = {}
    for route in ("naive", "expand", "packed")[: 2 if family in ONLY_EXPANDED else 3]:
        shared = route != "naive"
        options = {"gradient_checkpointing": shared, "completion_chunk": 2 if shared else None}
        vlm = make_vlm(family, lora=LoRAOptions(r=4, alpha=8), vision_cache=None, **options)
        torch.manual_seed(0)  # LoRA's A
        model = vlm.build().double()
        randomise_lora(model)
        prompts = make_prompts(vlm)
        wide = {k: v.double() if k.startswith("pixel") else v for k, v in prompts.inputs.items()}
        found[route] = gradients(vlm, model, replace(prompts, inputs=wide), make_texts(vlm), route)
    naive = found.pop("naive")
    for route, values in found.items():
        gaps = {name: float((values.pop(name) - naive[name]).abs().max()) for name in ("logprobs", "entropy")}
        gap = relative_gap(values, {name: naive[name] for name in values})
        print(f"{family}, {route}: {gaps}, gradients {gap:.1e}")
        assert max(*gaps.values(), gap) < 1e-6


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_bfloat16_is_no_worse_than_naive(make_vlm: MakeVLM, family: str, mode: tuple[str, bool, int | None]) -> None:
    """Errors against naive in fp32, with the same weights."""
    route, checkpointing, chunk = mode
    measured: dict[str, dict[str, Tensor]] = {}
    for name, dtype in (("exact", "float32"), ("naive", "bfloat16"), ("shared", "bfloat16")):
        shared = name == "shared"
        vlm = make_vlm(
            family,
            dtype=dtype,
            lora=LoRAOptions(r=4, alpha=8),
            gradient_checkpointing=checkpointing and shared,
            completion_chunk=chunk if shared else None,
        )
        torch.manual_seed(0)  # LoRA's A
        model = vlm.build()
        randomise_lora(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        prompts, texts = make_prompts(vlm), make_texts(vlm)
        found = gradients(vlm, model, prompts, texts, route if shared else "naive")
        measured[name] = {key: value.float() for key, value in found.items()}
    exact = measured.pop("exact")
    logprobs = {name: float((found.pop("logprobs") - exact["logprobs"]).norm()) for name, found in measured.items()}
    for found in measured.values():
        del found["entropy"]
    rest = {key: value for key, value in exact.items() if key not in ("logprobs", "entropy")}
    errors = {name: relative_gap(found, rest) for name, found in measured.items()}
    print(f"error of shared over naive: log-probs {logprobs['shared'] / logprobs['naive']:.2f}, ", end="")
    print(f"gradients {errors['shared'] / errors['naive']:.2f}")
    assert logprobs["naive"] > 1e-3, "bfloat16 was used"
    assert logprobs["shared"] <= 2 * logprobs["naive"]
    assert errors["shared"] <= 2 * errors["naive"]
