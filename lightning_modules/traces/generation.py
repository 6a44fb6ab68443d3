"""Generates texts about clips: descriptions, or reasoning traces that end with an answer.

``vidreason predict`` and stages whose ``traces_file`` is null write the same records and headers.

Shape letters: B clips, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import LoadedClip
from vidreason.datamodules.clips.samplers import GivenBatches
from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.task import Task
from vidreason.datamodules.trace_parts import join_parts, own_part
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.datamodules.unreadable import warn_unreadable
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import Completion, generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.pieces import split_clips
from vidreason.rewards.completion import THINK_FORM, CompletionForm


@dataclass(frozen=True)
class TraceOptions:
    """Options of generated texts.

    Args:
        kind: Texts of ``vidreason predict``: ``describe`` for descriptions, ``reason`` for traces with an answer.
        samples: Texts per clip (K).
        sampling: Sampling options; at temperature 1, traces of training and test have the same distribution.
        label_hint: Show the true label in the prompt of a description, as RB-FT's released code does.
        filter: Rules that reject descriptions; traces with an answer are all kept, right or wrong.
        judge: Judge the texts that the base writes: are they language, and do they depend on the clip?
    """

    kind: Literal["describe", "reason"] = "describe"
    samples: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    label_hint: bool = False
    filter: RationaleFilter = field(default_factory=RationaleFilter)
    judge: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"traces.samples must be at least 1, got {self.samples}")


def _any_adapter(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def trace_view(
    task: Task, kind: Literal["describe", "reason"], label_hint: bool = False, form: CompletionForm = THINK_FORM
) -> DescribeView | ReasonView:
    """Returns the prompt of generated texts of a kind, without texts behind it."""
    return DescribeView(task, label_hint=label_hint) if kind == "describe" else ReasonView(task, form=form)


@dataclass(frozen=True)
class TraceGenerator:
    """Generates texts about clips and records which weights wrote them."""

    vlm: VLM
    view: DescribeView | ReasonView
    """The prompt about a clip."""
    options: TraceOptions
    form: CompletionForm
    """Blocks that a trace consists of."""
    seed: int
    adapter_sha: str
    """SHA-256 of the weights that the stage started from; empty for the base."""
    task_sha: str
    clips_per_forward: int | None = None
    """Clips that go through the model at once; None is the whole batch."""
    adapter_context: Callable[[nn.Module], AbstractContextManager[None]] = _any_adapter
    """Activates the weights that write if the model has several adapters."""

    @property
    def header(self) -> TraceHeader:
        """The header of trace files that this generator writes."""
        counts = {"samples": self.options.samples, "seed": self.seed}
        sampling: dict[str, object] = {**asdict(self.options.sampling), **counts}
        if self.vlm.chat_template_kwargs:  # They change the prompt, of which ``prompt_sha`` covers the words only.
            sampling["chat_template_kwargs"] = self.vlm.chat_template_kwargs
        return TraceHeader(False, self.vlm.base_sha(), self.adapter_sha, self.view.sha(), self.task_sha, sampling)

    def records(self, model: nn.Module, batch: VideoBatch, label_names: Sequence[str]) -> list[TraceRecord]:
        """Generates K texts about every readable clip of a batch."""
        if not len(batch):
            return []
        parts = split_clips(self.vlm, batch, self.clips_per_forward)
        return [record for part in parts for record in self._records_of(model, part, tuple(label_names))]

    def _records_of(self, model: nn.Module, batch: VideoBatch, label_names: tuple[str, ...]) -> list[TraceRecord]:
        options, prompts, clips = self.options, batch.prompts, batch.clips
        with self.adapter_context(model):
            generated = generate_completions(
                self.vlm, model, prompts, clips, options.samples, options.sampling, self.seed, form=self.form
            )
        return [
            self._record(clip, k, completion, label_names)
            for clip, group in zip(clips, generated.completions, strict=True)
            for k, completion in enumerate(group)
        ]

    def _record(self, clip: Clip, k: int, completion: Completion, label_names: tuple[str, ...]) -> TraceRecord:
        parsed = completion.parsed
        reasoning, reason = parsed.reasoning, None
        if self.view.kind == "describe":
            # A description has no tags, so that all of it is the reasoning.
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


class RankShard(NamedTuple):
    """The share of one rank in writing a trace file."""

    rank: int = 0
    ranks: int = 1
    barrier: Callable[[], object] = lambda: None
    """Blocks until all ranks have called it."""


@dataclass(frozen=True)
class TraceFile:
    """A trace file that a generator completes for the clips of a data module.

    Args:
        path: The file; it is created if it does not exist and continued if it does.
        generator: The generator of the texts.
        data: The data module of the clips.
        shard: Share of this rank; all ranks have to complete the file together.
    """

    path: Path
    generator: TraceGenerator
    data: VideoDataModule
    shard: RankShard = RankShard()

    def complete(
        self, model: nn.Module, splits: Sequence[str], device: torch.device, known: Collection[str] = ()
    ) -> TraceStore:
        """Writes the texts about the clips of ``splits`` that the file lacks.

        Ranks take batches in turn. Batches do not depend on the number of ranks, so that the texts do not either.

        Args:
            model: The model that writes.
            splits: Names of the splits.
            device: Device of the model.
            known: Ids of clips to skip because another file has their texts.

        Returns:
            The store, complete except for unreadable clips, about which a warning is printed.

        Raises:
            ValueError: If other weights wrote the file, or it has another prompt.
        """
        shard, header = self.shard, self.generator.header
        with self._joined():
            store = TraceStore.open(self.path)
            have = {(r.video_id, r.sample) for r in store.records()}
            batches = [(split, batch) for split in splits for batch in self._missing_batches(store, split, known)]
            shard.barrier()  # All ranks have seen what is missing before the first one writes.
            own_store = own_part(self.path, header, shard.rank)
            todo = batches[shard.rank :: shard.ranks]
            clips = sum(len(batch) for _, batch in todo)
            hidden = not todo or shard.rank > 0
            with tqdm(total=clips, desc=f"writing {self.path.name}", unit="clip", disable=hidden) as bar:
                for batch in self._batches(splits, todo):
                    warn_unreadable(batch, "no text written")
                    with torch.no_grad():
                        records = self.generator.records(model, batch.to(device), self.data.label_names)
                    # A batch is generated as a whole, also if the file has some of its texts.
                    own_store.append([r for r in records if (r.video_id, r.sample) not in have])
                    bar.update(len(batch) + len(batch.failed))
        return store

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """Joins the parts that ranks have written, before and after the block; all ranks enter and leave together."""
        if self.shard.rank == 0:
            TraceStore.create(self.path, self.generator.header)
            join_parts(self.path)
        self.shard.barrier()
        yield
        self.shard.barrier()
        if self.shard.rank == 0:
            join_parts(self.path)
        self.shard.barrier()

    def _missing_batches(self, store: TraceStore, split: str, known: Collection[str]) -> list[list[int]]:
        """Returns the batches with a clip that lacks texts, as positions in ``data.clips(split)``.

        An interrupted batch is generated again as a whole: padding depends on all clips of a batch, so that scores of
        the same text in another batch would differ in their last digits.
        """
        clips, size = self.data.clips(split), self.data.eval_batch_size
        asked = [i for i, clip in enumerate(clips) if clip.video_id not in known]
        missing = store.missing([clips[i].video_id for i in asked], self.generator.options.samples)
        batches = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [batch for batch in batches if any(clips[i].video_id in missing for i in batch)]

    def _batches(self, splits: Sequence[str], todo: Sequence[tuple[str, list[int]]]) -> Iterator[VideoBatch]:
        """Loads batches of clips, split by split."""
        for split in splits:
            own = [batch for name, batch in todo if name == split]
            if not own:
                continue
            loader: DataLoader[LoadedClip] = self.data.loader(split, self.generator.view)
            yield from DataLoader(
                loader.dataset,
                batch_sampler=GivenBatches(loader.dataset, own),
                num_workers=loader.num_workers,
                multiprocessing_context=loader.multiprocessing_context,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                worker_init_fn=loader.worker_init_fn,
                prefetch_factor=loader.prefetch_factor,
            )
