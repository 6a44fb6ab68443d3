"""Runs and exports whose weights replaced the base: other questions than that of the run are still the base's."""

import csv
from pathlib import Path

import pytest
import stage_world
import yaml

from vidreason.answering.loaded import LoadedModel
from vidreason.cli.main import main
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.types import Clip
from vidreason.serving.engine import Answer, Engine, Job
from vidreason.serving.open_questions import Asked
from vidreason.serving.questions import Question
from vidreason.serving.server import Source

NIGHT = Asked((Question("Is it night?", ("yes", "no")),))


def fit(folder: Path, base: Path, run: str, lora: dict[str, int] | None) -> None:
    """Two steps of label SFT at a rate that changes what the model says."""
    (folder / "clips").mkdir(exist_ok=True)
    with (folder / "clips" / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
            stage_world.write_solid(folder / "clips" / f"{i}.mp4", 25 * i, frames=6)
            rows.writerow([f"{i}.mp4", ("dark", "bright")[i % 2], split])
    (folder / "task.yaml").write_text("name: light\nquestion: How light is it?\nclasses: [dark, bright]\n")
    data = {"manifest": "clips/manifest.csv", "task": "task.yaml", "frames": {"num_frames": 4}, "batch_size": 4}
    for name, kind, arguments in (
        ("data", "vidreason.datamodules.manifest.ManifestDataModule", data),
        ("vlm", "vidreason.lightning_modules.vlms.tiny.vlm.TinyVLM", {"path": str(base), "lora": lora}),
    ):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"class_path": kind, "init_args": arguments}))
    command = ["fit", "--config", "configs/sft_label.yaml", "--vlm", "vlm.yaml", "--data", "data.yaml"]
    rate = ["--model.init_args.optim.optimizer.init_args.lr", "0.02"]
    assert main([*command, "--run_dir", run, "--trainer.max_steps", "2", *rate]) == 0


def answers(loaded: LoadedModel, clip: Path) -> tuple[tuple[float, ...], dict[str, float]]:
    """Probabilities of another question, and of the run's own."""
    video = read_frames(clip, FrameOptions(num_frames=4, timeout=None))
    found = Engine(loaded, 8).answer([Job(Clip(clip, None, "new"), video, True, NIGHT)])[0]
    assert isinstance(found, Answer)
    assert found.own is not None
    return found.others[0], dict(found.own.probs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 64}])
def test_runs_and_exports_answer_other_questions_by_the_base(
    lora: dict[str, int] | None, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, small_base, "run", lora)
    clip = stage_world.write_solid(tmp_path / "new.mp4", 99, frames=9)
    assert main(["export", "run", "--out", "out", "--merge"]) == 0
    run, merged = Source(run=Path("run")).load(), Source(export=Path("out")).load()
    assert (run.base is None, merged.base is None) == (lora is not None, False)
    base = run.with_base().answering
    wanted, own = answers(run, clip)
    other, same = answers(merged, clip)
    assert other == pytest.approx(wanted, abs=1e-5)
    assert same == pytest.approx(own, abs=1e-4)
    if lora is None:
        assert base.vlm.base_sha() == merged.with_base().answering.vlm.base_sha()
    small_base.rename(tmp_path / "gone")
    try:
        with pytest.raises(ValueError, match="--own-question-only"):
            Engine(Source(export=Path("out")).load(), 8)
    finally:
        (tmp_path / "gone").rename(small_base)
