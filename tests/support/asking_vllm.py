"""Asks vLLM, in an environment of its own, for log-probabilities of completions."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

PYTHON = os.environ.get("VIDREASON_VLLM_PYTHON")
NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="VIDREASON_VLLM_PYTHON is not set: it names the Python of an environment with vLLM, which "
        "tests/parity/make_environment.sh makes",
    ),
]
WORKER = Path(__file__).parents[1] / "parity" / "vllm_worker.py"


def ask_vllm(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the worker on a job."""
    assert PYTHON is not None
    folder.mkdir()
    torch.save(job, folder / "requests.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([PYTHON, str(WORKER), str(folder)], env=environment, capture_output=True, text=True)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"vLLM failed:\n{(done.stdout + done.stderr)[-6000:]}"
    answers: dict[str, Any] = torch.load(folder / "answers.pt")
    return answers
