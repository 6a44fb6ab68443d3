"""GRPO updates on one GPU: naive at its best micro-batch against the shared prefix.

Real shapes of Qwen2.5-VL with random weights in bf16, LoRA on the decoder, vision tower frozen: one video of 32 frames
(4,096 visual tokens, prompt 4,296), G completions of C tokens, forward and backward of the GRPO loss. Times are medians
of device events after a warm-up. Naive repeats prompt and pixels for every completion, uses the fastest micro-batch,
and runs a backward after each. Ours is ``vlm.route: auto`` with the vision cache filled within the run. MFU is the
FLOPs of a side over its time and over the bf16 rate of a large matrix product measured here. An update that runs out of
memory is reported as such and enters no ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from gpu_run import Clock, Deadline
from harness import flop_counter
from reference_model import Grid, make_prompts, make_texts, make_vlm
from torch import nn
from variants import grpo, naive_logprobs, rows

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.functional.losses import grpo_loss
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions

LORA = LoRAOptions(r=16, alpha=32)


@dataclass(frozen=True)
class Scale:
    """The sizes of the updates."""

    sizes: tuple[str, ...]
    grid: Grid
    words_behind: int
    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    dtype: str
    device: str


FULL = Scale(("3b",), (16, 32, 32), 194, (256, 512), (8,), "bfloat16", "cuda")
TINY = Scale(("reference",), (1, 4, 4), 8, (4,), (2,), "float32", "cpu")


@dataclass(frozen=True)
class Side:
    """Results of one side (naive or ours) in one setting."""

    seconds: float | None
    """Median time of an update; None if it runs out of memory."""
    peak_gb: float | None
    """Peak of allocated memory, including weights."""
    gflop: float
    micro_batch: int


@dataclass(frozen=True)
class Row:
    """Results of both sides in one setting."""

    size: str
    checkpointing: bool
    completion: int
    group_size: int
    weights_gb: float
    naive: Side
    naive_at_once: Side
    ours: Side
    ours_no_cache: Side
    largest_logprob_difference: float
    """Between the two sides, in this precision."""

    @property
    def ratio(self) -> float | None:
        """Time of naive at its best micro-batch over ours."""
        return self.naive.seconds / self.ours.seconds if self.naive.seconds and self.ours.seconds else None

    @property
    def memory_ratio(self) -> float | None:
        """Memory of naive over ours, both with all completions at once."""
        both = self.naive_at_once.peak_gb, self.ours.peak_gb
        return both[0] / both[1] if both[0] and both[1] else None


def print_rows(found: Sequence[Row], rate: float) -> None:
    """Prints a line per setting; ``rate`` is in FLOP per second."""
    head = (
        "model",
        "ckpt",
        "C",
        "G",
        "naive s",
        "mb",
        "ours s",
        "ratio",
        "tok/s",
        "MFU naive",
        "MFU",
        "GB naive",
        "GB",
    )
    print("".join(f"{name:>11s}" for name in head))
    for row in found:
        ours, naive = row.ours, row.naive
        tokens = row.completion * row.group_size / ours.seconds if ours.seconds else None
        cells: list[Any] = [
            row.size,
            row.checkpointing,
            row.completion,
            row.group_size,
            naive.seconds,
            naive.micro_batch,
        ]
        cells += [ours.seconds, row.ratio, tokens, mfu(naive, rate), mfu(ours, rate)]
        cells += [row.naive_at_once.peak_gb, ours.peak_gb]
        print("".join(f"{_cell(cell):>11s}" for cell in cells), flush=True)


def mfu(side: Side, rate: float) -> float | None:
    """Returns the share of the measured rate of a matrix product; None if the side ran out of memory."""
    return side.gflop * 1e9 / side.seconds / rate if side.seconds else None


def _cell(value: Any) -> str:
    if value is None:
        return "no memory"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclass
class Bench:
    """A model with its prompts and the clock."""

    vlm: VLM
    model: nn.Module
    prompts: EncodedPrompts
    clock: Clock

    def ours(self, texts: TextBatch) -> Callable[[], None]:
        """Returns an update with all completions at once behind one prompt."""

        def step() -> None:
            self.model.zero_grad()
            grpo(self.vlm.score(self.model, self.prompts, texts).logprobs, texts).backward()  # type: ignore[no-untyped-call]

        return step

    def naive(self, texts: TextBatch, size: int) -> Callable[[], None]:
        """Returns an update with micro-batches of ``size`` completions, each behind its own copy of the prompt."""
        advantages = torch.linspace(-1.5, 1.5, len(texts), device=texts.ids.device)

        def step() -> None:
            self.model.zero_grad()
            for start in range(0, len(texts), size):
                part = rows(texts, start, start + size)
                found = naive_logprobs(self.vlm, self.model, self.prompts, part)
                count = texts.loss_mask.sum()  # of all micro-batches, so that their gradients add up
                ahead = advantages[start : start + size]
                old = found.detach() + 0.1  # ratios differ from 1, as in a second pass over the rollouts
                loss = grpo_loss(found, ahead, part.loss_mask, normalizer=count, old_logprobs=old).loss
                loss.backward()  # type: ignore[no-untyped-call]

        return step

    def side(self, step: Callable[[], None], micro_batch: int, gflop: float, repeats: int = 3) -> Side:
        """Measures a step after one warm-up step."""
        found = self.clock.run(step, 1 + repeats)
        self.model.zero_grad()
        if found is None:
            return Side(None, None, gflop, micro_batch)
        return Side(statistics.median(found[0][1:]), found[1], gflop, micro_batch)

    def cached(self, on: bool) -> None:
        """Switches the vision cache on, or off, so that each update runs the vision tower."""
        if on:
            self.vlm.__dict__.pop("vision_cache", None)  # the cached property makes a new, empty cache
        else:
            self.vlm.vision_cache = None  # type: ignore[misc]

    def difference(self, texts: TextBatch) -> float:
        """Returns the largest difference between the log-probs of both sides, for two completions."""
        two = rows(texts, 0, 2)
        with torch.no_grad():
            gap = self.vlm.score(self.model, self.prompts, two).logprobs
            gap = gap - naive_logprobs(self.vlm, self.model, self.prompts, two)
        return float(gap.abs().max())


def gflop(step: Callable[[], None]) -> float:
    """Returns the GFLOP of one step."""
    with flop_counter() as counter:
        step()
    return counter.get_total_flops() / 1e9


def best_naive(bench: Bench, texts: TextBatch, single: float, known: int) -> tuple[Side, Side]:
    """Measures naive at its fastest micro-batch and with all completions at once.

    Args:
        bench: The model with its prompts.
        texts: G completions.
        single: GFLOP of one of them.
        known: The fastest micro-batch if it was found before with fewer completions, else 0.
    """
    group = len(texts)
    at_once = bench.side(bench.naive(texts, group), group, group * single, repeats=2)
    fitting = [at_once] if at_once.seconds is not None else []
    sizes = [known] if known else [group // 2**i for i in range(1, group.bit_length())]
    for size in sizes:
        if len(fitting) == 2 or size == group:  # two that fit are compared; smaller ones are taken to be slower
            break
        side = bench.side(bench.naive(texts, size), size, group * single, repeats=2)
        fitting += [side] if side.seconds is not None else []
    best = min(fitting, key=lambda side: side.seconds or 0.0, default=at_once)
    return best, at_once


def measure(
    bench: Bench, scale: Scale, size: str, checkpointing: bool, length: int, group: int, micro_batch: int
) -> Row:
    """Measures one setting; ``micro_batch`` is the known fastest one of naive, or 0."""
    texts = make_texts([length] * group, [0] * group, [-1] * group, 0, scale.device)
    weights = torch.cuda.memory_allocated() / 1e9 if bench.clock.cuda else 0.0
    single = gflop(bench.naive(rows(texts, 0, 1), 1))
    bench.cached(False)
    without = bench.side(bench.ours(texts), group, gflop(bench.ours(texts)))
    bench.cached(True)
    bench.ours(texts)()  # fills the cache, as rollouts do
    ours = bench.side(bench.ours(texts), group, gflop(bench.ours(texts)))
    naive, at_once = best_naive(bench, texts, single, micro_batch)
    gap = bench.difference(texts)
    return Row(size, checkpointing, length, group, weights, naive, at_once, ours, without, gap)


def updates(scale: Scale, clock: Clock, rate: float, deadline: Deadline) -> list[dict[str, Any]]:
    """Measures all settings for which there is time.

    Args:
        scale: The sizes.
        clock: The clock of the device.
        rate: FLOP per second of a large matrix product.
        deadline: The time limit.
    """
    found: list[Row] = []
    for size in scale.sizes:
        bench = None
        micro_batches: dict[tuple[bool, int], int] = {}
        for group, checkpointing, length in product(scale.groups, (True, False), scale.lengths):
            if not deadline.allows(f"update {size}, checkpointing {checkpointing}, C {length}, G {group}"):
                continue
            bench = bench or _bench(scale, size, clock)
            set_checkpointing(bench.model, checkpointing)
            known = micro_batches.get((checkpointing, length), 0)
            found.append(measure(bench, scale, size, checkpointing, length, group, known))
            micro_batches[checkpointing, length] = found[-1].naive.micro_batch
            print_rows(found[-1:], rate)
    extra = [{"ratio": r.ratio, "memory_ratio": r.memory_ratio, "mfu": mfu(r.ours, rate)} for r in found]
    return [asdict(row) | more for row, more in zip(found, extra, strict=True)]


def _bench(scale: Scale, size: str, clock: Clock) -> Bench:
    options = {"dtype": scale.dtype, "lora": LORA, "device": scale.device, "size": size}
    vlm = make_vlm("qwen", scale.grid, 0, gradient_checkpointing=False, **options)
    dtype = getattr(torch, scale.dtype)
    prompts = make_prompts("qwen", scale.grid, 1, 0, scale.device, dtype, words_behind=scale.words_behind)
    return Bench(vlm, vlm.build(), prompts, clock)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Turns gradient checkpointing of the decoder on or off."""
    base: Any = model.get_base_model()  # type: ignore[operator]
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base, f"{kind}_checkpointing_disable")()
