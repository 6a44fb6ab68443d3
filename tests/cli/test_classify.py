"""Asking a finished run: its decisions are those of its own test, for files, folders and frames in memory."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stage_world as world
import torch
from safetensors.torch import load_file, save_file

from vidreason import VideoClassifier
from vidreason.cli.main import main
from vidreason.config.finished_stage import find_stage
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.sources.listing import ListedClip
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha
from vidreason.pipelines.state import save_state
from vidreason.run_folder import RunState, StageRecord

small_base = world.small_base

SETTINGS = [
    *("--data", "data.yaml", "--model.init_args.traces.samples", "2"),
    *("--model.init_args.traces.sampling.max_new_tokens", "8"),
]


@pytest.fixture(scope="module")
def home(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips and ``runs``: a pipeline's folder with a calibrator and its test, and a label SFT."""
    home = tmp_path_factory.mktemp("home")
    (home / "clips").mkdir()
    with (home / "clips" / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["cal"] * 2 + ["test"] * 3):
            world.write_solid(home / "clips" / f"{i}.mp4", 20 * i)
            rows.writerow([f"{i}.mp4", ("dark", "bright")[i % 2], split])
    (home / "task.yaml").write_text(
        "name: light\nquestion: How light is it?\nclasses: [dark, {name: bright, definition: 'light, very'}]\n"
    )
    (home / "data.yaml").write_text(
        "class_path: vidreason.datamodules.manifest.ManifestDataModule\n"
        "init_args: {manifest: clips/manifest.csv, task: task.yaml, frames: {num_frames: 4}, batch_size: 4}\n"
    )
    (home / "vlm.yaml").write_text(
        "class_path: vidreason.lightning_modules.vlms.tiny.vlm.TinyVLM\n"
        f"init_args: {{path: {small_base}, lora: {{r: 4}}}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        common = ["--config", "configs/calibration.yaml", "--vlm", "vlm.yaml", *SETTINGS]
        trained = "runs/x/stages/01_calibration"
        tested = ["--run_dir", "runs/x/stages/02_test", "--model.init_args.calibrator_path", f"{trained}/adapter"]
        assert main(["fit", *common, "--run_dir", trained, "--trainer.max_steps", "2"]) == 0
        assert main(["test", *common, *tested]) == 0
        label = ["--config", "configs/sft_label.yaml", "--vlm", "vlm.yaml", "--data", "data.yaml"]
        assert main(["fit", *label, "--run_dir", "runs/label", "--trainer.max_steps", "1"]) == 0
    records = {
        "calibration": StageRecord("finished", "stages/01_calibration", {}, ["fit"]),
        "test": StageRecord("finished", "stages/02_test", {}, ["test"]),
        "grpo": StageRecord("skipped", "stages/03_grpo", {}, ["fit"]),
    }
    save_state(RunState("two", 4, records), home / "runs/x")
    (home / "runs/half").mkdir()
    (home / "runs/half/pipeline.yaml").write_text("stages:\n- name: calibration\n- name: grpo\n- name: test\n")
    save_state(RunState("two", 4, {"calibration": records["calibration"]}), home / "runs/half")
    shutil.copytree(home / "runs/label", home / "runs/cut")
    (home / "runs/cut/finished.json").unlink()
    return home


def predictions(home: Path) -> dict[str, dict]:
    lines = (home / "runs/x/stages/02_test/predictions.jsonl").read_text().splitlines()
    return {line["video_id"]: line for line in map(json.loads, lines)}


def same(decision, line) -> bool:
    return (
        decision.label == line["pred"]
        and decision.probs == pytest.approx(line["probs"], abs=1e-6)
        and list(decision.traces) == [trace["text"] for trace in line["traces"]]
    )


@pytest.mark.parametrize("stage", ["test", "calibration"])
def test_known_clips_get_what_the_test_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    """One at a time under another name, or together: the noise goes by the id that the content has in the manifest."""
    monkeypatch.chdir(home)
    said = predictions(home)
    assert len(said) == 3
    ask = VideoClassifier.from_run("runs/x", stage)
    shutil.copy("clips/8.mp4", tmp_path / "sent by phone.MP4")
    assert same(ask(tmp_path / "sent by phone.MP4"), said["8.mp4"])
    together = ask([f"clips/{i}.mp4" for i in (10, 8, 9)])
    assert all(same(decision, said[f"{i}.mp4"]) for decision, i in zip(together, (10, 8, 9), strict=True))
    assert len({decision.traces for decision in together}) == 3
    more = ask("clips/8.mp4", traces=3)
    assert more.traces[:2] == together[1].traces, "a further trace changes none before it"
    assert len(more.traces) == 3
    assert more.probs != pytest.approx(together[1].probs, abs=1e-6)
    assert ask("clips/8.mp4").probs == pytest.approx(together[1].probs, abs=1e-6), "the run's K comes back"


def test_two_clips_of_one_name_are_two_clips(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    ask = VideoClassifier.from_run("runs/label")
    paths = [world.write_solid(tmp_path / f"{grey}.mp4", grey) for grey in (33, 222)]
    alone = [ask(ListedClip(path, "1.mp4")).probs for path in paths]
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)
    together = ask([ListedClip(path, "1.mp4") for path in (*paths, paths[0])])
    for decision, wanted in zip(together, (*alone, alone[0]), strict=True):
        assert decision.probs == pytest.approx(wanted, abs=1e-6)


def test_frames_in_memory_are_sampled_like_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    ask = VideoClassifier.from_run("runs/label")
    path = world.write_solid(tmp_path / "new.mp4", 77, frames=10)
    frames = read_frames(path, FrameOptions(num_frames=10)).frames.permute(0, 2, 3, 1).numpy()
    file, memory = ask(path), ask(frames, fps=8.0)
    assert memory.probs == pytest.approx(file.probs, abs=1e-6)
    assert ask(255 - frames, fps=8.0).probs != pytest.approx(file.probs, abs=1e-6)
    assert file.traces == ()
    with pytest.raises(ValueError, match=r"frames 0: frames must be \[T, H, W, 3\] uint8"):
        ask(np.zeros((4, 3, 8, 8), np.uint8), fps=8.0)
    with pytest.raises(ValueError, match="give the frames per second"):
        ask(frames)


def test_the_random_numbers_of_the_process_stay_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    VideoClassifier.from_run("runs/x")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert "PL_GLOBAL_SEED" not in os.environ


def test_a_moved_run_needs_neither_its_data_nor_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = predictions(home)
    shutil.copytree(home / "runs/x", tmp_path / "elsewhere")
    shutil.copy(home / "clips/9.mp4", tmp_path / "9.mp4")
    monkeypatch.chdir(tmp_path)
    decision = VideoClassifier.from_run("elsewhere")("9.mp4")
    assert same(decision, said["9.mp4"]), "the id is the path as given, which here is the manifest's"


def test_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    world.write_solid(tmp_path / "fine.mp4", 99)
    capsys.readouterr()
    assert main(["classify", str(tmp_path), "clips/8.mp4", "--run", "runs/x", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["broken.mp4", "fine.mp4", "8.mp4"]
    assert [set(line) for line in lines] == [{"path", "label", "probs", "traces", "seconds", "error", "abstained"}] * 3
    assert "broken.mp4" in lines[0]["error"]
    assert lines[0]["label"] is None
    assert sum(lines[1]["probs"].values()) == pytest.approx(1)
    assert lines[2]["probs"] == pytest.approx(predictions(home)["8.mp4"]["probs"], abs=1e-6)
    assert lines[1]["error"] is None
    before = sorted(Path().rglob("*"))
    assert main(["classify", "clips/8.mp4", "--run", "runs/x"]) == 0
    assert sorted(Path().rglob("*")) == before, "asking writes nothing"
    out, err = capsys.readouterr()
    assert re.search(r"^answers: stage calibration, step 2 \(.*01_calibration/adapter\)$", err, flags=re.MULTILINE)
    assert "clips/8.mp4" in out
    assert predictions(home)["8.mp4"]["pred"] in out


@pytest.mark.slow
def test_a_file_of_results_holds_what_the_classifier_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Read ahead in batches, from shards of a run and of its export, as one clip at a time."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("vidreason.inference.usual_readers", lambda: 3)
    (home / "clips" / "torn.mp4").write_bytes(b"no video")
    try:
        for number in ("1/2", "2/2"):
            out = ["--out", str(tmp_path / "r.jsonl"), "--shard", number, "--batch_size", "3"]
            main(["classify", "clips", "--run", "runs/x", *out])
        assert main(["export", "runs/x", "--out", str(tmp_path / "export")]) == 0
        asked = ["classify", "clips", "--export", str(tmp_path / "export"), "--out", str(tmp_path / "e.jsonl")]
        assert main(asked) == 1
        assert "e.jsonl: 12 clips, 12 of them new, 1 not read" in capsys.readouterr().out
        one = VideoClassifier.from_run("runs/x", batch_size=1, readers=0)
        wanted = {str(path): one(path) for path in sorted(Path("clips").glob("*.mp4"))}
    finally:
        (home / "clips" / "torn.mp4").unlink()
    for files in (["r-1-of-2.jsonl", "r-2-of-2.jsonl"], ["e.jsonl"]):
        rows = [json.loads(line) for file in files for line in (tmp_path / file).read_text().splitlines()]
        assert sorted(row["path"] for row in rows) == list(wanted)
        for row in rows:
            assert row["probs"] == pytest.approx(wanted[row["path"]].probs, abs=1e-5)
            assert tuple(row["traces"]) == wanted[row["path"]].traces
            assert (row["error"] is None) == (row["path"] != "clips/torn.mp4")
    assert main(["classify", "clips", "--run", "runs/label", "--out", str(tmp_path / "e.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "e.jsonl: holds decisions of other settings: weights was " in said
    assert "LikelihoodDecider" in said


@pytest.mark.slow
def test_the_processes_of_torchrun_decide_about_each_clip_once(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "vidreason"]
    ask = ["classify", "clips", "--run", "runs/label", "--out", str(tmp_path / "r.jsonl")]
    done = subprocess.run([*command, *ask], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = [(tmp_path / f"r-{number}-of-2.jsonl").read_text().splitlines() for number in (1, 2)]
    rows = [json.loads(line) for line in sum(parts, [])]
    assert sorted(row["path"] for row in rows) == sorted(f"clips/{number}.mp4" for number in range(11))
    assert all(row["error"] is None for row in rows)
    assert min(map(len, parts)) > 0


def test_below_the_threshold_of_its_weights_the_classifier_abstains(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(home / "runs/x", tmp_path / "x")
    shutil.copytree(home / "clips", tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    stage = Path("x/stages/01_calibration")
    said = predictions(home)["8.mp4"]
    strict = Threshold(1.0, 1.0, 0.1, 0.09, 40, 1, 0.5, adapter_sha(str(stage / "adapter")), 2)
    strict.save(stage)
    capsys.readouterr()
    assert main(["classify", "clips/8.mp4", "--run", "x"]) == 0
    out, err = capsys.readouterr()
    assert f"abstains ({said['pred']})" in out
    assert "abstains below a confidence of 1.000: on clips like those of split cal, at most 10% of" in err
    ask = VideoClassifier.from_run("x")
    decision = ask("clips/8.mp4")
    assert (decision.label, decision.abstained) == (None, True)
    assert decision.probs == pytest.approx(said["probs"], abs=1e-6)
    assert not ask("clips/8.mp4", traces=1).abstained, "it holds for two traces"
    replace(strict, confidence=0.5).save(stage)
    assert VideoClassifier.from_run("x")("clips/8.mp4").label == said["pred"]
    replace(strict, weights_sha="other").save(stage)
    with pytest.raises(ValueError, match="threshold.json: belongs to other weights"):
        VideoClassifier.from_run("x")


@pytest.mark.slow
def test_a_threshold_needs_clips_and_evaluation_decides_with_every_stage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(home / "runs/label", tmp_path / "label")
    monkeypatch.chdir(home)
    capsys.readouterr()
    assert main(["threshold", "--run", str(tmp_path / "label")]) == 2
    assert "cal has 2 clips, and 29 accepted ones without an error" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(tmp_path / "label"), "--splits", "cal"]) == 2
    assert "error: --splits cal: the run has trained" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(tmp_path / "label")]) == 0
    assert "zero_shot likelihood" in capsys.readouterr().out
    rows = json.loads((tmp_path / "label/evaluation/evaluation.json").read_text())["rows"]
    assert [(row["who"]["method"], row["clips"]) for row in rows] == [
        ("majority", 3),
        ("zero_shot likelihood", 3),
        ("fit likelihood", 3),
    ]


def test_weights_of_another_task_are_refused_by_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    task = (home / "task.yaml").read_text()
    argv = ["test", "--config", "configs/test.yaml", "--vlm", "vlm.yaml", *SETTINGS, "--run_dir", "runs/t"]
    argv += ["--model.init_args.adapter_path", "runs/label/adapter", "--data.init_args.task", "other.yaml"]
    for old, new, named in (
        ("light, very", "daylight", "other definitions: bright was 'light, very', is 'daylight'"),
        ("dark,", "dim,", "the classes dark, bright, not dim, bright"),
    ):
        (home / "other.yaml").write_text(task.replace(old, new))
        if new == "dim,":
            (home / "clips/dim.csv").write_text((home / "clips/manifest.csv").read_text().replace("dark", "dim"))
            argv += ["--data.init_args.manifest", "clips/dim.csv"]
        assert main(argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: adapter_path: runs/label/adapter was trained on {named}; ")


@pytest.mark.parametrize(
    ("run", "stage", "message"),
    [
        ("runs", None, "it holds the runs half, x, choose one"),
        ("nowhere", None, "no finished run there"),
        ("runs/x", "tset", "has the stages calibration, test, grpo"),
        ("runs/x", "grpo", "is skipped, not finished"),
        ("runs/label", "sft_label", "leave --stage out"),
        ("runs/half", None, r"has not finished \(grpo, test\): .* or ask a stage by name: --stage calibration$"),
        ("runs/cut", None, r"has not finished \(no finished.json\)"),
    ],
)
def test_what_cannot_be_asked(home: Path, run: str, stage: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_stage(home / run, stage)


def test_a_run_that_tested_a_checkpoint_has_no_weights_to_ask(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs/x/stages/02_test", tmp_path / "tested")
    config = tmp_path / "tested/config.yaml"
    config.write_text(config.read_text().replace("ckpt_path: null", "ckpt_path: runs/y/checkpoints/last.ckpt"))
    with pytest.raises(ValueError, match="tested the checkpoint runs/y/checkpoints/last.ckpt; give the run folder"):
        find_stage(tmp_path / "tested")


def test_an_export_gives_what_the_run_gave(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_base: Path
) -> None:
    """The calibrator and its policy, elsewhere, without the run, its data and their code."""
    monkeypatch.chdir(home)
    said, there = predictions(home), tmp_path / "made" / "light"
    shutil.copy("clips/8.mp4", tmp_path / "sent by phone.MP4")
    unknown = world.write_solid(tmp_path / "new.mp4", 77)
    in_run = VideoClassifier.from_run("runs/x")(unknown)
    before = os.umask(0o022)
    try:
        assert main(["export", "runs/x", "--out", str(there)]) == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in there.rglob("*") if file.is_file()} == {0o644}
    config = (there / "adapter_config.json").read_text()
    assert json.loads(config)["task_type"] == "CAUSAL_LM"
    assert str(small_base) not in config
    card = (there / "README.md").read_text()
    assert "| test | 3 | " in card
    assert "is loaded by vidreason only" in card
    assert f"differ from those of the run by at most {0:.2g} nats" in card
    assert str(home) not in card
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vidreason.config.built_stage.VideoCLI", None)
    elsewhere = shutil.copytree(there, tmp_path / "elsewhere")
    ask = VideoClassifier.from_export(elsewhere, base=str(small_base))
    assert same(ask("sent by phone.MP4"), said["8.mp4"])
    decision = ask(unknown)
    assert (decision.probs, decision.traces) == (pytest.approx(in_run.probs, abs=1e-5), in_run.traces)
    with pytest.raises(ValueError, match="base base\\d is not at .* name its folder: base=FOLDER"):
        VideoClassifier.from_export(elsewhere)
    with pytest.raises(ValueError, match="was trained on another base than"):
        VideoClassifier.from_export(elsewhere, base="embedded")


def test_a_damaged_export_is_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    whole = tmp_path / "whole"
    assert main(["export", "runs/label", "--out", str(whole)]) == 0
    assert main(["export", "runs/cut", "--out", str(whole)]) == 2
    assert "has not finished" in capfd.readouterr().err
    info = json.loads((whole / "vidreason.json").read_text())
    damage = {
        "no export of vidreason": ("vidreason.json", None),
        "vidreason.json: damaged": ("vidreason.json", b"{"),
        "task.yaml: was changed": ("task.yaml", (whole / "task.yaml").read_bytes().replace(b"very", b"quite")),
        "task.yaml: is missing": ("task.yaml", None),
        "its weights are missing": ("adapter_model.safetensors", None),
        "configuration are damaged": ("adapter_config.json", b"{"),
        "its weights or": (
            "adapter_model.safetensors",
            (whole / "adapter_model.safetensors").read_bytes()[:-8],
        ),
        "export version 99": ("vidreason.json", json.dumps({**info, "export": {"version": 99}}).encode()),
        "clips.json: damaged": ("clips.json", b"["),
    }
    damage["weights of a run and no export"] = (
        "vidreason.json",
        json.dumps({key: value for key, value in info.items() if key != "export"}).encode(),
    )
    for number, (message, (name, content)) in enumerate(damage.items()):
        folder = shutil.copytree(whole, tmp_path / str(number))
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            VideoClassifier.from_export(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_an_export_replaces_its_own_kind_only(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    assert main(["export", "runs/label", "--out", str(out)]) == 0
    (out / "README.md").unlink()
    assert main(["export", "runs/label", "--out", str(out)]) == 0
    assert (out / "README.md").is_file(), "an export of the same run is replaced"
    assert main(["export", "runs/x", "--out", str(out)]) == 2
    assert "holds an export of another run" in capfd.readouterr().err
    namesake = shutil.copytree("runs/label", tmp_path / "elsewhere" / "label")
    weights = namesake / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    before = (out / "vidreason.json").read_bytes()
    assert main(["export", str(namesake), "--out", str(out)]) == 2, "a run of the same name with other weights"
    assert "holds an export of another run" in capfd.readouterr().err
    assert (out / "vidreason.json").read_bytes() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("all of it")
    assert main(["export", "runs/label", "--out", str(mine)]) == 2
    assert "something else than an export" in capfd.readouterr().err
    assert main(["export", "runs/label", "--out", str(mine), "--force"]) == 0
    assert (tmp_path / "mine.old" / "thesis.tex").read_text() == "all of it"
    assert main(["export", "runs/half", "--out", str(tmp_path / "half")]) == 2
    assert not (tmp_path / "half").exists()
