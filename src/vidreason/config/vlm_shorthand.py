"""``--vlm Qwen/Qwen2.5-VL-3B-Instruct``: a hub id or a model folder instead of a section file.

The family is read from the model (``model_type`` in its config.json); the shipped section of that family is used with
its path replaced. Other changes need a section file or a flag (``--vlm.init_args.max_pixels``).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vidreason.config.files import find_config, shipped_folder

SECTIONS: Mapping[str, str] = {
    "qwen2_5_vl": "vlm/qwen2_5_vl_3b.yaml",
    "qwen2_vl": "vlm/qwen2_5_vl_3b.yaml",
    "qwen3_vl": "vlm/qwen3_vl_4b.yaml",
    "qwen3_vl_moe": "vlm/qwen3_vl_4b.yaml",
    "glm4v": "vlm/glm4_1v_9b.yaml",
    "glm46v": "vlm/glm4_1v_9b.yaml",
    "internvl": "vlm/internvl3_2b.yaml",
    "llava_onevision": "vlm/llava_onevision_7b.yaml",
    "llava_next_video": "vlm/llava_next_video_7b.yaml",
    "qwen3_5": "vlm/qwen3_5_4b.yaml",
    "qwen3_5_moe": "vlm/qwen3_5_4b.yaml",
    "gemma4": "vlm/gemma4_e2b.yaml",
    "smolvlm": "vlm/smolvlm2_500m.yaml",
    "vidreason_tiny_vlm": "vlm/tiny.yaml",
}
"""``model_type`` to the shipped section of its family."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_YAML_SUFFIXES = (".yaml", ".yml", ".json")


def is_shorthand(value: str) -> bool:
    """Returns whether a value of ``--vlm`` names a model, not a section file, a class or an inline section.

    >>> is_shorthand("Qwen/Qwen2.5-VL-3B-Instruct"), is_shorthand("configs/vlm/tiny.yaml"), is_shorthand("my.VLM")
    (True, False, False)
    """
    if value.endswith(_YAML_SUFFIXES) or value.lstrip().startswith("{") or find_config(value) is not None:
        return False
    return _is_folder(value) or _HUB_ID.fullmatch(value) is not None


def expand(value: str) -> dict[str, Any]:
    """Returns the section that a shorthand stands for.

    Args:
        value: A hub id or a model folder, for which ``is_shorthand`` is true.

    Raises:
        ValueError: If the model cannot be found, or its family has no shipped section.
    """
    kind = _model_type(value)
    if kind not in SECTIONS:
        raise ValueError(
            f"--vlm {value}: a model of type {kind!r}, which needs a family of its own: subclass "
            "vidreason.lightning_modules.vlms.base.VLM and give its section as --vlm FILE.yaml (docs/extending.md); "
            f"known types are {', '.join(sorted(SECTIONS))}"
        )
    section: dict[str, Any] = yaml.safe_load((shipped_folder() / SECTIONS[kind]).read_text(encoding="utf-8"))
    path = str(Path(value).expanduser().absolute()) if _is_folder(value) else value
    return {**section, "init_args": {**section["init_args"], "path": path}}


def model_section(value: str) -> dict[str, Any]:
    """Returns the vlm section that a value of ``--vlm`` stands for: a hub id, a model folder or a section file.

    Raises:
        ValueError: If the model or the file cannot be found.
    """
    if is_shorthand(value):
        return expand(value)
    path = find_config(value)
    if path is None:
        raise ValueError(f"--vlm {value}: no such file, neither here nor among the shipped configs")
    section = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(section, dict):
        raise ValueError(f"--vlm {value}: not a vlm section (class_path and init_args)")
    return section


def shorthand_settings(value: str | None) -> dict[str, object]:
    """Returns the section of a shorthand as dotted settings, for fingerprints; {} for any other value."""
    if value is None or not is_shorthand(value):
        return {}
    section = expand(value)
    return {
        "vlm.class_path": section["class_path"],
        **{f"vlm.init_args.{key}": item for key, item in section["init_args"].items()},
    }


def family_class_path(model_type: str) -> str | None:
    """Returns the ``class_path`` of the family of a ``model_type``; None if no shipped section has it."""
    if model_type not in SECTIONS:
        return None
    section = yaml.safe_load((shipped_folder() / SECTIONS[model_type]).read_text(encoding="utf-8"))
    return str(section["class_path"])


def _is_folder(value: str) -> bool:
    return value.startswith((".", "/", "~")) or Path(value).is_dir()


def _model_type(value: str) -> str:
    if _is_folder(value):
        config = Path(value).expanduser() / "config.json"
        if not config.is_file():
            raise ValueError(f"--vlm {value}: neither a section file (.yaml) nor a model folder (no config.json in it)")
    else:
        config = _from_hub(value)
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--vlm {value}: {config} does not say its model_type; copy or download it again") from error


@cache
def _from_hub(name: str) -> Path:
    from transformers.utils.hub import cached_file  # seconds to import

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns of every retry
    print(f"--vlm {name}: asking the hub what it is", flush=True)
    try:
        config = cached_file(name, "config.json")
    except OSError as error:
        raise ValueError(
            f"--vlm {name}: not on this machine, and the hub does not give it; check the name and the network, or run "
            f"`hf download {name} --local-dir DIR` where there is one and give --vlm DIR"
        ) from error
    finally:
        hub.setLevel(level)
    assert config is not None
    return Path(config)
