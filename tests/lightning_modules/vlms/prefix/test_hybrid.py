"""Families whose decoders mix full attention with sliding windows (Gemma 4) or linear attention (Qwen3.5)."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from vidreason.testing.samples import relative_gap
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer
from vlm_builders import PROMPTS, TREE, gradients, make_prompts, make_texts

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix import expand
from vidreason.lightning_modules.vlms.prefix.layout import unwrap

MakeVLM = Callable[..., VLM]
FAMILIES = ("gemma4", "qwen3_5")
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRAOptions(r=4, alpha=8)},
    "full": {"freeze_vision": False},
    "nf4": {"lora": LoRAOptions(r=4, alpha=8), "quantize": "nf4"},
}
# gradient checkpointing and chunks
CASES = [
    pytest.param(*case, marks=() if case[1:] == ("lora", True, 2) else pytest.mark.slow)
    for case in itertools.product(FAMILIES, TRAINED, (False, True), (None, 2))
]
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


@pytest.mark.parametrize(("family", "trained", "checkpointing", "chunk"), CASES)
def test_equals_naive(make_vlm: MakeVLM, family: str, trained: str, checkpointing: bool, chunk: int | None) -> None:
    vlm, model = build(make_vlm, family, trained, gradient_checkpointing=checkpointing)
    prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
    naive = gradients(vlm, model, prompts, texts, "naive")
    vlm.completion_chunk = chunk
    found = gradients(vlm, model, prompts, texts, "auto")
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(found.pop(name), naive.pop(name), rtol=0, atol=1e-5)
    assert relative_gap(found, naive) < 1e-5
    reached = {name.split(".lora_")[0].rpartition(".")[2] for name, value in found.items() if value.abs().max() > 0}
    linear = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"} if family == "qwen3_5" else set()
    assert trained == "full" or linear | {"q_proj", "k_proj", "down_proj"} <= reached


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(make_vlm: MakeVLM, family: str) -> None:
    vlm, model = build(make_vlm, family)
    ours = vlm.generate(model, make_prompts(vlm), 2, Sampling(16, temperature=0))
    model.eval()
    assert len(set(ours.texts)) == len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = vlm.encode([builders.make_example(prompt=prompt, seed=i)]).prompts.inputs
        theirs = model.generate(  # type: ignore[operator]
            **alone, do_sample=False, max_new_tokens=16, suppress_tokens=sorted(vlm.suppressed_ids)
        )
        for row in (2 * i, 2 * i + 1):
            assert ours.ids[row][ours.mask[row]].tolist() == theirs[0, alone["input_ids"].shape[1] :].tolist()


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
def test_the_video_matters_and_is_encoded_once(make_vlm: MakeVLM, family: str) -> None:
    vlm, model = build(make_vlm, family, "lora")
    texts, seen = make_texts(vlm, TREE), list[int]()
    tower = unwrap(model).get_submodule(vlm.vision_modules[0])
    tower.register_forward_pre_hook(lambda *_: seen.append(1))
    clips = [[builders.make_example(prompt=p, seed=s + i) for i, p in enumerate(PROMPTS)] for s in (0, 50)]
    one, other = (vlm.score(model, vlm.encode(examples).prompts, texts).logprobs for examples in clips)
    assert ((one - other).abs() > 1e-4)[texts.loss_mask].float().mean() > 0.9
    assert len(seen) == 2

    known = [replace(clip, sample=replace(clip.sample, identity=clip.sample.video_id)) for clip in clips[0]]
    for _ in range(2):
        cached = vlm.score(model, vlm.encode(known).prompts, texts).logprobs
        torch.testing.assert_close(cached, one, rtol=0, atol=1e-5)
    assert len(seen) == 2 + len(PROMPTS), "the second time, the embeddings come from the cache"


@pytest.mark.parametrize("family", SLOW_FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forwards_of_one_token_have_gradients(make_vlm: MakeVLM, family: str, checkpointing: bool) -> None:
    """For one token behind a cache, linear attention has other kernels, one of which would write to its state."""
    vlm, model = build(make_vlm, family, gradient_checkpointing=checkpointing)
    prompts, texts = make_prompts(vlm), make_texts(vlm, [(0, -1, 2), (0, -1, 2), (1, -1, 2), (2, -1, 2)])
    naive, found = (gradients(vlm, model, prompts, texts, route) for route in ("naive", "expand"))
    torch.testing.assert_close(found.pop("logprobs"), naive.pop("logprobs"), rtol=0, atol=1e-5)
    assert relative_gap(found, naive) < 1e-5


@pytest.mark.slow
def test_an_old_transformers_is_refused(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of older versions do not say how many inputs the convolution of a layer needs."""
    vlm, model = build(make_vlm, "qwen3_5")
    monkeypatch.setattr(LinearAttentionLayer, "update_conv_state", lambda self, conv_states, **kwargs: conv_states)
    with pytest.raises(ValueError, match="transformers .* cannot extend linear attention: install 5.24 or newer"):
        vlm.score(model, make_prompts(vlm), make_texts(vlm, TREE))
