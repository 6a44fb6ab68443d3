"""``vidreason demo``: the whole main job on the embedded default."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vidreason.demo.run import run_demo
from vidreason.pipelines.commands import trainer_commands


def main(argv: Sequence[str]) -> int:
    """Runs the demo on one thread, unless the user says otherwise.

    Args:
        argv: Options of ``vidreason demo``.

    Returns:
        Exit status: 0 done, else that of the pipeline that stopped.
    """
    # The embedded model is too small for a second thread to help, and where other programs run, waiting for it makes
    # everything several times slower. Read when torch is first imported, which nothing has done yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_demo(argv, trainer_commands())
