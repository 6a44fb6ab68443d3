"""Supervised fine-tuning on texts: captions, the model's own rationales, traces, or labels.

RB-FT (arXiv 2511.15923) trains on rationales, then on labels; DeepIntuit (arXiv 2603.10300) begins with traces (its
*cold start*). Deviations from the papers:
    1. The cold start can compose traces from the model's own descriptions and the training labels, without a teacher.
    2. Reasoning and answer tokens are averaged separately (``targets.answer_weight``), see ``functional/losses.py``.
    3. The K texts of a clip share one encoding of its video.

The loss is a mean over the target tokens of the whole optimizer step, for any micro-batches and number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, DescribeView, LabelView, ReasonView
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceStore
from vidreason.datamodules.types import TextBatch, VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.passes import (
    Workload,
    plain_workload,
    stand_in_texts,
    update_pass,
    writing_pass,
)
from vidreason.lightning_modules.fit.ranks import mean_over_ranks
from vidreason.lightning_modules.functional.losses import TextLoss, weighted_text_loss
from vidreason.lightning_modules.functional.reductions import TokenCounts, count_tokens
from vidreason.lightning_modules.traces.run_texts import write_run_traces
from vidreason.lightning_modules.traces.targets import (
    TargetOptions,
    Texts,
    caption_targets,
    rationale_targets,
    swapped_targets,
    trace_targets,
    traces_or_composed,
)
from vidreason.lightning_modules.vlms.base import VLM, Scores
from vidreason.lightning_modules.vlms.pieces import split_clips
from vidreason.rewards.completion import CompletionForm, render_completion
from vidreason.run_folder import DESCRIPTIONS_FILE, TRACES_FILE

_WRITTEN = {"describe": "descriptions", "reason": "traces"}


class RationaleSFTModule(VLMModule):
    """Trains on texts about videos by next-token prediction, including the end of turn.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        targets: Options of the target texts.
        traces_file: Trace file with the texts for ``rationale`` and ``trace``; if null, the starting weights write one
            to the run folder with the options ``traces``.
    """

    supports_masked_samples: ClassVar[bool] = True

    def __init__(
        self, vlm: VLM, targets: TargetOptions = TargetOptions(), traces_file: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(vlm, **kwargs)
        self.automatic_optimization = False
        if targets.swapped and self.completion.mode != "think":
            raise ValueError(
                f"targets.swapped: needs completion.mode think, got {self.completion.mode}: the answer of a swapped "
                "trace has to follow its reasoning; set targets.swapped to 0"
            )
        self.targets = targets
        self.traces_file = traces_file

    @property
    def stage_name(self) -> str:
        """Name of the stage: ``sft_caption``, ``sft_rationale``, ``sft_trace`` or ``sft_label``."""
        return f"sft_{self.targets.kind}"

    # ------------------------------------------------------------------ targets

    def setup(self, stage: str) -> None:
        """Connects the data module; a fit on captions gets those of ``val`` for its validation loss."""
        super().setup(stage)
        if self.targets.kind == "caption" and stage in ("fit", "validate") and not self.data.provides_target_texts:
            captions = caption_targets(self.data.clips("val"), self.targets.caption_field)
            self.data.connect(eval_view=DescribeView(self.data.task, texts=captions))

    def train_view(self, task: Task) -> ClipView:
        """Returns the view with labels as targets; ``prepare_views`` replaces it for other targets."""
        return LabelView(task)

    def workload(self, data: VideoDataModule, command: str) -> Workload:
        """Returns the passes of a command, in which texts that are yet to be written are as long as they may be."""
        targets, task, form, clips = self.targets, data.task, self.completion, data.clips("train")
        if targets.kind == "label" or data.provides_target_texts or command != "fit":
            return super().workload(data, command)
        if targets.kind == "caption":
            view: ClipView = DescribeView(task, texts=caption_targets(clips, targets.caption_field))
            return Workload((update_pass(self, data, view),))
        options = self.traces
        texts = stand_in_texts(self.vlm.tokenizer, clips, options.sampling.max_new_tokens, options.samples)
        view = DescribeView(task, texts=texts)
        if targets.kind == "trace":
            plain = replace(form, confidence=False)
            labelled = [clip for clip in clips if clip.label]
            whole = {
                c.video_id: tuple(render_completion(text, c.label or "", plain) for text in texts[c.video_id])
                for c in labelled
            }
            view = ReasonView(task, whole, form, swapped_targets(whole, targets.swapped))
        written: dict[str, tuple[Literal["describe", "reason"], ...]]
        written = {"describe": ("describe",), "reason": ("reason",), "reason_first": ("reason", "describe")}
        kinds = written[targets.compose] if targets.kind == "trace" else written["describe"]
        writing = [writing_pass(self, data, kind, ("train",)) for kind in kinds if self.traces_file is None]
        return plain_workload(self, data, command, [*writing, update_pass(self, data, view, stand_ins=True)])

    def prepare_views(self) -> None:
        """Connects the view with the target texts, which the starting weights write if no file is given."""
        if self.targets.kind == "label" or self.data.provides_target_texts or self.trainer.state.fn != "fit":
            return
        texts, clips, task = self.target_texts(), self.data.clips("train"), self.data.task
        usable = sum(bool(texts.get(clip.video_id)) for clip in clips)
        number = sum(len(texts.get(clip.video_id, ())) for clip in clips)
        self.print(f"{self.stage_name}: {number} target texts about {usable} of {len(clips)} training clips")
        if not usable:
            if self.targets.kind == "caption":
                raise ValueError(f"no training clip has a text in the manifest's column {self.targets.caption_field!r}")
            raise ValueError(_no_targets(Path(self.traces_file or Path(self.trainer.default_root_dir, TRACES_FILE))))
        is_trace = self.targets.kind == "trace"
        swapped = swapped_targets(texts, self.targets.swapped, self.seed)
        view = ReasonView(task, texts, self.completion, swapped) if is_trace else DescribeView(task, texts=texts)
        self.data.connect(train_view=view)

    def target_texts(self) -> Texts:
        """Returns the target texts of the training clips by video id.

        Raises:
            ValueError: If the trace file belongs to other weights, another prompt or another task.
        """
        clips, targets = self.data.clips("train"), self.targets
        if targets.kind == "caption":
            return caption_targets(clips, targets.caption_field)
        if targets.kind == "rationale":
            return rationale_targets(self._trace_store("describe").by_video(kept_only=True))
        if targets.compose == "reason_first":
            return self._own_traces_first()
        return _traces_in(self._trace_store(targets.compose), targets.compose, self.data, self.completion)

    def _own_traces_first(self) -> Texts:
        """Returns own traces that end in the label and, for clips without one, descriptions composed with the label."""
        task, describes = self.data.task, False
        if self.traces_file is not None:  # holds one of the two; the starting weights write the other
            header = TraceStore.open(Path(self.traces_file)).header
            describes = header.prompt_sha == self.trace_generator(task, "describe").header.prompt_sha
        store = self._trace_store("reason", given=not describes)
        traces = _traces_in(store, "reason", self.data, self.completion)
        found = [video_id for video_id, texts in traces.items() if texts]
        composed: Texts = {}
        if len(found) < len(traces):
            store = self._trace_store("describe", given=describes, known=found, name=DESCRIPTIONS_FILE)
            composed = _traces_in(store, "describe", self.data, self.completion)
        texts, shares = traces_or_composed(traces, composed)
        self.print(f"{self.stage_name}: what {len(texts)} clips learn comes {shares}")
        return texts

    def _trace_store(
        self,
        kind: Literal["describe", "reason"],
        given: bool = True,
        known: Collection[str] = (),
        name: str = TRACES_FILE,
    ) -> TraceStore:
        """Returns the texts of a kind from ``traces_file``, or lets the starting weights write them.

        Args:
            kind: Descriptions, or traces with an answer.
            given: Whether ``traces_file``, if set, is to hold texts of this kind.
            known: Ids of clips about which none are written.
            name: Name of the file in the run folder.
        """
        generator = self.trace_generator(self.data.task, kind)
        if self.traces_file is not None and given:
            store = TraceStore.open(Path(self.traces_file))
            store.check(generator.header, allow_external=self.targets.kind == "trace")
            return store
        writer = self.adapter_path or "the base"
        clips = "clip" if not known else f"clip without a trace ({len(known)} have one)"
        self.print(f"{self.stage_name}: {writer} writes {self.traces.samples} {_WRITTEN[kind]} per {clips}")
        return write_run_traces(self.trainer, self.policy, generator, self.data, ("train",), known, name)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        """Runs one optimizer step on the mean negative log-likelihood of the target tokens."""
        texts = batch.valid_texts
        own = count_tokens(texts.loss_mask, texts.answer_mask)
        # Every micro-batch is divided by these counts of the whole step (see functional/losses.py).
        means = (mean_over_ranks(self.trainer, count) for count in (own.reasoning, own.answer))
        counts = TokenCounts(*means)
        losses: list[TextLoss] = []
        greedy: list[Tensor] = []

        def loss(part: VideoBatch) -> Tensor:
            scores = self.vlm.score(self.policy, part.prompts, part.texts)
            losses.append(self.text_loss(scores.logprobs, part.valid_texts, counts))
            greedy.append(greedy_tokens(scores, part.valid_texts))
            return losses[-1].loss

        micro_batches = split_clips(self.vlm, batch, self.updates.clips_per_forward)
        has_samples = bool(counts.total)
        step = self.optimizer_step_on(micro_batches, loss, has_samples)
        if not has_samples:
            return
        sums = torch.stack([*map(sum_detached, zip(*losses, strict=True)), sum_detached(greedy)])
        total, reasoning, answer, right = mean_over_ranks(self.trainer, sums).unbind()
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch))
        self.log("train/loss_reasoning", reasoning, batch_size=len(batch))
        if self.targets.kind == "trace":
            self.log("train/loss_answer", answer, batch_size=len(batch))
        self.log("train/mean_token_accuracy", right / counts.total, batch_size=max(1, len(texts)))
        self.log_dict({"train/grad_norm": step.grad_norm, "train/learning_rate": step.learning_rate})

    def text_loss(self, logprobs: Tensor, texts: TextBatch, counts: TokenCounts) -> TextLoss:
        """Returns the loss of some texts [N, L], divided by the token counts of the whole optimizer step."""
        return weighted_text_loss(
            logprobs,
            texts.loss_mask,
            texts.answer_mask,
            answer_weight=self.targets.answer_weight,
            reasoning_count=counts.reasoning,
            answer_count=counts.answer,
        )

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """Decides about a batch of ``val``; for captions as targets, computes their loss instead."""
        if self.targets.kind != "caption":
            return super().validation_step(batch, batch_idx)
        loss, right, tokens = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        if len(batch) and len(batch.texts) and bool(batch.sample_mask.any()):
            counts = count_tokens(batch.texts.loss_mask, batch.texts.answer_mask)
            tokens = int(batch.texts.loss_mask.sum())
            for part in split_clips(self.vlm, batch, self.evaluation.clips_per_forward):
                scores = self.vlm.score(self.policy, part.prompts, part.texts)
                loss = loss + self.text_loss(scores.logprobs, part.texts, counts).loss
                right = right + greedy_tokens(scores, part.texts) / max(tokens, 1)
        # Every rank logs, also without a caption, since sync_dist is a collective operation.
        self.log("val/loss", loss, prog_bar=True, batch_size=tokens, sync_dist=True)
        self.log("val/mean_token_accuracy", right, batch_size=tokens, sync_dist=True)
        return {"predictions": ()}

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of ``val`` and prints the share of completions that parse."""
        clips = self.metrics_of("val").clips()
        if self.targets.kind == "caption":
            return
        super().on_validation_epoch_end()
        if self.decide.by == "answer" and clips and not self.trainer.sanity_checking:
            rate = 1 - float(self.trainer.callback_metrics["val/unparsed_rate"])
            self.print(f"{self.stage_name}: parse rate on val {rate:.1%} ({clips} clips, step {self.global_step})")


def _no_targets(path: Path) -> str:
    """Returns the error message about a trace file of which no text is left to learn."""
    reasons = Counter(r.reject_reason or "does not end in the label" for r in TraceStore.open(path).records())
    most = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)) or "it holds no text"
    return f"{path}: no training clip has a text left to learn: {most}"


def _traces_in(
    store: TraceStore, compose: Literal["describe", "reason"], data: VideoDataModule, form: CompletionForm
) -> Texts:
    """Returns the target traces that the texts of a store make, by video id of the training clips."""
    return trace_targets(data.clips("train"), store.by_video(kept_only=True), compose, data.label_names, form)


def greedy_tokens(scores: Scores, texts: TextBatch) -> Tensor:
    """Returns the number of target tokens, [], that greedy decoding would choose after the preceding target tokens."""
    return scores.greedy[texts.loss_mask].sum()


def sum_detached(values: Iterable[Tensor]) -> Tensor:
    """Returns the sum of scalars, [] float, without their gradient."""
    return torch.stack(list(values)).sum().detach().float()
