"""TinyVLM writes and scores: greedy search, both routes, the tokenizer, and the chat template."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vlm_builders as builders
from vlm_builders import FAN, PROMPTS, TREE, gradients, make_prompts, make_texts

from vidreason.datamodules.porch.texts import PHRASES
from vidreason.datamodules.porch.world import LABELS
from vidreason.datamodules.types import Text
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.completion import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from vidreason.testing.samples import relative_gap

MakeTiny = Callable[..., TinyVLM]


@pytest.mark.parametrize("rows", [FAN, TREE], ids=["fan", "tree"])
@pytest.mark.parametrize(
    "options", [{}, {"freeze_vision": False}, {"lora": LoRAOptions(r=4, alpha=8)}], ids=["decoder", "full", "lora"]
)
def test_expand_equals_naive(make_tiny: MakeTiny, options: dict[str, Any], rows: Any) -> None:
    vlm = make_tiny(**options)
    model = vlm.build()
    builders.randomise_lora(model)
    model.eval()  # a tower in training normalises over its batch, in which the naive route repeats clips
    prompts, texts = make_prompts(vlm), make_texts(vlm, rows)
    expand, naive = (gradients(vlm, model, prompts, texts, route) for route in ("expand", "naive"))

    for name in ("logprobs", "entropy"):
        a, b = expand.pop(name), naive.pop(name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert (b[texts.loss_mask] != 0).all()
        assert (a[~texts.loss_mask] == 0).all()
    assert any("visual" in name for name in expand) == (options.get("freeze_vision") is False)
    assert relative_gap(expand, naive) < 1e-4


@pytest.mark.parametrize("route", ["expand", "naive"])
def test_the_video_matters(make_tiny: MakeTiny, route: Any) -> None:
    vlm = make_tiny(route=route)
    model = vlm.build()
    texts = make_texts(vlm, TREE)
    with torch.no_grad():
        one, other = (vlm.score(model, make_prompts(vlm, seed), texts).logprobs for seed in (0, 50))
    assert ((one - other).abs() > 1e-4)[texts.loss_mask].float().mean() > 0.9


def test_greedy_equals_transformers(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    model = vlm.build()
    prompts = make_prompts(vlm, size=(64, 96))
    ours = vlm.generate(model, prompts, 1, Sampling(24, temperature=0))
    model.eval()
    options = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": sorted(vlm.suppressed_ids)}
    together = model.generate(**prompts.inputs, **options)  # type: ignore[operator]
    for i, prompt in enumerate(PROMPTS):
        alone = vlm.encode([builders.make_example(prompt=prompt, seed=i, size=(64, 96))]).prompts.inputs
        theirs = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]  # type: ignore[operator]
        words = ours.ids[i][ours.mask[i]]
        assert len(words) > 2
        assert words.tolist() == theirs.tolist()
        batched = together[i, prompts.inputs["input_ids"].shape[1] :]
        assert batched[: len(words)].tolist() == words.tolist()
    assert len({tuple(row.tolist()) for row in ours.ids}) == 3


def test_the_placeholder_is_never_written(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    ids = vlm.tokenizer.convert_tokens_to_ids
    assert vlm.suppressed_ids == {ids("<|video|>")}
    assert vlm.stop_ids == {ids("<|end|>")}
    assert vlm.tokenizer.pad_token_id != vlm.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "tabs\tand\r\nlines\n",
        "ÄÖÜ ß é ñ",
        "你好,世界",
        "مرحبا",
        "👩‍👩‍👧 🚪📦",
        "a\u0301 \u200b\ufeff",
        "<think>…</think><answer>pass_by</answer>",
        "def f(x): return {'a': [1, 2.5e-3]}  # %$&@",
        "".join(map(chr, range(32, 127))),
    ],
    ids=repr,
)
def test_the_tokenizer_encodes_any_text(make_tiny: MakeTiny, text: str) -> None:
    tokenizer = make_tiny().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_tags_and_labels_are_ordinary_words(make_tiny: MakeTiny) -> None:
    """Special tokens would vanish where texts are decoded without them, and be one token where others are several."""
    tokenizer = make_tiny().tokenizer
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    assert special == {"<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|video|>"}
    for word in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, *LABELS, "jump", "no_fight"):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == word
        assert len(ids) > 1, f"{word} is one token: the base has been told about it"


def test_words_of_descriptions_are_mostly_one_token(make_tiny: MakeTiny) -> None:
    tokenizer = make_tiny().tokenizer
    words = {w for values in PHRASES.values() for phrases in values.values() for p in phrases for w in p.split()[1:]}
    lengths = [len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words]
    assert sum(length == 1 for length in lengths) / len(lengths) > 0.8


def test_a_context_behind_an_open_prompt_reads_as_a_closed_one(make_tiny: MakeTiny) -> None:
    """Pretraining asks its questions behind one open prompt; later stages ask them in a closed one."""
    vlm = make_tiny()
    question = "Describe the video."
    closed = vlm.encode([builders.make_example(["A parcel."], prompt=question, size=(64, 96))])
    texts = (Text(question, role="context"), Text("A parcel.", parent=0))
    opened = vlm.encode([builders.make_example(texts, prompt="", open_prompt=True, size=(64, 96))])
    context, answer = (opened.texts.ids[i][opened.texts.mask[i]] for i in range(2))
    row = torch.cat([opened.prompts.inputs["input_ids"][0], context, answer])
    whole = torch.cat([closed.prompts.inputs["input_ids"][0], closed.texts.ids[0]])
    assert row.tolist() == whole.tolist()
    assert opened.texts.loss_mask[0].sum() == 0
    assert opened.texts.loss_mask[1].sum() == closed.texts.loss_mask[0].sum()
    assert vlm.tokenizer.decode(whole).replace("<|video|>", "") == (
        "<|user|>Describe the video.<|end|><|assistant|>A parcel.<|end|>"
    )


def test_the_embedded_tokenizer_is_the_one_of_scratch(make_tiny: MakeTiny) -> None:
    assert TinyVLM("scratch").tokenizer.get_vocab() == make_tiny().tokenizer.get_vocab()
