"""Loggers by name: at most 40 curves in TensorBoard, whatever a stage of GRPO is set to; runs of wandb and MLflow."""

import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from vidreason.config import loggers
from vidreason.config.loggers import RunTensorBoard, build_logger, end_wandb, open_loggers
from vidreason.lightning_modules.decisions.metrics import ClassificationMetrics
from vidreason.lightning_modules.functional.losses import PolicyLossOutput
from vidreason.lightning_modules.rl.metrics import (
    RolloutTable,
    prefix_statistics,
    rollout_statistics,
    update_statistics,
)
from vidreason.pipelines.call import read_call
from vidreason.pipelines.fingerprints import fingerprint_settings

REWARDS = tuple(f"part{number}" for number in range(12))
WATCHED = [
    *("train/grad_norm", "train/learning_rate", "train/num_tokens", "train/step_time", "train/clips_per_s"),
    *(f"timing_s/{name}" for name in ("gen", "reward", "old_log_prob", "ref", "update_actor", "step")),
    *("rollout_mismatch/max", "data/wait_s", "data/decode_ms", "data/decode_failures", "val/decode_failures", "epoch"),
    *("memory/allocated", "memory/reserved", "vision_cache/hit_rate", "vision_cache/gb"),
]


def test_a_grpo_stage_with_everything_has_at_most_40_curves(tmp_path: Path) -> None:
    table = RolloutTable(torch.ones(2, 3, 6 + len(REWARDS), dtype=torch.float64), REWARDS)
    fields = len(PolicyLossOutput.__annotations__)
    logged = [*rollout_statistics(table), *update_statistics([PolicyLossOutput(*[torch.zeros(())] * fields)]), *WATCHED]
    logged += prefix_statistics(torch.ones(2), 3, 2, True)
    metrics = ClassificationMetrics([f"class {number}" for number in range(20)])
    metrics.update(torch.full((1, 20), 0.05), torch.tensor([0]), torch.tensor([0]))
    logged += [f"val/{name}" for name in metrics.compute()]
    assert len(logged) > 100
    logger = RunTensorBoard(tmp_path, trains=True)
    shown = [name for tag in logged if (name := logger._shown(tag))]
    assert 30 < len(shown) <= 40
    assert len(set(shown)) == len(shown)
    assert sorted(shown)[:2] == ["main/train/loss", "main/train/reward"]
    assert [name for name in shown if "/rewards/" in name] == [f"main/train/rewards/part{n}/mean" for n in range(6)]
    assert logger._shown("train/rewards/part0/mean") == "main/train/rewards/part0/mean"  # at the next step, too
    assert not [tag for tag in logged if RunTensorBoard(tmp_path, trains=False)._shown(tag)]


def test_the_logger_of_a_pipeline_is_that_of_its_stages_and_runs_none_again() -> None:
    call = read_call(["--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "x", "--logger", "csv"])
    assert call.spec.args == {"logger": "csv"}
    assert fingerprint_settings({"logger": "csv"}) == {}


def test_mlflow_has_the_place_that_it_would_choose_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, built = ModuleType("mlflow"), Mock()
    mlflow.get_tracking_uri = lambda: "sqlite:///mlflow.db"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", Mock(MlflowException=OSError))
    monkeypatch.setattr(loggers, "MLFlowLogger", built)
    build_logger("mlflow", tmp_path / "x", trains=True)
    assert built.call_args.kwargs["tracking_uri"] == "sqlite:///mlflow.db"
    assert built.call_args.kwargs["run_name"] == (tmp_path / "x").as_posix()


def test_a_run_of_wandb_ends_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    end_wandb([CSVLogger(tmp_path)], failed=False)
    assert not wandb.finish.called
    end_wandb([WandbLogger.__new__(WandbLogger)], failed=True)
    wandb.finish.assert_called_once_with(exit_code=1)


def test_a_refusal_of_wandb_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusalError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "wandb.errors", Mock(Error=RefusalError))
    monkeypatch.setattr(WandbLogger, "experiment", property(Mock(side_effect=RefusalError("No API key\nconfigured."))))
    line = "--logger wandb: No API key configured.; WANDB_MODE=offline needs no account"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        open_loggers([WandbLogger.__new__(WandbLogger)])
