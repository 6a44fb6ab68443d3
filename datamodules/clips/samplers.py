"""In which order training takes the clips, and where a fit that was interrupted goes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler

from vidreason.datamodules.clips.dataset import ClipDataset, ClipKey
from vidreason.datamodules.clips.sampling import balanced_order


def batches_of_an_epoch(trainer: L.Trainer, batches: int) -> int:
    """How many of a loader's ``batches`` the trainer takes in an epoch."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class ResumableSampler(DistributedSampler[Any]):
    """An order of clips that may be entered anywhere."""

    consumed: tuple[int, int] = (0, 0)
    """An epoch, and how many of its clips this rank had seen when the run was interrupted"""

    @property
    def seen(self) -> int:
        """How many clips of this epoch are passed over."""
        epoch, clips = self.consumed
        return clips if epoch == self.epoch else 0


class ResumableLoader(DataLoader[Any]):
    """A training loader whose state is how many batches were trained on, however many workers have fetched ahead.

    Its sampler is a :class:`ResumableSampler`. Lightning keeps ``state_dict`` in its checkpoints, and calls
    ``load_state_dict`` before it iterates.
    """

    trainer: L.Trainer | None = None
    """Who trains; None outside of a fit"""

    def state_dict(self) -> dict[str, int]:
        """The epoch of the next batch, and how many of its clips all ranks together have been trained on."""
        sampler = self._sampler()
        assert self.trainer is not None
        assert self.batch_size is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        epoch, batches = divmod(int(done), batches_of_an_epoch(self.trainer, len(self)))
        return {"epoch": epoch, "clips": batches * self.batch_size * sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the sampler go on behind those clips."""
        sampler = self._sampler()
        sampler.set_epoch(state["epoch"])
        sampler.consumed = (state["epoch"], state["clips"] // sampler.num_replicas)

    def _sampler(self) -> ResumableSampler:
        assert isinstance(self.sampler, ResumableSampler)
        return self.sampler


class SeededDistributedSampler(ResumableSampler):
    """Shuffles by seed and epoch alone, on one process or many; Lightning calls its ``set_epoch``.

    The epoch travels with each index, since workers that live on would not see it change on the dataset. Where clips
    cannot be divided by the ranks, the first of the order come again at its end, and count nothing there.
    """

    def __iter__(self) -> Iterator[ClipKey]:
        """Yields this rank's clips in the order of this epoch; of one that was interrupted, those not seen yet."""
        places = range(self.rank, self.total_size, self.num_replicas)  # in the order of all ranks together
        rest = islice(zip(places, self.order(), strict=True), self.seen, None)
        clips = len(self.dataset)  # type: ignore[arg-type]
        return (ClipKey(index, self.epoch, valid=place < clips) for place, index in rest)

    def order(self) -> Iterator[int]:
        """This rank's positions in the order of this epoch, from its beginning."""
        return super().__iter__()


class NonRepeatingDistributedSampler(DistributedSampler[Any]):
    """Clips in their order, shared out over processes, none of them twice: for everything that is counted.

    With fewer clips than processes, those that would have none get one that counts nothing: a process without a batch
    would leave out the validation that the others wait in.
    """

    def __init__(self, dataset: ClipDataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.num_samples = max(1, len(range(rank, len(dataset), num_replicas)))
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[ClipKey]:
        """Yields this rank's positions."""
        own = [ClipKey(place, 0) for place in range(self.rank, self.total_size, self.num_replicas)]
        return iter(own or [ClipKey(0, 0, valid=False)])


class BalancedSampler(SeededDistributedSampler):
    """Draws as many clips as there are, all labels equally often: each C draws, from the first on, are C labels.

    Clips of a rare label come several times in an epoch, those of a frequent one not in every epoch; the clips of a
    label take turns. An epoch depends on seed and epoch alone, so ranks share it.
    """

    def order(self) -> Iterator[int]:
        """This rank's positions in the order of this epoch."""
        assert isinstance(self.dataset, ClipDataset)
        drawn = balanced_order([clip.label for clip in self.dataset.clips], self.total_size, self.seed, self.epoch)
        return iter(drawn[self.rank : self.total_size : self.num_replicas])
