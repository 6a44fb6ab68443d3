"""Everything that is measured on one GPU, in at most eight minutes, with nothing to download.

    make links && PYTHONPATH=.typing python benchmarks/gpu_all.py --json benchmarks/results/DATE_gpu_all.json

Random weights at the real shapes of Qwen2.5-VL. The parts run in this order, and what there is no time for is listed:

- ``exact``: rounding in bf16 of every route, compared with that of naive scoring (``gpu_exact.py``);
- ``update``: forward and backward of GRPO, naive against shared prefix, with MFU (``gpu_update.py``);
- ``steps``: SFT and calibration at 3B and 7B within 24 GB, and what the plan predicts (``gpu_steps.py``);
- ``sampling``: tokens a second;
- ``strategies``: every stage with LoRA, in 4 bits and under FSDP2.

``--tiny`` runs the same code with tiny sizes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import gpu_steps
import gpu_update
import torch
from figures import write_json
from gpu_exact import exactness
from gpu_run import Clock, Deadline, circumstances, matmul_rate, options_of

PARTS = ("exact", "update", "steps", "sampling", "strategies")
PACKAGES = ("torch", "transformers", "peft", "lightning", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures all parts for which there is time; returns the content of the result file."""
    options = options_of(__doc__ or "", arguments, minutes=7.0, parts=PARTS)
    deadline = Deadline(options.minutes)
    update, steps = (gpu_update.TINY, gpu_steps.TINY) if options.tiny else (gpu_update.FULL, gpu_steps.FULL)
    clock = Clock(update.device)
    rate = matmul_rate(64 if options.tiny else 8192, getattr(torch, update.dtype), update.device)
    result: dict[str, Any] = {**circumstances(clock, PACKAGES), "matmul_tflops": rate / 1e12}
    print(result, flush=True)
    grid, length = ((1, 4, 4), 4) if options.tiny else ((8, 16, 16), 64)
    parts: Mapping[str, Callable[[], Any]] = {
        "exact": lambda: exactness(clock.device, grid, length),
        "update": lambda: gpu_update.updates(update, clock, rate, deadline),
        "steps": lambda: gpu_steps.capped_steps(steps, clock, deadline),
        "sampling": lambda: gpu_steps.sampling(steps, clock),
        "strategies": lambda: gpu_steps.strategies(steps, clock, deadline),
    }
    for name in options.parts:
        if deadline.allows(name):
            result[name] = parts[name]()
            if name in ("exact", "sampling"):
                print(f"{name}: {result[name]}", flush=True)
    result |= {"scales": {"update": asdict(update), "steps": asdict(steps)}, "not_run": deadline.left_out}
    if deadline.left_out:
        print("not run: " + "; ".join(deadline.left_out))
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
