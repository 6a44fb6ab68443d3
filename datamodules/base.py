"""The base class of data modules: from clips to batches, with the prompts that a stage asks for.

A subclass defines the labels and the clips of each split; decoding, prompts, encoding and shuffling are implemented
here. A stage defines what the model is shown of a clip by a ``ClipView``, and the model family turns that into tensors
by a ``BatchEncoder``. Both are pickled into the workers of the loader.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from vidreason.datamodules.clips.collating import BatchCollator
from vidreason.datamodules.clips.dataset import ClipDataset, LoadedClip, clips_with_target
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.samplers import (
    BalancedSampler,
    NonRepeatingDistributedSampler,
    ResumableLoader,
    SeededDistributedSampler,
)
from vidreason.datamodules.clips.workers import worker_options
from vidreason.datamodules.folds import HELD_OUT, FoldOptions
from vidreason.datamodules.known import KnowsVideos
from vidreason.datamodules.leaks import find_leaks
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.split_names import STANDARD_SPLITS
from vidreason.datamodules.splits import (
    DEFAULT_FRACTIONS,
    check_disjoint,
    check_labels,
    complete_splits,
    write_splits,
)
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import BatchEncoder, Clip
from vidreason.datamodules.words import check_words
from vidreason.run_folder import SPLITS_FILE

_LOG = logging.getLogger(__name__)


def run_seed(seed: int | None) -> int:
    """Returns ``seed``; if it is None, the seed that was given to ``seed_everything``, or 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


class VideoDataModule(L.LightningDataModule, ABC):
    """A data set of labelled videos; a subclass implements ``label_names`` and ``samples``.

    Args:
        encoder: Encodes examples as tensors; the command line passes the ``vlm`` section.
        frames: Options of the frames that are taken from a clip.
        batch_size: Clips per training batch.
        eval_batch_size: Clips per batch in evaluation; null takes ``batch_size``.
        num_workers: Number of processes that decode; 0 decodes in the main process.
        seed: Seed of shuffling and of the jitter of segment sampling; null takes ``seed_everything``.
        predict_splits: Splits of ``predict``.
        test_splits: Splits of ``test``; null takes every split except train, val and cal.
        split_seed: Seed of the splits that have to be made; separate from ``seed``, so that all seeds share splits.
        prefetch_batches: Batches that each worker loads ahead; they wait in shared memory (``/dev/shm``).
        pin_memory: Whether batches are loaded to page-locked memory, which a GPU reads without the CPU; null does so if
            the trainer uses a GPU.
        fold: The part of train that the stage gets, for cross-fitting; by default all of it.
    """

    def __init__(
        self,
        encoder: BatchEncoder | None = None,
        frames: FrameOptions = FrameOptions(),
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        predict_splits: Sequence[str] = ("train",),
        test_splits: Sequence[str] | None = None,
        split_seed: int = 0,
        prefetch_batches: int = 2,
        pin_memory: bool | None = None,
        fold: FoldOptions = FoldOptions(),
    ) -> None:
        super().__init__()
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches must be at least 1, got {prefetch_batches}")
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}")
        self.encoder = encoder
        self.frames = frames
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = run_seed(seed)
        self.predict_splits = tuple(predict_splits)
        self.test_splits = None if test_splits is None else tuple(test_splits)
        self.split_seed = split_seed
        self.prefetch_batches = prefetch_batches
        self.pin_memory = pin_memory
        self.fold = fold
        self.balance_classes = False
        self.view: ClipView | None = None
        self._eval_view: ClipView | None = None
        self._clips: dict[str, tuple[Clip, ...]] | None = None
        self._made: tuple[str, ...] = ()
        self._held_out: tuple[Clip, ...] = ()

    provides_target_texts: ClassVar[bool] = False
    """True if batches bring prompts and target texts of their own, so that no view is used (pretraining)."""

    @property
    @abstractmethod
    def label_names(self) -> tuple[str, ...]:
        """[C] class names; the index of a label is its position."""

    @abstractmethod
    def samples(self, split: str) -> Sequence[Clip]:
        """Returns the clips of a split as the data define it; empty if there is no such split."""

    @property
    def task(self) -> Task:
        """The classes and prompts; by default the label names and a generic question."""
        return Task.from_labels(type(self).__name__, self.label_names)

    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits that ``samples`` provides."""
        return STANDARD_SPLITS

    def setup(self, stage: str) -> None:
        """Collects the clips, makes missing splits and writes these to ``splits.csv`` in the run folder."""
        if self._clips is None:
            given = {
                name: tuple(clip if clip.split == name else replace(clip, split=name) for clip in self.samples(name))
                for name in self.splits()
            }
            check_labels(self.label_names, given)
            check_disjoint(given)
            self._clips, made = complete_splits(given, DEFAULT_FRACTIONS, self.split_seed)
            self._made = (*self._made, *made)
            check_words(self.task, (clip for clips in self._clips.values() for clip in clips), self.encoder)
            for leak in find_leaks(self._clips.get("train", ()), self.task.metadata_fields):
                _LOG.warning("%s; leave it out of the task's metadata_fields unless it is known in use, too", leak)
            if self.fold.of:
                self._clips["train"], self._held_out = self.fold.divide(self._clips.get("train", ()), self.split_seed)
            _LOG.info("clips: %s", ", ".join(f"{name} {len(clips)}" for name, clips in self._clips.items()))
        if (self._made or self._held_out) and self.trainer is not None and self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / SPLITS_FILE
            write_splits(path, {**self._clips, HELD_OUT: self._held_out})
            told = [f"{', '.join(self._made)} made"] if self._made else []
            told += [f"{self.fold} ({len(self._held_out)} clips)"] if self._held_out else []
            rank_zero_info(f"{'; '.join(told)}, by seed {self.split_seed}, written to {path}")

    def clips(self, split: str) -> tuple[Clip, ...]:
        """Returns the clips of a split, including splits that ``setup`` made.

        Args:
            split: A split's name; standard splits may be empty.

        Raises:
            ValueError: If the data have no such split.
        """
        if self._clips is None:
            self.setup("")
        assert self._clips is not None
        if split not in self._clips and split not in STANDARD_SPLITS:
            raise ValueError(f"there is no split {split!r}; the data have {', '.join(self._clips)}")
        return self._clips.get(split, ())

    @property
    def test_split_names(self) -> tuple[str, ...]:
        """The splits of ``test``, in the order of its loaders."""
        if self.test_splits is not None:
            return self.test_splits
        if self._clips is None:
            self.setup("")
        assert self._clips is not None
        return tuple(name for name in self._clips if name not in ("train", "val", "cal"))

    def connect(
        self,
        *,
        batch_size: int | None = None,
        train_view: ClipView | None = None,
        eval_view: ClipView | None = None,
        balance_classes: bool | None = None,
    ) -> None:
        """Sets the options that a stage defines, before loaders are made; None leaves an option unchanged.

        Args:
            batch_size: Clips per training batch.
            train_view: View of training, and of evaluation if there is no ``eval_view``.
            eval_view: View of validation, test and prediction.
            balance_classes: Whether training clips are drawn so that all labels are equally frequent.
        """
        self.batch_size = self.batch_size if batch_size is None else batch_size
        self.view = train_view or self.view
        self._eval_view = eval_view or self._eval_view
        self.balance_classes = self.balance_classes if balance_classes is None else balance_classes

    def train_dataloader(self) -> DataLoader[LoadedClip]:
        """Returns the loader of the training clips that have a target, shuffled anew in each epoch."""
        return self.loader("train", self._shown(self.view), train=True)

    def val_dataloader(self) -> list[DataLoader[LoadedClip]]:
        """Returns the validation loader in a list, which is empty if there is no split val."""
        return [self._eval_loader(("val",))] if self.clips("val") else []

    def test_dataloader(self) -> list[DataLoader[LoadedClip]]:
        """Returns one loader per test split, in the order of ``test_split_names``."""
        if not self.test_split_names:
            raise ValueError("the data have no test split: name one with test_splits")
        return [self._eval_loader((split,)) for split in self.test_split_names]

    def predict_dataloader(self) -> DataLoader[LoadedClip]:
        """Returns one loader over all ``predict_splits``."""
        return self._eval_loader(self.predict_splits)

    def loader(
        self, split: str, view: ClipView, batch_size: int | None = None, train: bool = False
    ) -> DataLoader[LoadedClip]:
        """Returns a loader of one split with the given view.

        Args:
            split: Name of the split.
            view: Defines the prompt and texts of a clip.
            batch_size: Clips per batch; None takes the configured number.
            train: If True, clips are shuffled and jittered, clips without a target are left out, and a clip that
                cannot be read is a placeholder video that does not count. If False, the order is fixed and such a clip
                is only in ``VideoBatch.failed``.

        Raises:
            ValueError: If the split is empty or unknown, or no clip of it has a target.
        """
        clips = self._of((split,))
        if train:
            clips = clips_with_target(split, clips, view)
            if self.frames.cache is not None and self.frames.jittered_in_training:
                _LOG.info("frames of training are not cached: frames.sampling 'segment' draws others in each epoch")
        return self._loader(clips, view, batch_size, train)

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Returns the dataset of a loader; override it if clips are not read from files."""
        return ClipDataset(clips, view, self.frames, self.seed, train)

    def _eval_loader(self, splits: Sequence[str]) -> DataLoader[LoadedClip]:
        clips, view = self._of(splits), self._shown(self._eval_view or self.view)
        return self._loader(clips, view, None, train=False, shared_out=True)

    def _of(self, splits: Sequence[str]) -> tuple[Clip, ...]:
        for split in splits:
            if not self.clips(split):
                raise ValueError(f"split {split!r} has no clips")
        return tuple(clip for split in splits for clip in self.clips(split))

    def _shown(self, view: ClipView | None) -> ClipView:
        if view is None:
            raise ValueError("nothing says what to show of a clip: call connect(train_view=...) before making loaders")
        return view

    def _loader(
        self, clips: Sequence[Clip], view: ClipView, batch_size: int | None, train: bool, shared_out: bool = False
    ) -> DataLoader[LoadedClip]:
        if self.encoder is None:
            raise ValueError("the data module has no encoder: give it the VLM, as the vlm section of a config does")
        dataset = self.dataset(clips, view, train)
        dataset.knows = self.encoder if isinstance(self.encoder, KnowsVideos) else None
        alone = {"num_replicas": 1, "rank": 0}
        # A sampler of ours also for one rank: it tells the workers which clips need not be decoded.
        evaluated = NonRepeatingDistributedSampler(dataset, **(self._ranks() if shared_out else alone))
        loader = (ResumableLoader if train else DataLoader)(
            dataset,
            batch_size=batch_size or (self.batch_size if train else self.eval_batch_size),
            sampler=self._sampler(dataset) if train else evaluated,
            collate_fn=BatchCollator(self.encoder, self.label_names),
            prefetch_factor=self.prefetch_batches if self.num_workers else None,
            pin_memory=self._on_gpu() if self.pin_memory is None else self.pin_memory,
            **worker_options(self.num_workers, (type(self).__module__, type(self.encoder).__module__)),
            # Without it, the loader would draw its base seed from torch's global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )
        if isinstance(loader, ResumableLoader):
            loader.trainer = self.trainer
        return loader

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _ranks(self) -> dict[str, int]:
        given = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return given or {"num_replicas": 1, "rank": 0}

    def _sampler(self, dataset: ClipDataset) -> SeededDistributedSampler:
        """Returns a distributed sampler for any number of processes; Lightning does not replace one."""
        ranks = self._ranks()
        kind = BalancedSampler if self.balance_classes else SeededDistributedSampler
        return kind(dataset, ranks["num_replicas"], ranks["rank"], shuffle=True, seed=self.seed)


def video_data(data: object) -> VideoDataModule:
    """Returns a trainer's data module.

    Raises:
        ValueError: If it is of another class.
    """
    if not isinstance(data, VideoDataModule):
        raise ValueError(f"the stages read clips from a VideoDataModule, got {type(data).__name__}")
    return data
