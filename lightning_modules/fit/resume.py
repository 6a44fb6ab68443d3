"""The entry of a fit in its checkpoints, and how a fit is resumed from it.

A resumed fit gives the same result as an uninterrupted one. Randomness depends on the seed, the batch number, the clip
and the sample, so that little has to be stored. The key ``vidreason`` of a checkpoint holds tensors and plain
containers, so that ``torch.load(..., weights_only=True)`` reads it:

- ``format``: 2;
- ``stage`` and ``parent_sha``: name of the stage, and hash of the weights that it started from;
- ``progress``: the finished batches (``progress.py``); ``clips_per_batch``: clips per batch over all ranks;
- ``seed``: the seed of the order of clips;
- ``train_clips``: number and hash of the ids of split train, in order; ``clips_with_target``: the same for clips with a
  target;
- ``traces``: number of texts in the run folder's trace file;
- ``random``: state of the random number generators, one entry per rank;
- ``stateful``: states of the objects of ``VLMModule.stateful()``, by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.stateful import Stateful

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import Clip
from vidreason.lightning_internals import batches_done, set_logged_steps
from vidreason.lightning_modules.fit.progress import FitProgress
from vidreason.lightning_modules.fit.ranks import gather_objects
from vidreason.lightning_modules.fit.rng import random_state, seed_batch, set_random_state
from vidreason.lightning_modules.weights.export import StartingWeights
from vidreason.run_folder import TRACES_FILE

KEY = "vidreason"
FORMAT = 2
_START_AGAIN = "start the stage again without --ckpt_path"


class ResumableStage(Protocol):
    """The attributes of a stage that :class:`ResumeFit` needs."""

    seed: int
    stage_name: str
    start: StartingWeights

    def stateful(self) -> Mapping[str, Stateful]:
        """Returns the objects whose state a checkpoint stores, by name."""
        ...


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
        stage = _stage(pl_module)
        checkpoint[KEY] = {
            "format": FORMAT,
            "stage": stage_name(pl_module),
            "progress": FitProgress.of(trainer).state(),
            "random": gather_objects(random_state()),
            "stateful": {name: state.state_dict() for name, state in stage.stateful().items()} if stage else {},
            **_identity(trainer, pl_module),
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
        if (stage := _stage(pl_module)) is not None:
            for name, state in stage.stateful().items():
                state.load_state_dict(saved["stateful"][name])
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_same_fit(saved, trainer, pl_module)
        _check_clips_with_target(saved, trainer)
        self._resumed = FitProgress(**saved["progress"])
        self._resumed.write_into(checkpoint["loops"]["fit_loop"])
        # With another number of ranks, the states do not belong to these processes.
        if len(saved["random"]) == trainer.world_size:
            self._random_state = saved["random"][trainer.global_rank]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the random number generators if the number of ranks is the same as before."""
        if self._random_state is not None:
            set_random_state(self._random_state)

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


def stage_name(module: L.LightningModule) -> str:
    """Returns the attribute ``stage_name`` of a module, or the name of its class."""
    return str(getattr(module, "stage_name", type(module).__name__))


def check_checkpoint_file(path: str | Path, module: L.LightningModule, trainer: L.Trainer | None = None) -> None:
    """Checks the checkpoint to resume from before a stage writes traces, which may take hours.

    Args:
        path: The checkpoint; Lightning reports a path that is not a file.
        module: The stage to run.
        trainer: The trainer; if given, data and starting weights are compared too.

    Raises:
        ValueError: If the checkpoint does not belong to this fit.
    """
    if not Path(path).is_file():
        return
    saved = checked_entry(torch.load(path, map_location="cpu", mmap=True, weights_only=True), module)
    if trainer is not None:
        check_same_fit(saved, trainer, module)


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
        raise ValueError(f"this checkpoint was written by {found}, not in format {FORMAT}: {_START_AGAIN}")
    if saved["stage"] != stage_name(module):
        raise ValueError(
            f"this checkpoint was written by stage {saved['stage']!r}, but the stage running is "
            f"{stage_name(module)!r}: --ckpt_path only resumes the same stage; hand weights over with "
            "--model.init_args.adapter_path"
        )
    return saved


def check_same_fit(saved: Mapping[str, Any], trainer: L.Trainer, module: L.LightningModule) -> None:
    """Checks that a checkpoint belongs to the fit that ``trainer`` runs.

    Raises:
        ValueError: If starting weights, batch size, seed, training clips or texts differ.
    """
    data = _data(trainer)
    if _stage(module) is None or data is None:
        return
    now = _identity(trainer, module)
    if saved["parent_sha"] != now["parent_sha"]:
        raise ValueError(
            "adapter_path: holds other weights now than those that the fit of this checkpoint began with; resume with "
            f"those, or {_START_AGAIN}"
        )
    _check_batches(saved, now, trainer, data)
    if saved["seed"] != now["seed"]:
        raise ValueError(
            f"this checkpoint was written with seed {saved['seed']}, now it is {now['seed']}, and other clips would "
            f"come next: give --seed_everything {saved['seed']}, or {_START_AGAIN}"
        )
    _check_train_clips(saved, now)
    if now["traces"] < saved["traces"]:
        raise ValueError(
            f"{_traces_path(trainer)}: holds {now['traces']} texts, but {saved['traces']} when this checkpoint was "
            f"written: put the file back, or {_START_AGAIN}"
        )


def _check_batches(saved: Mapping[str, Any], now: Mapping[str, Any], trainer: L.Trainer, data: VideoDataModule) -> None:
    before, ranks = saved["clips_per_batch"], trainer.world_size
    if before == now["clips_per_batch"]:
        return
    remedy = f"set model.init_args.batch_size to {before // ranks}" if before % ranks == 0 else "change their number"
    raise ValueError(
        f"this checkpoint was written at {before} clips per batch over {len(saved['random'])} processes, but {ranks} "
        f"with {data.batch_size} clips each make {now['clips_per_batch']}, another training: {remedy}"
    )


def _check_train_clips(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks the training clips: between two epochs others may have replaced them if their number is the same."""
    before, after = saved["train_clips"], now["train_clips"]
    if before == after:
        return
    same_number = before["count"] == after["count"]
    if FitProgress(**saved["progress"]).at_epoch_end and same_number:
        rank_zero_warn("the training clips are others, or in another order, than when this checkpoint was written")
        return
    raise ValueError(
        f"this checkpoint was written with {before['count']} training clips, but the data now hold {after['count']}"
        f"{', others or in another order' if same_number else ''}: the fit cannot tell which are still to come; put "
        f"them back as they were, or {_START_AGAIN}"
    )


def _check_clips_with_target(saved: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Checks the clips with a target; a repaired clip may have got a text since, which would shift the order."""
    data = _data(trainer)
    if data is None or "clips_with_target" not in saved:
        return
    before, after = saved["clips_with_target"], _clips_with_target(data)
    if before != after and saved["train_clips"] == _count_and_hash(data.clips("train")):
        raise ValueError(
            f"this checkpoint was written when {before['count']} training clips had something to learn, now "
            f"{after['count']} have{', others' if before['count'] == after['count'] else ''}: the fit cannot tell "
            f"which are still to come; {_START_AGAIN}"
        )


def _identity(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Returns the values that must be equal in a resumed fit; {} if module or data are not of this package."""
    stage, data = _stage(module), _data(trainer)
    if stage is None or data is None:
        return {}
    return {
        "parent_sha": stage.start.sha,
        "clips_per_batch": data.batch_size * trainer.world_size,
        "seed": data.seed,
        "train_clips": _count_and_hash(data.clips("train")),
        "clips_with_target": _clips_with_target(data),
        "traces": _count_texts(_traces_path(trainer)),
    }


def _stage(module: L.LightningModule) -> ResumableStage | None:
    return cast(ResumableStage, module) if hasattr(module, "stateful") else None


def _data(trainer: L.Trainer) -> VideoDataModule | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, VideoDataModule) else None


def _clips_with_target(data: VideoDataModule) -> dict[str, Any]:
    view, clips = data.view, data.clips("train")
    return _count_and_hash(clips if view is None else [clip for clip in clips if view.keep(clip)])


def _count_and_hash(clips: Sequence[Clip]) -> dict[str, Any]:
    ids = "\n".join(clip.video_id for clip in clips)
    return {"count": len(clips), "sha": hashlib.sha256(ids.encode()).hexdigest()}


def _traces_path(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / TRACES_FILE


def _count_texts(path: Path) -> int:
    """Returns the number of texts in a trace file: its lines without the header."""
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.is_file() else 0
