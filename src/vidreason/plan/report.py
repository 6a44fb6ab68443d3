"""A plan as text for the terminal, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidreason.datamodules.atomic_files import write_text
from vidreason.pipelines.table import render_table
from vidreason.plan.stages import Memory, PassPlan, StagePlan

GB = 1e9
_UNITS = {"": 1e9, "GB": 1e9, "GIB": 2.0**30, "MB": 1e6, "MIB": 2.0**20}


def memory_bytes(text: str) -> float:
    """Returns the bytes of a size such as ``24GB``.

    Raises:
        ValueError: If it is not a positive number with a unit.

    >>> memory_bytes("24GB"), memory_bytes("1 GiB"), memory_bytes("0.5")
    (24000000000.0, 1073741824.0, 500000000.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]) > 0:
        raise ValueError(f"--memory {text}: must be a positive number with GB, GiB, MB or MiB, such as 24GB")
    return float(match[1]) * _UNITS[match[2].upper()]


def stage_text(plan: StagePlan, title: str, memory: float | None) -> str:
    """Returns the plan of a stage: its passes, and the memory of each by part.

    Args:
        plan: The plan.
        title: Heading.
        memory: Bytes of the device; None if there is no limit.
    """
    lines = [f"{title}: {plan.command}" + (f", {plan.steps} optimizer steps" if plan.steps else "")]
    trained = f", trains {plan.trained / 1e6:.3g} M" if plan.trained else ""
    lines.append(f"{plan.parameters / 1e9:.3g} G parameters in {plan.precision}{trained}")
    if plan.unreadable:
        lines.append(f"{plan.unreadable} clips have no readable header and are planned as placeholder videos")
    lines += ["", render_table(_PASSES, [_pass_row(part) for part in plan.passes]), ""]
    lines += [
        f"longest prompt of {part.name}: {part.tokens.longest_clip} ({part.tokens.visual} visual tokens)"
        for part in plan.passes
    ]
    names = [name for name in vars(plan.passes[0].memory) if any(vars(p.memory)[name] for p in plan.passes)]
    header = ["memory, GB", *(_SHORT.get(name, name) for name in names), "total"]
    rows = [
        [part.name, *(_gb(vars(part.memory)[name]) for name in names), _gb(part.memory.total)] for part in plan.passes
    ]
    lines += ["", render_table(header, rows)]
    if memory is not None:
        lines += ["", *_fitting(plan.passes, memory)]
    return "\n".join(lines)


def as_json(plans: Sequence[StagePlan], model: str, memory: float | None, device: str) -> dict[str, Any]:
    """Returns plans as JSON values; sizes are in bytes."""
    stages = [asdict(plan) for plan in plans]
    for plan, stage in zip(plans, stages, strict=True):
        for part, row in zip(plan.passes, stage["passes"], strict=True):
            row["memory"]["total"] = part.memory.total
    return {"model": model, "device": device, "memory": memory, "stages": stages}


_PASSES = ("pass", "clips", "prompt: least", "median", "95 %", "most", "behind it", "clips/forward", "forwards")
_SHORT = {"activations": "activ.", "gradients": "grads", "optimizer": "optim.", "cache": "kv cache"}


def _pass_row(part: PassPlan) -> list[str]:
    tokens = part.tokens
    counts = (tokens.least, tokens.median, tokens.most_of_95_percent, tokens.most, tokens.behind)
    forwards = f"{part.forwards}" + (f" + {part.new_tokens} each" if part.new_tokens else "")
    return [part.name, str(part.clips), *map(str, counts), str(part.clips_per_forward), forwards]


def _gb(size: float) -> str:
    return "-" if not size else f"{size / GB:.2f}"


def _fitting(passes: Sequence[PassPlan], memory: float) -> list[str]:
    """Returns, for each setting, the largest value that fits."""
    by_setting: dict[str, list[PassPlan]] = {}
    for part in passes:
        by_setting.setdefault(part.bound, []).append(part)
    lines = []
    for setting, parts in by_setting.items():
        least = min(parts, key=lambda part: part.largest or 0)
        largest, now = least.largest or 0, parts[0].clips_per_forward
        if largest < 1:
            lines.append(f"{setting}: not one clip of {least.name} fits into {memory / GB:.3g} GB:")
            lines.append(f"  {_remedy(least.memory)}")
        else:
            state = "fits" if now <= largest else f"is too large: {least.name} would take {_gb(least.memory.total)} GB"
            lines.append(f"{setting}: at most {largest} (its value, {now}, {state})")
    return lines


def _remedy(memory: Memory) -> str:
    if memory.activations > memory.weights:
        return "set vlm.init_args.gradient_checkpointing: true, or lower data.init_args.frames"
    return "hold the base in 4 bits (--strategy qlora), or take a smaller model"


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a plan as JSON."""
    write_text(file, json.dumps(content, indent=1) + "\n")
