"""Which logged values have a curve in TensorBoard: at most 40, whatever a stage of GRPO is set to."""

from pathlib import Path

import torch

from vidreason.config.loggers import RunTensorBoard
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
