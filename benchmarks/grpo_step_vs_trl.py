"""A whole GRPO step against TRL's own ``GRPOTrainer``: CPU-seconds of rollout, scoring and update, on the same weights.

    python benchmarks/grpo_step_vs_trl.py [--repeats 5] [--steps 3] [--json FILE]

The model is a Qwen2.5-VL of 13 M parameters with random weights and a frozen vision tower. TRL gets 8 images and ours
a video of 16 frames in 8 temporal patches: 512 visual tokens on both sides, in prompts of equal length. The text
variants have prompts of that length without pixels. Both sides have the same number of prompts, group size, completion
length (no completion may end earlier), loss, optimizer, precision and threads; decoded images lie in memory.

Ours is ``GRPOModule.training_step`` under a Lightning trainer with its data module, TRL's is ``GRPOTrainer.train``. A
step is everything from the end of one to the end of the next. The update is what follows the scored rollouts:
log-probs, loss, backward, clipping, optimizer. Each run is a new interpreter; variants take turns, and the first step
of each is left out (it counts FLOPs and patches instead). A figure is the median over all runs of each run's median
step.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import grpo_step_variants
import torch
from figures import write_json

ROOT = Path(__file__).parent.parent
VARIANTS = ("video_trl", "video_ours", "text_trl", "text_ours")
PACKAGES = ("torch", "transformers", "trl", "lightning", "peft")
SIZES = {
    "reference": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "vision_sizes": {"depth": 4, "hidden_size": 256, "intermediate_size": 704, "fullatt_block_indexes": [3]},
    },
    "tiny": {},
}
"""Sizes of decoder and vision tower; ``tiny`` is for the test of this script."""


def write_model(folder: Path, size: str) -> None:
    """Writes the model that all variants load, with random weights."""
    spec = importlib.util.spec_from_file_location("vlm_builders", ROOT / "tests/support/vlm_builders.py")
    assert spec is not None
    assert spec.loader is not None
    builders: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    builders.write_qwen(folder, **SIZES[size])


def run_variant(variant: str, model: Path, options: argparse.Namespace, answer: Connection) -> None:
    """Runs one variant in this process and sends the measurements."""
    torch.set_num_threads(1)
    grpo_step_variants.quiet()
    torch.manual_seed(0)
    answer.send(grpo_step_variants.run_variant(variant, str(model), options))


def run_all(order: Sequence[str], model: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the variants in order, ``at_once`` at a time; yields (variant, measurements) as each ends.

    Raises:
        RuntimeError: If a variant failed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(order), {}
    while waiting or running:
        while waiting and len(running) < options.at_once:
            ours, theirs = context.Pipe(duplex=False)
            variant = waiting.pop(0)
            process = context.Process(target=run_variant, args=(variant, model, options, theirs), daemon=True)
            process.start()
            theirs.close()  # only then does recv() notice that the child is gone
            running[ours] = variant, process
        for ours in multiprocessing.connection.wait(list(running)):
            variant, process = running.pop(ours)
            try:
                found = ours.recv()
            except EOFError:
                raise RuntimeError(f"{variant} failed, see above") from None
            process.join()
            yield variant, found


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the ratios and the medians behind them."""
    figures: dict[str, Any] = {}
    seconds = {
        (variant, what): [statistics.median(run[what]) for run in runs[variant]]
        for variant in runs
        for what in ("step", "update")
    }
    for kind in ("video", "text"):
        for what in ("step", "update"):
            trl, ours = (statistics.median(seconds[f"{kind}_{side}", what]) for side in ("trl", "ours"))
            figures[f"{kind}_{what}_ratio"] = trl / ours
    for (variant, what), values in seconds.items():
        figures[f"{variant}_{what}_cpu_s"] = statistics.median(values)
        figures[f"{variant}_{what}_cpu_s_all"] = [round(value, 4) for value in values]
    for variant, repeats in runs.items():
        figures |= {f"{variant}_{name}": value for name, value in repeats[0].items() if name not in ("step", "update")}
    return figures


def print_table(figures: dict[str, Any]) -> None:
    """Prints ratios and seconds, a row per kind and part of the step."""
    print(f"{'':14s}{'TRL CPU-s':>11s}{'ours CPU-s':>11s}{'TRL / ours':>11s}")
    for kind in ("video", "text"):
        for what in ("step", "update"):
            trl, ours = (figures[f"{kind}_{side}_{what}_cpu_s"] for side in ("trl", "ours"))
            print(f"{kind + ' ' + what:14s}{trl:11.3f}{ours:11.3f}{figures[f'{kind}_{what}_ratio']:11.2f}")
    for name in ("prompt_tokens", "completion_tokens", "step_gflop", "vision_patches", "peak_rss_mb", "grad_norm"):
        print(f"{name:18s}" + "   ".join(f"{variant} {figures[f'{variant}_{name}']}" for variant in VARIANTS))


def main() -> None:
    """Runs all variants in turns and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per variant")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--side", type=int, default=224, help="pixels per side of a frame, a multiple of 28")
    parser.add_argument("--size", choices=sorted(SIZES), default="reference")
    parser.add_argument(
        "--at_once", type=int, default=1, help="processes at a time; 4: all variants meet the same load"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.size)
        order = [variant for i in range(options.repeats) for variant in (VARIANTS if i % 2 == 0 else VARIANTS[::-1])]
        for variant, found in run_all(order, Path(folder), options):
            runs[variant].append(found)
            step = statistics.median(found["step"])
            print(f"{variant} {len(runs[variant])}: {step:.3f} CPU-s a step", file=sys.stderr, flush=True)
    setting = {name: value for name, value in vars(options).items() if name != "json"}
    figures = {
        "date": date.today().isoformat(),
        "device": f"CPU, {platform.machine()}, one thread",
        "versions": {name: version(name) for name in PACKAGES},
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "setting": setting,
        **summarise(runs),
    }
    print(f"{figures['date']}, {figures['device']}, {figures['versions']}, load {figures['load_average']}, {setting}")
    print_table(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
