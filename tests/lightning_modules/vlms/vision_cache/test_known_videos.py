"""Videos whose embeddings are known are not decoded: the same prompts and values to the bit, and read where needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_builders as builders
from families import FAMILIES
from torch import nn
from watched_vision import built, counting

from vidreason.datamodules.known import not_decoded
from vidreason.datamodules.types import EncodedPrompts, Example, KnownVideo, Prompt, VideoSample
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.lightning_modules.vlms.vision_cache.known_entries import from_tensors, to_tensors

MakeVLM = Callable[..., VLM]
FAST = ("qwen", "smolvlm", "qwen3")
PROMPTS = (Prompt("what happens?"), Prompt("Describe it. Step by step!", open=True), Prompt("123 [a] <b>\n\nwho?  "))


def fast_first(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def examples_of(prompts: tuple[Prompt, ...]) -> list[Example]:
    """Clips of unlike lengths, so that the cold path has to tell them apart, each with one of the prompts."""
    return [
        replace(builders.make_example(seed=seed, identity=f"video {seed}"), prompt=prompt)
        for seed, prompt in enumerate(prompts)
    ]


def without_pixels(example: Example, known: KnownVideo | None) -> Example:
    assert known is not None
    again = from_tensors(to_tensors(known))  # as an entry of the cache gives it back
    assert again is not None
    assert again.timing == example.sample.timing
    return replace(example, sample=not_decoded(example.sample.clip, again))


@pytest.mark.parametrize("family", fast_first(list(FAMILIES)))
def test_the_prompt_is_the_same_to_the_bit(make_vlm: MakeVLM, family: str) -> None:
    """A prompt made from the entry that another prompt stored for its video equals the processor's prompt."""
    vlm = make_vlm(family)
    closed = tuple(prompt for prompt in PROMPTS if not prompt.open)
    first, others = examples_of((PROMPTS[0],) * 2), examples_of(closed)
    known = vlm.encode(first).prompts.known
    for chosen in ([0, 1], [0]):  # all videos known, and one of two
        asked = [without_pixels(e, known[i]) if i in chosen else e for i, e in enumerate(others)]
        ours, theirs = vlm.encode(asked).prompts, vlm.encode(others).prompts
        assert ours.without_pixels == tuple(i in chosen for i in range(2))
        assert list(ours.videos) == list(theirs.videos)
        assert ours.inputs.keys() == theirs.inputs.keys()
        for name, value in theirs.inputs.items():
            if not name.startswith("pixel"):
                assert ours.inputs[name].equal(value), name
                assert ours.inputs[name].dtype == value.dtype
            elif len(chosen) == 2:
                assert ours.inputs[name].numel() == 0
            else:
                assert ours.inputs[name].shape == value.shape
    (opened,) = (replace(e, prompt=PROMPTS[1]) for e in first[:1])
    ours, theirs = vlm.encode([without_pixels(opened, known[0])]).prompts, vlm.encode([opened]).prompts
    assert ours.inputs["input_ids"].equal(theirs.inputs["input_ids"])
    assert ours.turn_end.equal(theirs.turn_end)
    assert len(theirs.turn_end)


def test_words_that_join_the_template_make_no_prompt(make_vlm: MakeVLM) -> None:
    """A tokenizer may merge white space at the start of the words with what stands before them."""
    vlm = make_vlm("qwen")
    assert vlm.tokens_behind(Prompt(" what?")) is None
    assert vlm.tokens_behind(Prompt("what?")) is not None
    (example,) = examples_of((Prompt(" what?"),))
    assert vlm.encode([example]).prompts.known == (None,)


class World:
    """A model whose clips can be decoded again, and the ids of those that were."""

    def __init__(self, make_vlm: MakeVLM, family: str, **options: Any) -> None:
        self.vlm, self.model = built(make_vlm, family, **options)
        self.examples = examples_of((Prompt("what happens?"), Prompt("who is it?")))
        self.decoded: list[str] = []
        self.texts = builders.make_texts(self.vlm, [(b, -1, 3 + b) for b in range(2)])

    def prompts(self) -> EncodedPrompts:
        return self.vlm.encode([self.asked(example) for example in self.examples]).prompts

    def asked(self, example: Example) -> Example:
        """The example as a loader gives it: not decoded if its embeddings are known."""

        def read() -> VideoSample:
            self.decoded.append(example.sample.identity)
            return example.sample

        known = self.vlm.find_known(example.sample.identity, example.prompt, read)
        return example if known is None else replace(example, sample=not_decoded(example.sample.clip, known))

    def values(self, prompts: EncodedPrompts) -> list[torch.Tensor]:
        self.model.zero_grad()
        scores = self.vlm.score(self.model, prompts, self.texts).logprobs
        scores.sum().backward()
        sampled = self.vlm.generate(self.model, prompts, 2, Sampling(4, 0.0)).ids
        return [scores.detach(), sampled, *(p.grad for p in self.model.parameters() if p.grad is not None)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", fast_first([name for name in FAMILIES if name != "tiny"] + ["tiny"]))
def test_a_known_video_has_the_same_values_to_the_bit(make_vlm: MakeVLM, family: str, tmp_path: Path) -> None:
    """In the run that computed it and in another one; a lost entry and a route without cache decode it again."""
    options = VisionCacheOptions(folder=str(tmp_path), memory_gb=0)
    world = World(make_vlm, family, vision_cache=options)
    assert not world.vlm.knows_videos
    expected = world.values(world.prompts())
    for world in (world, World(make_vlm, family, vision_cache=options)):  # noqa: B020
        prompts = world.prompts()
        assert prompts.without_pixels == (True, True)
        assert not any(v.numel() for name, v in prompts.inputs.items() if name.startswith("pixel"))
        with counting(world.vlm, world.model) as calls:
            assert same(world.values(prompts), expected)
        assert calls == world.decoded == []
    (tmp_path / sorted(f.name for f in tmp_path.iterdir())[0]).unlink()
    mixed = world.prompts()
    assert sorted(mixed.without_pixels) == [False, True]
    assert same(world.values(mixed), expected)
    assert world.decoded == []
    prompts = world.prompts()
    for file in tmp_path.iterdir():
        file.unlink()
    assert same(world.values(prompts), expected)
    assert world.decoded == ["video 0", "video 1"]
    prompts = world.prompts()
    world.vlm.route = "naive"
    naive = world.vlm.score(world.model, prompts, world.texts).logprobs.detach()
    torch.testing.assert_close(naive, expected[0], rtol=1e-4, atol=1e-4)
    assert world.decoded == ["video 0", "video 1"] * 2
    assert not world.vlm.knows_videos, "every clip would be decoded again"


def test_of_many_known_videos_the_latest_can_be_decoded_again(
    make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that decodes a known video again holds its data set, so that only the latest functions are kept."""
    monkeypatch.setattr("vidreason.lightning_modules.vlms.vision_cache.cache.MOST_READS", 1)
    world = World(make_vlm, "qwen")
    world.values(world.prompts())
    assert world.prompts().without_pixels == (True, True)
    assert list(world.vlm.vision_cache._reads) == ["video 1"]


def test_another_chat_template_does_not_take_the_tokens_of_this_one(make_vlm: MakeVLM, tmp_path: Path) -> None:
    options = VisionCacheOptions(folder=str(tmp_path))
    world = World(make_vlm, "qwen", vision_cache=options)
    world.values(world.prompts())
    other = World(make_vlm, "qwen", vision_cache=options)
    template = builders.QWEN_TEMPLATE.replace("{{ m['role'] }}", "the {{ m['role'] }}", 1)
    other.vlm.processor.chat_template = template
    assert other.prompts().without_pixels == (False, False)
    assert World(make_vlm, "qwen", vision_cache=options).prompts().without_pixels == (True, True)


def test_nothing_is_known_of_weights_that_change(make_vlm: MakeVLM) -> None:
    world = World(make_vlm, "qwen")
    world.values(world.prompts())
    assert world.prompts().without_pixels == (True, True)
    merger: nn.Module = world.model.get_base_model().model.visual.merger  # type: ignore[operator]
    merger.requires_grad_(True)
    prompts = world.prompts()
    world.vlm.score(world.model, prompts, world.texts)
    assert world.decoded == ["video 0", "video 1"]
    assert world.prompts().without_pixels == (False, False)


def test_a_clip_that_is_gone_is_named(make_vlm: MakeVLM, tmp_path: Path) -> None:
    world = World(make_vlm, "qwen", vision_cache=VisionCacheOptions(folder=str(tmp_path), memory_gb=0))
    world.values(world.prompts())
    prompts = world.prompts()

    def gone() -> VideoSample:
        raise FileNotFoundError(2, "No such file or directory", "clip.mp4")

    assert world.vlm.vision_cache is not None
    world.vlm.find_known("video 0", Prompt("what?"), gone)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"removed cannot be decoded again: .*clip\.mp4"):
        world.vlm.score(world.model, prompts, world.texts)


@pytest.mark.parametrize("family", fast_first(list(FAMILIES)))
def test_pixels_in_bfloat16_are_those_that_the_tower_takes(make_vlm: MakeVLM, family: str) -> None:
    """Workers hand them over in the tower's dtype, where it would cast them before anything else."""
    vlm, model = built(make_vlm, family, dtype="bfloat16", vision_cache=None)
    narrow = vlm.encode(examples_of((Prompt("what happens?"),))).prompts
    dtype, vlm.pixel_dtype = vlm.pixel_dtype, None
    wide = vlm.encode(examples_of((Prompt("what happens?"),))).prompts
    assert dtype == (None if family == "gemma4" else torch.bfloat16)  # Gemma 4 scales them first
    for name, value in wide.inputs.items():
        if name.startswith("pixel_values"):
            assert value.dtype == torch.float32
            assert narrow.inputs[name].dtype == (dtype or torch.float32)
    texts = builders.make_texts(vlm, [(0, -1, 4)])
    with torch.no_grad():
        assert vlm.score(model, narrow, texts).logprobs.equal(vlm.score(model, wide, texts).logprobs)
