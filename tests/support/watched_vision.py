"""Models whose vision tower is watched, and prompts about videos that have names, to test the vision cache on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vlm_builders as builders
from torch import nn

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap

MakeVLM = Callable[..., VLM]
LORA = LoRAOptions(r=4, alpha=8)


def tower(vlm: VLM, model: nn.Module) -> nn.Module:
    found: nn.Module = unwrap(model).get_submodule(vlm.vision_modules[0])
    return found


@contextmanager
def counting(vlm: VLM, model: nn.Module) -> Iterator[list[int]]:
    """Collects one entry for every forward of the vision tower."""
    calls: list[int] = []
    handle = tower(vlm, model).register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def prompts_of(vlm: VLM, seeds: tuple[int, ...] = (0, 1), **options: Any) -> EncodedPrompts:
    words = ("what happens?", "describe the video, step by step", "who?")
    examples = [
        builders.make_example(prompt=words[i % 3], seed=seed, identity=f"video {seed}", **options)
        for i, seed in enumerate(seeds)
    ]
    return vlm.encode(examples).prompts


def texts_of(vlm: VLM, prompts: int = 2) -> TextBatch:
    return builders.make_texts(vlm, [(b, -1, 3 + b + i) for b in range(prompts) for i in range(2)])


def built(make_vlm: MakeVLM, family: str, **options: Any) -> tuple[VLM, nn.Module]:
    vlm = make_vlm(family, **{"lora": LORA, "dtype": "float32", **options})
    torch.manual_seed(0)
    model = vlm.build()
    builders.randomise_lora(model)
    return vlm, model
