"""benchmarks/kill_resume.py: real processes are killed and go on; what it compares it sees."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_compare
import kill_resume
import kill_stages
import pytest
import torch
from safetensors.torch import save_file

from vidreason.config.trainer_cli import build

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def a_run(folder: Path) -> Path:
    """A run folder with one of everything."""
    from torch.utils.tensorboard import SummaryWriter

    (folder / "checkpoints").mkdir(parents=True)
    with SummaryWriter(str(folder / "tb")) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 0.1 * step, step)
            writer.add_scalar("timing_s/step", torch.rand(()).item(), step)
            writer.add_scalar("watch/train/step_time", torch.rand(()).item(), step)
    lines = [{"vidreason_traces": 1}, *({"video_id": f"c{i}", "sample": 0, "text": "a"} for i in range(3))]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    save_file({"w": torch.arange(3.0)}, folder / "adapter_model.safetensors")
    kept = {"state_dict": {"w": torch.ones(2)}, "optimizer_states": [], "lr_schedulers": [], "global_step": 3}
    torch.save(
        {**kept, "epoch": 1, "vidreason": {"progress": {"batches": 3}, "stateful": {"rollouts": {"steps": 3}}}},
        folder / "checkpoints" / "last.ckpt",
    )
    (folder / "summary.json").write_text(json.dumps([{"acc": 0.5, "cpu_seconds": torch.rand(()).item()}]))
    return folder


def another_loss(run):
    shutil.rmtree(run / "tb")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tb")) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 0.1 * step + (1e-6 if step == 1 else 0), step)


def one_step_less(run):
    shutil.rmtree(run / "tb")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tb")) as writer:
        for step in range(2):
            writer.add_scalar("train/loss", 0.1 * step, step)


def a_trace_less(run):
    path = run / "traces.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def a_trace_twice(run):
    path = run / "traces.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def other_weights(run):
    save_file({"w": torch.arange(3.0) + 1e-7}, run / "adapter_model.safetensors")


def another_optimizer(run):
    path = run / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "optimizer_states": [{"state": {}}]}, path)


def another_count(run):
    path = run / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["vidreason"]["stateful"]["rollouts"]["steps"] = 4
    torch.save(saved, path)


def another_summary(run):
    (run / "summary.json").write_text(json.dumps([{"acc": 0.25, "cpu_seconds": 1.0}]))


CHANGES = {
    another_loss: "loss trace",
    one_step_less: "missing in the loss trace",
    a_trace_less: "missing in traces.jsonl",
    a_trace_twice: "traces.jsonl: ('c2', 0) stands there twice",
    other_weights: "adapter_model.safetensors differs",
    another_optimizer: "checkpoints/last.ckpt: optimizer_states differs",
    another_count: "checkpoints/last.ckpt: stateful differs",
    another_summary: "summary.json differs",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_seen(tmp_path, change):
    run, unbroken = a_run(tmp_path / "run"), a_run(tmp_path / "unbroken")
    assert kill_compare.differences(run, unbroken) == []
    change(run)
    found = kill_compare.differences(run, unbroken)
    assert len(found) == 1
    assert found[0].startswith(CHANGES[change])
    assert kill_compare.lost(found) == found[0].startswith("missing")


def test_the_file_is_added_to(tmp_path):
    path = tmp_path / "kills.json"
    kill_resume.add(path, "sft", 3, [])
    kill_resume.add(path, "grpo", 2, ["missing: everything"])
    kill_resume.add(path, "sft", 2, ["traces.jsonl differs"])
    wanted = {"sft": {"kills": 5, "equal": 3, "lost": 0}, "grpo": {"kills": 2, "equal": 0, "lost": 2}}
    assert json.loads(path.read_text()) == wanted


@pytest.mark.parametrize(("name", "kind"), {"sft": "describe", "grpo": "reason", "calibration": "reason"}.items())
def test_the_settings_of_a_stage_are_known(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text(kill_stages.DATA)
    command, *argv = kill_stages.STAGES[name].command(Path("run"))
    module = build(command, argv).model
    assert module.traces.kind == kind, "what is set stands beside what the stage's file says"
    assert module.batch_size == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "options"),
    [("sft,grpo,calibration,generate", ("--kills", "2")), ("pipeline", ("--kills", "3"))],
)
def test_real_processes_go_on_as_if_nothing_had_happened(tmp_path, stages, options):
    path = tmp_path / "kills.json"
    command = [sys.executable, str(BENCHMARKS / "kill_resume.py"), "--seed", "4", "--stages", stages, "--kills", "1"]
    command += ["--json", str(path), "--work", str(tmp_path / "work"), *options]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name, row in json.loads(path.read_text()).items():
        assert row["equal"] == row["kills"] > 0, name
        assert row["lost"] == 0
