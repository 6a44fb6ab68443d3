"""Exported models in plain transformers and PEFT: the script of the model card, where vidreason cannot be imported."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stage_world as world
import yaml
from families import FAMILIES

from vidreason import VideoClassifier
from vidreason.cli.main import main

BLOCKED = (
    "import runpy, sys\n"
    "sys.modules['vidreason'] = None\n"
    "del sys.argv[0]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)
pytestmark = pytest.mark.slow


def write_project(home: Path, family: str, **options: object) -> None:
    """Clips of the grey values, a task, and a tiny checkpoint of a family in the hub's format."""
    kind, write = FAMILIES[family]
    write(home / "base")
    (home / "clips").mkdir()
    with (home / "clips" / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["cal"] * 2 + ["test"] * 2):
            world.write_solid(home / "clips" / f"{i}.mp4", 25 * i, frames=12)
            rows.writerow([f"{i}.mp4", ("dark", "bright")[i % 2], split])
    (home / "task.yaml").write_text("name: light\nquestion: How light is it?\nclasses: [dark, bright]\n")
    (home / "data.yaml").write_text(
        "class_path: vidreason.datamodules.manifest.ManifestDataModule\n"
        "init_args: {manifest: clips/manifest.csv, task: task.yaml, frames: {num_frames: 6}, batch_size: 4}\n"
    )
    arguments = {"path": str(home / "base"), "lora": {"r": 4, "alpha": 64}, "dtype": "float32", **options}
    section = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
    (home / "vlm.yaml").write_text(yaml.safe_dump(section))


def fit(config: str, run: str, *more: str) -> None:
    common = ["--config", config, "--vlm", "vlm.yaml", "--data", "data.yaml", "--run_dir", run]
    assert main(["fit", *common, "--trainer.max_steps", "2", *more]) == 0


def script_of(folder: Path) -> str:
    found = re.search(r"```python\n(import json.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run_script(folder: Path, clip: str, *base: str) -> dict[str, float]:
    """Probabilities by the card's script, in a process that cannot import vidreason."""
    (folder / "script.py").write_text(script_of(folder))
    command = [sys.executable, "-c", BLOCKED, str(folder / "script.py"), str(folder), clip, *base]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    probs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return probs


@pytest.mark.parametrize("family", ["qwen", "qwen3", "internvl"])
@pytest.mark.parametrize("merge", [False, True])
def test_the_cards_script_gives_the_probabilities_of_the_run(
    family: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = {} if family == "internvl" else {"max_pixels": 28 * 28 * 4}
    write_project(tmp_path, family, **limit)
    fit("configs/sft_label.yaml", "run", "--model.init_args.optim.optimizer.init_args.lr", "0.01")
    out = tmp_path / "out"
    assert main(["export", "run", "--out", str(out), *(["--merge"] if merge else [])]) == 0
    assert len([line for line in script_of(out).splitlines() if line.strip()]) <= 30
    wanted = VideoClassifier.from_run("run")("clips/9.mp4").probs
    assert run_script(out, "clips/9.mp4", *([] if merge else ["base"])) == pytest.approx(wanted, abs=1e-5)
    assert VideoClassifier.from_export(out)("clips/9.mp4").probs == pytest.approx(wanted, abs=1e-5)
    monkeypatch.setattr("vidreason.export.write.TOLERANCE", -1.0)
    assert main(["export", "run", "--out", str(tmp_path / "other")]) == 2, "a difference is an error"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("merge", "shown"), [(False, "video+reasoning"), (True, "video+trace")])
def test_policy_and_calibrator_travel_together(
    merge: bool, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "qwen")
    traces = ["--model.init_args.traces.samples", "2", "--model.init_args.traces.sampling.max_new_tokens", "8"]
    fit("configs/sft_label.yaml", "label")
    traces += ["--model.init_args.input", shown]
    fit("configs/calibration.yaml", "run", *traces, "--model.init_args.adapter_path", "label/adapter")
    out = tmp_path / "out"
    assert main(["export", "run", "--out", str(out), *(["--merge"] if merge else [])]) == 0
    world.write_solid(tmp_path / "new.mp4", 99, frames=9)
    wanted, found = VideoClassifier.from_run("run")("new.mp4"), VideoClassifier.from_export(out)("new.mp4")
    assert found.traces == wanted.traces
    assert found.probs == pytest.approx(wanted.probs, abs=1e-5)
    assert run_script(out, "new.mp4", *([] if merge else ["base"])) == pytest.approx(wanted.probs, abs=1e-5)
    other = VideoClassifier.from_run("label")("new.mp4").probs
    assert wanted.probs != pytest.approx(other, abs=1e-3)


def test_four_bits_are_merged_into_full_precision_and_the_card_says_what_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "qwen", quantize="nf4")
    fit("configs/sft_label.yaml", "run")
    assert main(["export", "run", "--out", "out", "--merge"]) == 0
    check = json.loads(Path("out/vidreason.json").read_text())["export"]["check"]
    assert check["difference"] > 1e-3
    card = Path("out/README.md").read_text()
    assert f"at most {check['difference']:.2g} nats" in card
    assert "held its base in 4 bits" in card
    theirs, ours = run_script(Path("out"), "clips/9.mp4"), VideoClassifier.from_export("out")("clips/9.mp4").probs
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_traces_of_a_base_in_four_bits_travel_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base writes the traces, without an adapter, and holds its weights in 4 bits as in the run."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "qwen", quantize="nf4")
    traces = ["--model.init_args.traces.samples", "2", "--model.init_args.traces.sampling.max_new_tokens", "8"]
    fit("configs/calibration.yaml", "run", *traces)
    assert main(["export", "run", "--out", "out"]) == 0
    assert not Path("out/policy").exists()
    world.write_solid(tmp_path / "new.mp4", 99, frames=9)
    wanted, found = VideoClassifier.from_run("run")("new.mp4"), VideoClassifier.from_export("out")("new.mp4")
    assert found.traces == wanted.traces
    assert found.probs == pytest.approx(wanted.probs, abs=1e-5)
