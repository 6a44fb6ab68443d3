"""Hides what building a stage prints and logs."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quietly(level: int = logging.INFO) -> Iterator[None]:
    """Hides messages about seeds, devices and files within the block, up to ``level``; the run itself repeats them."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            yield
    finally:
        logging.disable(before)
