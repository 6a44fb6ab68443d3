"""Samplers and the training loader: the order of clips, and where an interrupted fit continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from vidreason.datamodules.clips.dataset import ClipDataset, ClipKey
from vidreason.datamodules.clips.sampling import balanced_order
from vidreason.lightning_internals import batches_done


def batches_of_an_epoch(trainer: L.Trainer, batches: int) -> int:
    """Returns how many of a loader's ``batches`` the trainer uses in an epoch."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _key(dataset: object, position: int, epoch: int, valid: bool) -> ClipKey:
    """Returns the index of a clip, with what is known of its video at this moment."""
    if isinstance(dataset, ClipDataset):
        return dataset.key(position, epoch, valid)
    return ClipKey(position, epoch, valid)


class GivenBatches(Sampler[list[ClipKey]]):
    """Batches of given positions, as indices with what is known of their videos when they are asked for.

    Args:
        dataset: The dataset.
        batches: Positions of the clips of each batch.
    """

    def __init__(self, dataset: object, batches: Sequence[Sequence[int]]) -> None:
        self.dataset = dataset
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[ClipKey]]:
        """Yields the batches in order."""
        return ([_key(self.dataset, place, 0, valid=True) for place in batch] for batch in self.batches)


class ResumableSampler(DistributedSampler[Any]):
    """A sampler that can start in the middle of an epoch."""

    consumed: tuple[int, int] = (0, 0)
    """Epoch in which the run was interrupted, and the number of its clips that this rank had seen."""

    @property
    def seen(self) -> int:
        """Number of clips to skip in the current epoch."""
        epoch, clips = self.consumed
        return clips if epoch == self.epoch else 0


class ResumableLoader(DataLoader[Any]):
    """A training loader whose state is the number of batches trained on, not the number that workers have prefetched.

    Its sampler is a :class:`ResumableSampler`. Lightning keeps ``state_dict`` in its checkpoints, and calls
    ``load_state_dict`` before it iterates.
    """

    trainer: L.Trainer | None = None
    """None outside of a fit."""

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch of the next batch and the number of its clips that all ranks have been trained on."""
        sampler = self._sampler()
        assert self.trainer is not None
        assert self.batch_size is not None
        epoch, batches = divmod(batches_done(self.trainer), batches_of_an_epoch(self.trainer, len(self)))
        return {"epoch": epoch, "clips": batches * self.batch_size * sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Sets the sampler to continue after the clips of a saved state."""
        sampler = self._sampler()
        sampler.set_epoch(state["epoch"])
        sampler.consumed = (state["epoch"], state["clips"] // sampler.num_replicas)

    def _sampler(self) -> ResumableSampler:
        assert isinstance(self.sampler, ResumableSampler)
        return self.sampler


class SeededDistributedSampler(ResumableSampler):
    """Shuffles by seed and epoch only, for any number of processes; Lightning calls its ``set_epoch``.

    The epoch is part of each index, since persistent workers would not see it change on the dataset. If the number of
    clips is not divisible by the number of ranks, the first clips are repeated at the end, with ``valid=False``.
    """

    def __iter__(self) -> Iterator[ClipKey]:
        """Yields this rank's clips of the epoch; in an interrupted epoch, the clips that were not seen yet."""
        places = range(self.rank, self.total_size, self.num_replicas)  # in the order of all ranks together
        rest = islice(zip(places, self.order(), strict=True), self.seen, None)
        clips = len(self.dataset)  # type: ignore[arg-type]
        return (_key(self.dataset, index, self.epoch, valid=place < clips) for place, index in rest)

    def order(self) -> Iterator[int]:
        """Returns this rank's positions of the whole epoch."""
        return super().__iter__()


class NonRepeatingDistributedSampler(DistributedSampler[Any]):
    """Distributes clips over ranks in order and without repetition, for metrics.

    ``DistributedSampler`` repeats clips so that all ranks have the same number; metrics would count these twice. A rank
    without a clip gets one with ``valid=False``: without a batch it would skip the validation, in which the other ranks
    would wait for it.
    """

    def __init__(self, dataset: ClipDataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.num_samples = max(1, len(range(rank, len(dataset), num_replicas)))
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[ClipKey]:
        """Yields this rank's positions."""
        own = range(self.rank, self.total_size, self.num_replicas)
        return (_key(self.dataset, place, 0, valid=bool(own)) for place in own or [0])


class BalancedSampler(SeededDistributedSampler):
    """Draws as many clips as there are, with all C labels equally frequent: each group of C draws has every label once.

    Clips of a rare label occur several times in an epoch, and clips of a frequent label not in every epoch. The order
    depends on seed and epoch only, so that all ranks have the same one.
    """

    def order(self) -> Iterator[int]:
        """Returns this rank's positions of the whole epoch."""
        assert isinstance(self.dataset, ClipDataset)
        drawn = balanced_order([clip.label for clip in self.dataset.clips], self.total_size, self.seed, self.epoch)
        return iter(drawn[self.rank : self.total_size : self.num_replicas])
