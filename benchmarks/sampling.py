"""Sampling of 8 completions of 256 tokens behind each of 8 videos: this checkout against another one.

Letters as in ``generation.py``. The model is the reference of all CPU benchmarks. Each measurement is a process of its
own, and the two checkouts take turns. Times are of the first pass after a short one that loads the kernels, with the
vision embeddings cached. Memory is the peak of the resident set minus the level after the model was built; the bytes of
tensors at their peak are counted in one more pass.

    git worktree add /tmp/before REVISION && make -C /tmp/before links
    python benchmarks/sampling.py --against /tmp/before --json FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from figures import write_json
from harness import Setting, _status, circumstances, in_a_process
from reference_model import END, make_prompts, make_vlm
from torch import Tensor

from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.generation import Sampled, Sampling
from vidreason.lightning_modules.vlms.planning.live_bytes import LiveBytes

VIDEOS = 8
SMALL = 2
"""New tokens of the pass that loads the kernels."""


def sampler(setting: Setting) -> tuple[Callable[[int], Sampled], list[Tensor]]:
    """Returns a function that samples a number of tokens for each completion, and the tensors that exist before."""
    vlm = make_vlm(setting.family, setting.grid, setting.seed)
    model = vlm.build()
    prompts = make_prompts(setting.family, setting.grid, VIDEOS, setting.seed)
    noise = generation.draw_noise(list(range(VIDEOS * setting.group_size)), setting.text_tokens)

    def run(tokens: int) -> Sampled:
        with vlm.fed_from_cache(model, prompts, "expand") as fed:
            options = Sampling(tokens), noise, [END], sorted(vlm.suppressed_ids), 0
            return generation.sample(vlm, model, fed or prompts, setting.group_size, *options)

    return run, [*model.parameters(), *model.buffers(), *prompts.inputs.values(), noise]


def measured(setting: Setting) -> dict[str, Any]:
    """Returns the time and memory of one pass, and what identifies its tokens."""
    run, _ = sampler(setting)
    level = _status("VmRSS")
    run(SMALL)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    cpu, wall = time.process_time(), time.perf_counter()
    sampled = run(setting.text_tokens)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = hashlib.sha256(sampled.ids.numpy().tobytes()).hexdigest()
    peak = _status("VmHWM") - level
    return {"cpu_s": cpu, "wall_s": wall, "peak_mb": peak, "tokens": int(sampled.mask.sum()), "sha256": tokens}


def tensor_peak(setting: Setting) -> float:
    """Returns the bytes of the tensors that one pass makes, at their peak, in MB of 1e6 bytes."""
    run, known = sampler(setting)
    run(SMALL)
    with LiveBytes(known) as live:
        run(setting.text_tokens)
    return live.peak / 1e6


def in_checkout(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Measures one pass with the vidreason of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve() / ".typing")}
    command = [sys.executable, __file__, "--once", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measures both checkouts and reports the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, after 'make links'")
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each completion")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each checkout")
    parser.add_argument("--once", action="store_true", help="measure one pass here and print it as JSON")
    options = parser.parse_args()
    setting = Setting("qwen", (8, 16, 16), 8, options.tokens, 0, options.repeats)
    if options.once:
        print(json.dumps({**in_a_process(measured, setting), "tensors_mb": in_a_process(tensor_peak, setting)}))
        return
    if options.against is None:
        parser.error("--against is needed: the folder of another checkout")
    folders = {"before": options.against, "now": Path(__file__).parent.parent}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for repeat in range(options.repeats):
        for name in list(folders)[:: 1 if repeat % 2 == 0 else -1]:
            runs[name].append(in_checkout(folders[name], ["--tokens", str(options.tokens)]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    middle = {
        name: {key: median(run[key] for run in found) for key in ("cpu_s", "wall_s", "peak_mb", "tensors_mb")}
        for name, found in runs.items()
    }
    headline = {
        "wall_ratio": middle["before"]["wall_s"] / middle["now"]["wall_s"],
        "cpu_ratio": middle["before"]["cpu_s"] / middle["now"]["cpu_s"],
        "memory_ratio": middle["now"]["peak_mb"] / middle["before"]["peak_mb"],
        "tensors_ratio": middle["now"]["tensors_mb"] / middle["before"]["tensors_mb"],
    }
    same = len({run["sha256"] for found in runs.values() for run in found}) == 1
    for name, value in {**headline, "same_tokens": same}.items():
        print(f"{name:16s}{value}")
    details = {**circumstances(setting), "videos": VIDEOS, "same_tokens": same, "medians": middle, "runs": runs}
    write_json(options.json, {**headline, "details": details})


if __name__ == "__main__":
    main()
