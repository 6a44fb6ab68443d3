"""What a stage keeps in its checkpoints beside weights and optimizer, so that a fit that was killed ends as another.

Tensors and plain containers only: ``torch.load(..., weights_only=True)`` reads a checkpoint. Under the key
``vidreason``:

- ``stage``, and ``parent_sha``: the weights that it started from;
- ``progress``: whole batches trained on (``fit_progress.py``), and ``clips_per_batch`` of all ranks together;
- ``ranks``: of every rank the state of its random number generators and what the stage adds in ``rank_state``;
- ``seed``: of the order of clips;
- ``train_clips``: number, and hash of the ids in their order, of the clips of split train; ``learnt_clips``: of those
  that have something to learn;
- ``traces``: how many texts the run folder held.

Randomness depends on the seed, the batch's number, the clip and the sample, and on nothing that a restart changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.fit_progress import FitProgress, batches_done, set_logged_steps
from vidreason.lightning_modules.fsdp import ShardedModule
from vidreason.lightning_modules.random_states import random_state, seed_batch, set_random_state
from vidreason.run_folder import TRACES_FILE

T = TypeVar("T")

KEY = "vidreason"


class ResumableModule(ShardedModule):
    """A stage whose fit goes on from a checkpoint where another left it."""

    seed: int
    _resumed: FitProgress | None = None
    _to_resume: dict[str, Any] | None = None
    _own_state: dict[str, Any] | None = None
    gathered_state: Mapping[str, Tensor] = MappingProxyType({})
    """Of the checkpoint that was just written or read, by the names that the model itself uses"""

    # ------------------------------------------------------------------ what a stage says

    @property
    def stage_name(self) -> str:
        """Name of the stage."""
        raise NotImplementedError

    @property
    def data(self) -> VideoDataModule:
        """The data module that the trainer runs on."""
        raise NotImplementedError

    @property
    def run_dir(self) -> Path:
        """The stage's run folder."""
        raise NotImplementedError

    @property
    def parent_sha(self) -> str:
        """Hash of the weights that the stage starts from."""
        raise NotImplementedError

    @property
    def fitting(self) -> bool:
        """Whether the trainer runs ``fit``."""
        return self.trainer.state.fn == TrainerFn.FITTING

    def rank_state(self) -> dict[str, Any]:
        """What else of this rank a fit goes on from; a stage with such a state adds to it."""
        return {}

    def take_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes up what ``rank_state`` said on all ranks of the interrupted fit, however many there are now."""

    def kept_beside(self, name: str) -> bool:
        """Whether a checkpoint holds a parameter that is not trained."""
        return False

    # ------------------------------------------------------------------ writing

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what trains (with its modules' buffers) and what the stage names, and says where the fit stands.

        All ranks call it together.
        """
        checkpoint["vidreason_stage"] = self.stage_name
        keep = {name for name, p in self.named_parameters() if p.requires_grad}
        modules = {name.rpartition(".")[0] for name in keep}
        keep |= {name for name, _ in self.named_buffers() if name.rpartition(".")[0] in modules}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in keep or self.kept_beside(k)}
        self.gathered_state = by_model_names(checkpoint)
        if self._trainer is None:
            return  # no fit to go on with
        checkpoint[KEY] = {
            "stage": self.stage_name,
            "parent_sha": self.parent_sha,
            "progress": FitProgress.of(self.trainer).state(),
            "clips_per_batch": self.clips_per_batch(),
            "seed": self.data.seed,
            "train_clips": self.train_clips(),
            "learnt_clips": self.learnt_clips(),
            "ranks": self.all_ranks({"random": random_state(), "stage": self.rank_state()}),
            "traces": _texts(self.run_dir / TRACES_FILE),
        }

    def clips_per_batch(self) -> int:
        """Clips that all ranks together train on at once."""
        return self.data.batch_size * int(self.trainer.world_size)

    def train_clips(self) -> dict[str, Any]:
        """What the order of an epoch hangs on: how many training clips there are, and a hash of their ids in order."""
        return _count_and_hash(self.data.clips("train"))

    def learnt_clips(self) -> dict[str, Any]:
        """The same of those that have something to learn; known when the stage has all its texts."""
        view, clips = self.data.view, self.data.clips("train")
        return _count_and_hash(clips if view is None else [clip for clip in clips if view.keep(clip)])

    def all_ranks(self, own: T) -> list[T]:
        """Returns what every rank says, in their order; all of them have to call it together."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return [own]
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, own)
        return found

    # ------------------------------------------------------------------ going on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what does not continue this fit; tells Lightning's loops where they go on.

        Raises:
            ValueError: Naming what differs and what to do.
        """
        saved = self._check_fit(checkpoint)
        if saved is None:
            return
        self._check_learnt(saved)
        self._resumed = FitProgress(**saved["progress"])
        self._resumed.tell(checkpoint["loops"]["fit_loop"])
        ranks = saved["ranks"]
        self._own_state = ranks[self.global_rank]["random"] if len(ranks) == self.trainer.world_size else None
        self.take_rank_states([rank["stage"] for rank in ranks])

    def on_train_start(self) -> None:
        """Puts the random number generators back, where there are as many ranks as before."""
        if self._own_state is not None:
            set_random_state(self._own_state)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds what dropout draws from; after a restart lets loggers count on."""
        done = batches_done(self.trainer)
        seed_batch(self.seed, done, self.global_rank)
        if self._resumed is not None and self._resumed.batches == done:
            set_logged_steps(self.trainer, self._resumed)
        self._resumed = None

    def go_on_within_batch(self) -> None:
        """Puts the generators back to where they were in the midst of the batch that was interrupted."""
        if self._own_state is not None:
            set_random_state(self._own_state)

    def refuse_foreign_checkpoint(self, path: str | Path) -> None:
        """Looks into a checkpoint that is to be resumed, before hours are spent on what comes before loading it.

        Raises:
            ValueError: It is of another stage.
        """
        if Path(path).is_file():
            self._to_resume = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            self._check_stage(self._to_resume)

    def refuse_other_fit(self) -> None:
        """Compares the checkpoint that was looked into with this fit, before the stage writes texts that it lacks.

        Raises:
            ValueError: It does not continue this fit.
        """
        if self._to_resume is not None:
            self._check_fit(self._to_resume)
            self._to_resume = None

    def _check_fit(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """What a checkpoint says of a fit that this one continues; None where it says nothing, or nothing is fitted."""
        self._check_stage(checkpoint)
        saved: dict[str, Any] | None = checkpoint.get(KEY)
        if saved is None or self._trainer is None or not self.fitting:
            return None
        if saved["parent_sha"] != self.parent_sha:
            raise ValueError(
                "adapter_path: holds other weights now than those that the fit of this checkpoint began with; resume "
                "with those, or start the stage again without --ckpt_path"
            )
        self._check_batches(saved)
        self._check_clips(saved)
        self._check_texts(saved["traces"])
        return saved

    def _check_stage(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get("vidreason_stage")
        if found != self.stage_name:
            raise ValueError(
                f"this checkpoint was written by stage {found!r}, but the stage running is {self.stage_name!r}: "
                "--ckpt_path only resumes the same stage; hand weights over with --model.init_args.adapter_path"
            )

    def _check_batches(self, saved: dict[str, Any]) -> None:
        before, now = saved["clips_per_batch"], self.clips_per_batch()
        if before == now:
            return
        ranks = int(self.trainer.world_size)
        remedy = (
            f"set model.init_args.batch_size to {before // ranks}" if before % ranks == 0 else "change their number"
        )
        raise ValueError(
            f"this checkpoint was written at {before} clips per batch over {len(saved['ranks'])} processes, but "
            f"{ranks} with {self.data.batch_size} clips each make {now}, another training: {remedy}"
        )

    def _check_clips(self, saved: dict[str, Any]) -> None:
        """Within an epoch nothing may differ; at its end clips may have given way to as many others."""
        if saved.get("seed", self.data.seed) != self.data.seed:
            raise ValueError(
                f"this checkpoint was written with seed {saved['seed']}, now it is {self.data.seed}, and other clips "
                f"would come next: give --seed_everything {saved['seed']}, or start the stage again without --ckpt_path"
            )
        before, now = saved.get("train_clips"), self.train_clips()  # earlier versions did not say
        if before is None or before == now:
            return
        as_many = before["count"] == now["count"]
        if saved["progress"]["batches"] % saved["progress"]["per_epoch"] == 0 and as_many:
            rank_zero_warn("the training clips are others, or in another order, than when this checkpoint was written")
            return
        raise ValueError(
            f"this checkpoint was written with {before['count']} training clips, but the data now hold {now['count']}"
            f"{', others or in another order' if as_many else ''}: the fit cannot tell which are still to come; put "
            "them back as they were, or start the stage again without --ckpt_path"
        )

    def _check_learnt(self, saved: dict[str, Any]) -> None:
        """A clip that was mended may have been written about only now."""
        before, now = saved.get("learnt_clips"), self.learnt_clips()
        if before is not None and before != now and saved.get("train_clips") == self.train_clips():
            raise ValueError(
                f"this checkpoint was written when {before['count']} training clips had something to learn, now "
                f"{now['count']} have{', others' if before['count'] == now['count'] else ''}: the fit cannot tell "
                "which are still to come; start the stage again without --ckpt_path"
            )

    def _check_texts(self, before: int) -> None:
        path = self.run_dir / TRACES_FILE
        now = _texts(path)
        if now < before:
            raise ValueError(
                f"{path}: holds {now} texts, but {before} when this checkpoint was written: put the file back, or "
                "start the stage again without --ckpt_path"
            )


def by_model_names(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint of a stage, by the names that the model itself uses."""
    return {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}


def _count_and_hash(clips: Sequence[Clip]) -> dict[str, Any]:
    ids = "\n".join(clip.video_id for clip in clips)
    return {"count": len(clips), "sha": hashlib.sha256(ids.encode()).hexdigest()}


def _texts(path: Path) -> int:
    """How many texts a trace file holds; 0 where there is none."""
    if not path.is_file():
        return 0
    return max(path.read_bytes().count(b"\n") - 1, 0)
