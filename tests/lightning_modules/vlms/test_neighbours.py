"""A clip's prompt depends on the clip alone, whatever else is in its batch; ``test_contract.py`` has the scores."""

from collections.abc import Callable

import vlm_builders as builders

from vidreason.lightning_modules.vlms.base import VLM

MakeVLM = Callable[..., VLM]


def test_a_prompt_names_its_own_number_of_frames(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("smolvlm")
    inputs = vlm.encode([builders.make_example(frames=1), builders.make_example(frames=8, seed=1)]).prompts.inputs
    short, long = (vlm.tokenizer.decode(row) for row in inputs["input_ids"])
    assert "series of one frames" in short
    assert "series of eight frames" in long
