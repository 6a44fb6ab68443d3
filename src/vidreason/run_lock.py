"""The lock of a run folder: one process at a time writes there. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK_FILE = "run.lock"


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder within the block; the lock file names the host and process id.

    The system releases the lock when a process ends, however it ends. A file that is left behind is taken over with a
    line on stderr, on whichever host its process ran.

    Args:
        folder: The run folder, which is made if it does not exist.

    Raises:
        ValueError: If another process holds the lock, or the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = _open_locked(path)
    try:
        file.seek(0)
        if left := " ".join(file.read().split()):
            print(f"{folder}: taking over the lock of {left}, which has ended", file=sys.stderr, flush=True)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked, so that nobody locks a file that is about to go
        file.close()


def _open_locked(path: Path) -> TextIO:
    """Opens and locks the file at ``path``, which a process that is ending may remove at any moment."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # A record lock, which forked children (workers of a data loader) do not inherit, unlike that of flock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # what POSIX has for a lock that another process holds
                file.close()
                raise ValueError(
                    f"{path.parent}: cannot be locked ({error.strerror}); give a --run_dir on another file system"
                ) from error
            file.seek(0)
            owner = " ".join(file.read().split()) or "another process"
            file.close()
            raise ValueError(
                f"{path.parent}: {owner} is writing there; wait until it has ended, or give another --run_dir"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()
