"""The stages that ``kill_resume.py`` kills: the shipped ones on little data, with all options that affect resuming.

LoRA with dropout; traces that the stage generates first; several optimizer steps per rollout batch, a reference model,
resampled groups; a validation every few batches, after which the best weights are exported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DATA = """class_path: vidreason.datamodules.porch.data.PorchDataModule
init_args:
  data_dir: porch
  train_clips: 12
  val_clips: 4
  cal_clips: 4
  test_clips: 4
  levels: [0]
  frames: {num_frames: 8}
  batch_size: 4
  num_workers: 0
  eval_batch_size: 4
"""
LORA = "{r: 4, alpha: 8, dropout: 0.1}"
SEED = "3"


@dataclass(frozen=True)
class Stage:
    """A command, and the stage that has to run before it."""

    argv: tuple[str, ...]
    needs: str | None = None
    """Name of the stage whose unbroken run comes first."""
    resumes: bool = True
    """True if a checkpoint is resumed by ``--ckpt_path``; False if the same command continues by itself."""

    def command(self, run: Path) -> list[str]:
        """Returns the arguments after ``vidreason`` that start or continue a run."""
        argv = [*self.argv, "--run_dir", str(run)]
        checkpoint = run / "checkpoints" / "last.ckpt"
        return [*argv, "--ckpt_path", str(checkpoint)] if self.resumes and checkpoint.is_file() else argv


def _settings(stage: str = "", **settings: object) -> tuple[str, ...]:
    """Returns ``--model.init_args.x 1`` for ``model__x=1``, and ``--trainer.y 2`` for ``trainer_of_y=2``.

    Args:
        stage: Stage of a pipeline, whose name becomes a prefix of each key; empty for a single stage.
        settings: Keys and values.
    """
    front = f"--{stage}." if stage else "--"
    argv: list[str] = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        argv += [front + key.replace("__", ".init_args.").replace("_of_", "."), text]
    return tuple(argv)


def _options(command: str, config: str, **settings: object) -> tuple[str, ...]:
    first = (command, "--config", f"configs/{config}.yaml", "--data", "data.yaml", "--vlm.init_args.lora", LORA)
    return (*first, *_settings(**settings), "--seed_everything", SEED)


_SHORT = {"max_new_tokens": 12, "temperature": 1.0}
_LONG = {"max_new_tokens": 40, "temperature": 1.0}
_TRACES = {"model__traces_of_samples": 2, "model__traces_of_sampling": _SHORT}
_ALL = {"min_words": 1, "agree": False, "complete": False, "hides_hint": False}
_GREEDY = {"max_new_tokens": 12, "temperature": 0.0}
_ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}}

# shared by a single stage and the same stage of a pipeline
_OWN = {**_TRACES, "model__traces_of_filter": _ALL}
_SFT = {"model__decide_of_sampling": _GREEDY, "model__optim_of_optimizer": _ADAM}
_GRPO = {
    "model__rollouts_of_sampling": _SHORT,
    "model__rollouts_of_max_unparsed_steps": 1000,
    "model__decide_of_sampling": _GREEDY,
}
_CALIBRATION = {**_TRACES, "trainer_of_check_val_every_n_epoch": 1}

STAGES = {
    "sft": Stage(
        _options(
            "fit",
            "sft_cold_start",
            **_OWN,
            **_SFT,
            model__batch_size=4,
            data__num_workers=1,
            trainer_of_max_steps=12,
            trainer_of_val_check_interval=6,
            checkpoint_of_every_n_batches=2,
            checkpoint_of_monitor="val/acc",
        )
    ),
    "grpo": Stage(
        _options(
            "fit",
            "grpo",
            model__adapter_path="sft/adapter",
            model__rewards=[
                {"class_path": "vidreason.rewards.accuracy.AccuracyReward"},
                {
                    "class_path": "vidreason.rewards.overlong.OverlongReward",
                    "init_args": {"max_tokens": 12, "buffer": 8},
                },
            ],
            **_GRPO,
            model__batch_size=4,
            model__rollouts_of_group_size=4,
            model__rollouts_of_resample=1,
            model__updates_of_inner_epochs=2,
            model__updates_of_minibatches=2,
            model__updates_of_clips_per_forward=2,
            model__loss_of_kl_coef=0.05,
            model__optim_of_optimizer=_ADAM,
            trainer_of_max_steps=28,
            trainer_of_val_check_interval=3,
            checkpoint_of_every_n_batches=1,
            checkpoint_of_monitor="val/acc",
        ),
        needs="sft",
    ),
    "calibration": Stage(
        _options(
            "fit",
            "calibration",
            model__adapter_path="sft/adapter",
            **_CALIBRATION,
            model__batch_size=4,
            model__optim_of_optimizer=_ADAM,
            trainer_of_max_epochs=3,
            checkpoint_of_every_n_batches=2,
        ),
        needs="sft",
    ),
    "generate": Stage(
        _options(
            "predict",
            "generate",
            model__adapter_path="sft/adapter",
            model__traces_of_kind="reason",
            model__traces_of_samples=3,
            model__traces_of_sampling=_LONG,
            data__predict_splits=["train", "val"],
        ),
        needs="sft",
        resumes=False,
    ),
    "pipeline": Stage(
        (
            *("pipeline", "--config", "configs/pipelines/deepintuit.yaml", "--data", "data.yaml", "--seed", SEED),
            *("--vlm.init_args.lora", LORA),
            *_settings(checkpoint_of_every_n_batches=2),
            *_settings("generate", **_OWN),
            *_settings(
                "sft_cold_start",
                **_SFT,
                model__batch_size=6,
                trainer_of_max_steps=6,
                trainer_of_val_check_interval=6,
            ),
            *_settings(
                "grpo",
                **_GRPO,
                model__batch_size=4,
                model__rollouts_of_group_size=3,
                trainer_of_max_steps=4,
                trainer_of_val_check_interval=2,
            ),
            *_settings("traces", **_TRACES),
            *_settings("calibration", **_CALIBRATION, model__batch_size=6, trainer_of_max_epochs=2),
            *_settings("test", **_TRACES),
        ),
        resumes=False,
    ),
}
