"""The demo with a stand-in for the trainer commands, and what it draws and says about given results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidreason.cli.demo import main
from vidreason.datamodules.types import Clip
from vidreason.demo import report
from vidreason.demo.report import choose_examples, draw_accuracy, render_comparison, render_example, render_verdict
from vidreason.demo.run import METHODS, QUICK, demo_settings, pipeline_options, run_demo
from vidreason.lightning_modules.decisions.predictions import Prediction, Trace
from vidreason.pipelines import inputs
from vidreason.pipelines.call import read_call, run_pipeline
from vidreason.pipelines.commands import Commands
from vidreason.pipelines.summary import SummaryRow, summarise_split

TEXT = "<think>A parcel stands at the door. It is gone at the end.</think><answer>theft</answer>"


def prediction(split: str, label: str, pred: str | None, group: str = "") -> Prediction:
    probs = {"theft": 0.7, "visit": 0.3} if pred == "theft" else {"theft": 0.3, "visit": 0.7}
    return Prediction(
        f"{split}/{label}", split, group, label, pred, probs, pred, pred is None, False, (Trace(TEXT, "theft"),)
    )


class FakeTrainer:
    """Writes the artefacts of the demo's stages without a model."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.failing: tuple[str, str] | None = None
        self.commands = Commands(self.run, lambda argv: None, lambda argv: 24)

    def demo(self, *argv: str) -> int:
        return run_demo(argv, self.commands, lambda job: run_pipeline(job.options, self.commands))

    def run(self, argv: list[str]) -> int:
        folder = Path(argv[argv.index("--run_dir") + 1])
        method, stage = folder.parts[-3], folder.name[3:]
        self.calls.append((method, stage))
        if self.failing == (method, stage):
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        if argv[0] == "predict":
            (folder / "traces.jsonl").write_text("{}\n")
        elif argv[0] == "fit":
            (folder / "adapter").mkdir()
            (folder / "adapter" / "weights").write_text("w")
        else:
            lines = []
            for level in (0, 1):
                for label, pred in (("theft", "theft"), ("visit", "theft")):
                    row = {
                        "video_id": label,
                        "split": f"test_L{level}",
                        "group": f"{level}",
                        "label": label,
                        "pred": pred,
                    }
                    more = {"probs": {"theft": 0.9, "visit": 0.1}, "answer": pred, "unparsed": False, "failed": False}
                    lines.append(json.dumps({**row, **more, "traces": []}))
            (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        return 0


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "fingerprint_embedded_weights", lambda: "base")
    return FakeTrainer()


def test_runs_four_methods_on_the_same_descriptions(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.demo("--quick", "--seed", "3") == 0
    assert trainer.calls[0] == ("rb_ft", "generate")
    assert {method for method, _ in trainer.calls} == set(METHODS)
    assert [method for method, stage in trainer.calls if stage == "generate"] == ["rb_ft"]
    out = capsys.readouterr().out
    assert out.index("writes   runs/demo/") < out.index("rm -r runs/demo") < out.index("vidreason pipeline")
    rows = json.loads(Path("runs/demo/summary.json").read_text())
    assert [(row["method"], row["split"]) for row in rows] == [(m, f"test_L{k}") for m in METHODS for k in (0, 1)]
    assert {(row["seed"], row["twin_acc"]) for row in rows} == {(3, 0.0)}
    assert [row["train_clips"] for row in rows] == [0, 0, 24, 24, 24, 24, 24, 24]
    assert Path("runs/demo/accuracy.png").stat().st_size > 1000
    table = Path("runs/demo/summary.txt").read_text()
    assert table.strip() in out
    assert "L1 (n=2)" in table
    assert "50.0 (9-91)" in table


def test_goes_on_where_it_was_and_skips_what_is_finished(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.failing = ("rb_ft", "sft_label")
    assert trainer.demo("--quick") == 1
    assert "vidreason demo --quick" in capsys.readouterr().err
    done = list(trainer.calls)
    assert ("deepintuit", "test") in done, "the others go on"
    trainer.calls.clear()
    trainer.failing = None
    assert trainer.demo("--quick") == 0
    assert trainer.calls == [("rb_ft", "sft_label"), ("rb_ft", "test")]
    trainer.calls.clear()
    assert trainer.demo("--quick") == 0
    assert trainer.calls == []


def test_every_setting_of_the_demo_fits_its_pipelines() -> None:
    stages = set()
    for method in METHODS:
        for quick in (False, True):
            settings = demo_settings(Path("runs/demo"), 1, quick)
            call = read_call(pipeline_options(method, Path("runs/demo"), 1, settings))
            assert call.spec.args["data.init_args.seed"] == 1
            assert call.spec.args["data.init_args.data_dir"] == "runs/demo/porch"
            stages |= {stage.name for stage in call.spec.stages}
    used = {key.partition(".")[0] for key in QUICK}
    assert used <= stages | {"data"}


def test_label_stages_get_the_same_settings() -> None:
    settings = demo_settings(Path("d"), 0, True)
    calls = [read_call(pipeline_options(method, Path("d"), 0, settings)) for method in ("label_sft", "rb_ft")]
    stages = [call.spec.stage("sft_label") for call in calls]
    assert stages[0].args == stages[1].args
    assert calls[0].spec.args == calls[1].spec.args


def test_options_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--quik"])
    assert "--quik" in capsys.readouterr().err


def rows() -> list[SummaryRow]:
    made = []
    for method, right in (("zero_shot", 2), ("deepintuit", 8)):
        for level in ("L0", "L1"):
            clips = [prediction(f"test_{level}", "theft", "theft" if k < right else "visit") for k in range(10)]
            made.append(summarise_split(clips, method=method, note="grpo ended" if method == "deepintuit" else ""))
    return made


def test_comparison_names_every_cell() -> None:
    text = render_comparison(rows())
    accuracy = text.split("\n\n")[0].splitlines()
    assert accuracy[1].split("  ")[0] == "method"
    assert accuracy[1].count("(n=10)") == 2
    assert accuracy[-1].split()[:3] == ["deepintuit", "80.0", "(49-94)"]
    assert text.count("deepintuit: grpo ended") == 1
    assert "0.500" in text  # zero_shot's ECE: certain by 0.7 and right in 2 of 10


def test_picture_shows_more_than_axes(tmp_path: Path) -> None:
    draw_accuracy(rows(), 0.5, tmp_path / "a.png")
    draw_accuracy(rows()[:2], 0.5, tmp_path / "b.png")
    one, other = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.png", "b.png"))
    assert one.shape == other.shape
    assert (one != other).any()


def test_examples_show_each_level_and_a_mistake() -> None:
    predictions = [
        prediction("test_L0", "visit", "theft"),
        prediction("test_L0", "theft", "theft"),
        prediction("test_L1", "theft", "theft"),
        prediction("test_L1", "theft", None),
    ]
    chosen = choose_examples(predictions)
    assert [(p.split, p.right) for p in chosen] == [("test_L0", True), ("test_L1", True), ("test_L1", False)]
    assert len(choose_examples(predictions, count=2)) == 2
    assert choose_examples([]) == []


def test_an_example_says_what_was_thought_and_decided(tmp_path: Path) -> None:
    clip = Clip(tmp_path / "clip.mp4", "theft", "clip")
    worked = report.Worked(clip, prediction("test_L1", "theft", "theft"), tmp_path / "strip.png")
    text = render_example(worked)
    for part in ("clip.mp4", "strip.png", "It is gone at the end.", "theft", "probability 0.70: right"):
        assert part in text
    wrong = report.Worked(clip, prediction("test_L1", "visit", "theft"), tmp_path / "strip.png")
    assert "wrong, it is visit" in render_example(wrong)


def test_the_last_sentence_is_the_paired_difference_at_l1() -> None:
    labels = ["theft", "visit"] * 50

    def method(wrong: range) -> list[Prediction]:
        found = []
        for split in ("test_L0", "test_L1"):
            for i, label in enumerate(labels):
                other = "visit" if label == "theft" else "theft"
                pred = other if i in wrong and split == "test_L1" else label
                found.append(replace(prediction(split, label, pred, f"{i}"), video_id=f"{split}/{i}"))
        return found

    text = render_verdict(method(range(10)), method(range(30)))
    half = 1.96 * np.sqrt(0.2 * 0.8 / 100)  # 20 of 100 clips differ, all in favour of reasoning
    assert f"is better than label SFT: +20.0 ± {100 * half:.1f} points at L1 (95 % interval, 100 clips" in text
    assert f"could show a difference of {100 * half * (1.96 + 0.8416) / 1.96:.0f} points" in text
    assert "is worse" in render_verdict(method(range(30)), method(range(10)))
    assert "is not shown to be better" in render_verdict(method(range(1)), method(range(1, 3)))
