"""Compares a run that was killed with an unbroken run: everything except times, bit for bit."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vidreason.config.loggers import WATCHED

TIMED = ("timing_s/", "data/", "train/step_time", "train/clips_per_s", "vision_cache/", "memory/", "hp_metric")
"""Prefixes of tags whose values depend on the machine or on the memory of a process."""


def differences(run: Path, unbroken: Path) -> list[str]:
    """Returns the differences between two run folders; the unbroken one is the reference."""
    return [*_losses(run, unbroken), *_texts(run, unbroken), *_weights(run, unbroken), *_tables(run, unbroken)]


def lost(found: list[str]) -> bool:
    """Returns whether something is missing and not only different."""
    return any(item.startswith("missing") for item in found)


def loss_trace(run: Path) -> dict[tuple[str, int], set[float]]:
    """Returns logged values by (tag, step); more than one value if attempts logged different ones."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    values: dict[tuple[str, int], set[float]] = defaultdict(set)
    for file in sorted(run.rglob("events.out.tfevents.*")):
        place = file.parent.relative_to(run).as_posix()
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                timed = value.tag.removeprefix(WATCHED).startswith(TIMED)
                if value.metadata.plugin_data.plugin_name != "scalars" or timed:
                    continue
                values[f"{place}/{value.tag}", event.step].add(float(make_ndarray(value.tensor).item()))
    return values


def _losses(run: Path, unbroken: Path) -> list[str]:
    found, wanted = loss_trace(run), loss_trace(unbroken)
    out = [f"missing in the loss trace: {tag} at step {step}" for tag, step in wanted if (tag, step) not in found]
    for (tag, step), values in found.items():
        # repr, because NaN is not equal to itself
        known = {repr(value) for value in wanted.get((tag, step), set())}
        if {repr(value) for value in values} != known:
            out.append(f"loss trace: {tag} at step {step} is {sorted(values)}, unbroken {sorted(known)}")
    return out


def _texts(run: Path, unbroken: Path) -> list[str]:
    out = []
    for path in sorted(unbroken.rglob("traces.jsonl")):
        name = path.relative_to(unbroken)
        if not (run / name).is_file():
            out.append(f"missing: {name}")
            continue
        (head, found, twice), (head_wanted, wanted, _) = _records(run / name), _records(path)
        out += [f"{name}: header differs"] if head != head_wanted else []
        out += [f"{name}: {key} stands there twice" for key in twice]
        out += [f"missing in {name}: {key}" for key in wanted if key not in found]
        out += [f"{name}: {key} differs" for key, line in found.items() if wanted.get(key) != line]
    return out


def _records(path: Path) -> tuple[str, dict[tuple[str, int], str], list[tuple[str, int]]]:
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[tuple[str, int], str] = {}
    twice = []
    for line in lines:
        record = json.loads(line)
        key = (record["video_id"], record["sample"])
        twice += [key] if key in found else []
        found[key] = line
    return head, found, twice


def _weights(run: Path, unbroken: Path) -> list[str]:
    out = []
    for path in sorted([*unbroken.rglob("*.safetensors"), *unbroken.rglob("*.ckpt")]):
        name = path.relative_to(unbroken)
        if not (run / name).is_file():
            out.append(f"missing: {name}")
        elif path.suffix == ".ckpt":
            one, other = (torch.load(file, weights_only=True) for file in (run / name, path))
            for saved in (one, other):
                saved |= {key: saved["vidreason"][key] for key in ("progress", "stateful")}
            keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "progress", "stateful")
            out += [f"{name}: {key} differs" for key in keys if not same(one.get(key), other[key])]
        elif not same(load_file(run / name), load_file(path)):
            out.append(f"{name} differs")
    return out


def same(one: Any, other: Any) -> bool:
    """Returns whether two nested containers are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _tables(run: Path, unbroken: Path) -> list[str]:
    out = []
    for name in ("predictions.jsonl", "summary.json", "vidreason.json"):
        for path in sorted(unbroken.rglob(name)):
            place = path.relative_to(unbroken)
            if not (run / place).is_file():
                out.append(f"missing: {place}")
            elif _plain(run / place) != _plain(path):
                out.append(f"{place} differs")
    return out


def _plain(path: Path) -> Any:
    """Returns the content of a file without times, and with the lines of a table sorted."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return sorted(text.splitlines())
    content = json.loads(text)
    rows = content if isinstance(content, list) else [content]
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]
