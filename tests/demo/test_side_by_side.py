"""Pipelines in processes of their own: what is shown and written, how many at a time, and how they are stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vidreason.demo import side_by_side
from vidreason.demo.side_by_side import Job, Processes, run_jobs


def test_jobs_run_at_the_same_time_up_to_a_number_and_one_failure_stops_no_other(tmp_path: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def run(job: Job) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 3 if job.name == "b" else 0

    jobs = [Job(name, (), tmp_path / name) for name in "abcde"]
    assert run_jobs(jobs, 2, run) == {"a": 0, "b": 3, "c": 0, "d": 0, "e": 0}
    assert most == 2


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of the interpreter that ``python -m vidreason pipeline`` starts."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "print('[1/2] generate\\n  $ vidreason predict', flush=True)\n"
        "sys.stderr.write('writing: 10%\\rwriting: 20%\\r[2/2] sft_label\\n')\nsys.stderr.flush()\n"
        "if 'wait' in sys.argv:\n    time.sleep(60)\n"
        "print('error: no such file')\nsys.exit(2)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(side_by_side.sys, "executable", str(program))
    return program


def test_output_goes_to_a_file_and_stages_and_errors_are_shown(tmp_path: Path, script: Path) -> None:
    shown: list[str] = []
    assert Processes(shown.append)(Job("rb_ft", ("--config", "x"), tmp_path / "rb_ft" / "log.txt")) == 2
    assert [line.split(maxsplit=1)[1] for line in shown[:3]] == [
        "[1/2] generate",
        "[2/2] sft_label",
        "error: no such file",
    ]
    assert shown[3].startswith("rb_ft        stopped with exit status 2 after 0.")
    assert b"writing: 10%\rwriting: 20%" in (tmp_path / "rb_ft" / "log.txt").read_bytes()


def test_sigterm_is_passed_on(tmp_path: Path, script: Path) -> None:
    shown: list[str] = []
    processes = Processes(
        lambda line: (shown.append(line), "[2/2]" in line and os.kill(os.getpid(), signal.SIGTERM))[0]
    )
    with processes.passing_sigterm_on():
        statuses = run_jobs([Job("rb_ft", ("wait",), tmp_path / "log.txt")], 1, processes)
    assert statuses == {"rb_ft": -signal.SIGTERM}
    assert "ended by SIGTERM" in shown[-1]
