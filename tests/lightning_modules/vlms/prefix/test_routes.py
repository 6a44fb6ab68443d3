"""Tests which route is taken, what each refuses, and that the packed attention leaves everything else as it was."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from torch import nn
from vlm_builders import make_prompts, make_texts

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix import packing, shared_prefix
from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap
from vidreason.lightning_modules.vlms.prefix.packing import NAME, packed_attention
from vidreason.lightning_modules.vlms.prefix.shared_prefix import RouteOptions, choose_route
from vidreason.testing.samples import norm_of

MakeVLM = Callable[..., VLM]
WORDS = ("what happens at the door?", "who?")
ROWS = [(0, -1, 5), (1, -1, 3), (0, -1, 4), (0, 0, 2)]
FLAT = ROWS[:3]


def setting(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda model: setattr(text_config(model), name, value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (setting("layer_types", ["full_attention", "sliding_attention"]), "has sliding-attention layers"),
        (setting("layer_types", ["linear_attention", "full_attention"]), "has linear-attention layers"),
        (setting("sliding_window", 512), "has sliding-window layers"),
        (setting("num_kv_shared_layers", 2), "the last 2 layers of .* share keys and values"),
        (setting("use_bidirectional_attention", "vision"), "attends in both directions within an image"),
        (setting("attn_logit_softcapping", 50.0), "caps its attention logits"),
        (setting("_attn_implementation", "eager"), "vlm.attn_implementation is eager, and the route is built on sdpa"),
    ],
    ids=["sliding", "linear", "window", "shared", "both-ways", "capped", "eager"],
)
def test_packed_refuses_by_name(make_vlm: MakeVLM, change: Any, why: str) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    model = vlm.build()
    prompts, texts = make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS)
    vlm.score(model, prompts, texts)
    change(model)
    with pytest.raises(ValueError, match=f"'packed' cannot be exact here: .*{why}; set vlm.route to expand or naive"):
        vlm.score(model, prompts, texts)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    choice = choose_route(RouteOptions(), model, prompts.inputs, texts)
    assert choice.route == "expand"
    assert re.fullmatch(f"route 'packed' would not be exact, since .*{why}", choice.reason)


def test_token_types_are_refused(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    prompts = make_prompts(vlm, words=WORDS)
    kinds = {**prompts.inputs, "token_type_ids": torch.zeros_like(prompts.inputs["input_ids"])}
    with pytest.raises(ValueError, match="both directions within an image"):
        vlm.score(vlm.build(), replace(prompts, inputs=kinds), make_texts(vlm, ROWS))


def test_auto(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    vlm = make_vlm("qwen")
    model = vlm.build()
    prompts, texts = make_prompts(vlm, words=WORDS), make_texts(vlm, FLAT)
    taken: list[str] = []
    for name in ("packed_scores", "expand_prompts", "naive_scores"):
        real: Callable[..., Any] = getattr(shared_prefix, name)
        monkeypatch.setattr(
            shared_prefix, name, lambda *args, name=name, real=real: (taken.append(name), real(*args))[1]
        )
    with caplog.at_level(logging.INFO):
        vlm.score(model, prompts, texts)
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        vlm.score(model, prompts, texts)
        model.eval()  # nothing is recomputed in eval mode
        vlm.score(model, prompts, texts)
        monkeypatch.setattr(shared_prefix, "is_sharded", lambda model: True)
        vlm.score(model, prompts, texts)
        text_config(model).num_kv_shared_layers = 1
        with pytest.raises(
            ValueError, match="gradients reach sharded layers through the cache.*; set vlm.route to naive"
        ):
            vlm.score(model, prompts, texts)
        with torch.no_grad():
            vlm.score(model, prompts, texts)
    assert taken == ["expand_prompts", "packed_scores", "expand_prompts", "packed_scores", "expand_prompts"]
    said = [r.message for r in caplog.records if "scored by route" in r.message]
    assert len(said) == len(set(said)) == 4, "each choice is told once"
    text_config(model).num_kv_shared_layers = 0
    vlm.route = "expand"
    with pytest.raises(ValueError, match="gradients reach sharded layers through the cache.*; set vlm.route to packed"):
        vlm.score(model, prompts, texts)
    vlm.route, vlm.completion_chunk = "auto", 1
    with pytest.raises(ValueError, match="every chunk would gather sharded layers"):
        vlm.score(model, prompts, texts)


def test_auto_packs_texts_behind_texts(make_vlm: MakeVLM) -> None:
    """One forward in all, where the expand route takes one a level; where the model cannot be packed it still does."""
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, words=WORDS)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    forked = [*ROWS, (0, 0, 3)]  # two texts behind row 0; one alone would be joined to it
    for route, rows, expected in (
        *(("auto", FLAT, 2), ("auto", forked, 1)),
        *(("packed", forked, 1), ("expand", forked, 3), ("expand", ROWS, 2)),
    ):
        vlm.route, forwards[:] = route, []  # type: ignore[assignment]
        vlm.score(model, prompts, make_texts(vlm, rows))
        assert len(forwards) == expected, (route, rows)
    text_config(model).num_kv_shared_layers = 1
    assert choose_route(RouteOptions(), model, prompts.inputs, make_texts(vlm, forked)).route == "expand"


def test_auto_packs_long_texts(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, words=WORDS)
    for length, expected in ((256, "expand"), (257, "packed")):
        texts = make_texts(vlm, [(0, -1, 3), (1, -1, length)])
        assert choose_route(RouteOptions(), model, prompts.inputs, texts).route == expected


@pytest.mark.parametrize("block", [1, 3, 5, 100])
def test_blocks_of_queries_are_exact(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Unequal texts of up to 11 tokens against the naive route, in value and gradient; the calls are counted."""
    monkeypatch.setattr(packing, "BLOCK", block)
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, words=WORDS)
    texts = make_texts(vlm, [(0, -1, 11), (0, -1, 7), (1, -1, 9), (1, 2, 6), (1, 2, 2)])
    calls: list[int] = []
    real = packing.scaled_dot_product_attention
    monkeypatch.setattr(
        packing, "scaled_dot_product_attention", lambda *a, **k: (calls.append(a[0].shape[2]), real(*a, **k))[1]
    )
    found = {}
    for route in ("naive", "packed"):
        vlm.route = route  # type: ignore[assignment]
        model.zero_grad()
        logprobs = vlm.score(model, prompts, texts).logprobs
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[route] = logprobs.detach(), gradients
    behind = [width for width in calls if width <= 11]
    assert (max(behind) <= block) if block < 11 else (max(behind) > 5)
    torch.testing.assert_close(found["packed"][0], found["naive"][0], atol=1e-5, rtol=0)
    for name, gradient in found["naive"][1].items():
        floor = 1e-6 * norm_of(found["naive"][1].values())
        assert (found["packed"][1][name] - gradient).norm() <= 1e-5 * torch.maximum(gradient.norm(), floor), name


@pytest.mark.parametrize("option", [{"completion_chunk": 2}, {"text_memory_gb": 1.0}], ids=str)
def test_naive_takes_no_chunks(make_vlm: MakeVLM, option: dict[str, Any]) -> None:
    vlm = make_vlm("qwen", route="naive", **option)
    with pytest.raises(ValueError, match="'naive' has no prefix to keep"):
        vlm.score(vlm.build(), make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS))


def test_nonsense_is_refused(make_vlm: MakeVLM) -> None:
    with pytest.raises(ValueError, match="vlm.completion_chunk must be at least 1"):
        make_vlm("qwen", completion_chunk=0)
    with pytest.raises(ValueError, match="vlm.text_memory_gb must be positive"):
        make_vlm("qwen", text_memory_gb=0.0)


def test_only_the_decoder_changes_its_attention(make_vlm: MakeVLM) -> None:
    """And without a packed row it is what it was: left-padded prompts, decoding, the naive route."""
    for family in ("tiny", "qwen", "smolvlm"):
        vlm, fresh = make_vlm(family), make_vlm(family, route="naive")
        model = vlm.build()
        size = (64, 96) if family == "tiny" else (56, 56)
        prompts = vlm.encode(
            [
                builders.make_example(prompt=p, seed=i, size=size)
                for i, p in enumerate(("describe the video, step by step, and say who arrives", "who?"))
            ]
        ).prompts
        assert (prompts.inputs["attention_mask"] == 0).any(), "the shorter prompt is padded"
        texts = make_texts(vlm, FLAT)
        with torch.no_grad():
            before = [vlm.score(model, prompts, texts).logprobs, fresh.score(model, prompts, texts).logprobs]
            written = vlm.generate(model, prompts, 2, Sampling(6, temperature=0))
            vlm.route = "packed"
            vlm.score(model, prompts, texts)
            vlm.route = "expand"
            after = [vlm.score(model, prompts, texts).logprobs, fresh.score(model, prompts, texts).logprobs]
            again = vlm.generate(model, prompts, 2, Sampling(6, temperature=0))
        assert unwrap(model).get_decoder().config._attn_implementation == NAME
        if family != "tiny":
            assert unwrap(model).config.vision_config._attn_implementation == "sdpa"
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(written.ids, again.ids)
        assert torch.equal(written.logprobs, again.logprobs)


def test_the_packed_attention_never_guesses() -> None:
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    layer = nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="was not handed the lengths"):
        packed_attention(layer, q, k, k, torch.ones(1, 1, 0, 0, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs sliding_window, which"):
        packed_attention(layer, q, k, k, None, packing=object(), sliding_window=4)  # type: ignore[arg-type]


def test_a_layer_that_attends_otherwise_is_noticed(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    model = vlm.build()
    other = unwrap(model).get_decoder().layers[1].self_attn
    monkeypatch.setattr(other, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match=r"only layers \[0\] of 2 attend over the packed row"):
        vlm.score(model, make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS))


def test_dropout_says_what_it_shares(make_vlm: MakeVLM, caplog: pytest.LogCaptureFixture) -> None:
    assert LoRAOptions().dropout == 0
    with pytest.warns(UserWarning, match=r"vlm.lora.dropout is 0.1: texts behind one prompt share one dropout mask"):
        make_vlm("qwen", lora=LoRAOptions(r=4, dropout=0.1)).build()
