"""Kills runs at random moments, lets them go on, and compares them with a run that was not killed.

    python benchmarks/kill_resume.py --kills 50 --seed 0 --json benchmarks/results/DATE_kill_resume.json

Each stage is an ordinary ``vidreason`` command on small data. An unbroken run says how long it takes and what has to
come out. A run is then killed (SIGKILL, with all that it has started) at a moment drawn over that whole time, start
included; every third time while a file is just being written, a checkpoint, an adapter or a table. It is started
again, may be killed again, several times, and in the end runs through. Then every value in its logs, its texts by clip
and sample, weights, optimizer, best checkpoints, predictions and summary have to be the unbroken run's, bit for bit.

FILE holds ``{stage: {"kills", "equal", "lost"}}`` and is added to, so that it may be filled in portions: ``kills``
that were made, those of them in runs that came out ``equal``, and those in runs that did not go on or lacked something.
With ``--signal TERM`` or ``INT`` the runs are stopped and not killed, and it is said how long that takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kill_attempts import attempt, drafts
from kill_compare import differences, lost
from kill_stages import DATA, STAGES

from vidreason import exit_codes
from vidreason.datamodules.atomic_files import write_text

GOES_ON = 0.75
"""Chance that a run that was killed is killed again"""
LIMIT_S = 600.0


class Killer:
    """Runs one stage, unbroken and broken, in a folder of its own."""

    def __init__(self, stage: str, work: Path, number: signal.Signals, rng: random.Random) -> None:
        self.name, self.stage, self.work, self.rng = stage, STAGES[stage], work, rng
        self.number = number
        self.unbroken = work / stage
        self.seconds = 0.0
        self._number = 0

    def prepare(self) -> None:
        """Makes the unbroken run, and those that it needs, unless they are there."""
        if self.stage.needs is not None:
            Killer(self.stage.needs, self.work, self.number, self.rng).prepare()
        done = self.work / f"{self.name}.seconds"
        if not done.is_file():
            shutil.rmtree(self.unbroken, ignore_errors=True)
            end = self._attempt(self.unbroken, None)
            if end.status != 0:
                raise SystemExit(f"the unbroken run of {self.name} failed, see {self._log(self.unbroken)}")
            write_text(done, f"{end.seconds}\n")
        self.seconds = float(done.read_text(encoding="utf-8"))

    def broken(self, most: int) -> tuple[int, list[str]]:
        """Makes a run that is killed at least once and at most ``most`` times; returns how often, and what differs."""
        self._number += 1
        run = self.work / f"{self.name}_killed"
        shutil.rmtree(run, ignore_errors=True)
        self._log(run).unlink(missing_ok=True)
        kills = 0
        while True:
            again = kills < most and (kills == 0 or self.rng.random() < GOES_ON)
            end = self._attempt(run, self._moment(run) if again else None)
            if end.killed:
                kills += 1
                print(f"  {self.name}: killed after {end.seconds:.2f} s, ended {end.stopping:.2f} s later", flush=True)
                if end.status not in (exit_codes.INTERRUPTED, -self.number):
                    return kills, [f"missing: the run did not stop in order (exit status {end.status})"]
            elif end.status != 0:
                return kills, [f"missing: the run did not go on (exit status {end.status}), see {self._log(run)}"]
            else:
                break
        return kills, differences(run, self.unbroken)

    def _moment(self, run: Path) -> Callable[[float], bool]:
        """When to kill: at a random moment, or at one of the times that something is being written."""
        at = self.rng.uniform(0.0, self.seconds)
        if self.rng.random() < 2 / 3:
            return lambda seconds: seconds >= at
        return lambda seconds: seconds >= at / 2 and drafts(run)  # something will still be written then

    def _attempt(self, run: Path, kill: Callable[[float], bool] | None):  # type: ignore[no-untyped-def]
        return attempt(self.stage.command(run), self.work, self._log(run), kill, self.number, LIMIT_S)

    def _log(self, run: Path) -> Path:
        return run.with_suffix(".log")


def main() -> None:
    """Makes the kills and adds to the file after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="per stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/kill_resume"), help="where the runs are")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, between two runs")
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages: unknown {', '.join(unknown)}; there are {', '.join(STAGES)}")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "data.yaml", DATA)
    start, failed = time.monotonic(), False
    for stage in stages:
        number = signal.Signals[f"SIG{options.signal}"]
        killer = Killer(stage, work, number, random.Random(f"{options.seed}/{stage}"))
        killer.prepare()
        print(f"{stage}: {killer.seconds:.1f} s unbroken", flush=True)
        left = options.kills
        while left > 0 and (time.monotonic() - start) / 60 < options.minutes:
            kills, found = killer.broken(left)
            left -= kills
            failed = failed or bool(found)
            total = add(options.json, stage, kills, found)
            print(f"{stage}: {total}" + "".join(f"\n    {item}" for item in found[:12]), flush=True)
            if found:
                kept = work / f"{stage}_seed{options.seed}_failed{options.kills - left}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(work / f"{stage}_killed", kept)
    sys.exit(failed)


def add(path: Path, stage: str, kills: int, found: list[str]) -> dict[str, int]:
    """Adds a run to the file; returns what it says of the stage now."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    row = content.setdefault(stage, {"kills": 0, "equal": 0, "lost": 0})
    row["kills"] += kills
    row["equal"] += 0 if found else kills
    row["lost"] += kills if lost(found) else 0
    write_text(path, json.dumps(content, indent=1) + "\n")
    return dict(row)


if __name__ == "__main__":
    main()
