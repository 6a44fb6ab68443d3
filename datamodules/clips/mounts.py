"""File systems that do not answer: a thousand clips on a dead mount cost one time limit and not each its own."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

from vidreason.datamodules.clips.time_limit import ANSWER_TIMEOUT, Kind, ReadTimeoutError, look_at

_MOUNTS = Path("/proc/self/mountinfo")
_AGAIN_S = 300.0
"""Seconds after which a place that did not answer is looked at again."""
_MOST_LINKS = 40  # as many as the system follows in one path


class Lookout:
    """Looks at files, but not where another one has just not answered. Several threads may use it.

    Args:
        timeout: Seconds that a look may take.
        again: Seconds after which a place that did not answer is looked at again.
    """

    def __init__(self, timeout: float = ANSWER_TIMEOUT, again: float = _AGAIN_S) -> None:
        self.timeout, self.again = timeout, again
        self._dead: dict[Path, tuple[float, Path]] = {}
        """The mount or folder that did not answer: when it may be looked at again, and which file did not."""
        self._lock = threading.Lock()

    def look(self, path: Path) -> Kind | None:
        """Returns what ``look_at`` returns.

        Raises:
            ReadTimeoutError: If the path does not answer, or another one on the same mount has just not answered.
            OSError: If the path cannot be looked at.
        """
        if self._dead:
            self._check(path)
        try:
            return look_at(path, self.timeout)
        except ReadTimeoutError:
            with self._lock:
                self._dead[mount_of(path)] = time.monotonic() + self.again, path
            raise

    def _check(self, path: Path) -> None:
        own = Path(os.path.abspath(path))
        with self._lock:
            dead = {place: found for place, found in self._dead.items() if found[0] > time.monotonic()}
            self._dead = dead
        place = next((place for place in dead if own.is_relative_to(place)), None)
        if place is None and dead and (behind_links := mount_of(path)) in dead:
            place = behind_links
        if place is not None:
            raise ReadTimeoutError(
                f"{path}: not looked at, since {dead[place][1]} on the same mount gave no answer within "
                f"{self.timeout:g} seconds: repair the disk or network mount ({place})"
            )


def mount_of(path: Path) -> Path:
    """Returns the mount that a path is on, without looking at anything on it.

    Returns:
        The mount point; for the root file system, or where the system does not tell, the folder of the path.
    """
    mounts = _mount_points()
    whole, links = os.path.abspath(path), 0
    done, waiting = Path("/"), list(Path(whole).parts[:0:-1])
    while waiting:
        done /= waiting.pop()
        if str(done) in mounts:
            rest = [done.joinpath(*waiting[::-1][:length]) for length in range(len(waiting), -1, -1)]
            return next(place for place in rest if str(place) in mounts)  # the innermost one
        try:
            target = os.readlink(done)
        except OSError:  # no link
            continue
        links += 1
        if links > _MOST_LINKS:
            break
        joined = os.path.normpath(done.parent / target)
        done, waiting = Path("/"), [*waiting, *Path(joined).parts[:0:-1]]
    return Path(whole).parent


def _mount_points() -> frozenset[str]:
    """Returns the mount points of this process except the root; empty where the system does not list them."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    # man 5 proc: the fifth field, with octal escapes for white space
    points = (re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines)
    return frozenset(points) - {"/"}
