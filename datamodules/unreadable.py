"""Warnings about clips that cannot be read."""

from __future__ import annotations

import warnings

from vidreason.datamodules.types import VideoBatch


def warn_unreadable(batch: VideoBatch, consequence: str) -> None:
    """Warns about each clip of a batch that could not be read, on every rank: each rank has other clips.

    Args:
        batch: The batch.
        consequence: What follows, for example ``counted wrong in val``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # Python shows the same text only once otherwise.
        for failed in batch.failed:
            message = f"{failed.clip.path}: {consequence}, the clip cannot be read ({failed.error})"
            warnings.warn(message, stacklevel=2)
