"""Writing about clips: rationales and traces, by ``vidreason predict`` or for a stage that learns from its own texts.

Shape letters: B clips, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from vidreason.datamodules.prompts import ClipView, DescribeView, ReasonView
from vidreason.datamodules.traces import TraceStore
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.own_traces import Share, TraceOptions, Writer, report_failed, write_missing
from vidreason.lightning_modules.rollout import Completion, generate_rollouts
from vidreason.lightning_modules.trained_weights import WeightsModule
from vidreason.lightning_modules.work import Work
from vidreason.rewards.completion import CompletionForm
from vidreason.run_folder import TRACES_FILE


class WritingModule(WeightsModule):
    """Weights that write about clips; its attributes are arguments of ``VLMModule``."""

    predict: Literal["describe", "reason"]
    trace_options: TraceOptions
    completion: CompletionForm
    _written: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ what it is shown

    def written_view(self) -> ClipView:
        """What a clip shows when a rationale or trace is written about it."""
        if self.predict == "reason":
            return self.reason_view()
        return DescribeView(self.task, label_hint=self.trace_options.label_hint)

    def reason_view(self, texts: Mapping[str, tuple[str, ...]] | None = None) -> ReasonView:
        """What a clip shows where completions are written or learnt."""
        return ReasonView(self.task, texts, self.completion)

    # ------------------------------------------------------------------ what it writes

    def writer(self, view: ClipView, options: TraceOptions) -> Writer:
        """Returns the writer of the weights that the stage starts from."""
        return Writer(
            view=view,
            options=options,
            base_sha=self.vlm.base_sha(),
            adapter_sha=self.parent_sha,
            task_sha=self.task.sha(),
            seed=self.seed,
            sample=self.sample_texts,
        )

    def sample_texts(self, batch: VideoBatch, options: TraceOptions) -> Sequence[Sequence[Completion]]:
        """Samples texts for every clip of a batch, [B][K]; the noise depends on the seed, the clip and the sample."""
        return generate_rollouts(
            self.vlm,
            self.policy,
            batch.prompts,
            batch.clips,
            options.samples,
            options.sampling,
            self.seed,
            form=self.completion,
        ).completions

    def write_traces(self, writer: Writer, splits: Sequence[str], known: Collection[str] = ()) -> TraceStore:
        """Lets the starting weights write the texts about ``splits`` that the run folder lacks; the ranks share them.

        Called in ``configure_model``, before a checkpoint is restored, so that a resumed run's texts have one author.

        Args:
            writer: Who writes.
            splits: Names of the splits.
            known: Ids of clips whose texts are elsewhere.
        """
        if next(self.policy.parameters()).device != self.device:
            self.policy.to(self.device)
        wait = partial(self.trainer.strategy.barrier, "write_traces")
        share = Share(self.trainer.global_rank, self.trainer.world_size, wait)
        path = self.run_dir / TRACES_FILE
        with torch.device("cpu"), self.forward_context():  # the strategy may have set another default device
            return write_missing(path, writer, self.data, splits, self.device, known, share)

    # ------------------------------------------------------------------ predict

    def on_predict_start(self) -> None:
        """Finds out what the run folder holds already; those clips are not written again."""
        super().on_predict_start()
        path = self.run_dir / TRACES_FILE
        if not path.exists():
            return
        ids = [clip.video_id for split in self.data.predict_splits for clip in self.data.clips(split)]
        missing = TraceStore.open(path).missing(ids, self.trace_options.samples)
        self._written = frozenset(ids) - frozenset(missing)

    def predict_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Writes texts about a batch.

        Returns:
            ``{"traces": ...}``, the records, for ``callbacks/trace_writer.py``.
        """
        report_failed(batch, "no text written")
        if not batch.sample_mask.all() or all(clip.video_id in self._written for clip in batch.clips):
            return {"traces": ()}
        records = self.predict_writer().records(batch, self.data.label_names)
        return {"traces": tuple(r for r in records if r.video_id not in self._written)}

    def predict_writer(self) -> Writer:
        """Returns the writer of ``vidreason predict``."""
        return self.writer(self.written_view(), self.trace_options)

    def writing_work(self, clips: float) -> Work:
        """What it takes to write about ``clips``."""
        return Work(clips_read=clips, texts_written=clips * self.trace_options.samples)
