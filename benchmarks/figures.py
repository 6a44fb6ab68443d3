"""Common parts of all result files: versions of packages, and writing as JSON."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = [name for name in packages if importlib.util.find_spec(name) is not None]
    return {"python": platform.python_version()} | {name: version(name) for name in found}


def write_json(file: Path | None, content: Mapping[str, Any]) -> None:
    """Writes the figures as JSON; does nothing if ``file`` is None."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
