"""The variants of ``grpo_step_vs_trl.py``, by name."""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

from grpo_step_ours import run_ours
from grpo_step_trl import run_trl


def run_variant(variant: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs ``video_ours``, ``video_trl``, ``text_ours`` or ``text_trl``; returns the measurements."""
    kind, _, side = variant.partition("_")
    return {"ours": run_ours, "trl": run_trl}[side](path, options, kind == "video")


def quiet() -> None:
    """Silences warnings and the log of Lightning."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
