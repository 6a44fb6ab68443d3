"""Supervised fine-tuning on texts: captions, the model's own rationales, traces, or labels.

RB-FT (arXiv 2511.15923) is rationale, then label; DeepIntuit (arXiv 2603.10300) begins with traces (*cold start*).
Deviations from the papers:
    1. The cold start may compose its traces from the model's own descriptions and the training labels; no teacher.
    2. Reasoning and answer tokens are averaged apart (``answer_weight``), see ``functional/losses.py``.
    3. K texts of a clip stand behind one encoding of its video.

The loss is a mean over all target tokens of the optimizer step. Its token counts must be known before the first
backward, so one batch on each rank makes one optimizer step: ``accumulate_grad_batches`` is refused, ``batch_size`` is
the number of clips per step and rank.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, DescribeView, LabelView
from vidreason.datamodules.traces import TraceStore
from vidreason.datamodules.types import TextBatch, VideoBatch
from vidreason.lightning_modules.base import GREEDY, Decide, VLMModule
from vidreason.lightning_modules.functional.losses import TextLoss, weighted_text_loss
from vidreason.lightning_modules.functional.reductions import TokenCounts, count_tokens
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions, Writer
from vidreason.lightning_modules.sft_targets import Texts, caption_targets, rationale_targets, trace_targets
from vidreason.lightning_modules.vlms.base import VLM, Scores
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.work import Work, epochs_to_take
from vidreason.rewards.completion import THINK_FORM, CompletionForm
from vidreason.run_folder import TRACES_FILE


class RationaleSFTModule(VLMModule):
    """Learns texts about videos by next-token prediction, end of turn included.

    Args:
        target: What is learnt. ``caption``: a column of the manifest; ``rationale``: the model's own descriptions;
            ``trace``: reasoning and answer in the grammar of ``rewards/completion.py``; ``label``: the class name.
        traces: Trace file for ``rationale`` and ``trace``; null lets the starting weights write it into the run folder.
        compose: How a ``trace`` is made: from a description and the training label, or from the model's own traces
            that end in the label.
        caption_field: Manifest column for ``caption``.
        answer_weight: Weight of the answer's mean loss beside the reasoning's; null is one mean over all tokens.
        min_steps: Optimizer steps to take at least: epochs are added where the clips are few.
        vlm: See ``VLMModule``; so are all arguments below.
        adapter_path: Start from these weights.
        optimizer: The optimizer.
        schedule: Learning-rate schedule.
        warmup: Share or number of warm-up steps.
        decide: How ``val`` is decided; ``caption`` watches the loss on the captions of ``val`` instead.
        samples: Completions per clip for ``decide: answer``.
        sampling: Sampling for ``decide: answer``.
        predict: What ``predict`` writes.
        traces_sampled: How texts are sampled where ``traces`` is null.
        batch_size: Clips per training batch.
        seed: Seed of all sampling.
        completion: Which blocks the target ``trace`` has.
    """

    weighs_clips: ClassVar[bool] = True

    def __init__(
        self,
        vlm: VLM,
        target: Literal["caption", "rationale", "trace", "label"] = "label",
        traces: str | None = None,
        compose: Literal["describe", "reason"] = "describe",
        caption_field: str = "caption",
        answer_weight: float | None = 1.0,
        min_steps: int = 0,
        adapter_path: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        decide: Decide = "likelihood",
        samples: int = 1,
        sampling: Sampling = GREEDY,
        predict: Literal["describe", "reason"] = "describe",
        traces_sampled: TraceOptions = OWN_TRACES,
        batch_size: int | None = None,
        seed: int | None = None,
        completion: CompletionForm = THINK_FORM,
    ) -> None:
        super().__init__(
            vlm,
            adapter_path,
            optimizer,
            schedule,
            warmup,
            decide,
            samples,
            sampling,
            predict,
            traces_sampled=traces_sampled,
            batch_size=batch_size,
            seed=seed,
            completion=completion,
        )
        self.target = target
        self.traces = traces
        self.compose = compose
        self.caption_field = caption_field
        self.answer_weight = answer_weight
        self.min_steps = min_steps

    @property
    def stage_name(self) -> str:
        """``sft_caption``, ``sft_rationale``, ``sft_trace`` or ``sft_label``."""
        return f"sft_{self.target}"

    # ------------------------------------------------------------------ targets

    def setup(self, stage: str) -> None:
        """Refuses gradient accumulation; then as every stage."""
        if stage == "fit":
            self.refuse_accumulation()
        super().setup(stage)

    def train_view(self) -> ClipView:
        """Labels are known at once; other targets follow in ``prepare_views``."""
        return LabelView(self.task)

    def eval_view(self) -> ClipView:
        """The captions of ``val``, or what the decision needs."""
        if self.target == "caption" and self.fitting and not self.data.brings_texts:
            return DescribeView(self.task, texts=caption_targets(self.data.clips("val"), self.caption_field))
        return super().eval_view()

    def prepare_views(self) -> None:
        """Looks the target texts up, letting the starting weights write them where no file is given."""
        if self.target == "label" or self.data.brings_texts or not self.fitting:
            return
        texts = self.target_texts()
        clips = self.data.clips("train")
        usable = sum(bool(texts.get(clip.video_id)) for clip in clips)
        number = sum(len(texts.get(clip.video_id, ())) for clip in clips)
        self.print(f"{self.stage_name}: {number} target texts about {usable} of {len(clips)} training clips")
        if not usable and self.target == "caption":
            raise ValueError(f"no training clip has a text in the manifest's column {self.caption_field!r}")
        if not usable:
            path = Path(self.traces) if self.traces is not None else self.run_dir / TRACES_FILE
            reasons = Counter(r.reject_reason or "does not end in the label" for r in TraceStore.open(path).records())
            most = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)) or "it holds no text"
            raise ValueError(f"{path}: no training clip has a text left to learn: {most}")
        view = self.reason_view(texts) if self.target == "trace" else DescribeView(self.task, texts=texts)
        self.data.connect(train_view=view)

    def target_texts(self) -> Texts:
        """Returns the target texts of the training clips by video id."""
        clips = self.data.clips("train")
        if self.target == "caption":
            return caption_targets(clips, self.caption_field)
        records = self.own_texts().by_video(kept_only=True)
        if self.target == "rationale":
            return rationale_targets(records)
        return trace_targets(clips, records, self.compose, self.data.label_names, self.completion)

    def own_texts(self) -> TraceStore:
        """Opens the trace file, or lets the starting weights write one.

        Raises:
            ValueError: The file is of other weights, another prompt or another task.
        """
        writer = self.target_writer()
        if self.traces is not None:
            store = TraceStore.open(Path(self.traces))
            store.check(writer.header, allow_external=self.target == "trace")
            return store
        path = self.run_dir / TRACES_FILE
        start = self.adapter_path or "the base"
        self.print(f"{self.stage_name}: no traces given; {start} writes {writer.options.samples} per clip into {path}")
        return self.write_traces(writer, ("train",))

    def target_writer(self) -> Writer:
        """Returns who writes, or should have written, the target texts."""
        options = self.trace_options
        if self.target == "trace" and self.compose == "reason":
            return self.writer(self.reason_view(), options)
        return self.writer(DescribeView(self.task, label_hint=options.label_hint), options)

    # ------------------------------------------------------------------ training

    def total_steps(self) -> int:
        """Optimizer steps of this fit, at least ``min_steps`` unless ``trainer.max_steps`` forbids it."""
        trainer = self.trainer
        steps = super().total_steps()
        if steps >= self.min_steps or trainer.max_steps != -1:
            return steps
        epochs = int(trainer.max_epochs or 1)
        wanted = epochs_to_take(epochs, steps, self.min_steps, trainer.check_val_every_n_epoch or 1)
        self.print(f"{self.stage_name}: {wanted} instead of {epochs} epochs, to take at least {self.min_steps} steps")
        trainer.fit_loop.max_epochs = wanted
        return super().total_steps()

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the target tokens of the whole optimizer step."""
        scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
        texts = batch.valid_texts
        loss = self.text_loss(scores.logprobs, texts)
        self.log("train/loss", loss.loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log("train/loss_reasoning", loss.reasoning, batch_size=len(batch))
        self.log_token_accuracy("train", scores, texts)
        if self.target == "trace":
            self.log("train/loss_answer", loss.answer, batch_size=len(batch))
        return loss.loss

    def text_loss(self, logprobs: Tensor, texts: TextBatch, over_ranks: bool = True) -> TextLoss:
        """Returns the loss of one batch.

        Args:
            logprobs: [N, L].
            texts: N target texts.
            over_ranks: Its means run over the batches of all ranks, each of which must have one.
        """
        counts = count_tokens(texts.loss_mask, texts.answer_mask)
        if over_ranks:
            counts = TokenCounts(self.mean_over_ranks(counts.reasoning), self.mean_over_ranks(counts.answer))
        return weighted_text_loss(
            logprobs,
            texts.loss_mask,
            texts.answer_mask,
            answer_weight=self.answer_weight,
            reasoning_count=counts.reasoning,
            answer_count=counts.answer,
        )

    def log_token_accuracy(self, split: str, scores: Scores, texts: TextBatch) -> None:
        """Logs the share of target tokens that greedy decoding would write behind the target so far."""
        self.log(f"{split}/mean_token_accuracy", token_accuracy(scores, texts), batch_size=max(1, len(texts)))

    # ------------------------------------------------------------------ watching

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """Decides about a batch of ``val``; for ``caption`` the loss on its captions."""
        if self.target != "caption":
            return super().validation_step(batch, batch_idx)
        loss, right, tokens = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        if len(batch) and len(batch.texts) and batch.sample_mask.all():
            scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
            loss = self.text_loss(scores.logprobs, batch.texts, over_ranks=False).loss
            right, tokens = token_accuracy(scores, batch.texts), int(batch.texts.loss_mask.sum())
        # all ranks log, also those without a caption: they add up what they log
        self.log("val/loss", loss, prog_bar=True, batch_size=tokens, sync_dist=True)
        self.log("val/mean_token_accuracy", right, batch_size=tokens, sync_dist=True)
        return {"predictions": ()}

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/*``, and says how many completions parse."""
        if self.target == "caption":
            return
        metrics = self.metrics_of("val")
        clips = int(metrics.confusion().sum())
        if self.decide == "answer" and clips and not self.trainer.sanity_checking:
            rate = 1 - float(metrics.compute()["unparsed_rate"])
            self.print(f"{self.stage_name}: parse rate on val {rate:.1%} ({clips} clips, step {self.global_step})")
        super().on_validation_epoch_end()

    # ------------------------------------------------------------------ how much there is to do

    def work(self, command: str, data: VideoDataModule, trainer: L.Trainer) -> Work | None:
        """As for every stage, with the texts that it has to write itself."""
        work = super().work(command, data, trainer)
        if work is None or command != "fit" or self.target not in ("rationale", "trace") or self.traces is not None:
            return work
        return work + self.writing_work(len(data.clips("train")) / trainer.world_size)

    def learning_work(self, clips: float, classes: int) -> Work:
        """One text behind a clip, or all that were sampled."""
        texts = self.trace_options.samples if self.target in ("rationale", "trace") else 1
        return Work(clips_learnt=clips, texts_learnt=clips * texts)


def token_accuracy(scores: Scores, texts: TextBatch) -> Tensor:
    """Returns the share of target tokens that greedy decoding would write behind the target so far."""
    return scores.greedy[texts.loss_mask].sum() / max(int(texts.loss_mask.sum()), 1)
