"""Every stage under every strategy from the command line with ``configs/debug.yaml``, overlays in either order.

Each run has to end well, and what it prints and saves has to be what it did.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_processes as processes
import yaml
from safetensors.torch import load_file

from vidreason.cli.main import main
from vidreason.config.trainer_cli import build

without_ranks = processes.without_ranks
pytestmark = pytest.mark.usefixtures("without_ranks")

OVERLAYS = ("single", "lora", "full", "qlora", "ddp", "fsdp", "fsdp_qlora", "multi_node")
SEVERAL = ("ddp", "fsdp", "fsdp_qlora")
FITS = ("sft_label", "sft_rationale", "sft_cold_start", "grpo", "calibration")
COMMANDS = {**dict.fromkeys(FITS, "fit"), "generate": "predict", "test": "test"}
KINDS = {"ddp": "DDP", "fsdp": "FSDP2", "fsdp_qlora": "FSDP2"}
WRITTEN = {"generate": "traces.jsonl", "test": "predictions.jsonl"}
SHORT = {  # what debug.yaml leaves long
    "sft_rationale": ["--model.init_args.traces.samples", "1"],
    "calibration": ["--model.init_args.traces", "{samples: 1, sampling: {max_new_tokens: 16}}"],
    "grpo": ["--model.init_args.rollouts.sampling.max_new_tokens", "16"],
    "generate": ["--model.init_args.traces", "{samples: 1, sampling: {max_new_tokens: 16}}"],
}
LIMIT_S = 300


@dataclass(frozen=True)
class Cell:
    """A stage under a strategy, in an order of overlays of its own."""

    stage: str
    strategy: str
    processes: int = 1

    def command(self, run_dir: Path) -> list[str]:
        """Behind ``vidreason``."""
        debug, overlay = (["--config", f"configs/{name}.yaml"] for name in ("debug", f"strategy/{self.strategy}"))
        debug_first = (len(self.stage) + OVERLAYS.index(self.strategy)) % 2 == 0
        order = [*debug, *overlay] if debug_first else [*overlay, *debug]
        where = ["--trainer.accelerator", "cpu", "--trainer.devices", str(self.processes)]
        end = ["--run_dir", str(run_dir), *(where if self.strategy in SEVERAL else where[:2])]
        first = ["--config", f"configs/{self.stage}.yaml"]
        return [COMMANDS[self.stage], *first, *order, *SHORT.get(self.stage, []), *end]

    @property
    def quantised(self) -> bool:
        """True if the base is held in 4 bits."""
        return self.strategy.endswith("qlora")

    @property
    def adapter(self) -> bool:
        """True if an adapter is trained."""
        return self.strategy in ("lora", "qlora", "fsdp_qlora") or self.stage == "calibration"

    def check(self, run_dir: Path, said: str) -> None:
        """Compares what was asked for with what was printed, saved and written."""
        line = next(line for line in said.splitlines() if line.startswith("strategy: "))
        kind = KINDS.get(self.strategy, "SingleDevice")
        assert re.match(rf"strategy: {kind}, {self.processes} process", line), line
        assert ("4 bits (nf4)" in line) == self.quantised, line
        assert ("LoRA adapter" in line) == self.adapter, line
        saved: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        assert saved["vlm"]["init_args"]["quantize"] == ("nf4" if self.quantised else "none")
        assert (saved["vlm"]["init_args"]["lora"] is not None) == (self.strategy in ("lora", "qlora", "fsdp_qlora"))
        strategy = saved["trainer"]["strategy"]
        named = strategy if isinstance(strategy, str) else strategy["class_path"].rpartition(".")[2]
        assert named == {"DDP": "ddp", "SingleDevice": "auto"}.get(kind, kind)
        assert saved["trainer"]["max_steps"] == 2
        if COMMANDS[self.stage] == "fit":
            file = "adapter/adapter_model.safetensors" if self.adapter else "weights/model.safetensors"
            assert load_file(run_dir / file)
        else:
            lines = (run_dir / WRITTEN[self.stage]).read_text(encoding="utf-8").splitlines()
            assert len(lines) == len(set(lines)) > 4


ONE_PROCESS = [Cell(stage, strategy) for stage in COMMANDS for strategy in OVERLAYS if strategy != "multi_node"]
TWO_PROCESSES = [Cell(stage, strategy, 2) for stage in COMMANDS for strategy in SEVERAL]


def name_of(cell: Cell) -> str:
    return f"{cell.stage}-{cell.strategy}"


def run_here(cell: Cell, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(cell.command(run_dir))
    said = capsys.readouterr().err
    assert status == 0, said[-3000:]
    cell.check(run_dir, said)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ONE_PROCESS, ids=name_of)
def test_every_stage_under_every_strategy(cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(cell, tmp_path / "run", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("cell", TWO_PROCESSES, ids=name_of)
def test_every_stage_in_two_processes(cell: Cell, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vidreason", *cell.command(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert found.returncode == 0, found.stderr[-3000:]
    cell.check(tmp_path / "run", found.stderr)


@pytest.mark.parametrize("stage", ["grpo", "test"])
def test_several_machines_have_to_be_named(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Cell(stage, "multi_node").command(tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "num_nodes is 2" in said
    assert "configs/strategy/ddp.yaml" in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OVERLAYS)
@pytest.mark.parametrize("stage", COMMANDS)
def test_both_orders_are_one_config(stage: str, strategy: str) -> None:
    """All of it: what one overlay sets, the other does not."""
    found = []
    overlays = (f"configs/strategy/{strategy}.yaml", "configs/debug.yaml")
    for order in (overlays, overlays[::-1]):
        files = [word for path in (f"configs/{stage}.yaml", *order) for word in ("--config", path)]
        command = COMMANDS[stage]
        cli = build(command, [*files, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--run_dir", "run"])
        found.append({k: v for k, v in vars(cli.config[command].as_flat()).items() if k != "config"})
    assert found[0] == found[1]
