"""Tests where embeddings are not cached, since they change, and what the key of one depends on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from watched_vision import LORA, built, counting, prompts_of, texts_of, tower

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.vision_cache import cache as vision_cache

MakeVLM = Callable[..., VLM]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged about the cache."""
    said: list[str] = []
    monkeypatch.setattr(vision_cache, "rank_zero_info", said.append)
    return said


def test_training_the_merger_one_step_turns_it_off(make_vlm: MakeVLM, messages: list[str]) -> None:
    """Every one of its scores must be of the weights as they are then; frozen again, it has another key."""
    vlm, model = built(make_vlm, "qwen")
    prompts, texts = prompts_of(vlm), texts_of(vlm)
    before = vlm.score(model, prompts, texts).logprobs.detach()
    merger = unwrap(model).model.visual.merger
    merger.requires_grad_(True)
    with counting(vlm, model) as calls:
        optimizer = torch.optim.SGD(merger.parameters(), lr=0.5)
        vlm.score(model, prompts, texts).logprobs.sum().backward()
        optimizer.step()
        after = vlm.score(model, prompts, texts).logprobs.detach()
        assert len(calls) == 2
        assert (after - before).abs().max() > 1e-3
        merger.requires_grad_(False)
        frozen = vlm.score(model, prompts, texts).logprobs
        assert len(calls) == 4  # two videos under a new key
        vlm.score(model, prompts, texts)
        assert len(calls) == 4
    torch.testing.assert_close(frozen.detach(), after, rtol=0, atol=1e-5)
    assert len(messages) == 2
    assert "a clip and stay in memory" in messages[0]
    assert "not cached: model.visual.merger" in messages[1]
    assert "is trained" in messages[1]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen", {"lora": LoRAOptions(target_modules=("mlp.0", "q_proj")), "freeze_vision": False}, "an adapter"),
        ("tiny", {"lora": LoRAOptions(target_modules=("linear", "q_proj"))}, "projector.linear carries an adapter"),
        ("smolvlm", {"lora": LoRAOptions(target_modules=("proj", "q_proj"))}, "connector"),
        ("tiny", {"lora": None}, "projector.norm.weight is trained"),
        ("smolvlm", {"lora": None}, "connector.modality_projection.proj.weight is trained"),
        ("qwen", {"lora": None, "freeze_vision": False}, "visual"),
        ("qwen", {"route": "naive"}, "route 'naive'"),
    ],
)
def test_off_by_itself_and_says_why(
    make_vlm: MakeVLM,
    messages: list[str],
    family: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    vlm, model = built(make_vlm, family, **options)
    prompts, texts = prompts_of(vlm), texts_of(vlm)
    with counting(vlm, model) as calls:
        vlm.score(model, prompts, texts)
        vlm.score(model, prompts, texts)
    assert len(calls) == 2
    assert len(messages) == 1
    assert reason in messages[0]


def test_off_where_a_tower_is_in_train_mode(make_vlm: MakeVLM, messages: list[str]) -> None:
    """Batch normalisation in train mode: an embedding depends on the batch."""
    vlm, model = built(make_vlm, "tiny")
    for module in tower(vlm, model).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    vlm.score(model, prompts_of(vlm), texts_of(vlm))
    assert "normalises over the batch" in messages[0]


def test_off_where_nobody_says_which_frames_they_are(make_vlm: MakeVLM, messages: list[str], family: str) -> None:
    vlm, model = built(make_vlm, family)
    prompts = replace(prompts_of(vlm), videos=("video 0", ""))
    with counting(vlm, model) as calls:
        vlm.score(model, prompts, texts_of(vlm))
        vlm.score(model, prompts, texts_of(vlm))
    assert len(calls) == 2
    assert "jittered" in messages[0]


def test_the_key_holds_all_that_an_embedding_depends_on(make_vlm: MakeVLM) -> None:
    """Buffers included: the running statistics of batch normalisation."""

    def key(family: str = "tiny", change: Callable[[Any], None] | None = None, video: int = 0, **options: Any) -> str:
        vlm, model = built(make_vlm, family, **options)
        cache = vlm.vision_cache
        assert cache is not None
        found: list[str] = []
        inner = cache._keys
        cache._keys = lambda *a: found.extend(inner(*a)) or inner(*a)  # type: ignore[method-assign, func-returns-value]
        if change is not None:
            change(unwrap(model))
        vlm.score(model, prompts_of(vlm, (video,)), texts_of(vlm, 1))
        return found[0]

    def statistics(base: Any) -> None:
        base.model.visual.stages[0][1].running_mean += 0.1

    def projector(base: Any) -> None:
        with torch.no_grad():
            base.model.projector.linear.weight[0, 0] += 1e-3

    def decoder(base: Any) -> None:
        with torch.no_grad():
            base.model.language_model.embed_tokens.weight[0, 0] += 1
            base.lm_head.weight[0, 0] += 1

    same = key()
    assert key() == same
    assert key(change=decoder) == same  # neither decoder nor head is on the way
    assert key(lora=replace(LORA, r=8)) == same
    others = [
        key(video=1),
        key(change=statistics),
        key(change=projector),
        key(dtype="bfloat16"),
        key(attn_implementation="eager"),
        key(quantize="nf4"),
        key("qwen"),
        key("qwen", max_pixels=28 * 28 * 4),
        key("qwen", max_pixels=28 * 28 * 8),
        key("qwen", attn_implementation="eager", route="expand"),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        others.append(key())
    assert len({same, *others}) == 1 + len(others)
