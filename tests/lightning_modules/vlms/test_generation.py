"""Sampling: log-probs, greedy search against transformers, noise, filters, stops."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vlm_builders as builders
from published_positions import position_ids
from vlm_builders import PROMPTS, make_prompts

from vidreason.lightning_modules.vlms import encoder
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling, draw_noise, inverse_cdf, keep_likeliest
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.qwen import QwenVL

MakeVLM = Callable[..., VLM]
SEEDS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.fixture
def often_ending(make_vlm: MakeVLM, tmp_path: Path) -> QwenVL:
    """A model on whose 60 stop ids a fifth or so of all steps end."""
    folder = tmp_path / "often_ending"
    shutil.copytree(make_vlm("qwen").path, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(100, 160))}))
    return QwenVL(str(folder))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12),
        Sampling(12, temperature=0.6),
        Sampling(12, temperature=1.7, top_p=0.8, top_k=50),
        Sampling(12, 0.0),
    ],
    ids=["plain", "cold", "hot-filtered", "greedy"],
)
def test_generated_logprobs_equal_scores(make_vlm: MakeVLM, family: str, sampling: Sampling) -> None:
    vlm = make_vlm(family, lora=LoRAOptions(r=4, dropout=0.5))  # dropout must be off while sampling
    torch.manual_seed(0)  # LoRA's A
    model = vlm.build()
    builders.randomise_lora(model)
    prompts = make_prompts(vlm)
    generated = vlm.generate(model, prompts, 3, sampling, SEEDS)
    model.eval()
    scores = vlm.score(model, prompts, vlm.texts_from(generated), temperature=sampling.temperature or 1.0)
    torch.testing.assert_close(generated.logprobs, scores.logprobs, rtol=0, atol=1e-5)
    assert generated.owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("family", ["qwen", "qwen2"])
def test_greedy_equals_forwards_of_the_whole_text(make_vlm: MakeVLM, family: str) -> None:
    """Without prefill or cache, and at positions that are not ours."""
    vlm = make_vlm(family)
    model = vlm.build()
    ours = vlm.generate(model, make_prompts(vlm), 1, Sampling(24, temperature=0))
    model.eval()
    for i, prompt in enumerate(PROMPTS):
        inputs = dict(vlm.encode([builders.make_example(prompt=prompt, seed=i)]).prompts.inputs)
        length = inputs["input_ids"].shape[1]
        for _ in range(24):
            logits = model(**inputs, position_ids=position_ids(model, inputs)).logits[0, -1]
            logits[sorted(vlm.suppressed_ids)] = -torch.inf
            for name, value in (("input_ids", int(logits.argmax())), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.full((1, 1), value)], dim=1)
            if int(logits.argmax()) in vlm.stop_ids:
                break
        assert ours.ids[i][ours.mask[i]].tolist() == inputs["input_ids"][0, length:].tolist()


def test_noise_depends_on_the_seed_alone(make_vlm: MakeVLM, often_ending: QwenVL) -> None:
    for vlm in (make_vlm("smolvlm"), often_ending):
        model = vlm.build()
        together = vlm.generate(model, make_prompts(vlm), 3, Sampling(16), SEEDS)
        again = vlm.generate(model, make_prompts(vlm), 3, Sampling(16), SEEDS)
        assert together.texts == again.texts
        assert len(set(together.texts)) >= 7
        for i, prompt in enumerate(PROMPTS):
            alone = vlm.encode([builders.make_example(prompt=prompt, seed=i)]).prompts
            swapped = vlm.generate(model, alone, 2, Sampling(16), [[SEEDS[i][2], SEEDS[i][0]]])
            assert swapped.texts == (together.texts[3 * i + 2], together.texts[3 * i])
        longer = vlm.generate(model, make_prompts(vlm), 3, Sampling(20), SEEDS)
        assert (longer.ids[:, :16] == together.ids)[together.mask].all(), "more room does not change what was drawn"


def test_stops_on_the_models_own_ids(often_ending: QwenVL) -> None:
    vlm, model = often_ending, often_ending.build()
    rows: list[int] = []
    unwrap(model).lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    generated = vlm.generate(model, make_prompts(vlm), 3, Sampling(16), SEEDS)
    lengths = generated.mask.sum(1).tolist()
    stops = set(range(100, 160))
    assert stops < vlm.stop_ids
    assert set(generated.finish_reason) == {"stop", "length"}
    for i, (length, reason) in enumerate(zip(lengths, generated.finish_reason, strict=True)):
        ids = generated.ids[i, :length].tolist()
        assert [token in stops for token in ids] == [False] * (length - 1) + [reason == "stop"]
        assert reason == "stop" or length == 16
        shown = ids[:-1] if reason == "stop" else ids
        assert generated.texts[i] == vlm.tokenizer.decode(shown, skip_special_tokens=False)
        assert not generated.mask[i, length:].any()
    assert sum(rows) == 3 + sum(length - 1 for length in lengths), "rows that ended are not forwarded"


def test_placeholders_are_never_sampled(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    vlm = make_vlm(family)
    model = vlm.build()
    names = set(vlm.tokenizer.convert_ids_to_tokens(sorted(vlm.suppressed_ids)))
    image, video = ("<|image_pad|>", "<|video_pad|>") if family == "qwen" else ("<image>", "<video>")
    assert {image, video} <= names
    assert "<|endoftext|>" not in names
    held_as_words = make_vlm(family)
    monkeypatch.setattr(encoder, "VISUAL_TOKEN", re.compile("(?!)"))
    assert held_as_words.suppressed_ids == encoder.placeholder_tokens(unwrap(model).config) != frozenset()
    head = unwrap(model).lm_head
    head.bias = torch.nn.Parameter(torch.zeros(512))
    head.bias.data[sorted(vlm.suppressed_ids)] = 1000.0
    for sampling in (Sampling(8), Sampling(8, temperature=0)):
        generated = vlm.generate(model, make_prompts(vlm), 2, sampling, [[1, 2]] * 3)
        assert not vlm.suppressed_ids & set(generated.ids.flatten().tolist())
        assert generated.logprobs.min() > -50


def test_modes_come_back(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen", lora=LoRAOptions(r=4), gradient_checkpointing=True)
    model = vlm.build()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2, "the frozen tower is in eval mode, the rest in train mode"
    generated = vlm.generate(model, make_prompts(vlm), 2, Sampling(3))  # seeds from torch's generator
    assert generated.ids.shape == (6, 3)
    assert [module.training for module in model.modules()] == before


def test_refuses_open_prompts_and_odd_seeds(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    model = vlm.build()
    with pytest.raises(ValueError, match="open prompt"):
        vlm.generate(model, vlm.encode([builders.make_example(open_prompt=True)]).prompts, 1, Sampling(2))
    with pytest.raises(ValueError, match=r"seeds must be \[3\]\[2\]"):
        vlm.generate(model, make_prompts(vlm), 2, Sampling(2), [[1], [2], [3]])


@pytest.mark.parametrize("field", ["max_new_tokens", "temperature", "top_p", "top_k"])
def test_sampling_refuses_nonsense(field: str) -> None:
    with pytest.raises(ValueError, match=f"sampling.{field}"):
        Sampling(**{field: -1})


def test_keep_likeliest() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert keep_likeliest(probs, 1.0, 0).equal(probs)
    assert keep_likeliest(probs, 1.0, 2).tolist()[0] == pytest.approx([0, 0.4, 0, 0.3])
    assert keep_likeliest(probs, 0.65, 0).tolist()[0] == pytest.approx([0, 0.4, 0, 0.3])
    assert keep_likeliest(probs, 0.75, 0).tolist()[0] == pytest.approx([0, 0.4, 0.2, 0.3])
    assert keep_likeliest(probs, 0.01, 0).tolist()[0] == pytest.approx([0, 0.4, 0, 0])
    assert keep_likeliest(probs, 0.5, 2).tolist()[0] == pytest.approx([0, 0.4, 0, 0]), "top-p of what top-k left"


def test_inverse_cdf() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1.0 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probs, uniforms).tolist() == [1, 1, 3, 3, 3]
    assert inverse_cdf(probs * 3, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_sampled_frequencies_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = draw_noise([123], 20000)[0]
    counts = torch.bincount(inverse_cdf(probs.expand(20000, 4), noise), minlength=4) / 20000
    torch.testing.assert_close(counts, probs, rtol=0, atol=0.015)


def test_the_log_says_how_many_tokens_a_clip_becomes(make_vlm: MakeVLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    vlm = make_vlm("qwen", max_pixels=56 * 56)
    model, example = vlm.build(), builders.make_example(frames=8, size=(112, 112))
    for _ in range(2):
        prompts = vlm.encode([example]).prompts
        vlm.generate(model, prompts, 1, Sampling(max_new_tokens=1))
    length = prompts.inputs["input_ids"].shape[1]
    (said,) = [record.message for record in caplog.records if "visual tokens" in record.message]
    # Four pairs of frames, each of 4 x 4 patches, of which four make a token.
    assert said == f"a clip becomes 16 visual tokens in the first batch; its longest prompt has {length} tokens"
