"""Embeddings of a frozen vision path: equal values with and without the cache, computed once, only where fixed."""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import sample
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from watched_vision import built, counting, prompts_of, texts_of

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.vision_cache import cache as vision_cache
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.lightning_modules.vlms.vision_cache.embedding_store import EmbeddingStore
from vidreason.lightning_modules.vlms.vision_cache.features import VisionFeatures

MakeVLM = Callable[..., VLM]
FAMILIES = ("tiny", "qwen", "smolvlm", "internvl", "onevision", "qwen3")


def logprobs_and_gradient(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch) -> list[Tensor]:
    model.zero_grad()
    scores = vlm.score(model, prompts, texts).logprobs
    scores.sum().backward()
    return [scores.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("family", "route"),
    sample(list(product(FAMILIES, ["expand", "packed"])), ("tiny", "expand"), ("qwen", "packed"), ("qwen3", "packed")),
)
def test_same_values_and_one_call_per_video(make_vlm: MakeVLM, family: str, route: str, tmp_path: Path) -> None:
    """Scoring, sampling and scoring again; from memory, then from disk by another run."""
    plain, model = built(make_vlm, family, route=route, vision_cache=None)
    prompts, texts = prompts_of(plain), texts_of(plain)
    with counting(plain, model) as calls:
        expected = logprobs_and_gradient(plain, model, prompts, texts)
        logprobs_and_gradient(plain, model, prompts, texts)
        sampled = plain.generate(model, prompts, 2, Sampling(6, 0.0))
    assert len(calls) == 3
    options = VisionCacheOptions(folder=str(tmp_path / "cache"))
    for computed in (2, 0):
        vlm, model = built(make_vlm, family, route=route, vision_cache=options)
        assert vlm.vision_cache is not None
        with counting(vlm, model) as calls:
            for _ in range(2):
                found = logprobs_and_gradient(vlm, model, prompts, texts)
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert vlm.generate(model, prompts, 2, Sampling(6, 0.0)).ids.equal(sampled.ids)
            alone = prompts_of(vlm, (1,))
            vlm.score(model, alone, texts_of(vlm, 1))
        assert len(calls) == computed
        assert vlm.vision_cache.take_statistics()[:2] == (7 - computed, 7)
        assert vlm.vision_cache.take_statistics()[:2] == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_video_is_the_same_to_the_bit(make_vlm: MakeVLM, family: str) -> None:
    plain, model = built(make_vlm, family, vision_cache=None)
    prompts, texts = prompts_of(plain, (3,)), texts_of(plain, 1)
    expected = logprobs_and_gradient(plain, model, prompts, texts)
    vlm, model = built(make_vlm, family)
    for _ in range(2):
        for ours, theirs in zip(logprobs_and_gradient(vlm, model, prompts, texts), expected, strict=True):
            assert ours.equal(theirs)


def test_both_routes_share_entries_and_the_video_matters(make_vlm: MakeVLM, family: str) -> None:
    vlm, model = built(make_vlm, family)
    texts = texts_of(vlm)
    with counting(vlm, model) as calls:
        first = vlm.score(model, prompts_of(vlm, (0, 1)), texts).logprobs
        vlm.route = "packed"
        again = vlm.score(model, prompts_of(vlm, (0, 1)), texts).logprobs
        other = vlm.score(model, prompts_of(vlm, (2, 1)), texts).logprobs
    assert len(calls) == 3
    torch.testing.assert_close(first, again, rtol=0, atol=1e-5)
    assert (other - first)[:2].abs().max() > 1e-4
    torch.testing.assert_close(other[2:], first[2:], rtol=0, atol=1e-5)


def test_what_validation_computed_serves_training(make_vlm: MakeVLM, family: str) -> None:
    vlm, model = built(make_vlm, family)
    prompts, texts = prompts_of(vlm), texts_of(vlm)
    with torch.inference_mode():
        vlm.score(model, prompts, texts)
    with counting(vlm, model) as calls:
        logprobs_and_gradient(vlm, model, prompts, texts)
    assert calls == []


def test_damaged_entries_are_computed_anew(make_vlm: MakeVLM, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    options = VisionCacheOptions(folder=str(tmp_path), memory_gb=0)
    vlm, model = built(make_vlm, "qwen", vision_cache=options)
    prompts, texts = prompts_of(vlm, (0,)), texts_of(vlm, 1)
    expected = vlm.score(model, prompts, texts).logprobs
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 0x40
    header = len(whole) - 200
    for content in (b"", whole[:100], whole[:header], bytes(flipped), b"x" * len(whole)):
        file.write_bytes(content)
        recwarn.clear()
        with counting(vlm, model) as calls:
            assert vlm.score(model, prompts, texts).logprobs.equal(expected)
            assert vlm.score(model, prompts, texts).logprobs.equal(expected)
        assert len(calls) == 1
        assert any(str(file) in str(w.message) and "damaged" in str(w.message) for w in recwarn)
    other = file.with_name("0" * 40 + ".safetensors")  # somebody renamed an entry
    os.replace(file, other)
    assert EmbeddingStore(tmp_path, 1).read("0" * 40) is None
    assert not other.exists()


def test_memory_stays_within_its_bound(make_vlm: MakeVLM) -> None:
    vlm, model = built(make_vlm, "qwen", vision_cache=VisionCacheOptions(memory_gb=2.5 * 8 * 64 * 4 / 1e9))
    texts = texts_of(vlm, 1)
    assert vlm.vision_cache is not None
    with counting(vlm, model) as calls:
        for video, expected in ((0, 1), (1, 2), (1, 2), (2, 3), (1, 3), (0, 4)):  # 0 went when 2 came: two videos fit
            vlm.score(model, prompts_of(vlm, (video,)), texts)
            assert len(calls) == expected
            assert vlm.vision_cache.take_statistics().gb <= 2.5 * 8 * 64 * 4 / 1e9


def test_a_recipe_leaves_its_embeddings_behind(make_vlm: MakeVLM) -> None:
    """Workers get the recipe, not the cache."""
    vlm, model = built(make_vlm, "qwen")
    vlm.score(model, prompts_of(vlm), texts_of(vlm))
    assert vlm.vision_cache is not None
    assert "vision_cache" not in vlm.__getstate__()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="max_gb must be positive"):
        VisionCacheOptions(max_gb=0)


def test_deepstack_features_come_from_the_cache(
    make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qwen3-VL adds features of inner vision layers to its decoder's first layers; two videos, one of them known."""
    text: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "rope_theta": 1e4,
        "mrope_interleaved": True,
    }
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 8}
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.tensor([[5, 62, *[61] * 4, 63, 7, 8]] * 2)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 61).int() * 2,
        "pixel_values_videos": torch.randn(2 * 16, 3 * 2 * 8 * 8),
        "video_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    expected = model(**inputs).logits
    prompts = EncodedPrompts(inputs, 2, ids[0, :0], ("a", "b"))
    vlm = make_vlm("qwen", vision_cache=VisionCacheOptions(folder=str(tmp_path), memory_gb=0))
    cache = vlm.vision_cache
    assert cache is not None
    with counting(vlm, model) as calls:
        for alone in (True, False, False):
            asked = EncodedPrompts(vlm.repeat_prompts(inputs, torch.tensor([1])), 1, ids[0, :0], ("b",))
            asked = asked if alone else prompts
            with cache.feeding(vlm, model, asked, "expand"):
                found = model(**asked.inputs).logits
            torch.testing.assert_close(found, expected[1:] if alone else expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    join = vision_cache.join
    without = lambda entries: VisionFeatures(join(entries).pooler_output, [])  # noqa: E731
    monkeypatch.setattr(vision_cache, "join", without)
    with cache.feeding(vlm, model, prompts, "expand"):
        assert (model(**inputs).logits - expected).abs().max() > 1e-3
