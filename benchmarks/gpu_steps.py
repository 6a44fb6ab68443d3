"""Time and peak memory of training steps of Qwen2.5-VL on one GPU, and of sampling.

Real shapes with random weights in bf16, vision tower frozen, two videos of 16 frames (2,048 visual tokens each) a step.

- ``capped_steps``: SFT and calibration with an adapter at the shapes of 3B and 7B, gradient checkpointing on, within
  24 GB (``set_per_process_memory_fraction``), and the peak that ``vidreason plan`` predicts for the same step.
- ``strategies``: every stage at the shape of 3B without the limit. ``lora`` and ``qlora`` train an adapter, on a bf16
  base and on a 4-bit base; ``fsdp`` trains all weights and ``fsdp_qlora`` an adapter on a 4-bit base, both sharded over
  a group of this one process, so that FSDP2 runs all its collectives.
- ``sampling``: 8 completions for each of 8 videos.

A step uses the code of the stages: sampling (GRPO only), log-probs, loss, backward, clipping, AdamW. The first step of
a variant is its warm-up and fills the vision cache. 4-bit variants need bitsandbytes and are listed as not run without.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from gpu_run import Clock, Deadline
from reference_model import END, Grid, make_prompts, make_texts, make_vlm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from variants import cross_entropy, grpo

from vidreason.datamodules.types import Encoded, EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.sharding import shard, unsharded
from vidreason.lightning_modules.vlms.planning.memory import MemoryEstimate
from vidreason.lightning_modules.weights.parameters import grad_norm, set_train_mode, trainable

LORA = LoRAOptions(r=16, alpha=32)
STRATEGIES = ("lora", "qlora", "fsdp", "fsdp_qlora")
STAGES = ("sft_label", "sft_trace", "grpo", "calibration")
CAP_GB = 24.0
VIDEOS, TEXTS, LABEL = 2, 2, 4
"""Videos per step, target texts per video in ``sft_trace``, tokens per label."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a benchmark run."""

    sizes: tuple[str, ...]
    """Of the steps under the limit; the strategies run the first."""
    grid: Grid
    tokens: int
    """Tokens of a text or completion."""
    group_size: int
    traces: int
    dtype: str
    device: str
    steps: int
    sampled: tuple[int, int]
    """Videos, and tokens of each completion, in sampling."""


FULL = Scale(("3b", "7b"), (8, 32, 32), 128, 8, 4, "bfloat16", "cuda", 3, (8, 256))
TINY = Scale(("reference",), (1, 4, 4), 4, 2, 2, "float32", "cpu", 1, (2, 4))


@dataclass(frozen=True)
class Row:
    """Results of one stage under one strategy."""

    size: str
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
    predicted_gb: float | None = None
    """Peak that the plan predicts; None where it was not asked for."""


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

    def rollouts(self, tokens: int = 0) -> TextBatch:
        """Samples G completions behind each video, like ``VLM.generate`` without decoding them to text."""
        group, videos, tokens = self.scale.group_size, self.prompts.batch_size, tokens or self.scale.tokens
        noise = generation.draw_noise(list(range(videos * group)), tokens)
        sampling = Sampling(max_new_tokens=tokens)
        with self.vlm.fed_from_cache(self.model, self.prompts, "expand"), unsharded(self.model):
            made = generation.sample(
                self.vlm, self.model, self.prompts, group, sampling, noise, [END], sorted(self.vlm.suppressed_ids), 0
            )
        owner = torch.arange(videos, device=made.ids.device).repeat_interleave(group)
        answers = torch.zeros_like(made.mask)
        return TextBatch(made.ids, made.mask, made.mask, answers, owner, torch.full_like(owner, -1))


def build(
    size: str, strategy: str, stage: str, scale: Scale, videos: int = VIDEOS, checkpointing: bool = False
) -> Variant:
    """Builds the model of a stage under a strategy."""
    quantised = strategy.endswith("qlora")
    vlm = make_vlm(
        "qwen",
        scale.grid,
        0,
        size,
        scale.device,
        dtype=scale.dtype,
        lora=LORA if trains_adapter(strategy, stage) else None,
        quantize="nf4" if quantised else "none",
        gradient_checkpointing=checkpointing,
    )
    model = vlm.build()
    if strategy.startswith("fsdp"):
        shard(model, init_device_mesh(scale.device, (1,)), vlm.vision_modules)
    set_train_mode(model)
    dtype = getattr(torch, scale.dtype)
    return Variant(vlm, model, make_prompts("qwen", scale.grid, videos, 0, scale.device, dtype), scale)


def trains_adapter(strategy: str, stage: str) -> bool:
    """Returns whether an adapter is trained; False if all weights are."""
    return strategy != "fsdp" or stage == "calibration"


def measure(variant: Variant, size: str, strategy: str, stage: str, clock: Clock) -> Row:
    """Runs and measures a warm-up step and the steps."""
    watched = trainable(variant.model)[-1]  # one tensor is enough to see that steps are taken
    before = watched.detach().clone()
    found = clock.run(variant.step_of(stage), 1 + variant.scale.steps)
    variant.model.zero_grad()
    number = sum(p.numel() for p in trainable(variant.model))
    if found is None:
        return Row(size, stage, strategy, number, None, None, moved=False)
    moved = not torch.equal(local(watched), local(before))
    return Row(size, stage, strategy, number, statistics.median(found[0][1:]), found[1], moved)


def local(tensor: Any) -> torch.Tensor:
    """Returns the local shard of a tensor, which in a group of one process is the whole tensor."""
    here: torch.Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return here


def predicted(variant: Variant, stage: str) -> float:
    """Returns the peak in GB that the plan predicts for a step of a stage with an adapter."""
    vlm, dtype = variant.vlm, getattr(torch, variant.scale.dtype)
    one = make_prompts("qwen", variant.scale.grid, 1, 0, dtype=dtype)
    rows = variant.texts(stage)
    assert rows is not None
    with TemporaryDirectory() as folder:
        config: Any = vlm.config  # type: ignore[attr-defined]
        config.save_pretrained(folder)
        vlm.path, path, vlm._processor = folder, vlm.path, vlm._processor or object()  # tokens are random
        try:
            estimate = MemoryEstimate(vlm, dtype)
            usage = estimate.update(Encoded(one, rows.to("cpu").behind(0, 1)), VIDEOS)
            optimizer = estimate.optimizer_bytes(lambda parameters: torch.optim.AdamW(parameters))
        finally:
            vlm.path = path
    weights, pixels = estimate.fake.weights, sum(value.nbytes for value in variant.prompts.inputs.values())
    fixed = weights.base_bytes + weights.adapter_bytes + weights.trained_bytes + weights.largest_bytes
    return float(fixed + optimizer + pixels + usage.total) / 1e9


@contextmanager
def memory_limit(clock: Clock) -> Iterator[None]:
    """Limits the memory of the GPU in the block to ``CAP_GB``."""
    if not clock.cuda:
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GB * 1e9 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def capped_steps(scale: Scale, clock: Clock, deadline: Deadline) -> list[dict[str, Any]]:
    """Measures SFT and calibration within the limit, with the peak that the plan predicts."""
    rows: list[Row] = []
    with memory_limit(clock):
        for size in scale.sizes:
            if not deadline.allows(f"steps {size}"):
                continue
            variant = build(size, "lora", "sft_trace", scale, checkpointing=True)
            for stage in ("sft_trace", "calibration"):
                row = measure(variant, size, "lora", stage, clock)
                rows.append(Row(**vars(row) | {"predicted_gb": predicted(variant, stage)}))
                print_row(rows[-1])
            del variant
            gc.collect()
    return [asdict(row) for row in rows]


def strategies(scale: Scale, clock: Clock, deadline: Deadline) -> list[dict[str, Any]]:
    """Measures every stage under every strategy that machine and time allow."""
    four_bits = importlib.util.find_spec("bitsandbytes") is not None
    rows: list[Row] = []
    variant, built, size = None, ("", False), scale.sizes[0]
    dist.init_process_group("nccl" if clock.cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for strategy, stage in product(STRATEGIES, STAGES):
            name = f"{stage} x {strategy}"
            if strategy.endswith("qlora") and not four_bits:
                deadline.left_out.append(f"{name}: bitsandbytes is not installed")
            elif deadline.allows(name):
                kind = (strategy, trains_adapter(strategy, stage))
                if variant is None or kind != built:
                    variant = None  # frees the last model before the next one is built
                    gc.collect()
                    variant, built = build(size, strategy, stage, scale), kind
                rows.append(measure(variant, size, strategy, stage, clock))
                print_row(rows[-1])
    finally:
        dist.destroy_process_group()
    return [asdict(row) for row in rows]


def sampling(scale: Scale, clock: Clock) -> dict[str, Any]:
    """Measures sampling; tokens are counted up to the end of each completion."""
    videos, tokens = scale.sampled
    variant = build(scale.sizes[0], "lora", "grpo", scale, videos)
    made: list[int] = []

    def sample() -> None:
        with torch.no_grad():
            made.append(int(variant.rollouts(tokens).mask.sum()))

    found = clock.run(sample, 3)
    result = {"size": scale.sizes[0], "rows": videos * scale.group_size, "most_tokens": tokens, "tokens": made[-1:]}
    if found is None:
        return {**result, "seconds": None}
    seconds = statistics.median(found[0][1:])
    return {**result, "seconds": seconds, "tokens_per_s": made[-1] / seconds, "peak_gb": found[1]}


def print_row(row: Row) -> None:
    """Prints the figures of a step."""
    cells = "no memory" if row.seconds is None else f"{row.seconds:.3f} s, {row.peak_gb:.2f} GB"
    plan = "" if row.predicted_gb is None else f", plan {row.predicted_gb:.2f} GB"
    print(f"{row.size} {row.strategy} {row.stage}: {row.trained / 1e6:.1f} M trained, {cells}{plan}", flush=True)
