"""A clip's prompt and scores depend on the clip alone, whatever else is in its batch."""

from collections.abc import Callable

import pytest
import torch
import vlm_builders as builders
from families import FAMILIES

from vidreason.datamodules.types import Example
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling

MakeVLM = Callable[..., VLM]
OF_ONE_LENGTH = ("tiny", "onevision", "nextvideo")
NAMES = ["delivery", "visitor", "a cat"]
SIZES = ((56, 56), (40, 90), (112, 56), (64, 96))


def clips(family: str) -> list[Example]:
    """Eight clips of unequal length and size, except where a family needs one length."""
    words = ["who?", "describe the video, step by step", "what happens at the door?"]
    return [
        builders.make_example(
            NAMES, prompt=words[i % 3], seed=i, frames=8 if family in OF_ONE_LENGTH else frames, size=SIZES[i % 4]
        )
        for i, frames in enumerate((1, 9, 2, 5, 8, 3, 1, 16))
    ]


@pytest.mark.parametrize(
    ("family", "route"),
    [(f, r) for f in FAMILIES for r in ("expand", "packed") if r == "expand" or f not in ("gemma4", "qwen3_5")],
)
def test_a_batch_of_one_equals_a_batch_of_eight(make_vlm: MakeVLM, family: str, route: str) -> None:
    vlm = make_vlm(family, route=route, dtype="float32")
    model = vlm.build().eval()
    examples = clips(family)
    together = vlm.encode(examples)
    with torch.no_grad():
        joint = vlm.score(model, together.prompts, together.texts).logprobs
        written = vlm.generate(model, together.prompts, 1, Sampling(6, temperature=0))
    ids, mask = together.prompts.inputs["input_ids"], together.prompts.inputs["attention_mask"].bool()
    for i, example in enumerate(examples):
        alone = vlm.encode([example])
        assert alone.prompts.inputs["input_ids"][0].equal(ids[i][mask[i]]), "the same prompt, word by word"
        with torch.no_grad():
            scores = vlm.score(model, alone.prompts, alone.texts).logprobs
            words = vlm.generate(model, alone.prompts, 1, Sampling(6, temperature=0)).texts
        rows = together.texts.owner == i
        torch.testing.assert_close(scores, joint[rows], rtol=0, atol=1e-5)
        probs, expected = scores.sum(1).softmax(0), joint[rows].sum(1).softmax(0)
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-5)
        assert words[0] == written.texts[i]


def test_a_prompt_names_its_own_number_of_frames(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("smolvlm")
    inputs = vlm.encode([builders.make_example(frames=1), builders.make_example(frames=8, seed=1)]).prompts.inputs
    short, long = (vlm.tokenizer.decode(row) for row in inputs["input_ids"])
    assert "series of one frames" in short
    assert "series of eight frames" in long
