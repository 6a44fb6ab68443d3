"""Measurement in the CPU benchmarks: one process per variant and repeat, variants in turns, medians.

Each measurement is a new interpreter: a fork of a process whose thread pools have started may die at random. It builds
the model, runs a small step that loads every kernel, resets the peak of resident memory, runs one step to read the peak
and warm up, and one step that is timed in CPU-seconds and wall seconds; imports do not count. FLOPs and forwards of the
vision tower do not vary and are counted in a separate process.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import versions, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.prefix.layout import unwrap

PACKAGES = ("torch", "transformers", "peft", "lightning")
ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""Kernels of ``scaled_dot_product_attention`` in ``torch.ops.aten``, without the prefix ``_scaled_dot_product_``."""


@dataclass(frozen=True)
class Setting:
    """The sizes and the seed of a benchmark."""

    family: str
    grid: tuple[int, int, int]
    group_size: int
    text_tokens: int
    seed: int
    repeats: int = 5


@dataclass
class Work:
    """A built variant."""

    vlm: VLM
    model: nn.Module
    step: Callable[[], None]
    """The measured step."""
    small: Callable[[], None]
    """The step on a small input, which loads the kernels."""
    fill: Callable[[], None] | None = None
    """A pass before the step in the same run, such as the rollouts that fill the vision cache."""


Make = Callable[[Setting], Work]


class Run(NamedTuple):
    """One measured step."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    """Above the level after imports and build; MB of 1e6 bytes."""


class Counted(NamedTuple):
    """Counts that do not vary between runs."""

    gflop: float
    vision_calls: int
    """Forwards of the vision tower in ``step``."""
    vision_calls_in_run: int
    """Forwards of the vision tower in ``fill`` and ``step`` together."""


def flop_counter() -> FlopCounterMode:
    """Returns a counter that includes every attention kernel.

    Torch's own formulas leave out the CPU's kernel in older versions, and refuse keys and values with fewer heads than
    the queries (``enable_gqa``), which CUDA kernels take as they are.
    """
    own: dict[Any, Any] = {}
    for kernel in ATTENTION:
        forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")
        own[forward] = lambda q, k, v, *_, **__: sdpa_flop_count(q, _heads(k, q), _heads(v, q))
        own[backward] = lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, _heads(k, q), _heads(v, q))
    return FlopCounterMode(display=False, custom_mapping=own)


def _heads(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape [n, K, S, D] with the number of heads of ``like``."""
    return (shape[0], like[1], *shape[2:])


def _status(name: str) -> float:
    """Returns a line of /proc/self/status in MB of 1e6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6  # the kernel's "kB" are 1024 bytes
    raise ValueError(f"/proc/self/status has no {name}: these benchmarks run on Linux")


def run(make: Make, setting: Setting, second_step: bool = True) -> Run:
    """Builds a variant and measures memory in its first step and time in its last, the second one if there is one."""
    work = make(setting)
    work.small()
    if work.fill is not None:
        work.fill()
    work.model.zero_grad()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    level = _status("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    work.step()
    peak = _status("VmHWM") - level
    if second_step:
        work.model.zero_grad()
        cpu, wall = time.process_time(), time.perf_counter()
        work.step()
    return Run(time.process_time() - cpu, time.perf_counter() - wall, peak)


def count(make: Make, setting: Setting) -> Counted:
    """Builds a variant and counts FLOPs and forwards of the vision tower in one step."""
    work = make(setting)
    work.small()
    calls: list[int] = []
    unwrap(work.model).get_submodule(work.vlm.vision_modules[0]).register_forward_hook(lambda *_: calls.append(1))
    if work.fill is not None:
        work.fill()
    before = len(calls)
    with flop_counter() as counter:
        work.step()
    return Counted(counter.get_total_flops() / 1e9, len(calls) - before, len(calls))


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a new interpreter and returns what it returns.

    Args:
        function: A function of a module, as pickle needs it.
        args: Its arguments, which are pickled.

    Raises:
        RuntimeError: If the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()  # only then does recv() notice that the child is gone
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}; see above") from None
    finally:
        process.join()


def _answer(answer: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Sends what a function returns; runs in the process of a measurement."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # routes and caches log at INFO
    answer.send(function(*args))


@dataclass(frozen=True)
class Figures:
    """Medians of one variant."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    gflop: float
    vision_calls: int
    vision_calls_in_run: int
    cpu_s_all: tuple[float, ...]
    peak_mb_all: tuple[float, ...]


def measure(variants: Mapping[str, Make], setting: Setting, second_step: bool = True) -> dict[str, Figures]:
    """Measures every variant ``repeats`` times, in turns; without ``second_step`` the first step is timed."""
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    counted: dict[str, Counted] = {}
    for repeat in range(setting.repeats):
        # reversed in every other repeat, so that a drift of the machine's speed does not favour one variant
        for name in list(variants) if repeat % 2 == 0 else list(variants)[::-1]:
            runs[name].append(in_a_process(run, variants[name], setting, second_step))
            print(f"{name} {repeat + 1}: {runs[name][-1].cpu_s:.3f} CPU-s", file=sys.stderr, flush=True)
    for name, make in variants.items():
        counted[name] = in_a_process(count, make, setting)
    return {
        name: Figures(
            *(round(statistics.median(column), 4) for column in zip(*runs[name], strict=True)),
            gflop=round(counted[name].gflop, 3),
            vision_calls=counted[name].vision_calls,
            vision_calls_in_run=counted[name].vision_calls_in_run,
            cpu_s_all=tuple(round(run.cpu_s, 3) for run in runs[name]),
            peak_mb_all=tuple(round(run.peak_mb, 1) for run in runs[name]),
        )
        for name in variants
    }


def gradients(work: Work) -> dict[str, torch.Tensor]:
    """Returns the gradients of one step by name of the parameter."""
    if work.fill is not None:
        work.fill()
    work.model.zero_grad()
    work.step()
    return {name: p.grad.clone() for name, p in work.model.named_parameters() if p.grad is not None}


def gradient_difference(makes: Sequence[Make], setting: Setting) -> tuple[float, float]:
    """Returns the largest relative difference to the first variant: over all parameters, and of a single tensor.

    A single tensor is compared to its norm or to 1e-6 of the norm of the whole gradient, whichever is larger.
    """
    first = gradients(makes[0](setting))
    norm = float(torch.stack([g.norm() for g in first.values()]).norm())
    overall, single = 0.0, 0.0
    for make in makes[1:]:
        other = gradients(make(setting))
        if other.keys() != first.keys():
            raise ValueError("the variants train different parameters")
        gaps = {name: float((other[name] - g).norm()) for name, g in first.items()}
        overall = max(overall, float(torch.tensor(list(gaps.values())).norm()) / norm)
        single = max(single, *(gap / max(float(first[name].norm()), 1e-6 * norm) for name, gap in gaps.items()))
    return overall, single


def arguments(doc: str, group_size: int = 8, text_tokens: int = 64) -> tuple[Setting, argparse.Namespace]:
    """Parses the options of all CPU benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=("qwen", "smolvlm", "tiny"), default="qwen")
    parser.add_argument("--grid", type=_grid, default=(8, 16, 16), help="T,H,W patches; 4 make a token")
    parser.add_argument("--group_size", type=int, default=group_size, help="texts behind the video")
    parser.add_argument("--text_tokens", type=int, default=text_tokens, help="tokens of each text")
    parser.add_argument("--repeats", type=int, default=5, help="processes per variant")
    options = parser.parse_args()
    if min(options.group_size, options.text_tokens - 1, options.repeats) < 1:
        parser.error("--group_size and --repeats must be at least 1, --text_tokens at least 2")
    names = ("family", "grid", "group_size", "text_tokens", "seed", "repeats")
    return Setting(**{name: getattr(options, name) for name in names}), options


def _grid(text: str) -> tuple[int, int, int]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1 or numbers[1] % 2 or numbers[2] % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give T,H,W with even H and W")
    return numbers


def circumstances(setting: Setting) -> dict[str, Any]:
    """Returns date, device, versions and load."""
    return {
        "date": date.today().isoformat(),
        "device": f"CPU {platform.machine()}, one thread",
        "versions": versions(PACKAGES),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "setting": asdict(setting),
    }


def report(
    headline: Mapping[str, float],
    variants: Mapping[str, Figures],
    where: Mapping[str, Any],
    file: Path | None,
    **more: Any,
) -> None:
    """Prints the figures as a table and writes them as JSON: the headline figures, and the others under ``details``."""
    packages = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    print(f"{where['date']}, {where['device']}, {packages}, load average {where['load_average']}")
    print(", ".join(f"{name} {value}" for name, value in where["setting"].items()))
    head = ("CPU-s", "wall s", "GFLOP", "peak MB", "vision calls", "in the run")
    print(f"{'':16s}" + "".join(f"{name:>14s}" for name in head))
    for name, f in variants.items():
        row = (f.cpu_s, f.wall_s, f.gflop, f.peak_mb)
        print(f"{name:16s}" + "".join(f"{x:14.2f}" for x in row) + f"{f.vision_calls:14d}{f.vision_calls_in_run:14d}")
    for name, value in headline.items():
        print(f"{name:24s}{value:.4g}")
    details = {**where, **more, "variants": {name: asdict(figures) for name, figures in variants.items()}}
    write_json(file, {**headline, "details": details})


def report_ratios(doc: str, variants: Mapping[str, Make], ours: str, **more: str) -> None:
    """Runs a benchmark whose figures are CPU-seconds of the variant ``naive`` over those of others.

    Args:
        doc: Docstring of the script.
        variants: All variants; they compute the same gradient.
        ours: The variant of ``ratio``.
        more: Variants of further ratios, by name of the ratio.
    """
    setting, options = arguments(doc, group_size=4)
    found = measure(variants, setting)
    gradient, single = in_a_process(gradient_difference, list(variants.values()), setting)
    ratios = {name: found["naive"].cpu_s / found[variant].cpu_s for name, variant in {"ratio": ours, **more}.items()}
    headline = {"ratio": ratios.pop("ratio")}
    differences = {"grad_rel_diff": gradient, "grad_rel_diff_per_tensor": single}
    report(headline, found, circumstances(setting), options.json, **ratios, **differences)
