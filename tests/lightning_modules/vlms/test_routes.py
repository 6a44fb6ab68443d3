"""Which route is taken, what each refuses, and that the packed attention leaves everything else as it was."""

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms import packing, shared_prefix
from vidreason.lightning_modules.vlms.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.layout import text_config, unwrap
from vidreason.lightning_modules.vlms.packing import NAME, packed_attention
from vidreason.lightning_modules.vlms.shared_prefix import RouteOptions, choose_route

MakeVLM = Callable[..., VLM]
ROWS = [(0, -1, 5), (1, -1, 3), (0, -1, 4), (0, 0, 2)]
FLAT = ROWS[:3]


def make_prompts(vlm: VLM, builders: ModuleType) -> EncodedPrompts:
    return vlm.encode(
        [builders.make_example(prompt=p, seed=i) for i, p in enumerate(("what happens at the door?", "who?"))]
    ).prompts


def make_texts(vlm: VLM, builders: ModuleType, rows: list[tuple[int, int, int]] = ROWS) -> TextBatch:
    texts: TextBatch = builders.text_rows(rows, sorted(set(range(10, 500)) - vlm.suppressed_ids))
    return texts


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
def test_packed_refuses_by_name(make_vlm: MakeVLM, builders: ModuleType, change: Any, why: str) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    model = vlm.build()
    prompts, texts = make_prompts(vlm, builders), make_texts(vlm, builders)
    vlm.score(model, prompts, texts)
    change(model)
    with pytest.raises(ValueError, match=f"'packed' cannot be exact here: .*{why}; set vlm.route to expand or naive"):
        vlm.score(model, prompts, texts)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    vlm.route = "auto"
    with pytest.raises(ValueError, match=f"{why}, and route 'expand' cannot serve it .*; set vlm.route to naive, or"):
        vlm.score(model, prompts, texts)


def test_token_types_are_refused(make_vlm: MakeVLM, builders: ModuleType) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    prompts = make_prompts(vlm, builders)
    kinds = {**prompts.inputs, "token_type_ids": torch.zeros_like(prompts.inputs["input_ids"])}
    with pytest.raises(ValueError, match="both directions within an image"):
        vlm.score(vlm.build(), replace(prompts, inputs=kinds), make_texts(vlm, builders))


def test_auto(
    make_vlm: MakeVLM, builders: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = make_vlm("qwen")
    model = vlm.build()
    prompts, texts = make_prompts(vlm, builders), make_texts(vlm, builders, FLAT)
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
    assert len(said) == len(set(said)) == 3, "each choice is told once"
    text_config(model).num_kv_shared_layers = 0
    vlm.route = "expand"
    with pytest.raises(ValueError, match="gradients reach sharded layers through the cache.*; set vlm.route to packed"):
        vlm.score(model, prompts, texts)
    vlm.route, vlm.completion_chunk = "auto", 1
    with pytest.raises(ValueError, match="every chunk would gather sharded layers"):
        vlm.score(model, prompts, texts)


def test_auto_packs_texts_behind_texts(make_vlm: MakeVLM, builders: ModuleType) -> None:
    """One forward in all, where the expand route takes one a level; where the model cannot be packed it still does."""
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, builders)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    forked = [*ROWS, (0, 0, 3)]  # two texts behind row 0; one alone would be joined to it
    for route, rows, expected in (
        *(("auto", FLAT, 2), ("auto", forked, 1)),
        *(("packed", forked, 1), ("expand", forked, 3), ("expand", ROWS, 2)),
    ):
        vlm.route, forwards[:] = route, []  # type: ignore[assignment]
        vlm.score(model, prompts, make_texts(vlm, builders, rows))
        assert len(forwards) == expected, (route, rows)
    text_config(model).num_kv_shared_layers = 1
    assert choose_route(RouteOptions(), model, prompts.inputs, make_texts(vlm, builders, forked)).route == "expand"


def test_auto_packs_long_texts(make_vlm: MakeVLM, builders: ModuleType) -> None:
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, builders)
    for length, expected in ((256, "expand"), (257, "packed")):
        texts = make_texts(vlm, builders, [(0, -1, 3), (1, -1, length)])
        assert choose_route(RouteOptions(), model, prompts.inputs, texts).route == expected


@pytest.mark.parametrize("block", [1, 3, 5, 100])
def test_blocks_of_queries_are_exact(
    make_vlm: MakeVLM, builders: ModuleType, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Unequal texts of up to 11 tokens against the naive route, in value and gradient; the calls are counted."""
    monkeypatch.setattr(packing, "BLOCK", block)
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm, builders)
    texts = make_texts(vlm, builders, [(0, -1, 11), (0, -1, 7), (1, -1, 9), (1, 2, 6), (1, 2, 2)])
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
        floor = 1e-6 * torch.stack([g.norm() for g in found["naive"][1].values()]).norm()
        assert (found["packed"][1][name] - gradient).norm() <= 1e-5 * torch.maximum(gradient.norm(), floor), name


@pytest.mark.parametrize("option", [{"completion_chunk": 2}, {"text_memory_gb": 1.0}], ids=str)
def test_naive_takes_no_chunks(make_vlm: MakeVLM, builders: ModuleType, option: dict[str, Any]) -> None:
    vlm = make_vlm("qwen", route="naive", **option)
    with pytest.raises(ValueError, match="'naive' has no prefix to keep"):
        vlm.score(vlm.build(), make_prompts(vlm, builders), make_texts(vlm, builders))


def test_nonsense_is_refused(make_vlm: MakeVLM) -> None:
    with pytest.raises(ValueError, match="vlm.completion_chunk must be at least 1"):
        make_vlm("qwen", completion_chunk=0)
    with pytest.raises(ValueError, match="vlm.text_memory_gb must be positive"):
        make_vlm("qwen", text_memory_gb=0.0)


def test_only_the_decoder_changes_its_attention(make_vlm: MakeVLM, builders: ModuleType) -> None:
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
        texts = make_texts(vlm, builders, FLAT)
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


def test_a_layer_that_attends_otherwise_is_noticed(
    make_vlm: MakeVLM, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = make_vlm("smolvlm", route="packed")
    model = vlm.build()
    other = unwrap(model).get_decoder().layers[1].self_attn
    monkeypatch.setattr(other, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match=r"only layers \[0\] of 2 attend over the packed row"):
        vlm.score(model, make_prompts(vlm, builders), make_texts(vlm, builders))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("route", ["expand", "packed", "naive"])
def test_suppressed_tokens_have_probability_zero(
    make_vlm: MakeVLM, builders: ModuleType, route: Any, chunk: int | None
) -> None:
    vlm = make_vlm("qwen", route=route, completion_chunk=None if route == "naive" else chunk)
    model = vlm.build()
    texts = make_texts(vlm, builders)
    ids = texts.ids.clone()
    ids[0, 2] = min(vlm.suppressed_ids)
    head = unwrap(model).lm_head
    head.bias = nn.Parameter(torch.zeros(512))
    head.bias.data[sorted(vlm.suppressed_ids)] = 1000.0  # they would take all of the probability
    odd = replace(texts, ids=ids, loss_mask=texts.mask)
    scores = vlm.score(model, make_prompts(vlm, builders), odd, temperature=0.7, with_entropy=True)
    assert scores.entropy is not None
    assert scores.logprobs[0, 2] == -torch.inf
    rest = texts.mask.clone()
    rest[0, 2:] = False
    assert scores.logprobs[rest].min() > -50
    assert scores.entropy[rest].min() > 0.1


@pytest.mark.parametrize("route", ["expand", "packed"])
def test_a_lora_on_the_head_is_applied(make_vlm: MakeVLM, builders: ModuleType, route: Any) -> None:
    lora = LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "lm_head"))
    vlm = make_vlm("qwen", lora=lora, route=route)
    model = vlm.build()
    builders.randomise_lora(model)
    prompts, texts = make_prompts(vlm, builders), make_texts(vlm, builders)
    ours = vlm.score(model, prompts, texts).logprobs
    ours.sum().backward()
    assert unwrap(model).lm_head.lora_B["policy"].weight.grad.abs().max() > 0
    with torch.no_grad():
        theirs = own_logprobs(vlm, model, builders, texts, row=1)
        unwrap(model).lm_head.lora_B["policy"].weight.zero_()
        without = vlm.score(model, prompts, texts).logprobs
    counted = texts.loss_mask[1, :3]
    torch.testing.assert_close(ours[1, :3][counted], theirs[counted], rtol=0, atol=1e-5)
    assert (without - ours)[texts.loss_mask].abs().min() > 1e-4


def own_logprobs(vlm: VLM, model: nn.Module, builders: ModuleType, texts: TextBatch, row: int) -> Tensor:
    """Of one text behind its prompt, from the family's own forward and all of its logits."""
    alone = dict(vlm.encode([builders.make_example(prompt="who?", seed=1)]).prompts.inputs)
    tail = texts.ids[row : row + 1, : int(texts.mask[row].sum())]
    start = alone["input_ids"].shape[1]
    alone["input_ids"] = torch.cat([alone["input_ids"], tail], 1)
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    if "mm_token_type_ids" in alone:
        alone["mm_token_type_ids"] = torch.cat([alone["mm_token_type_ids"], torch.zeros_like(tail)], 1)
    logits = model(**alone).logits[0, start - 1 : -1].float()
    logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, tail[0, :, None])[:, 0]


def add_cap(model: nn.Module, cap: Callable[[], float | None]) -> None:
    """Gives the family's own forward something that it does to its logits."""
    own = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        if cap() is not None:
            out.logits = torch.tanh(out.logits / cap()) * cap()
        return out

    model.forward = capped  # type: ignore[method-assign]


@pytest.mark.parametrize("route", ["expand", "packed"])
def test_soft_capping_comes_before_the_log_probs(make_vlm: MakeVLM, builders: ModuleType, route: Any) -> None:
    vlm = make_vlm("smolvlm", route=route)
    model = vlm.build()
    prompts, texts = make_prompts(vlm, builders), make_texts(vlm, builders)
    uncapped = vlm.score(model, prompts, texts).logprobs
    text_config(model).final_logit_softcapping = 1.5
    add_cap(model, lambda: text_config(model).final_logit_softcapping)
    with torch.no_grad():
        ours = vlm.score(model, prompts, texts).logprobs
        theirs = own_logprobs(vlm, model, builders, texts, row=1)
    assert text_config(model).final_logit_softcapping == 1.5
    counted = texts.loss_mask[1, :3]
    torch.testing.assert_close(ours[1, :3][counted], theirs[counted], rtol=0, atol=1e-5)
    assert (ours - uncapped)[texts.loss_mask].abs().max() > 0.01


def test_logits_that_are_changed_unseen_are_refused(make_vlm: MakeVLM, builders: ModuleType) -> None:
    vlm = make_vlm("smolvlm")
    model = vlm.build()
    add_cap(model, lambda: 30.0)
    with pytest.raises(ValueError, match="changes its logits behind the head"):
        vlm.score(model, make_prompts(vlm, builders), make_texts(vlm, builders))


def test_dropout_says_what_it_shares(make_vlm: MakeVLM, caplog: pytest.LogCaptureFixture) -> None:
    assert LoRAOptions().dropout == 0
    with pytest.warns(UserWarning, match=r"vlm.lora.dropout is 0.1: texts behind one prompt share one dropout mask"):
        make_vlm("qwen", lora=LoRAOptions(r=4, dropout=0.1)).build()
