"""Families whose decoders mix full attention with sliding windows (Gemma 4)."""

from collections.abc import Callable

import pytest
import torch
from comparing import relative_gap
from vlm_builders import TREE, gradients, make_prompts, make_texts

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.prefix import expand

MakeVLM = Callable[..., VLM]


def test_trees_behind_windows_equal_naive(make_vlm: MakeVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that others continue run by length; in one padded forward, as in other families, scores would be wrong."""
    vlm = make_vlm("gemma4")
    model = vlm.build()
    prompts, texts = make_prompts(vlm), make_texts(vlm, TREE)
    naive, found = (gradients(vlm, model, prompts, texts, route) for route in ("naive", "expand"))
    with monkeypatch.context() as patch:
        patch.setattr(expand, "layers_with_state", lambda model: None)
        with torch.no_grad():
            padded = vlm.score(model, prompts, texts, temperature=0.8).logprobs
    logprobs = naive.pop("logprobs")
    torch.testing.assert_close(found.pop("logprobs"), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pop("entropy"), naive.pop("entropy"), rtol=0, atol=1e-5)
    assert relative_gap(found, naive) < 1e-5
    assert (padded - logprobs).abs().max() > 0.1
