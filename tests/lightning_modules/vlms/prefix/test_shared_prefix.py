"""The shared prefix against transformers' own forward, and the work that it does; ``test_contract.py`` has the rest."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from published_positions import position_ids
from vlm_builders import FAN, PROMPTS, TREE, gradients, make_prompts, make_texts

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap

MakeVLM = Callable[..., VLM]
LORA = LoRAOptions(r=4, alpha=8)


@pytest.mark.parametrize("route", ["expand", "packed"])
def test_scores_equal_transformers_own_forward(make_vlm: MakeVLM, family: str, route: Any) -> None:
    """Every row alone, without padding or cache, at positions that are not ours."""
    vlm = make_vlm(family, route=route)
    model = vlm.build()
    prompts, texts = make_prompts(vlm), make_texts(vlm, FAN)
    with torch.no_grad():
        ours = vlm.score(model, prompts, texts, temperature=0.7).logprobs
        for row, (owner, _, length) in enumerate(FAN):
            alone = dict(vlm.encode([builders.make_example(prompt=PROMPTS[owner], seed=owner)]).prompts.inputs)
            tail = texts.ids[row : row + 1, :length]
            start = alone["input_ids"].shape[1]
            alone["input_ids"] = torch.cat([alone["input_ids"], tail], 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            if "mm_token_type_ids" in alone:
                kinds = alone["mm_token_type_ids"]
                alone["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tail)], 1)
            logits = model(**alone, position_ids=position_ids(model, alone)).logits[0, start - 1 : -1].float() / 0.7
            logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
            theirs = logits.log_softmax(-1).gather(-1, tail[0, :, None])[:, 0]
            counted = texts.loss_mask[row, :length]
            torch.testing.assert_close(ours[row, :length][counted], theirs[counted], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"route": "expand"}, {"route": "packed"}, {"completion_chunk": 2}], ids=str)
def test_the_tower_sees_each_video_once(make_vlm: MakeVLM, family: str, options: dict[str, Any]) -> None:
    vlm = make_vlm(family, lora=LORA, **options)
    model = vlm.build()
    prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
    seen: list[int] = []
    tower = unwrap(model).get_submodule(vlm.vision_modules[0])
    pixels = "hidden_states" if family == "qwen" else "pixel_values"
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs[pixels])), with_kwargs=True
    )
    vlm.score(model, prompts, texts).logprobs.sum().backward()
    once = sum(seen)
    assert len(seen) == 1
    assert once == (len(prompts.inputs["pixel_values_videos"]) if family == "qwen" else 3 * 4)
    vlm.route, vlm.completion_chunk = "naive", None
    vlm.score(model, prompts, texts)
    assert sum(seen) - once == once * 7 // 3, "the naive route repeats the video for each of the 7 paths"


def test_context_rows_cost_no_head(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    model = vlm.build()
    texts = make_texts(vlm, [(0, -1, 6), (0, 0, 2), (0, 0, 3), (1, -1, 4)])
    counts = texts.mask.clone()
    counts[[0, 3]] = False
    scored: list[int] = []
    unwrap(model).lm_head.register_forward_hook(lambda module, args, out: scored.append(out[..., 0].numel()))
    prompts = vlm.encode([builders.make_example(seed=i) for i in range(2)]).prompts
    logprobs = vlm.score(model, prompts, replace(texts, loss_mask=counts)).logprobs
    assert sum(scored) == 1 + (1 + 2), "one distribution behind the context for both children, three inside them"
    assert (logprobs[[0, 3]] == 0).all()


def test_nothing_to_score(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    encoded = vlm.encode([builders.make_example()])
    assert vlm.score(vlm.build(), encoded.prompts, encoded.texts, with_entropy=True).logprobs.shape == (0, 0)


def test_auto_packs_under_checkpointing(make_vlm: MakeVLM, family: str, caplog: pytest.LogCaptureFixture) -> None:
    vlm = make_vlm(family, lora=LORA, gradient_checkpointing=True)
    model = vlm.build()
    builders.randomise_lora(model)
    prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
    with caplog.at_level(logging.INFO):
        auto = gradients(vlm, model, prompts, texts, "auto")
        gradients(vlm, model, prompts, texts, "auto")
    said = [r.message for r in caplog.records if "scored by route" in r.message]
    assert said == ["texts are scored by route 'packed': decoder layers are recomputed in the backward pass"]

    plain = make_vlm(family, lora=LORA)
    other = plain.build()
    builders.randomise_lora(other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        b.data.copy_(a.data)
    expand = gradients(plain, other, prompts, texts, "expand")
    for name, value in expand.items():
        torch.testing.assert_close(auto[name], value, rtol=1e-3, atol=1e-4)

    model.eval()  # nothing is recomputed in eval mode
    assert gradients(vlm, model, prompts, texts, "expand")["logprobs"].sub(expand["logprobs"]).abs().max() < 1e-5


def test_refuses_rows_in_the_wrong_place(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    model, prompts = vlm.build(), make_prompts(vlm)
    for rows, message in (
        ([(0, 1, 2), (0, -1, 2)], "text row 0: parent 1 must be an earlier row"),
        ([(0, -1, 2), (1, 0, 2)], "text row 1: parent 0 must be an earlier row of the same prompt 1"),
        ([(0, -1, 2), (0, -1, 0)], "text row 1 has no token"),
    ):
        texts = make_texts(vlm, rows)
        for vlm.route in ("expand", "packed", "naive"):
            with pytest.raises(ValueError, match=message):
                vlm.score(model, prompts, texts)
