"""Embeddings of a frozen vision path: equal values with and without the cache, computed once, only where fixed."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms import vision_cache
from vidreason.lightning_modules.vlms.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.embedding_store import EmbeddingStore
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.layout import unwrap
from vidreason.lightning_modules.vlms.vision_cache import VisionCacheOptions

MakeVLM = Callable[..., VLM]
LORA = LoRAOptions(r=4, alpha=8)
FAMILIES = ("tiny", "qwen", "smolvlm")


def tower(vlm: VLM, model: nn.Module) -> nn.Module:
    found: nn.Module = unwrap(model).get_submodule(vlm.vision_modules[0])
    return found


@contextmanager
def counting(vlm: VLM, model: nn.Module) -> Iterator[list[int]]:
    """Collects one entry for every forward of the vision tower."""
    calls: list[int] = []
    handle = tower(vlm, model).register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def prompts_of(vlm: VLM, builders: ModuleType, seeds: tuple[int, ...] = (0, 1), **options: Any) -> EncodedPrompts:
    words = ("what happens?", "describe the video, step by step", "who?")
    examples = [
        builders.make_example(prompt=words[i % 3], seed=seed, identity=f"video {seed}", **options)
        for i, seed in enumerate(seeds)
    ]
    return vlm.encode(examples).prompts


def texts_of(vlm: VLM, builders: ModuleType, prompts: int = 2) -> TextBatch:
    words = sorted(set(range(10, 500)) - vlm.suppressed_ids)
    rows = [(b, -1, 3 + b + i) for b in range(prompts) for i in range(2)]
    batch: TextBatch = builders.text_rows(rows, words)
    return batch


def built(make_vlm: MakeVLM, builders: ModuleType, family: str, **options: Any) -> tuple[VLM, nn.Module]:
    vlm = make_vlm(family, **{"lora": LORA, "dtype": "float32", **options})
    torch.manual_seed(0)
    model = vlm.build()
    builders.randomise_lora(model)
    return vlm, model


def logprobs_and_gradient(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch) -> list[Tensor]:
    model.zero_grad()
    scores = vlm.score(model, prompts, texts).logprobs
    scores.sum().backward()
    return [scores.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["expand", "packed"])
def test_same_values_and_one_call_per_video(
    make_vlm: MakeVLM, builders: ModuleType, family: str, route: str, tmp_path: Path
) -> None:
    """Scoring, sampling and scoring again; from memory, then from disk by another run."""
    plain, model = built(make_vlm, builders, family, route=route, vision_cache=None)
    prompts, texts = prompts_of(plain, builders), texts_of(plain, builders)
    with counting(plain, model) as calls:
        expected = logprobs_and_gradient(plain, model, prompts, texts)
        logprobs_and_gradient(plain, model, prompts, texts)
        sampled = plain.generate(model, prompts, 2, Sampling(6, 0.0))
    assert len(calls) == 3
    options = VisionCacheOptions(folder=str(tmp_path / "cache"))
    for computed in (2, 0):
        vlm, model = built(make_vlm, builders, family, route=route, vision_cache=options)
        assert vlm.vision_cache is not None
        with counting(vlm, model) as calls:
            for _ in range(2):
                found = logprobs_and_gradient(vlm, model, prompts, texts)
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert vlm.generate(model, prompts, 2, Sampling(6, 0.0)).ids.equal(sampled.ids)
            alone = prompts_of(vlm, builders, (1,))
            vlm.score(model, alone, texts_of(vlm, builders, 1))
        assert len(calls) == computed
        assert vlm.vision_cache.take_statistics()[:2] == (7 - computed, 7)
        assert vlm.vision_cache.take_statistics()[:2] == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_video_is_the_same_to_the_bit(make_vlm: MakeVLM, builders: ModuleType, family: str) -> None:
    plain, model = built(make_vlm, builders, family, vision_cache=None)
    prompts, texts = prompts_of(plain, builders, (3,)), texts_of(plain, builders, 1)
    expected = logprobs_and_gradient(plain, model, prompts, texts)
    vlm, model = built(make_vlm, builders, family)
    for _ in range(2):
        for ours, theirs in zip(logprobs_and_gradient(vlm, model, prompts, texts), expected, strict=True):
            assert ours.equal(theirs)


def test_both_routes_share_entries_and_the_video_matters(make_vlm: MakeVLM, builders: ModuleType, family: str) -> None:
    vlm, model = built(make_vlm, builders, family)
    texts = texts_of(vlm, builders)
    with counting(vlm, model) as calls:
        first = vlm.score(model, prompts_of(vlm, builders, (0, 1)), texts).logprobs
        vlm.route = "packed"
        again = vlm.score(model, prompts_of(vlm, builders, (0, 1)), texts).logprobs
        other = vlm.score(model, prompts_of(vlm, builders, (2, 1)), texts).logprobs
    assert len(calls) == 3
    torch.testing.assert_close(first, again, rtol=0, atol=1e-5)
    assert (other - first)[:2].abs().max() > 1e-4
    torch.testing.assert_close(other[2:], first[2:], rtol=0, atol=1e-5)


def test_what_validation_computed_serves_training(make_vlm: MakeVLM, builders: ModuleType, family: str) -> None:
    vlm, model = built(make_vlm, builders, family)
    prompts, texts = prompts_of(vlm, builders), texts_of(vlm, builders)
    with torch.inference_mode():
        vlm.score(model, prompts, texts)
    with counting(vlm, model) as calls:
        logprobs_and_gradient(vlm, model, prompts, texts)
    assert calls == []


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said about the cache."""
    said: list[str] = []
    monkeypatch.setattr(vision_cache, "rank_zero_info", said.append)
    return said


def test_training_the_merger_one_step_turns_it_off(
    make_vlm: MakeVLM, builders: ModuleType, messages: list[str]
) -> None:
    """Every one of its scores must be of the weights as they are then; frozen again, it has another key."""
    vlm, model = built(make_vlm, builders, "qwen")
    prompts, texts = prompts_of(vlm, builders), texts_of(vlm, builders)
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
    builders: ModuleType,
    messages: list[str],
    family: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    vlm, model = built(make_vlm, builders, family, **options)
    prompts, texts = prompts_of(vlm, builders), texts_of(vlm, builders)
    with counting(vlm, model) as calls:
        vlm.score(model, prompts, texts)
        vlm.score(model, prompts, texts)
    assert len(calls) == 2
    assert len(messages) == 1
    assert reason in messages[0]


def test_off_where_a_tower_is_in_train_mode(make_vlm: MakeVLM, builders: ModuleType, messages: list[str]) -> None:
    """Batch normalisation in train mode: an embedding depends on the batch."""
    vlm, model = built(make_vlm, builders, "tiny")
    for module in tower(vlm, model).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    vlm.score(model, prompts_of(vlm, builders), texts_of(vlm, builders))
    assert "normalises over the batch" in messages[0]


def test_off_where_nobody_says_which_frames_they_are(
    make_vlm: MakeVLM, builders: ModuleType, messages: list[str], family: str
) -> None:
    vlm, model = built(make_vlm, builders, family)
    prompts = replace(prompts_of(vlm, builders), videos=("video 0", ""))
    with counting(vlm, model) as calls:
        vlm.score(model, prompts, texts_of(vlm, builders))
        vlm.score(model, prompts, texts_of(vlm, builders))
    assert len(calls) == 2
    assert "jittered" in messages[0]


def test_the_key_holds_all_that_an_embedding_depends_on(make_vlm: MakeVLM, builders: ModuleType) -> None:
    """Buffers included: the running statistics of batch normalisation."""

    def key(family: str = "tiny", change: Callable[[Any], None] | None = None, video: int = 0, **options: Any) -> str:
        vlm, model = built(make_vlm, builders, family, **options)
        cache = vlm.vision_cache
        assert cache is not None
        found: list[str] = []
        inner = cache._keys
        cache._keys = lambda *a: found.extend(inner(*a)) or inner(*a)  # type: ignore[method-assign, func-returns-value]
        if change is not None:
            change(unwrap(model))
        vlm.score(model, prompts_of(vlm, builders, (video,)), texts_of(vlm, builders, 1))
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


def test_damaged_entries_are_computed_anew(
    make_vlm: MakeVLM, builders: ModuleType, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options = VisionCacheOptions(folder=str(tmp_path), memory_gb=0)
    vlm, model = built(make_vlm, builders, "qwen", vision_cache=options)
    prompts, texts = prompts_of(vlm, builders, (0,)), texts_of(vlm, builders, 1)
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


def test_the_folder_stays_within_its_bound(tmp_path: Path) -> None:
    """The entries longest unused go first; reading one counts as use."""
    store = EmbeddingStore(tmp_path, max_gb=5 * 4300e-9)
    for i in range(5):
        store.write(f"k{i}", {"x": torch.full((1000,), float(i))})
        os.utime(store.path(f"k{i}"), (1000 + i, 1000 + i))
    found = store.read("k0")
    assert found is not None
    assert found["x"].equal(torch.zeros(1000))
    store.write("k5", {"x": torch.ones(1000)})
    assert sorted(p.stem for p in tmp_path.glob("*.safetensors")) == ["k0", "k2", "k3", "k4", "k5"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= store.max_bytes
    with pytest.warns(UserWarning, match="max_gb is less"):
        store.write("large", {"x": torch.ones(10_000)})
    assert not store.path("large").exists()


def test_memory_stays_within_its_bound(make_vlm: MakeVLM, builders: ModuleType) -> None:
    vlm, model = built(make_vlm, builders, "qwen", vision_cache=VisionCacheOptions(memory_gb=2.5 * 8 * 64 * 4 / 1e9))
    texts = texts_of(vlm, builders, 1)
    assert vlm.vision_cache is not None
    with counting(vlm, model) as calls:
        for video, expected in ((0, 1), (1, 2), (1, 2), (2, 3), (1, 3), (0, 4)):  # 0 went when 2 came: two videos fit
            vlm.score(model, prompts_of(vlm, builders, (video,)), texts)
            assert len(calls) == expected
            assert vlm.vision_cache.take_statistics().gb <= 2.5 * 8 * 64 * 4 / 1e9


def write_many(folder: Path, seed: int) -> None:
    """Writes and reads twenty entries that other processes write too."""
    store = EmbeddingStore(folder, max_gb=1.0)
    for i in torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist():
        store.write(f"k{i}", {"x": torch.full((20_000,), float(i))})
        found = store.read(f"k{i}")
        assert found is not None
        assert found["x"].eq(i).all()


def test_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"k{i}.safetensors" for i in range(20))
    with safe_open(tmp_path / "k7.safetensors", framework="pt") as file:
        assert file.get_tensor("x").eq(7).all()


def test_a_recipe_leaves_its_embeddings_behind(make_vlm: MakeVLM, builders: ModuleType) -> None:
    """Workers get the recipe, not the cache."""
    vlm, model = built(make_vlm, builders, "qwen")
    vlm.score(model, prompts_of(vlm, builders), texts_of(vlm, builders))
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
    without = lambda entries: vision_cache.VisionFeatures(join(entries).pooler_output, [])  # noqa: E731
    monkeypatch.setattr(vision_cache, "join", without)
    with cache.feeding(vlm, model, prompts, "expand"):
        assert (model(**inputs).logits - expected).abs().max() > 1e-3
