"""The entry of a fit in its checkpoints, and how a fit is resumed from it.

A resumed fit gives the same result as an uninterrupted one. Randomness depends on the seed, the batch number, the clip
and the sample, so that little has to be stored. The key ``vidreason`` of a checkpoint holds tensors and plain
containers, so that ``torch.load(..., weights_only=True)`` reads it:

- ``format``: 2;
- ``stage`` and ``parent_sha``: name of the stage, and hash of the weights that it started from;
- ``progress``: the finished batches (``progress.py``); ``clips_per_batch``: clips per batch over all ranks;
- ``seed``: the seed of the order of clips; ``optim``: rate, schedule and other options of the optimizer;
- ``train_clips``: number and hash of the ids of split train, in order; ``clips_with_target``: the same for clips with a
  target;
- ``traces``: number of texts in the run folder's trace file;
- ``random``: state of the random number generators, one entry per rank;
- ``stateful``: states of the objects of ``VLMModule.stateful()``, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from vidreason.lightning_internals import batches_done, set_current_rate, set_logged_steps
from vidreason.lightning_modules.fit.checkpoint_io import read_checkpoint
from vidreason.lightning_modules.fit.progress import FitProgress
from vidreason.lightning_modules.fit.ranks import gather_objects
from vidreason.lightning_modules.fit.rng import random_state, seed_batch, set_random_state
from vidreason.lightning_modules.fit.same_fit import (
    START_AGAIN,
    check_clips_with_target,
    check_same_fit,
    identity,
    resumable,
    stage_name,
)
from vidreason.lightning_modules.functional.finite import check_weights

KEY = "vidreason"
FORMAT = 2


class ResumeFit(L.Callback):
    """Stores the progress of a fit in its checkpoints and resumes the fit from it.

    ``VLMModule`` attaches this callback. Any other module may return one from ``configure_callbacks``; its checkpoints
    store the progress, the random states and the name of the stage.
    """

    def __init__(self) -> None:
        self._resumed: FitProgress | None = None
        self._random_state: dict[str, Any] | None = None

    # ------------------------------------------------------------------ saving

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the entry ``vidreason``; all ranks have to call it together."""
        stage = resumable(pl_module)
        checkpoint[KEY] = {
            "format": FORMAT,
            "stage": stage_name(pl_module),
            "progress": FitProgress.of(trainer).state(),
            "random": gather_objects(random_state()),
            "stateful": {name: state.state_dict() for name, state in stage.stateful().items()} if stage else {},
            **identity(trainer, pl_module),
        }

    # ------------------------------------------------------------------ resuming

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the state of an earlier fit of this process; Lightning restores a checkpoint after this hook."""
        self._resumed = self._random_state = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint belongs to this fit, and sets Lightning's loops to its progress.

        Raises:
            ValueError: If it does not; the message names the difference and the remedy.
        """
        saved = checked_entry(checkpoint, pl_module)
        check_weights(_parameters(pl_module, checkpoint.get("state_dict", {})), "--ckpt_path", START_AGAIN)
        if (stage := resumable(pl_module)) is not None:
            for name, state in stage.stateful().items():
                state.load_state_dict(saved["stateful"][name])
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_same_fit(saved, trainer, pl_module)
        check_clips_with_target(saved, trainer)
        self._resumed = FitProgress(**saved["progress"])
        self._resumed.write_into(checkpoint["loops"]["fit_loop"])
        # With another number of ranks, the states do not belong to these processes.
        if len(saved["random"]) == trainer.world_size:
            self._random_state = saved["random"][trainer.global_rank]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the random number generators if the number of ranks is the same as before.

        The learning rate is computed anew: a fit that was made longer has another schedule than its checkpoint.
        """
        if self._random_state is not None:
            set_random_state(self._random_state)
        if self._resumed is not None:
            for config in trainer.lr_scheduler_configs:
                set_current_rate(config.scheduler)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds the generators that dropout uses; after a restart, also continues the step count of loggers."""
        done = batches_done(trainer)
        seed_batch(getattr(pl_module, "seed", 0), done, trainer.global_rank)
        if self._resumed is not None and self._resumed.batches == done:
            set_logged_steps(trainer, self._resumed.logged_steps)
        self._resumed = None


def check_attached(trainer: L.Trainer, callbacks: Sequence[L.Callback], name: str) -> None:
    """Checks that the callbacks of a stage, or subclasses of them, are attached to the trainer.

    Raises:
        ValueError: If the stage overrides ``configure_callbacks`` and leaves one out.
    """
    for callback in callbacks:
        if not any(isinstance(other, type(callback)) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}.configure_callbacks leaves out {type(callback).__name__}: return "
                "[*super().configure_callbacks(), ...]"
            )


def check_checkpoint_file(
    path: str | Path, module: L.LightningModule, trainer: L.Trainer | None = None
) -> dict[str, Any]:
    """Checks the checkpoint to resume from before a stage writes traces, which may take hours.

    Args:
        path: The checkpoint.
        module: The stage to run.
        trainer: The trainer; if given, data and starting weights are compared too.

    Returns:
        The entry ``vidreason`` of the checkpoint.

    Raises:
        ValueError: If the file is no checkpoint, or does not belong to this fit.
    """
    saved = checked_entry(read_checkpoint(path), module)
    if trainer is not None:
        check_same_fit(saved, trainer, module)
    return saved


def load_weights(path: str | Path, module: L.LightningModule) -> None:
    """Loads the trained weights of a checkpoint, and nothing else, into a stage whose model is built.

    Raises:
        ValueError: If the checkpoint belongs to another stage or lacks a trained parameter.
    """
    checkpoint = read_checkpoint(path)
    checked_entry(checkpoint, module)
    state: dict[str, Any] = checkpoint["state_dict"]
    check_weights(_parameters(module, state), f"--ckpt_path {path}", "give an earlier checkpoint")
    lacking = [name for name, p in module.named_parameters() if p.requires_grad and name not in state]
    if lacking:
        raise ValueError(
            f"--ckpt_path {path}: has no weights for {lacking[0]} and {len(lacking) - 1} more: train the same part of "
            "the model (vlm.lora, vlm.freeze_vision) as the fit that wrote it"
        )
    module.load_state_dict(state, strict=False)


def checked_entry(checkpoint: Mapping[str, Any], module: L.LightningModule) -> dict[str, Any]:
    """Returns the entry ``vidreason`` of a checkpoint of the stage ``module``.

    Raises:
        ValueError: If the checkpoint has another format or belongs to another stage.
    """
    saved = checkpoint.get(KEY)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = "an older version of vidreason" if "vidreason_stage" in checkpoint or saved else "another program"
        if isinstance(saved, dict) and saved.get("format", 0) > FORMAT:
            found = "a newer version of vidreason"
        raise ValueError(f"this checkpoint was written by {found}, not in format {FORMAT}: {START_AGAIN}")
    if saved["stage"] != stage_name(module):
        raise ValueError(
            f"this checkpoint was written by stage {saved['stage']!r}, but the stage running is "
            f"{stage_name(module)!r}: --ckpt_path only resumes the same stage; hand weights over with "
            "--model.init_args.adapter_path"
        )
    return saved


def _parameters(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters in a state dict; buffers may be infinite on purpose."""
    return {name: state[name] for name, _ in module.named_parameters() if name in state}
