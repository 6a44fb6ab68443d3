"""Time and peak memory of training steps of Qwen2.5-VL-3B, for every stage and strategy on one GPU.

    make links && PYTHONPATH=.typing python benchmarks/gpu_strategies.py --json benchmarks/results/gpu_strategies.json

Real shapes with random weights in bf16, vision tower frozen, two videos of 16 frames (2,048 visual tokens each) a
step. ``lora`` and ``qlora`` train an adapter, on a bf16 base and on a 4-bit base; ``fsdp`` trains all weights and
``fsdp_qlora`` an adapter on a 4-bit base, both sharded over a group of this one process, so that FSDP2 runs all its
collectives. A calibrator is an adapter under every strategy. A step uses the code of the stages: sampling (GRPO only),
log-probs, loss, backward, clipping, AdamW. The first step of a variant is its warm-up and fills the vision cache. 4-bit
variants need bitsandbytes and are listed as not run without it. The script ends within ten minutes; variants that it
has no time for are listed. ``--smoke`` runs the same code with tiny sizes on a CPU.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from figures import write_json
from gpu_run import Clock, circumstances, options_of
from reference_model import END, Grid, make_prompts, make_texts, make_vlm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from variants import cross_entropy, grpo

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.sharding import shard, unsharded
from vidreason.lightning_modules.weights.parameters import grad_norm, set_train_mode, trainable

LORA = LoRAOptions(r=16, alpha=32)
STRATEGIES = ("lora", "qlora", "fsdp", "fsdp_qlora")
STAGES = ("sft_label", "sft_trace", "grpo", "calibration")
PACKAGES = ("torch", "transformers", "peft", "lightning", "bitsandbytes")
VIDEOS, TEXTS, LABEL = 2, 2, 4
"""Videos per step, target texts per video in ``sft_trace``, tokens per label."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a benchmark run."""

    size: str
    grid: Grid
    tokens: int
    """Tokens of a text or completion."""
    group_size: int
    traces: int
    dtype: str
    device: str
    steps: int


FULL = Scale("3b", (8, 32, 32), 128, 8, 4, "bfloat16", "cuda", 3)
SMOKE = Scale("reference", (1, 4, 4), 4, 2, 2, "float32", "cpu", 1)


@dataclass(frozen=True)
class Row:
    """Results of one stage under one strategy."""

    stage: str
    strategy: str
    trained: int
    """Number of trained parameters."""
    seconds: float | None
    """Median time of a step; None if it runs out of memory."""
    peak_gb: float | None
    """Peak of allocated memory, including weights; 0 on a CPU."""
    moved: bool
    """True if the steps changed the weights."""


@dataclass
class Variant:
    """A built model with its prompts."""

    vlm: VLM
    model: nn.Module
    prompts: EncodedPrompts
    scale: Scale

    def step_of(self, stage: str) -> Callable[[], None]:
        """Returns one optimizer step of a stage."""
        optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-4)
        texts = self.texts(stage)

        def step() -> None:
            rows = self.rollouts() if texts is None else texts
            optimizer.zero_grad()
            logprobs = self.vlm.score(self.model, self.prompts, rows).logprobs
            loss = grpo(logprobs, rows) if stage == "grpo" else cross_entropy(logprobs, rows)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grads_with_norm_(trainable(self.model), 1.0, grad_norm(trainable(self.model)))
            optimizer.step()

        return step

    def texts(self, stage: str) -> TextBatch | None:
        """Returns the texts behind the videos; None for GRPO, which samples them in each step."""
        if stage == "grpo":
            return None
        length = LABEL if stage == "sft_label" else self.scale.tokens
        each = {"sft_label": 1, "sft_trace": TEXTS, "calibration": self.scale.traces}[stage]
        owner = [video for video in range(VIDEOS) for _ in range(each)]
        lengths, parent = [length] * len(owner), [-1] * len(owner)
        if stage == "calibration":  # a label behind each trace; traces are context, not targets
            lengths, parent = lengths + [LABEL] * len(owner), parent + list(range(len(owner)))
            owner = owner * 2
        return make_texts(lengths, owner, parent, 0, self.scale.device)

    def rollouts(self) -> TextBatch:
        """Samples G completions behind each video, like ``VLM.generate`` without decoding them to text."""
        group = self.scale.group_size
        noise = generation.draw_noise(list(range(VIDEOS * group)), self.scale.tokens)
        sampling = Sampling(max_new_tokens=self.scale.tokens)
        with self.vlm._vision_fed(self.model, self.prompts, "expand"), unsharded(self.model):
            made = generation.sample(
                self.vlm, self.model, self.prompts, group, sampling, noise, [END], sorted(self.vlm.suppressed_ids), 0
            )
        owner = torch.arange(VIDEOS, device=made.ids.device).repeat_interleave(group)
        answers = torch.zeros_like(made.mask)
        return TextBatch(made.ids, made.mask, made.mask, answers, owner, torch.full_like(owner, -1))


def build(strategy: str, stage: str, scale: Scale) -> Variant:
    """Builds the model of a stage under a strategy."""
    quantised = strategy.endswith("qlora")
    vlm = make_vlm(
        "qwen",
        scale.grid,
        0,
        scale.size,
        scale.device,
        dtype=scale.dtype,
        lora=LORA if trains_adapter(strategy, stage) else None,
        quantize="nf4" if quantised else "none",
    )
    model = vlm.build()
    if strategy.startswith("fsdp"):
        shard(model, init_device_mesh(scale.device, (1,)), vlm.vision_modules)
    set_train_mode(model)
    dtype = getattr(torch, scale.dtype)
    return Variant(vlm, model, make_prompts("qwen", scale.grid, VIDEOS, 0, scale.device, dtype), scale)


def trains_adapter(strategy: str, stage: str) -> bool:
    """Returns whether an adapter is trained; False if all weights are."""
    return strategy != "fsdp" or stage == "calibration"


def measure(variant: Variant, strategy: str, stage: str, clock: Clock) -> Row:
    """Runs and measures a warm-up step and the steps."""
    watched = trainable(variant.model)[-1]  # one tensor is enough to see that steps are taken
    before = watched.detach().clone()
    found = clock.run(variant.step_of(stage), 1 + variant.scale.steps)
    variant.model.zero_grad()
    number = sum(p.numel() for p in trainable(variant.model))
    if found is None:
        return Row(stage, strategy, number, None, None, moved=False)
    moved = not torch.equal(local(watched), local(before))
    return Row(stage, strategy, number, statistics.median(found[0][1:]), found[1], moved)


def local(tensor: Any) -> torch.Tensor:
    """Returns the local shard of a tensor, which in a group of one process is the whole tensor."""
    here: torch.Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return here


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a line per variant."""
    print("".join(f"{name:>16s}" for name in ("stage", "strategy", "trained M", "s a step", "peak GB")))
    for row in rows:
        figures = [f"{row.trained / 1e6:.1f}"]
        figures += ["no memory"] * 2 if row.seconds is None else [f"{row.seconds:.3f}", f"{row.peak_gb:.2f}"]
        print("".join(f"{cell:>16s}" for cell in (row.stage, row.strategy, *figures)), flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures all variants that machine and time allow; returns the content of the result file."""
    started = time.monotonic()
    options = options_of(__doc__, arguments, minutes=8.5)
    scale = SMOKE if options.smoke else FULL
    clock = Clock(scale.device)
    four_bits = importlib.util.find_spec("bitsandbytes") is not None
    where = circumstances(clock, PACKAGES)
    print(where)
    rows: list[Row] = []
    left: dict[str, str] = {}
    variant, built = None, ("", False)
    dist.init_process_group("nccl" if clock.cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for strategy, stage in product(STRATEGIES, STAGES):
            if strategy.endswith("qlora") and not four_bits:
                left[f"{stage} x {strategy}"] = "bitsandbytes is not installed"
            elif time.monotonic() - started > 60 * options.minutes:
                left[f"{stage} x {strategy}"] = "no time was left"
            else:
                kind = (strategy, trains_adapter(strategy, stage))
                if variant is None or kind != built:
                    variant = None  # frees the last model before the next one is built
                    gc.collect()
                    variant, built = build(strategy, stage, scale), kind
                rows.append(measure(variant, strategy, stage, clock))
                print_rows(rows[-1:])
    finally:
        dist.destroy_process_group()
    print_rows(rows)
    for name, why in left.items():
        print(f"not run: {name}: {why}")
    result = {**where, "scale": asdict(scale), "not_run": left, "rows": [asdict(row) for row in rows]}
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
