"""``vidreason plan``, and the check of a fit's prompts before its weights are loaded."""

import itertools
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vidreason.cli import main
from vidreason.plan.commands import PlannedStage, planned_commands
from vidreason.plan.stages import USABLE, largest_that_fits


def planned(batch: int, per_batch: int = 1, command: str = "fit", **trainer: Any) -> PlannedStage:
    section = {"max_steps": -1, "max_epochs": None, "limit_train_batches": None, "precision": None}
    section |= {"val_check_interval": None, "check_val_every_n_epoch": 1} | trainer
    stage: Any = SimpleNamespace(batch_size=batch, updates=SimpleNamespace(per_batch=per_batch))
    data: Any = SimpleNamespace(batch_size=99)
    return PlannedStage("stage", command, stage, data, SimpleNamespace(**section), "")  # type: ignore[arg-type]


def test_steps_are_counted_as_the_trainer_counts_them() -> None:
    assert planned(4, max_epochs=3).steps(10) == 9
    assert planned(4, max_epochs=3, per_batch=2).steps(10) == 18
    assert planned(4, max_steps=5, max_epochs=-1).steps(10) == 5
    assert planned(4, max_epochs=3, command="test").steps(10) == 0


def test_validations_follow_from_epochs_or_batches() -> None:
    assert planned(4, max_epochs=10, check_val_every_n_epoch=5).validations(10) == 2
    assert planned(4, max_steps=40, check_val_every_n_epoch=None, val_check_interval=20).validations(10) == 2
    assert planned(4, max_epochs=2, val_check_interval=0.5).validations(10) == 4


@pytest.mark.parametrize("limit", [0.0, 12.9, 13.0, 24.0, 40.0, 57.9, 58.0])
def test_the_largest_number_is_the_last_that_fits(limit: float) -> None:
    fits = [n for n in range(1, 17) if 10 + 3 * n <= limit]
    assert largest_that_fits(lambda n: 10.0 + 3 * n, 16, limit) == max(fits, default=0)


def test_the_largest_number_is_found_behind_the_vision_tower_with_few_plans() -> None:
    found, plans = [], 0
    for limit, tower in itertools.product(range(30, 400, 17), (0, 60, 200)):

        @cache
        def total(clips: int, tower: int = tower) -> float:
            return max(20.0 + tower, 20.0 + 7 * clips, 9.0 * clips - 40)

        found.append(largest_that_fits(total, 32, limit))
        plans += total.cache_info().currsize
        assert found[-1] == max((n for n in range(1, 33) if total(n) <= limit), default=0)
    assert {0, 32} < set(found)
    assert plans < 4 * len(found)  # halving an interval of 32 takes six


def test_a_pipeline_is_planned_stage_by_stage() -> None:
    lines = planned_commands((), "configs/pipelines/deepintuit.yaml", "fit", ["--grpo.trainer.max_steps", "7"])
    assert list(lines) == ["generate", "sft_cold_start", "grpo", "traces", "calibration", "test"]
    assert [line[0] for line in lines.values()] == ["predict", "fit", "fit", "predict", "fit", "test"]
    at = lines["grpo"].index("--trainer.max_steps")
    assert lines["grpo"][at + 1] == "7"
    overlaid = planned_commands(["configs/grpo.yaml", "configs/strategy/qlora.yaml"], None, "fit", ["--vlm", "x"])
    assert overlaid == {
        "grpo": ["fit", "--config", "configs/grpo.yaml", "--config", "configs/strategy/qlora.yaml", "--vlm", "x"]
    }


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], folder: Path, data: Path) -> None:
    call = ["plan", "--config", "configs/grpo.yaml", "--vlm", str(folder), "--data", str(data)]
    for more, words in (
        (["--memory", "much"], "--memory much: must be a positive number with GB"),
        (["--vlm", "nobody/no-such-model"], "--vlm nobody/no-such-model: not on this machine"),
        (["--modell", "x"], "unknown key 'modell'"),
    ):
        capsys.readouterr()  # what writing the folder printed
        assert main.main([*call, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


def test_a_fit_stops_before_its_weights_if_a_prompt_is_too_long(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    call = ["fit", "--config", "configs/grpo.yaml", "--vlm", str(folder), "--data", str(data)]
    call += ["--run_dir", str(tmp_path / "run"), "--model.init_args.rollouts.sampling.max_new_tokens", "4090"]
    assert (
        main.main([*call, "--trainer.accelerator", "cpu"]) == 2
    )  # loading weights, which the folder lacks, says otherwise
    error = capsys.readouterr().err.splitlines()[-1]
    assert "clip b_long.mp4: its prompt has" in error
    assert "max_new_tokens asks for 4090" in error
    assert "data.init_args.frames.num_frames" in error


@pytest.mark.slow
def test_a_stage_is_planned_without_weights(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    call = ["plan", "--config", "configs/grpo.yaml", "--vlm", str(folder), "--data", str(data)]
    call += ["--device", "cpu", "--model.init_args.batch_size", "4", "--json", str(tmp_path / "plan.json")]
    call += ["--vlm.init_args.scale", "configs/scale/embedded.yaml", "--vlm.init_args.max_pixels", "null"]
    assert main.main([*call, "--memory", "60MB"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.replace(str(folder), "FOLDER").splitlines())) <= 120
    assert "longest prompt of rollouts: b_long.mp4" in text
    (stage,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
    rollouts, training, validation = stage["passes"]
    assert (rollouts["clips"], training["clips"], validation["clips"]) == (7, 7, 1)
    assert stage["steps"] == 40
    assert training["forwards"] == 40
    # 4 frames are 2 steps in time; 224 x 168 pixels are scaled by sqrt(16 * 28 * 28 / (224 * 168)) = 0.577, to
    # 129 x 97, of which 4 x 3 whole patches of 28 x 28 remain, as the tiny processor allows 16
    assert rollouts["tokens"]["visual"] == 2 * 4 * 3
    for part in stage["passes"]:
        assert part["memory"]["total"] == pytest.approx(sum(v for k, v in part["memory"].items() if k != "total"))
    assert training["memory"]["optimizer"] == 2 * training["memory"]["gradients"] > 0
    assert 0 < training["largest"] < 4
    # the same with that many clips, and with one more
    for clips, fits in ((training["largest"], True), (training["largest"] + 1, False)):
        more = ["--model.init_args.updates.clips_per_forward", str(clips)]
        assert main.main([*call, *more]) == 0
        (again,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
        assert (again["passes"][1]["memory"]["total"] <= USABLE * 60e6) is fits
    # pixels reach the model in the dtype of its vision tower
    assert main.main([*call, "--vlm.init_args.dtype", "bfloat16"]) == 0
    (half,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
    before, after = (part["memory"]["inputs"] for part in (rollouts, half["passes"][0]))
    assert 0.5 <= after / before < 0.6  # token ids and masks stay integers
