"""Tests the cost of the routes: FLOPs, forwards, vision calls, and the tensors they hold."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_builders as builders
from covering import covering, sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vidreason.datamodules.types import EncodedPrompts
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.head import STATES_AT_ONCE
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.prefix.text_memory import text_bytes, texts_that_fit
from vidreason.lightning_modules.vlms.prefix.text_plan import plan_texts
from vidreason.lightning_modules.vlms.qwen import QwenVL

LORA = LoRAOptions(r=4, alpha=8)


class Tensors(TorchDispatchMode):
    """Watches every tensor that an operation makes: the largest of each type, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def write(tmp_path_factory: pytest.TempPathFactory, **sizes: int) -> Path:
    path: Path = builders.write_qwen(
        tmp_path_factory.mktemp("work"),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        num_hidden_layers=3,
        **sizes,
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory)


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory, vocab_size=8192)


def make(folder: Path, **options: Any) -> tuple[VLM, nn.Module, EncodedPrompts]:
    """64 visual tokens."""
    vlm = QwenVL(str(folder), **options)
    return vlm, vlm.build(), vlm.encode([builders.make_example(frames=8, size=(112, 112))]).prompts


def fan(vlm: VLM, texts: int, length: int) -> Any:
    return builders.make_texts(vlm, [(0, -1, length)] * texts)


def flops(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: Any, **options: Any) -> int:
    for name, value in options.items():
        setattr(vlm, name, value)
    with FlopCounterMode(display=False) as counter:
        vlm.score(model, prompts, texts).logprobs.sum().backward()
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize("checkpointing", sample([False, True], False))
def test_a_fraction_of_the_work(folder: Path, checkpointing: bool) -> None:
    """G = 8 texts of 16 tokens behind 64 visual tokens, tower frozen: forward and backward."""
    vlm, model, prompts = make(folder, lora=LORA, gradient_checkpointing=checkpointing)
    texts = fan(vlm, 8, 16)
    naive = flops(vlm, model, prompts, texts, route="naive")
    assert naive / flops(vlm, model, prompts, texts, route="packed") > 3.5
    assert naive / flops(vlm, model, prompts, texts, route="auto") > 3.5
    if not checkpointing:
        assert naive / flops(vlm, model, prompts, texts, route="expand") > 3.5


@pytest.mark.parametrize("route", sample(["expand", "packed"], "packed"))
def test_chunks_cost_one_more_forward_of_the_texts(folder: Path, route: str) -> None:
    vlm, model, prompts = make(folder, lora=LORA)
    texts = fan(vlm, 8, 16)
    whole = flops(vlm, model, prompts, texts, route=route)
    chunked = flops(vlm, model, prompts, texts, completion_chunk=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vlm.score(model, prompts, texts)
    assert 0 < chunked - whole < counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"route": "packed"}, 1),
        ({"route": "expand"}, 2),
        ({"route": "naive"}, 1),
        ({"route": "packed", "completion_chunk": 3}, 1 + 3),
        ({"route": "expand", "completion_chunk": 3}, 1 + 3),
    ],
    ids=str,
)
def test_forwards_and_vision_calls(folder: Path, options: dict[str, Any], forwards: int) -> None:
    vlm, model, prompts = make(folder, lora=LORA, **options)
    calls = {"model": 0, "tower": 0, "patches": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] += 1
            if name == "tower":
                calls["patches"] += len(args[0] if args else kwargs["hidden_states"])

        return hook

    unwrap(model).register_forward_pre_hook(count("model"), with_kwargs=True)
    unwrap(model).model.visual.register_forward_pre_hook(count("tower"), with_kwargs=True)
    scores = vlm.score(model, prompts, fan(vlm, 8, 16))
    assert calls["model"] == forwards
    scores.logprobs.sum().backward()
    assert calls["tower"] == 1
    patches = len(prompts.inputs["pixel_values_videos"])
    assert calls["patches"] == patches * (8 if options["route"] == "naive" else 1)
    texts_run = forwards - 1 if "completion_chunk" in options else 0
    assert calls["model"] == forwards + texts_run, "a chunk is run again in the backward pass, the prompts are not"


@pytest.mark.parametrize(
    ("options", "dtype"),
    covering([{"route": "expand"}, {"route": "packed", "completion_chunk": 5}], ["bfloat16", "float32"]),
)
def test_no_forward_holds_tokens_by_vocabulary(large_vocabulary: Path, options: dict[str, Any], dtype: str) -> None:
    vlm, model, prompts = make(large_vocabulary, lora=LORA, dtype=dtype, **options)
    texts = fan(vlm, 12, 64)
    tokens = int(texts.loss_mask.sum())
    assert tokens > 4 * STATES_AT_ONCE
    with Tensors() as seen:
        scores = vlm.score(model, prompts, texts, with_entropy=True)
        assert scores.entropy is not None
        (scores.logprobs + scores.entropy).sum().backward()
    assert seen.largest[torch.float32] == STATES_AT_ONCE * 8192
    assert max(seen.largest.values()) == STATES_AT_ONCE * 8192


def peak(folder: Path, texts: int, **options: Any) -> int:
    """Most bytes alive in forward and backward, above the weights and gradients."""
    vlm, model, prompts = make(folder, lora=LORA, **options)
    batch = fan(vlm, texts, 48)
    with Tensors() as seen:
        vlm.score(model, prompts, batch).logprobs.sum().backward()
    return seen.peak


@pytest.mark.parametrize(
    ("route", "checkpointing"), sample([(r, c) for r in ("expand", "packed") for c in (False, True)], ("packed", True))
)
def test_memory_of_chunks_does_not_grow_with_the_texts(folder: Path, route: str, checkpointing: bool) -> None:
    options: dict[str, Any] = {"route": route, "gradient_checkpointing": checkpointing}
    few, many = (peak(folder, n, completion_chunk=2, **options) for n in (4, 16))
    assert many < 1.1 * few
    whole = peak(folder, 16, **options)
    assert whole > (1.5 if checkpointing else 3) * many


@pytest.mark.parametrize(
    ("family", "options"),
    sample(
        [
            ("qwen", {"route": "expand"}),
            ("qwen", {"route": "packed"}),
            ("smolvlm", {"route": "packed"}),
            ("qwen", {"route": "packed", "gradient_checkpointing": True}),
            ("qwen", {"route": "expand", "gradient_checkpointing": True}),
            ("qwen", {"route": "expand", "dtype": "bfloat16"}),
            ("smolvlm", {"route": "packed", "dtype": "bfloat16"}),
        ],
        ("qwen", {"route": "expand"}),
        ("qwen", {"route": "packed", "gradient_checkpointing": True}),
        ("smolvlm", {"route": "packed", "dtype": "bfloat16"}),
    ),
    ids=str,
)
def test_the_estimate_is_near_what_is_held(make_vlm: Callable[..., VLM], family: str, options: dict[str, Any]) -> None:
    vlm = make_vlm(family, lora=LORA, **{"dtype": "float32", **options})
    model = vlm.build()
    prompts = vlm.encode([builders.make_example(frames=8, size=(112, 112))]).prompts
    held = []
    for count in (4, 12):
        batch = fan(vlm, count, 48)
        with Tensors() as seen:
            vlm.score(model, prompts, batch).logprobs.sum().backward()
        held.append(seen.peak)
    each = (held[1] - held[0]) / 8
    width = plan_texts(fan(vlm, 1, 48)).widths[0]
    estimate = text_bytes(model, width, prompts.inputs["input_ids"].shape[1], options["route"])
    print(f"{estimate / each:.2f} of what is held")
    assert 0.7 < estimate / each < 1.6


def test_chunks_follow_from_the_memory_limit(folder: Path) -> None:
    vlm, model, prompts = make(folder, lora=LORA)
    texts = fan(vlm, 8, 16)
    plan, length = plan_texts(texts), prompts.inputs["input_ids"].shape[1]
    each = max(text_bytes(model, width, length, "expand") for width in plan.widths)
    assert texts_that_fit(model, plan, length, "expand", 3.5 * each / 1e9) == 3
    forwards: list[int] = []
    unwrap(model).register_forward_pre_hook(lambda module, args: forwards.append(1))
    for gigabytes, chunk, expected in ((3.5, None, 1 + 3), (20.0, None, 1 + 1), (3.5, 2, 1 + 4), (3.5, 8, 1 + 3)):
        vlm.text_memory_gb, vlm.completion_chunk = gigabytes * each / 1e9, chunk
        forwards.clear()
        vlm.score(model, prompts, texts)
        assert len(forwards) == expected
    vlm.text_memory_gb = 0.5 * each / 1e9
    with pytest.raises(ValueError, match="do not hold one text of"):
        vlm.score(model, prompts, texts)
