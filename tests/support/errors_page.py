"""The messages that docs/errors.md documents, and small commands, in the folder of fixture ``here``."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
FIT = ("fit", "--config", "configs/sft_label.yaml", "--config", "small.yaml", "--data", "data.yaml")
LORA = ("--vlm.init_args.lora", "{r: 2, alpha: 4}")
WRITES = "{samples: 1, sampling: {max_new_tokens: 4}}"
TOO_MANY_GPUS = "trainer.devices is …, but this machine has … GPU"
FULL_DISK = "…: the disk is full"
"""Beginnings of rows"""


def stage(name: str, *options: str) -> list[str]:
    """The command of a stage, behind ``vidreason``."""
    command = {"generate": "predict", "test": "test"}.get(name, "fit")
    return [command, "--config", f"configs/{name}.yaml", "--config", "small.yaml", "--data", "data.yaml", *options]


def section(title: str) -> str:
    """A section's text."""
    return PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented(title: str) -> list[str]:
    """The messages of a section's tables."""
    return re.findall(r"^\| `(.+?)` \|", section(title), flags=re.MULTILINE)


def rows_that_say(message: str, title: str) -> list[str]:
    """The messages of a section that a printed one is an example of."""
    return [
        row for row in documented(title) if re.fullmatch(".+?".join(map(re.escape, row.split("…"))), message.strip())
    ]
