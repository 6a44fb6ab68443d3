"""Scoring, loss, backward, sampling, label scoring and the vision cache on a device that does not exist."""

import __future__

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from pretended_device import DEVICE, Counts, MixUpError, on_device, on_host, pretending
from torch import Tensor, nn
from watched_vision import built, counting, prompts_of, texts_of

from vidreason.datamodules.types import EncodedPrompts
from vidreason.lightning_modules.decisions.closed_set import class_logprobs
from vidreason.lightning_modules.functional.losses import grpo_loss
from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.prefix import expand, packing
from vidreason.lightning_modules.vlms.prefix.layout import layers_with_state
from vidreason.testing.samples import relative_gap

MakeVLM = Callable[..., VLM]
FAST = ("qwen", "smolvlm", "qwen3_5")
ALL = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in FAMILIES]
KERNELS = {"qwen3_5": 430, "gemma4": 620}
"""At most so many kernels per sampled token, with LoRA; the models have two to four layers. Others take 260."""
SEEDS = [[1, 2], [3, 4]]


def run_all(vlm: VLM, model: nn.Module, device: Any) -> dict[str, Tensor]:
    """Returns the results of every pass of two clips on a device, with the gradients of a GRPO loss."""
    prompts, labels = prompts_of(vlm).to(device), texts_of(vlm).to(device)
    generated = vlm.generate(model, prompts, 2, Sampling(10), SEEDS)
    texts = vlm.texts_from(generated)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], device=device)
    found = {"ids": generated.ids, "sampled": generated.logprobs}
    for route in ("expand",) if layers_with_state(model) else ("expand", "packed"):
        vlm.route = route  # type: ignore[assignment]  # one of the options
        scores = vlm.score(model, prompts, texts, with_entropy=True)
        count = texts.loss_mask.sum()
        made = grpo_loss(
            scores.logprobs,
            advantages,
            texts.loss_mask,
            normalizer=count,
            rollout_logprobs=generated.logprobs,
            entropy=scores.entropy,
            entropy_coef=0.01,
        )
        made.loss.backward()
        with torch.no_grad():
            classes = class_logprobs(vlm.score(model, prompts, labels).logprobs, labels, 2, 2)
        found |= {f"{route} loss": made.loss.detach(), f"{route} classes": classes}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ALL)
def test_as_on_the_host(make_vlm: MakeVLM, family: str) -> None:
    expected = run_all(*built(make_vlm, family), "cpu")
    vlm, model = built(make_vlm, family)
    on_device(model)
    with pretending(), counting(vlm, model) as calls:
        found = {name: on_host(value) for name, value in run_all(vlm, model, DEVICE).items()}
    assert found.pop("ids").equal(expected.pop("ids"))
    assert relative_gap(found, expected) < 1e-5
    assert len(calls) == 2, "the cache is cold for sampling, and warm from then on"


def sampled(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, tokens: int) -> Counts:
    with pretending() as counts:
        generated = vlm.generate(model, prompts.to(DEVICE), 1, Sampling(tokens), [[1]] * prompts.batch_size)
    assert generated.ids.shape[1] == tokens
    return counts


@pytest.mark.parametrize(
    "family", ["qwen", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "qwen")]
)
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["padded", "unpadded"])
def test_what_a_sampled_token_costs(
    make_vlm: MakeVLM, family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, model = built(make_vlm, family, vision_cache=None)
    monkeypatch.setitem(vars(vlm), "stop_ids", frozenset())  # no row ends
    on_device(model)
    prompts = prompts_of(vlm, (0, 1) if padded else (0,))
    _, few, many = (sampled(vlm, model, prompts, tokens) for tokens in (1, 2, 10))  # the first logs once what it sees
    assert many.syncs.total() - few.syncs.total() <= 1, many.syncs - few.syncs
    assert many.transfers == few.transfers
    kernels = (many.kernels - few.kernels) / 8
    print(f"{family}: {kernels} kernels a token, {many.syncs.total()} syncs, {many.transfers.total()} transfers")
    assert kernels <= KERNELS.get(family, 260)


def plant(monkeypatch: pytest.MonkeyPatch, function: Any, old: str, new: str) -> None:
    """Replaces a piece of the source of a function."""
    plain = inspect.unwrap(function)
    source = inspect.getsource(plain)
    assert source.count(old) == 1
    moved = "\n" * (plain.__code__.co_firstlineno - 1) + source.replace(old, new)
    made: dict[str, Any] = dict(plain.__globals__)
    exec(compile(moved, plain.__code__.co_filename, "exec", __future__.annotations.compiler_flag), made)
    monkeypatch.setattr(plain, "__code__", inspect.unwrap(made[plain.__name__]).__code__)


def line_of(function: Any, piece: str) -> str:
    """Returns the module and line of a piece of the source of a function."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    (line,) = [number for number, text in enumerate(lines, first) if piece in text]
    return f"{function.__module__}:{line}"


@pytest.fixture(scope="module")
def qwen(make_vlm: MakeVLM) -> tuple[VLM, nn.Module]:
    vlm, model = built(make_vlm, "qwen")
    on_device(model)
    with pretending():
        vlm.generate(model, prompts_of(vlm).to(DEVICE), 2, Sampling(1), SEEDS)  # fills the vision cache
    return vlm, model


@pytest.mark.parametrize(
    ("function", "old", "new", "found"),
    [
        (expand.extend, "torch.arange(ids.shape[1], device=ids.device)", "torch.arange(ids.shape[1])", "torch.arange"),
        (expand.extend, "torch.ones_like(ids)", "torch.ones(ids.shape, dtype=torch.int64)", "torch.ones("),
        (generation.sample, "noise.to(device)", "noise", "noise[alive, step]"),
        (packing._mask, "torch.bool, device=device", "torch.bool", "torch.ones("),
    ],
    ids=["positions", "mask", "noise", "packing-mask"],
)
def test_planted_faults_are_found(
    qwen: tuple[VLM, nn.Module], monkeypatch: pytest.MonkeyPatch, function: Any, old: str, new: str, found: str
) -> None:
    vlm, model = qwen
    monkeypatch.setattr(vlm, "route", "packed")
    where = line_of(function, found if found in inspect.getsource(inspect.unwrap(function)) else old)
    plant(monkeypatch, function, old, new)

    def sample_and_score() -> None:
        prompts, texts = prompts_of(vlm).to(DEVICE), texts_of(vlm).to(DEVICE)
        vlm.generate(model, prompts, 2, Sampling(2), SEEDS)
        vlm.score(model, prompts, texts)

    with pretending(), pytest.raises(MixUpError, match=re.escape(where)):
        sample_and_score()
