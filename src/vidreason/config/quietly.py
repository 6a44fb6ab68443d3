"""Building models and data without what libraries say about it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quietly(level: int = logging.INFO) -> Iterator[None]:
    """Hides what building says about seeds, devices and files, up to ``level``; the run itself will say it."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            yield
    finally:
        logging.disable(before)
