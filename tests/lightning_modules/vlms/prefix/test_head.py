"""Scores inside the forward: suppressed tokens, adapters on the head, and what a family does to its logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from published_positions import position_ids
from torch import Tensor, nn
from vlm_builders import make_prompts, make_texts

from vidreason.datamodules.types import TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap

MakeVLM = Callable[..., VLM]
WORDS = ("what happens at the door?", "who?")
ROWS = [(0, -1, 5), (1, -1, 3), (0, -1, 4), (0, 0, 2)]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("route", ["expand", "packed", "naive"])
def test_suppressed_tokens_have_probability_zero(make_vlm: MakeVLM, route: Any, chunk: int | None) -> None:
    vlm = make_vlm("qwen", route=route, completion_chunk=None if route == "naive" else chunk)
    model = vlm.build()
    texts = make_texts(vlm, ROWS)
    ids = texts.ids.clone()
    ids[0, 2] = min(vlm.suppressed_ids)
    head = unwrap(model).lm_head
    head.bias = nn.Parameter(torch.zeros(512))
    head.bias.data[sorted(vlm.suppressed_ids)] = 1000.0  # they would take all of the probability
    odd = replace(texts, ids=ids, loss_mask=texts.mask)
    scores = vlm.score(model, make_prompts(vlm, words=WORDS), odd, temperature=0.7, with_entropy=True)
    assert scores.entropy is not None
    assert scores.logprobs[0, 2] == -torch.inf
    rest = texts.mask.clone()
    rest[0, 2:] = False
    assert scores.logprobs[rest].min() > -50
    assert scores.entropy[rest].min() > 0.1


@pytest.mark.parametrize("route", ["expand", "packed"])
def test_a_lora_on_the_head_is_applied(make_vlm: MakeVLM, route: Any) -> None:
    lora = LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "lm_head"))
    vlm = make_vlm("qwen", lora=lora, route=route)
    model = vlm.build()
    builders.randomise_lora(model)
    prompts, texts = make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS)
    ours = vlm.score(model, prompts, texts).logprobs
    ours.sum().backward()
    assert unwrap(model).lm_head.lora_B["policy"].weight.grad.abs().max() > 0
    with torch.no_grad():
        theirs = own_logprobs(vlm, model, texts, row=1)
        unwrap(model).lm_head.lora_B["policy"].weight.zero_()
        without = vlm.score(model, prompts, texts).logprobs
    counted = texts.loss_mask[1, :3]
    torch.testing.assert_close(ours[1, :3][counted], theirs[counted], rtol=0, atol=1e-5)
    assert (without - ours)[texts.loss_mask].abs().min() > 1e-4


def own_logprobs(vlm: VLM, model: nn.Module, texts: TextBatch, row: int) -> Tensor:
    """Of one text behind its prompt, from the family's own forward and all of its logits."""
    alone = dict(vlm.encode([builders.make_example(prompt="who?", seed=1)]).prompts.inputs)
    tail = texts.ids[row : row + 1, : int(texts.mask[row].sum())]
    start = alone["input_ids"].shape[1]
    alone["input_ids"] = torch.cat([alone["input_ids"], tail], 1)
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    if "mm_token_type_ids" in alone:
        alone["mm_token_type_ids"] = torch.cat([alone["mm_token_type_ids"], torch.zeros_like(tail)], 1)
    logits = model(**alone, position_ids=position_ids(model, alone)).logits[0, start - 1 : -1].float()
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
def test_soft_capping_comes_before_the_log_probs(make_vlm: MakeVLM, route: Any) -> None:
    vlm = make_vlm("smolvlm", route=route)
    model = vlm.build()
    prompts, texts = make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS)
    uncapped = vlm.score(model, prompts, texts).logprobs
    text_config(model).final_logit_softcapping = 1.5
    add_cap(model, lambda: text_config(model).final_logit_softcapping)
    with torch.no_grad():
        ours = vlm.score(model, prompts, texts).logprobs
        theirs = own_logprobs(vlm, model, texts, row=1)
    assert text_config(model).final_logit_softcapping == 1.5
    counted = texts.loss_mask[1, :3]
    torch.testing.assert_close(ours[1, :3][counted], theirs[counted], rtol=0, atol=1e-5)
    assert (ours - uncapped)[texts.loss_mask].abs().max() > 0.01


def test_logits_that_are_changed_unseen_are_refused(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("smolvlm")
    model = vlm.build()
    add_cap(model, lambda: 30.0)
    with pytest.raises(ValueError, match="changes its logits behind the head"):
        vlm.score(model, make_prompts(vlm, words=WORDS), make_texts(vlm, ROWS))
