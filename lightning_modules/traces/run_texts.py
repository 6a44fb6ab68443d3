"""The texts of a run folder: written by the weights that a stage starts from, and judged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.trace_parts import join_parts
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.traces.generation import RankShard, TraceFile, TraceGenerator
from vidreason.lightning_modules.traces.text_quality import judge_texts
from vidreason.lightning_modules.vlms.loading.sharding import unsharded
from vidreason.run_folder import TEXT_QUALITY_FILE, TRACES_FILE


def write_run_traces(
    trainer: L.Trainer,
    model: nn.Module,
    generator: TraceGenerator,
    data: VideoDataModule,
    splits: Sequence[str],
    known: Collection[str] = (),
    name: str = TRACES_FILE,
) -> TraceStore:
    """Completes a trace file of the run folder for ``splits`` with a stage's starting weights.

    Call it in ``configure_model``, before a checkpoint is restored, so that the same weights write all texts of a
    resumed run.

    Args:
        trainer: The stage's trainer, whose ranks share the work.
        model: The starting weights.
        generator: The generator of the texts.
        data: The data module of the clips.
        splits: Names of the splits.
        known: Ids of clips to skip because another file has their texts.
        name: Name of the file.
    """
    path = Path(trainer.default_root_dir) / name
    with _writing(trainer, model) as shard:
        store = TraceFile(path, generator, data, shard).complete(model, splits, trainer.strategy.root_device, known)
    judge_run_texts(trainer, model, generator, data, splits, store)
    return store


def judge_run_texts(
    trainer: L.Trainer,
    model: nn.Module,
    generator: TraceGenerator,
    data: VideoDataModule,
    splits: Sequence[str],
    store: TraceStore | None = None,
) -> None:
    """Judges texts that the base wrote, as ``traces.judge`` asks for; writes the verdict and warns of a bad one.

    All ranks have to call it together, after the texts are written.

    Args:
        trainer: The stage's trainer.
        model: The weights that wrote them; texts of weights that an earlier stage has trained are not judged.
        generator: The generator of the texts.
        data: The data module of the clips.
        splits: Names of the splits.
        store: The texts; None takes those of ``traces.jsonl`` in the run folder.
    """
    if not generator.options.judge or generator.adapter_sha:
        return
    folder = Path(trainer.default_root_dir)
    trainer.strategy.barrier("judge_texts")
    with _writing(trainer, model):
        store = TraceStore.open(folder / TRACES_FILE) if store is None else store
        texts = {name: [record.text for record in group] for name, group in store.by_video(kept_only=False).items()}
        device = trainer.strategy.root_device
        quality = judge_texts(generator.vlm, model, data, generator.view, splits, texts, device)
    if trainer.is_global_zero:
        quality.save(folder / TEXT_QUALITY_FILE)
    if quality.faults:
        rank_zero_warn(
            f"{store.path}: the base writes no language about these clips: {'; '.join(quality.faults)}; name a model "
            "that can describe them, such as --vlm Qwen/Qwen2.5-VL-3B-Instruct"
        )


@contextmanager
def _writing(trainer: L.Trainer, model: nn.Module) -> Iterator[RankShard]:
    """Yields this rank's share, with the model on its device, unsharded and in the precision of its forwards."""
    strategy = trainer.strategy
    # Lightning moves the module to the device only after configure_model.
    if next(model.parameters()).device != strategy.root_device:
        model.to(strategy.root_device)
    # Ranks write unequal numbers of batches, and a strategy may have set another default device.
    with torch.device("cpu"), unsharded(model), trainer.precision_plugin.forward_context():
        yield RankShard(trainer.global_rank, trainer.world_size, partial(strategy.barrier, "write_traces"))


def complete_clips(trainer: L.Trainer, data: VideoDataModule, splits: Sequence[str], samples: int) -> frozenset[str]:
    """Returns the ids of the clips that have all ``samples`` texts in the run folder's trace file.

    All ranks have to call it together: the first one joins the parts that an interrupted run of several ranks has left.
    """
    path = Path(trainer.default_root_dir) / TRACES_FILE
    if trainer.is_global_zero and path.exists():
        join_parts(path)
    trainer.strategy.barrier("complete_clips")
    if not path.exists():
        return frozenset()
    ids = [clip.video_id for split in splits for clip in data.clips(split)]
    return frozenset(ids) - frozenset(TraceStore.open(path).missing(ids, samples))
