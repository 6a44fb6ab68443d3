"""Checks that a checkpoint belongs to the running fit: same weights, batches, optimizer, seed, clips and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.stateful import Stateful

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.fit.progress import FitProgress
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.weights.export import StartingWeights
from vidreason.run_folder import TRACES_FILE

START_AGAIN = "start the stage again without --ckpt_path"
_WEIGHTS_ONLY = "or take only its weights with --reset_optimizer into another --run_dir"


class ResumableStage(Protocol):
    """The attributes of a stage that :class:`ResumeFit` needs."""

    seed: int
    stage_name: str
    start: StartingWeights
    optim: OptimOptions

    def stateful(self) -> Mapping[str, Stateful]:
        """Returns the objects whose state a checkpoint stores, by name."""
        ...


def check_same_fit(saved: Mapping[str, Any], trainer: L.Trainer, module: L.LightningModule) -> None:
    """Checks that a checkpoint belongs to the fit that ``trainer`` runs.

    Raises:
        ValueError: If starting weights, batch size, seed, training clips or texts differ.
    """
    data = data_of(trainer)
    if resumable(module) is None or data is None:
        return
    now = identity(trainer, module)
    if saved["parent_sha"] != now["parent_sha"]:
        raise ValueError(
            "adapter_path: holds other weights now than those that the fit of this checkpoint began with; resume with "
            f"those, or {START_AGAIN}"
        )
    _check_batches(saved, now, trainer, data)
    check_optimizer(saved, now)
    if saved["seed"] != now["seed"]:
        raise ValueError(
            f"this checkpoint was written with seed {saved['seed']}, now it is {now['seed']}, and other clips would "
            f"come next: give --seed_everything {saved['seed']}, {_WEIGHTS_ONLY}"
        )
    _check_train_clips(saved, now)
    if now["traces"] < saved["traces"]:
        raise ValueError(
            f"{_traces_path(trainer)}: holds {now['traces']} texts, but {saved['traces']} when this checkpoint was "
            f"written: put the file back, or {START_AGAIN}"
        )


def _check_batches(saved: Mapping[str, Any], now: Mapping[str, Any], trainer: L.Trainer, data: VideoDataModule) -> None:
    before, ranks = saved["clips_per_batch"], trainer.world_size
    if before == now["clips_per_batch"]:
        return
    remedy = f"set model.init_args.batch_size to {before // ranks}" if before % ranks == 0 else "change their number"
    raise ValueError(
        f"this checkpoint was written at {before} clips per batch over {len(saved['random'])} processes, but {ranks} "
        f"with {data.batch_size} clips each make {now['clips_per_batch']}, another training: {remedy}, {_WEIGHTS_ONLY}"
    )


def check_optimizer(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks rate, schedule and other options of the optimizer, whose state would come from the checkpoint."""
    before, after = saved.get("optim", {}), now["optim"]
    if differing := [key for key in before if key in after and before[key] != after[key]]:
        values = ", ".join(f"{key} is {after[key]}, was {before[key]}" for key in differing)
        raise ValueError(
            f"model.init_args.optim: the optimizer of this checkpoint has other options ({values}): resume with those, "
            f"{_WEIGHTS_ONLY}"
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
        f"them back as they were, or {START_AGAIN}"
    )


def check_clips_with_target(saved: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Checks the clips with a target; a repaired clip may have got a text since, which would shift the order."""
    data = data_of(trainer)
    if data is None or "clips_with_target" not in saved:
        return
    before, after = saved["clips_with_target"], _clips_with_target(data)
    if before != after and saved["train_clips"] == _count_and_hash(data.clips("train")):
        raise ValueError(
            f"this checkpoint was written when {before['count']} training clips had something to learn, now "
            f"{after['count']} have{', others' if before['count'] == after['count'] else ''}: the fit cannot tell "
            f"which are still to come; {START_AGAIN}"
        )


def identity(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Returns the values that must be equal in a resumed fit; {} if module or data are not of this package."""
    stage, data = resumable(module), data_of(trainer)
    if stage is None or data is None:
        return {}
    return {
        "parent_sha": stage.start.sha,
        "clips_per_batch": data.batch_size * trainer.world_size,
        "seed": data.seed,
        "optim": stage.optim.described(),
        "train_clips": _count_and_hash(data.clips("train")),
        "clips_with_target": _clips_with_target(data),
        "traces": _count_texts(_traces_path(trainer)),
    }


def stage_name(module: L.LightningModule) -> str:
    """Returns the attribute ``stage_name`` of a module, or the name of its class."""
    return str(getattr(module, "stage_name", type(module).__name__))


def resumable(module: L.LightningModule) -> ResumableStage | None:
    """Returns the module if it is a stage of this package, which can be resumed exactly."""
    return cast(ResumableStage, module) if hasattr(module, "stateful") else None


def data_of(trainer: L.Trainer) -> VideoDataModule | None:
    """Returns the data module of a trainer if it is one of this package."""
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
