"""Lists the weights and settings that decisions depend on.

They are stored beside a file of results, so that a second call with another model or setting is refused and decisions
of two models never stand in one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from vidreason.answering.export_form import VLM_OPTIONS
from vidreason.answering.loaded import LoadedModel

_OF_THE_MACHINE = ("cache", "cache_gb", "timeout")
_EXACT = ("route", "completion_chunk", "text_memory_gb")
"""Options of a family that change how probabilities are computed, and not their values."""


def settings_of(loaded: LoadedModel, traces: int | None) -> dict[str, object]:
    """Returns everything that the decisions of a loaded model depend on except the clips.

    Args:
        loaded: The model.
        traces: Traces per clip (K); None is the number of the run.

    Returns:
        JSON values by dotted names such as ``frames.num_frames``.
    """
    answering = loaded.answering.with_samples(traces)
    decider, generator, vlm = answering.decider, answering.generator, answering.vlm
    threshold = loaded.threshold if loaded.threshold and traces in (None, loaded.threshold.samples) else None
    found: dict[str, object] = {
        "weights": loaded.weights_sha or f"base {vlm.base_sha()}",
        "task": {"name": loaded.task.name, "sha": loaded.task.sha()},
        "decide": {"by": type(decider).__name__, **_options(decider, leave=("task", "traces"))},
        "frames": _options(loaded.frames, leave=_OF_THE_MACHINE),
        "vlm": {name: getattr(vlm, name) for name in VLM_OPTIONS if name not in _EXACT},
        "precision": loaded.precision,
        "threshold": None if threshold is None else threshold.confidence,
    }
    if generator is not None:
        written = {"samples": generator.options.samples, "sampling": generator.options.sampling}
        found["traces"] = {**written, "form": generator.form, "seed": generator.seed, "policy": generator.adapter_sha}
    plain = json.loads(json.dumps(found, default=_plain))
    return dict(_flat("", plain))


def _options(record: object, leave: tuple[str, ...]) -> dict[str, object]:
    if not is_dataclass(record):
        return {}  # a class of the user's own; its name is all that is known
    return {field.name: getattr(record, field.name) for field in fields(record) if field.name not in leave}


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _flat(prefix: str, content: Mapping[str, Any]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in content.items():
        found += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(prefix + name, value)]
    return found
