"""Hides the output of building a stage."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quietly(level: int = logging.INFO) -> Iterator[None]:
    """Hides prints, warnings and logs up to ``level`` within the block; the run itself repeats them."""
    before = logging.root.manager.disable  # logging has no public way to read the current level
    logging.disable(level)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            yield
    finally:
        logging.disable(before)
