"""``vidreason demo``: runs and compares all shipped methods on the embedded model and data."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vidreason.demo.run import run_demo
from vidreason.pipelines.commands import trainer_commands


def main(argv: Sequence[str]) -> int:
    """Runs the demo, on one thread unless OMP_NUM_THREADS is set.

    Args:
        argv: Options of ``vidreason demo``.

    Returns:
        Exit status: 0, or that of the pipeline that stopped.
    """
    # The embedded model is too small for a second thread to help, and on a busy machine waiting for it makes everything
    # several times slower. torch reads the variable when it is first imported, which has not happened yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_demo(argv, trainer_commands())
