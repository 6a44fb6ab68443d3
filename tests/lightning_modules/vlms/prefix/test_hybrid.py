"""Families whose decoders mix full attention with sliding windows (Gemma 4) or linear attention (Qwen3.5)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import vlm_builders as builders
from torch import Tensor, nn
from vlm_builders import TREE, gradients, make_prompts, make_texts

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix import expand, layout
from vidreason.testing.samples import relative_gap

MakeVLM = Callable[..., VLM]
FAMILIES = ("gemma4", "qwen3_5")
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRAOptions(r=4, alpha=8)},
    "full": {"freeze_vision": False},
}
SLOW_FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def build(make_vlm: MakeVLM, family: str, trained: str = "full", **options: Any) -> tuple[VLM, nn.Module]:
    vlm = make_vlm(family, dtype="float32", **TRAINED[trained], **options)
    torch.manual_seed(0)  # LoRA's A
    model = vlm.build()
    builders.randomise_lora(model)
    return vlm, model


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Returns the bytes of the tensors that a forward pass keeps for its backward pass; shared memory counts once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(kept.values())


def test_adapters_reach_linear_attention(make_vlm: MakeVLM) -> None:
    _, model = build(make_vlm, "qwen3_5", "lora")
    reached = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    linear = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    assert reached == linear | {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_logprobs_equal_scores(make_vlm: MakeVLM, family: str) -> None:
    vlm, model = build(make_vlm, family, "lora")
    prompts = make_prompts(vlm)
    generated = vlm.generate(model, prompts, 3, Sampling(12), [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    scores = vlm.score(model, prompts, vlm.texts_from(generated))
    torch.testing.assert_close(generated.logprobs, scores.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SLOW_FAMILIES)
def test_padding_before_a_text_would_change_its_scores(
    make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    vlm, model = build(make_vlm, family)
    prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
    with torch.no_grad():
        right = vlm.score(model, prompts, texts).logprobs
        monkeypatch.setattr(expand, "layers_with_state", lambda model: None)
        padded = vlm.score(model, prompts, texts).logprobs
    assert (padded - right).abs().max() > 0.1


@pytest.mark.parametrize("family", SLOW_FAMILIES)
def test_checkpointing_keeps_a_fraction(make_vlm: MakeVLM, family: str) -> None:
    """Checkpointing keeps hidden states between layers, the cache of the prompts, and what is outside of layers."""
    kept = {}
    for checkpointing in (False, True):
        vlm, model = build(make_vlm, family, "lora", gradient_checkpointing=checkpointing, route="expand")
        prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
        kept[checkpointing] = kept_bytes(lambda: vlm.score(model, prompts, texts).logprobs)  # noqa: B023
    with torch.no_grad():
        model.eval()
        _, prefix = expand.prefill(vlm, model, prompts, lambda hidden, head: head(hidden[:, -1]))
    states = [value for layer in prefix.cache.layers for value in vars(layer).values()]
    states += [value for each in states if isinstance(each, dict) for value in each.values()]
    cached = sum(value.nbytes for value in states if isinstance(value, Tensor))
    print(f"{family}: {kept[False]} bytes without checkpointing, {kept[True]} with it, and {cached} in the cache")
    assert kept[True] + cached < kept[False] / 5


@pytest.mark.parametrize("family", SLOW_FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forwards_of_one_token_have_gradients(make_vlm: MakeVLM, family: str, checkpointing: bool) -> None:
    """For one token behind a cache, linear attention has other kernels, one of which would write to its state."""
    vlm, model = build(make_vlm, family, gradient_checkpointing=checkpointing)
    prompts, texts = make_prompts(vlm), make_texts(vlm, [(0, -1, 2), (0, -1, 2), (1, -1, 2), (2, -1, 2)])
    naive, found = (gradients(vlm, model, prompts, texts, route) for route in ("naive", "expand"))
    torch.testing.assert_close(found.pop("logprobs"), naive.pop("logprobs"), rtol=0, atol=1e-5)
    assert relative_gap(found, naive) < 1e-5


def test_a_decoder_without_full_attention_is_refused(make_vlm: MakeVLM) -> None:
    vlm, model = build(make_vlm, "qwen3_5", "lora")
    layout.text_config(model).layer_types = ["linear_attention"] * 3
    with pytest.raises(ValueError, match=r"^Qwen3_5\w+ has linear attention in every layer[^\n]*$"):
        vlm.generate(model, make_prompts(vlm), 1, Sampling(2))


def test_an_old_transformers_is_refused(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make_vlm("gemma4")
    monkeypatch.setattr(transformers, "__version__", "5.22.3")
    with pytest.raises(ValueError, match=r"^transformers 5.22.3 cannot run Gemma 4 on videos: install 5.23 or newer$"):
        vlm.build()
