"""The form of the entry ``export`` of ``vidreason.json``, which is checked before anything is built from it.

An exported folder may come from anyone. What it names are options of this program and nothing else: a key that is not
listed here, or an attention implementation that transformers would fetch from the hub as code, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import ReviewInput
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import CompletionForm

VLM_OPTIONS: Mapping[str, Any] = {
    "max_pixels": int | None,
    "chat_template_kwargs": dict | None,
    "quantize": Literal["none", "nf4"],
    "dtype": Literal["float32", "bfloat16", "auto"],
    "attn_implementation": Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
    "route": Literal["auto", "expand", "packed", "naive"],
    "completion_chunk": int | None,
    "text_memory_gb": float | None,
}
"""Options of a family that decide what it computes; paths, training and caches do not travel."""
_ENTRY: Mapping[str, Any] = {
    "version": int,
    "run": dict,
    "vlm": dict,
    "decide": dict,
    "frames": dict,
    "base": dict,
    "merged": bool,
    "precision": str,
    "weights_sha": str,
    "policy_sha": str | None,
    "threshold": dict | None,
    "check": dict,
}
_COMMON: Mapping[str, Any] = {"by": str, "clips_per_forward": int | None, "seed": int}
_WRITING: Mapping[str, Any] = {"samples": int, "sampling": dict, "form": dict}
_DECIDE: Mapping[str, Mapping[str, Any]] = {
    "likelihood": _COMMON,
    "answer": {**_COMMON, **_WRITING},
    "review": {
        **_COMMON,
        **_WRITING,
        "input": ReviewInput,
        "temperature": float,
    },
}
_RECORDS = {"frames": FrameOptions, "threshold": Threshold}


def check_entry(entry: Mapping[str, Any], file: Path, again: str) -> None:
    """Checks the keys and the types of their values.

    Args:
        entry: The entry ``export``.
        file: The file that holds it.
        again: What to do about a wrong one.

    Raises:
        ValueError: If a key is missing, unknown or of another form; the message names file and key.
    """
    check = _Check(file, again)
    check.keys(entry, _ENTRY, "export")
    check.keys(entry["run"], dict.fromkeys(("name", "stage", "task_sha"), str), "export.run", others=True)
    check.keys(entry["base"], {"name": str, "path": str | None}, "export.base")
    check.keys(entry["vlm"], {"model_type": str}, "export.vlm", others=True)
    options = {name: value for name, value in entry["vlm"].items() if name != "model_type"}
    check.keys(options, VLM_OPTIONS, "export.vlm", all_needed=False)
    by = entry["decide"].get("by")
    if by not in _DECIDE:
        check.refuse(f"export.decide.by is {by!r}, and not one of {', '.join(_DECIDE)}")
    check.keys(entry["decide"], _DECIDE[by], "export.decide")
    for name, kind in _RECORDS.items():
        if entry[name] is not None:
            check.keys(entry[name], get_type_hints(kind), f"export.{name}", all_needed=kind is Threshold)
    for name, kind in (("sampling", Sampling), ("form", CompletionForm)):
        if name in entry["decide"]:
            check.keys(entry["decide"][name], get_type_hints(kind), f"export.decide.{name}", all_needed=False)


class _Check:
    def __init__(self, file: Path, again: str) -> None:
        self.file, self.again = file, again

    def refuse(self, what: str) -> None:
        raise ValueError(f"{self.file}: {what}; {self.again}")

    def keys(
        self,
        found: Mapping[str, Any],
        hints: Mapping[str, Any],
        place: str,
        others: bool = False,
        all_needed: bool = True,
    ) -> None:
        """Checks that a mapping has the keys of ``hints`` with values of their types.

        Args:
            found: The mapping.
            hints: Type by key.
            place: Dotted name of the mapping in messages.
            others: Whether it may have further keys.
            all_needed: Whether a key may not be missing.
        """
        for name in found if not others else ():
            if name not in hints:
                self.refuse(f"{place}.{name} is unknown to this version; it takes {', '.join(hints)}")
        for name, hint in hints.items():
            if name not in found:
                if all_needed:
                    self.refuse(f"{place}.{name} is missing")
            elif not _fits(found[name], hint):
                self.refuse(f"{place}.{name} is {_short(found[name])}, and not {_told(hint)}")


def _fits(value: object, hint: Any) -> bool:
    """Returns whether a JSON value is of a type."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _told(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_told(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    named = {dict: "a mapping", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return named.get(hint, "null")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
