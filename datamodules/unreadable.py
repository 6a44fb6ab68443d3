"""Warnings about clips that cannot be read."""

from __future__ import annotations

import warnings

from vidreason.datamodules.types import VideoBatch
from vidreason.spelling import printable


def warn_unreadable(batch: VideoBatch, consequence: str) -> None:
    """Warns about each unreadable clip of a batch, on every rank, since ranks have different clips.

    Args:
        batch: The batch.
        consequence: Consequence for the message, for example ``counted wrong in val``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # Python shows the same text only once otherwise.
        for failed in batch.failed:
            message = f"{failed.clip.path}: {consequence}, the clip cannot be read ({failed.error})"
            warnings.warn(printable(message), stacklevel=2)
