"""Every family passes the contract; a user's own family does by the same import."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from families import FAMILIES, TIED, WITH_EXPERTS
from torch import Tensor
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.smolvlm import SmolVLM
from vidreason.testing.contract import Case, FamilyContract, all_cases, pairwise_cases

SAVED = "test_a_saved_adapter_runs_in_transformers"


def routes(case: str) -> str:
    """The id of a test of routes."""
    return f"test_routes_equal_naive[{case}]"


class Shipped(FamilyContract):
    """A family that is shipped, with all cases; ``fast`` names the two tests that are not marked slow."""

    name: str
    fast: ClassVar[Sequence[str]]

    @pytest.fixture(autouse=True)
    def _written(self, make_vlm: Callable[..., VLM]) -> None:
        self.family, self.path = type(make_vlm(self.name)), make_vlm(self.name).path

    @classmethod
    def cases(cls) -> list[Case]:
        return all_cases(cls.routes)


class TestQwen25(Shipped):
    name = "qwen"
    fast = (SAVED, routes("lora-packed-checkpointing-chunks-tree"))
    passes_positions = True


class TestQwen2(Shipped):
    name = "qwen2"
    fast = (SAVED, routes("full-expand-fan"))
    passes_positions = True


class TestSmolVLM(Shipped):
    name = "smolvlm"
    fast = (SAVED, routes("nf4-expand-chunks-tree"))


class TestTiny(Shipped):
    name = "tiny"
    fast = (SAVED, routes("full-packed-tree"))
    uniform_clips = True
    trains_vision = False


class TestQwen3VL(Shipped):
    name = "qwen3"
    fast = (SAVED, routes("full-expand-checkpointing-chunks-tree"))


class TestGLM41V(Shipped):
    name = "glm"
    fast = (SAVED, routes("lora-expand-tree"))


class TestGLM46V(Shipped):
    name = "glm46"
    fast = (SAVED, routes("full-packed-checkpointing-fan"))


class TestInternVL(Shipped):
    name = "internvl"
    fast = (SAVED, routes("nf4-packed-chunks-fan"))


class TestLlavaOnevision(Shipped):
    name = "onevision"
    fast = (SAVED, routes("lora-packed-tree"))
    uniform_clips = True


class TestLlavaNextVideo(Shipped):
    name = "nextvideo"
    fast = (SAVED, routes("full-expand-chunks-tree"))
    uniform_clips = True


class TestGemma4(Shipped):
    name = "gemma4"
    fast = (SAVED, routes("lora-expand-checkpointing-chunks-tree"))
    routes = ("expand",)


class TestQwen35(Shipped):
    name = "qwen3_5"
    fast = (SAVED, routes("lora-expand-checkpointing-chunks-tree"))
    routes = ("expand",)


class Another(Shipped):
    """Another kind of checkpoint of a family."""

    fast = ()

    @classmethod
    def cases(cls) -> list[Case]:
        return pairwise_cases(cls.routes)


class TestQwen3VLExperts(Another):
    name = "qwen3_moe"


class TestInternVLExperts(Another):
    name = "internvl_moe"


class TestGemma4Experts(Another):
    name = "gemma4_moe"
    routes = ("expand",)


class TestQwen35Experts(Another):
    name = "qwen3_5_moe"
    routes = ("expand",)


class TestQwen3VLTied(Another):
    name = "qwen3_tied"


class TestGemma4Tied(Another):
    name = "gemma4_tied"
    routes = ("expand",)


class TestQwen35Tied(Another):
    name = "qwen3_5_tied"
    routes = ("expand",)


class TestSmolVLMTied(Another):
    name = "smolvlm_tied"


class OneTooFar(SmolVLM):
    """Positions of texts begin one behind those of the prompt, and so differ from the naive route."""

    def text_position_ids(self, positions: Tensor) -> Tensor:
        return positions + 1


class OnePosition(SmolVLM):
    """Positions that no model was trained with."""

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(inputs["input_ids"])


@pytest.mark.parametrize(
    ("kind", "test", "arguments"),
    [
        (OneTooFar, "test_routes_equal_naive", (Case("lora", "expand", False, None, "fan"),)),
        (OnePosition, "test_label_scores_equal_transformers", ()),
    ],
)
def test_a_faulty_family_fails(
    make_vlm: Callable[..., VLM], kind: type[VLM], test: str, arguments: tuple[object, ...]
) -> None:
    class Faulty(FamilyContract):
        family = kind
        path = make_vlm("smolvlm").path

    with pytest.raises(AssertionError):
        getattr(Faulty(), test)(*arguments)


def test_every_family_is_under_contract() -> None:
    assert {kind.name for kind in Shipped.__subclasses__() if kind is not Another} == set(FAMILIES)
    assert {kind.name for kind in Another.__subclasses__()} == {*WITH_EXPERTS, *TIED}


def test_pairwise_cases_cover_every_pair() -> None:
    """At a quarter of the tests."""
    for routes in (("expand", "packed"), ("expand",)):
        every, chosen = all_cases(routes), pairwise_cases(routes)
        pairs = [{(a, b, c[a], c[b]) for c in cases for a in range(5) for b in range(a)} for cases in (every, chosen)]
        assert pairs[0] == pairs[1]
        assert len(chosen) <= len(every) / 3
