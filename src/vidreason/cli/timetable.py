"""What the stages of a pipeline took, and what those have to do that never ran; the bars tell the time left from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vidreason.callbacks.time_left import Behind
from vidreason.cli.pipeline_state import RunState
from vidreason.lightning_modules.work import Work


class Timetable:
    """The times of one pipeline in one run folder.

    Args:
        took: Seconds of stages that were finished in this folder, whatever their inputs were.
    """

    def __init__(self, took: Mapping[str, float]) -> None:
        self.took = dict(took)
        self.works: dict[str, Work | None] = {}
        """What stages have to do; None where that cannot be told"""
        self._timed: dict[str, float] = {}

    def finished(self, name: str, seconds: float) -> None:
        """Notes what a stage took on its present inputs: the speed of this machine follows from it."""
        self._timed[name] = seconds

    def behind(self, names: Iterable[str], running: str | None = None) -> Behind:
        """Sums up stages that are to run.

        Args:
            names: The stages.
            running: The one in front of them.
        """
        names = list(names)
        works = [self.works.get(name) for name in names if name not in self.took]
        pairs = [(self.works.get(name), seconds) for name, seconds in self._timed.items()]
        return Behind(
            seconds=sum(self.took.get(name, 0.0) for name in names),
            complete=None not in works,
            untimed=tuple(work for work in works if work is not None),
            timed=tuple((work, seconds) for work, seconds in pairs if work is not None),
            running=None if running is None else self.works.get(running),
        )


def seconds_taken(state: RunState | None) -> dict[str, float]:
    """Seconds of the stages that were finished in a folder, by name; those taken from another run cost none."""
    stages = state.stages.items() if state else ()
    return {name: 0.0 if record.taken else record.wall_seconds for name, record in stages if record.done}
