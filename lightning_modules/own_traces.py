"""Texts that a stage lets its own starting weights write: rationales and traces, with their lineage.

The same records come out of ``vidreason predict`` (``VLMModule.predict_step``) and of a stage whose ``traces`` are
null.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import LoadedClip
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.trace_parts import join_parts, own_part
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.rationale_filter import RationaleFilter
from vidreason.lightning_modules.rollout import Completion
from vidreason.lightning_modules.vlms.generation import Sampling


@dataclass(frozen=True)
class TraceOptions:
    """How a stage's own texts are sampled.

    Args:
        samples: Texts per clip (K).
        sampling: How each is sampled; temperature 1 keeps traces of training and test alike.
        label_hint: Show the true label to the writer of a rationale (RB-FT's released code does; off by default).
        filter: Which rationales are rejected. Traces that end in an answer are all kept, right or wrong.
    """

    samples: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    label_hint: bool = False
    filter: RationaleFilter = field(default_factory=RationaleFilter)


OWN_TRACES = TraceOptions()


@dataclass(frozen=True)
class Writer:
    """What a stage needs to let its weights write: the view, the sampler and the identity of the weights."""

    view: ClipView
    options: TraceOptions
    base_sha: str
    adapter_sha: str
    task_sha: str
    seed: int
    sample: Callable[[VideoBatch, TraceOptions], Sequence[Sequence[Completion]]]
    """batch, options -> [B][K] completions"""

    @property
    def header(self) -> TraceHeader:
        """Identity of the texts that this writer writes."""
        counts = {"samples": self.options.samples, "seed": self.seed}
        sampling: dict[str, object] = {**asdict(self.options.sampling), **counts}
        return TraceHeader(False, self.base_sha, self.adapter_sha, self.view.sha(), self.task_sha, sampling)

    def records(self, batch: VideoBatch, label_names: tuple[str, ...]) -> list[TraceRecord]:
        """Writes K texts for every readable clip of a batch."""
        if not len(batch):
            return []
        groups = self.sample(batch, self.options)
        return [
            self._record(clip, k, completion, label_names)
            for clip, group in zip(batch.clips, groups, strict=True)
            for k, completion in enumerate(group)
        ]

    def _record(self, clip: Clip, k: int, completion: Completion, label_names: tuple[str, ...]) -> TraceRecord:
        parsed = completion.parsed
        reasoning, reason = parsed.reasoning, None
        if self.view.kind == "describe":
            reasoning = completion.text.strip() if parsed.reasoning is None else parsed.reasoning
            options = self.options
            cut = completion.finish_reason == "length"
            reason = options.filter.reject_reason(completion.text, clip.label, label_names, options.label_hint, cut)
        return TraceRecord(
            video_id=clip.video_id,
            sample=k,
            text=completion.text,
            reasoning=reasoning,
            answer=parsed.answer,
            finish_reason=completion.finish_reason,
            logprob_sum=float(completion.logprobs.sum()),
            n_tokens=completion.n_tokens,
            kept=reason is None,
            reject_reason=reason,
        )


class Share(NamedTuple):
    """The part of the writing that one of several ranks does."""

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], object] = lambda: None
    """Returns when all ranks have come to it"""


ALL = Share()


def write_missing(
    path: Path,
    writer: Writer,
    data: VideoDataModule,
    splits: Sequence[str],
    device: torch.device,
    known: Collection[str] = (),
    share: Share = ALL,
) -> TraceStore:
    """Writes the texts that the file at ``path`` lacks of the clips of ``splits``; what it holds already is kept.

    Several ranks write batches in turns, so that none waits long for another; a batch holds the same clips for any
    number of them, and so do its texts.

    Args:
        path: The trace file, created where it does not exist.
        writer: Who writes.
        data: Where the clips are.
        splits: Names of the splits.
        device: Where the model is.
        known: Ids of clips whose texts are elsewhere; they are passed over.
        share: What this rank writes; all ranks have to call this together.

    Returns:
        The store, complete but for clips that could not be read (reported).

    Raises:
        ValueError: Where the file at ``path`` was written by other weights or with another prompt.
    """
    if share.rank == 0:
        TraceStore.create(path, writer.header)
        join_parts(path)
    share.wait()
    store = TraceStore.open(path)
    have = {(r.video_id, r.sample) for r in store.records()}
    todo = [
        (split, batch)
        for split in splits
        for batch in missing_batches(store, data, split, writer.options.samples, known)
    ]
    share.wait()  # all have seen what is missing before the first writes
    own_store = own_part(path, writer.header, share.rank)
    todo = todo[share.rank :: share.ranks]
    hidden = not todo or share.rank > 0
    with tqdm(total=sum(len(b) for _, b in todo), desc=f"writing {path.name}", unit="clip", disable=hidden) as bar:
        for split in splits:
            own = [batch for part, batch in todo if part == split]
            for batch in _loader(data, split, writer.view, own) if own else ():
                report_failed(batch, "no text written")
                with torch.no_grad():
                    records = writer.records(batch.to(device), data.label_names)
                own_store.append([r for r in records if (r.video_id, r.sample) not in have])
                bar.update(len(batch) + len(batch.failed))
    share.wait()
    if share.rank == 0:
        join_parts(path)
    share.wait()
    return store


def missing_batches(
    store: TraceStore, data: VideoDataModule, split: str, samples: int, known: Collection[str] = ()
) -> list[list[int]]:
    """Returns, as positions in ``data.clips(split)``, the batches that hold clips with fewer than ``samples`` texts.

    Clips that are ``known`` are in none. A writer that was interrupted in the midst of a batch writes about all of it
    again: next to other clips a text's numbers would differ in their last digits.
    """
    clips, size = data.clips(split), data.eval_batch_size
    asked = [i for i, clip in enumerate(clips) if clip.video_id not in known]
    missing = store.missing([clips[i].video_id for i in asked], samples)
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    return [batch for batch in batches if any(clips[i].video_id in missing for i in batch)]


def report_failed(batch: VideoBatch, consequence: str) -> None:
    """Says which clips of a batch could not be read, and what follows; on every rank, for each has other clips."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # each time: Python shows a text once
        for failed in batch.failed:
            message = f"{failed.clip.path}: {consequence}, the clip cannot be read ({failed.error})"
            warnings.warn(message, stacklevel=2)


def _loader(data: VideoDataModule, split: str, view: ClipView, batches: list[list[int]]) -> DataLoader[LoadedClip]:
    """Returns the split's loader, restricted to ``batches`` of clips."""
    whole = data.loader(split, view)
    return DataLoader(
        whole.dataset,
        batch_sampler=batches,
        num_workers=whole.num_workers,
        collate_fn=whole.collate_fn,
        worker_init_fn=whole.worker_init_fn,
    )
