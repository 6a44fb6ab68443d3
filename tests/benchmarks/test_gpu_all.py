"""The GPU script: all of its parts on a CPU at tiny sizes, and what it has to show where there is a GPU."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gpu_all
import gpu_steps
import pytest
import torch

ROOT = Path(__file__).parents[2]
ARMS = {"lora": 4, "qlora": 4, "fsdp": 4, "fsdp_qlora": 4}

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    gpu_all.main(["--tiny", "--json", str(file)])
    found = json.loads(file.read_text())
    assert {"date", "device", "versions", "cuda", "matmul_tflops", "scales", *gpu_all.PARTS} <= set(found)
    assert found["not_run"] == []
    assert [row["route"] for row in found["exact"]] == ["naive", "expand", "packed"]
    assert all(0 < row["logprobs"] < 0.01 and row.get("times_naive", 0) < 2 for row in found["exact"])
    assert [row["checkpointing"] for row in found["update"]] == [True, False]
    assert all(row["naive"]["gflop"] > row["ours"]["gflop"] > 0 for row in found["update"])
    assert all(row["largest_logprob_difference"] < 1e-5 for row in found["update"])
    assert [row["stage"] for row in found["steps"]] == ["sft_trace", "calibration"]
    parameters = 13.26e6 * 4 / 1e9  # the reference in float32
    assert all(parameters < row["predicted_gb"] < 2 * parameters for row in found["steps"])
    assert found["sampling"]["tokens_per_s"] > 0
    rows = found["strategies"]
    assert Counter(row["strategy"] for row in rows) == ARMS
    assert all(row["moved"] and row["seconds"] > 0 for row in (*rows, *found["steps"]))
    trained = {(row["strategy"], row["stage"]): row["trained"] for row in rows}
    assert trained["fsdp", "grpo"] > 10 * trained["lora", "grpo"] == 10 * trained["fsdp_qlora", "grpo"]
    assert trained["fsdp", "calibration"] == trained["lora", "calibration"]


@pytest.mark.slow
def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(gpu_steps, "STAGES", ("sft_label",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    found = gpu_all.main(["--tiny", "--parts", "strategies"])
    assert [row["strategy"] for row in found["strategies"]] == ["lora", "fsdp"]
    missing = [f"sft_label x {name}: bitsandbytes is not installed" for name in ("qlora", "fsdp_qlora")]
    assert found["not_run"] == missing
    assert gpu_all.main(["--tiny", "--minutes", "0"])["not_run"] == list(gpu_all.PARTS)


@pytest.mark.slow
def test_the_script_needs_no_decoder_and_no_parser() -> None:
    """They cannot even be imported there."""
    code = (
        "import sys, runpy; blocked = ('decord', 'omegaconf', 'jsonargparse'); "
        "sys.modules.update(dict.fromkeys(blocked)); "
        "sys.argv = ['gpu_all.py', '--tiny', '--parts', 'exact', 'steps']; sys.path.insert(0, 'benchmarks'); "
        "runpy.run_path('benchmarks/gpu_all.py', run_name='__main__'); "
        "assert all(sys.modules[name] is None for name in blocked)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
@gpu
class TestOnAGPU:
    """One run of the script, and what its figures have to be."""

    @pytest.fixture(scope="class")
    def found(self) -> dict[str, Any]:
        return gpu_all.main(["--parts", "exact", "update", "steps", "sampling"])

    def test_rounding_in_bf16_is_like_that_of_naive_scoring(self, found: dict[str, Any]) -> None:
        assert all(row.get("times_naive", 0) <= 2 for row in found["exact"])

    def test_an_update_is_four_times_as_fast(self, found: dict[str, Any]) -> None:
        assert found["update"]
        assert all(row["ratio"] is None or row["ratio"] >= 4 for row in found["update"])

    def test_steps_fit_into_24_gb_and_the_plan_is_right(self, found: dict[str, Any]) -> None:
        assert found["steps"]
        for row in found["steps"]:
            assert row["peak_gb"] is not None, "out of memory"
            assert row["predicted_gb"] == pytest.approx(row["peak_gb"], rel=0.15)

    def test_tokens_are_sampled(self, found: dict[str, Any]) -> None:
        assert found["sampling"]["tokens_per_s"] > 0
