"""In bfloat16, a shared prefix is as near to fp32 as the naive route is; ``test_contract.py`` has fp32."""

from collections.abc import Callable

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
