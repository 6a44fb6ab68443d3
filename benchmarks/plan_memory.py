"""Memory that ``vidreason plan`` predicts against the peak of tensor bytes that is measured.

    make links && PYTHONPATH=.typing python benchmarks/plan_memory.py --json benchmarks/results/DATE_plan_memory.json

Three families at their real widths with few decoder layers, fp32, LoRA on the decoder, on one CPU thread; all weights
are 0, since sizes do not depend on them. Measured is the largest number of bytes of live storages in a forward and
backward pass, counted at every operation, above weights, gradients and inputs; the vision cache is filled before.
Predicted is the same from the configuration alone: it runs fewer layers than are measured, and extrapolates. The two
configurations were not used while the prediction was written.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from figures import versions, write_json
from harness import PACKAGES
from real_shapes import SHAPES, write_folder
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from vlm_builders import make_example

from vidreason.datamodules.types import Encoded, Text
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.planning.live_bytes import LiveBytes
from vidreason.lightning_modules.vlms.planning.memory import MemoryEstimate, repeated

MODELS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "Qwen2.5-VL-3B": (3, {"depth": 2, "fullatt_block_indexes": [1]}),
    "Qwen3-VL-2B": (5, {"depth": 3, "deepstack_visual_indexes": [0, 1]}),
    "InternVL3-2B": (3, {"num_hidden_layers": 2}),
}
"""Decoder layers that are measured, and changes of the vision tower."""


@dataclass(frozen=True)
class Case:
    """A configuration of the comparison: gradient checkpointing, and the clips and texts of a forward pass."""

    name: str
    checkpointing: bool
    clips: int
    frames: int
    size: tuple[int, int]
    texts: tuple[int, ...]
    """Length of each text behind a clip, in words."""


CASES = (
    Case("SFT, 2 clips of unequal prompts", False, 2, 6, (224, 308), (18, 7)),
    Case("GRPO, 6 completions, checkpointing", True, 1, 8, (252, 224), (24, 20, 16, 12, 8, 4)),
)


@dataclass(frozen=True)
class Row:
    """One comparison; sizes in bytes."""

    model: str
    case: str
    layers: int
    layers_run: tuple[int, int]
    prompt_tokens: int
    predicted: int
    measured: int
    saved: int
    """Predicted bytes that autograd saves for the backward pass."""

    @property
    def ratio(self) -> float:
        """The predicted bytes divided by the measured bytes."""
        return self.predicted / self.measured


def compare(name: str, case: Case, folder: Path) -> Row:
    """Predicts and measures one configuration of one model."""
    layers, vision = MODELS[name]
    shape = SHAPES[name]
    write_folder(folder, shape, layers, vision)
    vlm = shape.family(
        str(folder), lora=LoRAOptions(r=16, alpha=32), dtype="float32", gradient_checkpointing=case.checkpointing
    )
    texts = tuple(" ".join(["word"] * words) for words in case.texts)
    example = make_example(texts, frames=case.frames, size=case.size, identity="clip")
    encoded = vlm.encode([example])
    padded = case.clips > 1
    estimate = MemoryEstimate(vlm, torch.float32)
    predicted = estimate.update(encoded, case.clips, padded)
    first = vlm.encode([replace(example, texts=(Text("a"),))])
    measured = measure(vlm, first, repeated(vlm, encoded, case.clips, padded))
    tokens = int(encoded.prompts.inputs["attention_mask"].sum())
    return Row(
        name,
        case.name,
        layers,
        estimate.fake.depths,
        tokens,
        round(predicted.total),
        measured,
        round(predicted.activations),
    )


def measure(vlm: VLM, first: Encoded, batch: Encoded) -> int:
    """Returns the peak of tensor bytes of forward and backward pass on ``batch``, after a forward pass on ``first``."""
    model = build(vlm)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        vlm.score(model, first.prompts, first.texts)  # fills the vision cache
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    known = [*model.parameters(), *model.buffers(), *grads, *batch.prompts.inputs.values(), *vars(batch.texts).values()]
    live = LiveBytes(known)
    with live:
        vlm.score(model, batch.prompts, batch.texts).logprobs.sum().backward()
    return live.peak


def build(vlm: VLM) -> nn.Module:
    """Returns the model of a folder without weights, with zeros for weights."""
    config = AutoConfig.from_pretrained(vlm.path)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    base.to_empty(device="cpu")
    base.tie_weights()
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data.zero_()
    checkpointing, frozen = vlm.gradient_checkpointing, vlm.vision_modules
    return building.equip(base, None, lora=vlm.lora, frozen=frozen, gradient_checkpointing=checkpointing)


def main() -> None:
    """Compares all models in all configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print("| model | configuration | layers | prompt tokens | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        for case in CASES:
            with TemporaryDirectory() as folder:
                row = compare(name, case, Path(folder))
            rows.append(row)
            sizes = f"{row.predicted / 1e6:.1f} | {row.measured / 1e6:.1f} | {row.ratio:.3f}"
            print(f"| {name} | {case.name} | {row.layers} | {row.prompt_tokens} | {sizes} |", flush=True)
            gc.collect()
    worst = max((abs(row.ratio - 1) for row in rows), default=0.0)
    print(f"largest deviation: {worst:.1%}", file=sys.stderr)
    found = [{**asdict(row), "ratio": row.ratio} for row in rows]
    circumstances = {"date": date.today().isoformat(), "device": "CPU, one thread", "versions": versions(PACKAGES)}
    write_json(options.json, {"largest_deviation": worst, "details": {**circumstances, "rows": found}})


if __name__ == "__main__":
    main()
