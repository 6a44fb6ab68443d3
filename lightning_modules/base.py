"""What all stages share: weights, optimizer, checkpoints, and deciding about clips.

``VLMModule`` is complete by itself: ``vidreason test`` runs it as zero-shot classifier (or, with ``adapter_path``, as
the model of any stage but calibration), ``vidreason predict`` lets it write rationales or traces. A training stage
subclasses it and adds ``training_step``.

Shape letters: B clips, C classes, N texts, L tokens, K samples per clip.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_scheduler

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, DescribeView, LabelScoringView, ReasonView
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceStore
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.deciding import closed_set, decide_by_answers, decide_by_probs, update_metrics
from vidreason.lightning_modules.functional.reductions import average_over_traces, label_log_probabilities
from vidreason.lightning_modules.lineage import Lineage
from vidreason.lightning_modules.metrics import ClassificationMetrics
from vidreason.lightning_modules.own_traces import (
    OWN_TRACES,
    TRACES_FILE,
    TraceOptions,
    Writer,
    report_failed,
    write_missing,
)
from vidreason.lightning_modules.predictions import Decisions, Prediction, decided, undecided
from vidreason.lightning_modules.rollout import Completion, generate_rollouts
from vidreason.lightning_modules.trained_weights import grad_norm, set_train_mode, trainable
from vidreason.lightning_modules.vlms.adapters import adapter_sha, is_adapter_folder, save_adapter, save_weights
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.building import POLICY, checkpoint_sha
from vidreason.lightning_modules.vlms.generation import Sampling

Decide = Literal["likelihood", "answer"]
GREEDY = Sampling(temperature=0.0)
ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "weights"


class VLMModule(L.LightningModule):
    """A vision-language model that decides about clips and writes about them; the base of every stage.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        adapter_path: ``adapter/`` or ``weights/`` of an earlier stage; null starts from the base.
        optimizer: The optimizer, without its parameters.
        schedule: Learning rate over the optimizer steps.
        warmup: Warm-up, as a share of all optimizer steps (below 1) or as a number of them (1 and above).
        decide: ``likelihood``: sequence log-likelihood of every class name behind one prefill; ``answer``: generate
            ``samples`` completions and let their answers vote (unparseable ones count as wrong).
        samples: Completions per clip for ``answer``.
        sampling: How completions for ``answer`` are sampled; temperature 0 is greedy.
        predict: What ``vidreason predict`` writes: descriptions or traces that end in an answer.
        traces_sampled: How ``predict``, and a stage whose ``traces`` are null, sample their texts.
        batch_size: Clips per training batch; null takes the data section's. It belongs to the method, so that any data
            section will do.
        seed: Seed of all sampling; null takes ``seed_everything``'s.
    """

    stage: ClassVar[str] = "zero_shot"

    def __init__(
        self,
        vlm: VLM,
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
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup must be a share of the steps or a number of them, got {warmup}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.strict_loading = False  # checkpoints hold trainable parameters only
        self.vlm = vlm
        self.adapter_path = adapter_path
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.decide: Decide = decide
        self.samples = samples
        self.sampling = sampling
        self.predict = predict
        self.trace_options = traces_sampled
        self.batch_size = batch_size
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.model: nn.Module | None = None
        self.metrics = nn.ModuleDict()
        self._written: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ what the stage is and sees

    @property
    def stage_name(self) -> str:
        """Name of the stage, for lineage and to keep checkpoints of different stages apart."""
        return self.stage

    @property
    def policy(self) -> nn.Module:
        """The weights; born in ``configure_model``."""
        assert self.model is not None, "configure_model has not run yet"
        return self.model

    @property
    def data(self) -> VideoDataModule:
        """The data module that the trainer runs on."""
        data: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, VideoDataModule):
            raise ValueError(f"the stages read clips from a VideoDataModule, got {type(data).__name__}")
        return data

    @property
    def task(self) -> Task:
        """The task of the data module."""
        return self.data.task

    @property
    def run_dir(self) -> Path:
        """The stage's run folder."""
        return Path(self.trainer.default_root_dir)

    @property
    def fitting(self) -> bool:
        """Whether the trainer runs ``fit``."""
        return self.trainer.state.fn == TrainerFn.FITTING

    def setup(self, stage: str) -> None:
        """Gives the data module its views; the data are ready here, the weights are not."""
        if self.batch_size is not None:
            self.data.batch_size = self.batch_size
        if stage == "predict":
            self.trainer.predict_loop.return_predictions = False  # they go to the callbacks, not into memory
            self.data.set_view(self.written_view())
            self.data.set_eval_view(self.written_view())
            return
        self.data.set_view(self.train_view())
        self.data.set_eval_view(self.eval_view())
        splits = self.data.test_split_names if stage == "test" else ("val",)
        self.metrics = nn.ModuleDict({metric_key(s): self.new_metrics() for s in splits})

    def train_view(self) -> ClipView:
        """What a clip shows in training."""
        return self.eval_view()

    def eval_view(self) -> ClipView:
        """What a clip shows when it is decided."""
        return LabelScoringView(self.task) if self.decide == "likelihood" else ReasonView(self.task)

    def written_view(self) -> ClipView:
        """What a clip shows when a rationale or trace is written about it."""
        if self.predict == "reason":
            return ReasonView(self.task)
        return DescribeView(self.task, label_hint=self.trace_options.label_hint)

    # ------------------------------------------------------------------ weights

    def configure_model(self) -> None:
        """Builds the weights once, then lets the stage complete its views with texts that only weights can write."""
        if self.model is None:
            self.model = self.build_model()
        if self.trainer.state.fn != TrainerFn.PREDICTING:
            self.prepare_views()

    def build_model(self) -> nn.Module:
        """Returns the weights that the stage starts from."""
        return self.vlm.build(self.adapter_path)

    def prepare_views(self) -> None:
        """Completes the views with texts that the weights have to write; called before the loaders are made."""

    def on_train_start(self) -> None:
        """Puts what is trained into train mode; frozen parts (a tower's BatchNorm) stay as they are in evaluation."""
        set_train_mode(self.policy)

    def writer(self, view: ClipView, options: TraceOptions) -> Writer:
        """Returns the writer of the weights that the stage starts from."""
        return Writer(
            view=view,
            options=options,
            base_sha=self.vlm.base_sha(),
            adapter_sha=self.parent_sha,
            task_sha=self.task.sha(),
            sample=self.sample_texts,
        )

    @property
    def parent_sha(self) -> str:
        """Hash of the weights that the stage starts from; empty for the base."""
        return adapter_sha(self.adapter_path) if self.adapter_path is not None else ""

    def sample_texts(self, batch: VideoBatch, options: TraceOptions) -> Sequence[Sequence[Completion]]:
        """Samples texts for every clip of a batch, [B][K]; the noise depends on the seed, the clip and the sample."""
        assert batch.prompts is not None
        return generate_rollouts(
            self.vlm, self.policy, batch.prompts, batch.clips, options.samples, options.sampling, self.seed
        ).completions

    def write_traces(self, writer: Writer, splits: Sequence[str], known: Collection[str] = ()) -> TraceStore:
        """Lets the starting weights write the texts about ``splits`` that the run folder lacks; the first rank writes.

        Called in ``configure_model``, before a checkpoint is restored, so that a resumed run's texts have one author.

        Args:
            writer: Who writes.
            splits: Names of the splits.
            known: Ids of clips whose texts are elsewhere.
        """
        path = self.run_dir / TRACES_FILE
        if self.trainer.is_global_zero:
            if next(self.policy.parameters()).device != self.device:
                self.policy.to(self.device)
            with torch.device("cpu"), self.forward_context():  # the strategy may have set another default device
                write_missing(path, writer, self.data, splits, self.device, known)
        self.trainer.strategy.barrier("write_traces")
        return TraceStore.open(path)

    def forward_context(self) -> AbstractContextManager[object]:
        """The trainer's precision context, for forwards outside its loops."""
        context: AbstractContextManager[object] = self.trainer.precision_plugin.forward_context()
        return context

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over all trainable parameters and a schedule stepped after every optimizer step."""
        parameters = trainable(self)
        if not parameters:
            raise ValueError("nothing to train: give the vlm section lora options or leave its weights unfrozen")
        optimizer = self.optimizer_factory(parameters)
        total = self.total_steps()
        warmup = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of this fit.

        Raises:
            ValueError: Where the trainer runs without end and the schedule needs one.
        """
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs to know where it ends")
        return max(1, int(total))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped (automatic optimisation)."""
        if self.automatic_optimization:
            self.log("train/grad_norm", grad_norm(trainable(self)))
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def clip_gradients_(self, max_norm: float) -> Tensor:
        """Clips the gradient of all trainable parameters in place; returns its norm before, a scalar.

        Args:
            max_norm: Largest norm, or 0 to leave the gradient as it is.
        """
        parameters = trainable(self)
        norm = grad_norm(parameters)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # ------------------------------------------------------------------ deciding

    def decide_batch(self, batch: VideoBatch) -> Decisions:
        """Decides about the B readable clips of a batch."""
        assert batch.prompts is not None
        if self.decide == "answer":
            options = TraceOptions(samples=self.samples, sampling=self.sampling)
            return decide_by_answers(self.sample_texts(batch, options), self.data.label_names)
        assert batch.texts is not None
        names = self.data.label_names
        scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
        asked = closed_set(scores.logprobs, batch.texts, len(names))
        logprobs = average_over_traces(label_log_probabilities(asked.scores), asked.owner, len(batch))
        return decide_by_probs(logprobs.exp(), names)

    def evaluate_batch(self, batch: VideoBatch, split: str) -> dict[str, tuple[Prediction, ...]]:
        """Decides about a batch and updates the split's metrics; clips that could not be read count as wrong.

        Returns:
            ``{"predictions": ...}``, one line for every clip of the batch, for callbacks.
        """
        names = self.data.label_names
        predictions = [undecided(failed, split, names) for failed in batch.failed]
        decisions = self.decide_batch(batch) if len(batch) else None
        if decisions is not None:
            predictions += [decided(clip, split, b, decisions, names) for b, clip in enumerate(batch.clips)]
        self.count(batch, decisions, split)
        return {"predictions": tuple(predictions)}

    def count(self, batch: VideoBatch, decisions: Decisions | None, split: str) -> None:
        """Adds the labelled clips of a batch, readable or not, to the split's metrics."""
        update_metrics(self.metrics_of(split), batch, decisions, self.data.label_names, self.device)

    def new_metrics(self) -> ClassificationMetrics:
        """Returns the metrics of one split."""
        return ClassificationMetrics(self.data.label_names)

    def metrics_of(self, split: str) -> ClassificationMetrics:
        """Returns the metrics of a split."""
        metrics = self.metrics[metric_key(split)]
        assert isinstance(metrics, ClassificationMetrics)
        return metrics

    def log_metrics(self, split: str) -> None:
        """Logs the metrics of a split as ``<split>/<name>`` and resets them."""
        metrics = self.metrics_of(split)
        if not int(metrics.confusion().sum()):
            return
        self.log_dict({f"{split}/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """Decides about a batch of ``val``."""
        return self.evaluate_batch(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/*``."""
        self.log_metrics("val")

    def test_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Decides about a batch of a test split."""
        return self.evaluate_batch(batch, self.data.test_split_names[dataloader_idx])

    def on_test_epoch_end(self) -> None:
        """Logs ``<split>/*`` of every test split."""
        for split in self.data.test_split_names:
            self.log_metrics(split)

    # ------------------------------------------------------------------ writing

    def on_predict_start(self) -> None:
        """Finds out what the run folder holds already; those clips are not written again."""
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
        report_failed(batch)
        if all(clip.video_id in self._written for clip in batch.clips):
            return {"traces": ()}
        records = self.predict_writer().records(batch, self.data.label_names)
        return {"traces": tuple(r for r in records if r.video_id not in self._written)}

    def predict_writer(self) -> Writer:
        """Returns the writer of ``vidreason predict``."""
        return self.writer(self.written_view(), self.trace_options)

    # ------------------------------------------------------------------ artefacts

    def lineage(self) -> Lineage:
        """Returns where the weights come from."""
        on_weights = isinstance(self.policy, PeftModel) and self.starts_from_weights
        return Lineage(
            stage=self.stage_name,
            base_sha=checkpoint_sha(str(self.adapter_path)) if on_weights else self.vlm.base_sha(),
            parent_sha=self.parent_sha,
            task_sha=self.task.sha(),
            label_names=tuple(self.data.label_names),
            seed=self.seed,
            global_step=self.trainer.global_step,
        )

    @property
    def starts_from_weights(self) -> bool:
        """Whether ``adapter_path`` is a folder of full weights."""
        return self.adapter_path is not None and not is_adapter_folder(self.adapter_path)

    def export(self, run_dir: Path) -> Path:
        """Writes the trained weights for the next stage.

        Args:
            run_dir: The run folder.

        Returns:
            ``run_dir/adapter``, or after full fine-tuning ``run_dir/weights``, a model folder.
        """
        info = self.lineage().info()
        if isinstance(self.policy, PeftModel):
            save_adapter(self.policy, run_dir / ADAPTER_FOLDER, POLICY, info)
            return run_dir / ADAPTER_FOLDER
        assert isinstance(self.policy, PreTrainedModel)
        save_weights(self.policy, run_dir / WEIGHTS_FOLDER, info)
        self.vlm.processor.save_pretrained(run_dir / WEIGHTS_FOLDER)
        return run_dir / WEIGHTS_FOLDER

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trainable parameters (and their modules' buffers) only, and writes down which stage they belong to."""
        checkpoint["vidreason_stage"] = self.stage_name
        keep = {name for name, p in self.named_parameters() if p.requires_grad}
        modules = {name.rpartition(".")[0] for name in keep}
        keep |= {name for name, _ in self.named_buffers() if name.rpartition(".")[0] in modules}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another stage.

        Raises:
            ValueError: Naming both stages and what to do.
        """
        found = checkpoint.get("vidreason_stage")
        if found != self.stage_name:
            raise ValueError(
                f"this checkpoint was written by stage {found!r}, but the stage running is {self.stage_name!r}: "
                "--ckpt_path only resumes the same stage; hand weights over with --model.init_args.adapter_path"
            )


def metric_key(split: str) -> str:
    """Returns a name under which a split's metrics can be a submodule."""
    return split.replace(".", "_")
