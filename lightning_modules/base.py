"""The base class of all stages: a vision-language model under a trainer, which classifies clips and describes them.

``VLMModule`` implements Lightning's hooks and delegates to objects (a decider, a trace generator) and callbacks
(resuming, unreadable clips). It can be used directly: ``vidreason test`` runs it as zero-shot classifier or, with
``adapter_path``, as the model of any stage except calibration, and ``vidreason predict`` generates descriptions or
traces with it. A training stage subclasses it and adds ``training_step``.

Shape letters: B clips, C classes, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from vidreason.datamodules.base import VideoDataModule, run_seed, video_data
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import VideoBatch
from vidreason.datamodules.unreadable import warn_unreadable
from vidreason.lightning_modules.decisions.deciders import AnswerDecider, DecideOptions, Decider, LikelihoodDecider
from vidreason.lightning_modules.decisions.evaluation import SplitMetrics, evaluate_batch, metric_key
from vidreason.lightning_modules.decisions.predictions import Prediction
from vidreason.lightning_modules.fit.callbacks import fit_callbacks
from vidreason.lightning_modules.fit.fsdp import shard_weights
from vidreason.lightning_modules.fit.optimizer_step import OptimizerStep, StepResult, UpdateOptions, check_trainer
from vidreason.lightning_modules.fit.passes import Workload, plain_workload
from vidreason.lightning_modules.fit.resume import check_attached, check_checkpoint_file, load_weights
from vidreason.lightning_modules.fit.schedule import OptimOptions, count_steps
from vidreason.lightning_modules.fit.stopping import run_unless_stopped
from vidreason.lightning_modules.traces.generation import TraceGenerator, TraceOptions, trace_view
from vidreason.lightning_modules.traces.run_texts import complete_clips
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY, checkpoint_sha
from vidreason.lightning_modules.vlms.loading.master_weights import keep_master_weights
from vidreason.lightning_modules.vlms.pieces import EvalOptions
from vidreason.lightning_modules.weights.export import StartingWeights, export_weights, trained_state
from vidreason.lightning_modules.weights.lineage import Lineage, check_policy, check_task
from vidreason.lightning_modules.weights.model_inputs import describe_inputs
from vidreason.lightning_modules.weights.parameters import set_train_mode, trainable
from vidreason.rewards.completion import THINK_FORM, CompletionForm

T = TypeVar("T")


class VLMModule(L.LightningModule):
    """A vision-language model that decides about clips and generates texts about them.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        adapter_path: The ``adapter/`` or ``weights/`` of an earlier stage; null starts from the base.
        optim: The optimizer and its learning rate.
        updates: Options of an optimizer step.
        eval: Options of forwards without a backward pass.
        decide: Options of decisions about clips.
        traces: Options of the texts that ``vidreason predict``, or a stage without ``traces_file``, writes.
        batch_size: Clips per optimizer step and rank; null takes ``batch_size`` of the data section.
        seed: Seed of all sampling; null takes ``seed_everything``.
        completion: Blocks of a completion: ``mode`` think, no_think or answer_first; ``confidence`` at the end.
    """

    stage: ClassVar[str]
    """Name of the stage; a subclass without it is named after its class."""
    supports_masked_samples: ClassVar[bool] = False
    """True if ``training_step`` leaves out clips that ``sample_mask`` excludes; needed to skip unreadable clips."""
    trained_adapter: ClassVar[str] = POLICY
    """Name in memory of the trained adapter."""
    also_saved_adapter: ClassVar[str | None] = None
    """Name of an adapter that checkpoints store although it is not trained."""
    scales_probabilities: ClassVar[bool] = False
    """True if decisions have probabilities from before and after temperature scaling."""

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        optim: OptimOptions = OptimOptions(),
        updates: UpdateOptions = UpdateOptions(),
        eval: EvalOptions = EvalOptions(),
        decide: DecideOptions = DecideOptions(),
        traces: TraceOptions = TraceOptions(),
        batch_size: int | None = None,
        seed: int | None = None,
        completion: CompletionForm = THINK_FORM,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # Checkpoints hold trained parameters only.
        self.vlm = vlm
        self.adapter_path = adapter_path
        self.optim = optim
        self.updates = updates
        self.evaluation = eval  # ``eval`` is a method of every module.
        self.decide, self.traces = decide, traces
        self.batch_size = batch_size
        self.seed = run_seed(seed)
        self.completion = completion
        self.model: nn.Module | None = None
        self.adapter_options = vlm.lora  # Of the adapter that is trained or run; None for the weights themselves.
        self.metrics = nn.ModuleDict()
        self.checkpoint_to_resume: Path | None = None  # Checked before texts are written; Lightning names it later.
        self.weights_to_load: Path | None = None  # A checkpoint of which a fit takes no more than the weights.
        self._start: StartingWeights | None = None
        self._written: frozenset[str] = frozenset()  # Clips whose texts an earlier ``predict`` has written.
        self._fit_callbacks = fit_callbacks()

    # ------------------------------------------------------------------ where it runs

    @property
    def stage_name(self) -> str:
        """Name of the stage in ``vidreason.json`` and in checkpoints."""
        return "zero_shot" if type(self) is VLMModule else str(getattr(type(self), "stage", type(self).__name__))

    @property
    def policy(self) -> nn.Module:
        """The model that ``configure_model`` has built."""
        assert self.model is not None, "configure_model has not run yet"
        return self.model

    @property
    def data(self) -> VideoDataModule:
        """The data module of the trainer."""
        return video_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callbacks that every fit needs, except where the trainer has one of the same class.

        Lightning calls this first in every run. The objects are always the same, since new ones would have no state.
        """
        check_trainer(self.trainer, self.stage_name, self.automatic_optimization, self.updates)
        present: Sequence[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [own for own in self._fit_callbacks if not any(isinstance(other, type(own)) for other in present)]

    # ------------------------------------------------------------------ what a clip shows

    def setup(self, stage: str) -> None:
        """Connects the data module; the data are set up already, the weights are not built yet."""
        check_attached(self.trainer, self._fit_callbacks, type(self).__name__)
        data, task = self.data, self.data.task
        self.read_artefacts(task)
        check_task(self.adapter_path, task, refuse=stage != "fit")  # A fit may begin with weights of another task.
        if stage == "predict":
            self.trainer.predict_loop.return_predictions = False  # Callbacks write them; they need not stay in memory.
            view = self.trace_generator(task).view
            data.connect(batch_size=self.batch_size, train_view=view, eval_view=view)
            self._written = complete_clips(self.trainer, data, data.predict_splits, self.traces.samples)
            return
        data.connect(batch_size=self.batch_size, train_view=self.train_view(task), eval_view=self.decider(task).view)
        splits, scaled = data.test_split_names if stage == "test" else ("val",), self.scales_probabilities
        known = getattr(self.decider(task), "gives_probabilities", True)
        self.metrics = nn.ModuleDict({metric_key(s): SplitMetrics(data.label_names, scaled, known) for s in splits})

    def read_artefacts(self, task: Task) -> None:
        """Reads ``vidreason.json`` of earlier stages before weights are built; does nothing by default."""

    def train_view(self, task: Task) -> ClipView:
        """Returns the prompts and target texts of training."""
        return self.decider(task).view

    def decider(self, task: Task) -> Decider:
        """Returns the object that decides about clips, with the classes and prompts of ``task``."""
        if self.decide.by == "likelihood":
            return LikelihoodDecider(task)
        return AnswerDecider(task, self.decide.samples, self.decide.sampling, self.seed, self.completion)

    def trace_generator(self, task: Task, kind: Literal["describe", "reason"] | None = None) -> TraceGenerator:
        """Returns the generator of texts of a kind by the starting weights; None is ``traces.kind``."""
        view = trace_view(task, kind or self.traces.kind, self.traces.label_hint, self.completion)
        size = self.evaluation.clips_per_forward
        return TraceGenerator(self.vlm, view, self.traces, self.completion, self.seed, self.start.sha, task.sha(), size)

    def workload(self, data: VideoDataModule, command: str) -> Workload:
        """Returns the passes of a command over ``data``, before weights are built and texts are written."""
        return plain_workload(self, data, command)

    # ------------------------------------------------------------------ weights

    @property
    def start(self) -> StartingWeights:
        """The weights that the stage starts from; read once, since the stage may later write to the same folder."""
        if self._start is None or self._start.path != self.adapter_path:
            self._start = StartingWeights.read(self.adapter_path)
        return self._start

    def configure_model(self) -> None:
        """Builds the weights once, completes the views with generated texts, and shards the weights."""
        if self.model is None:
            self.model = self.build_model()
            if self.trainer.state.fn == TrainerFn.FITTING:
                keep_master_weights(self.model)
            set_train_mode(self.model)  # Frozen parts (a tower's BatchNorm) stay in eval mode.
        path, self.checkpoint_to_resume = self.checkpoint_to_resume, None
        if path is not None:
            check_checkpoint_file(path, self, self.trainer)
        if self.trainer.state.fn != TrainerFn.PREDICTING:
            self.prepare_views()
        if self.weights_to_load is not None:
            load_weights(self.weights_to_load, self)  # After texts are written, as Lightning restores a checkpoint.
        frozen = self.vlm.vision_modules if self.vlm.freeze_vision else ()
        shard_weights(self.trainer.strategy, self.models(), frozen)

    def build_model(self) -> nn.Module:
        """Returns the weights that the stage starts from.

        Raises:
            ValueError: If ``adapter_path`` belongs to another base, has other LoRA options, or is a calibrator.
        """
        check_policy(self.adapter_path)
        return self.vlm.build(self.adapter_path)

    def models(self) -> Sequence[nn.Module]:
        """Returns the models that a sharding strategy shards, the trained model first."""
        return [self.policy]

    def prepare_views(self) -> None:
        """Completes the views with texts that the weights generate; called before loaders are made."""

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of all trainable parameters and its schedule."""
        batches = len(self.data.train_dataloader())
        return self.optim.build(self, count_steps(self.trainer, batches, self.updates.per_batch))

    def optimizer_step_on(
        self, micro_batches: Sequence[T], loss: Callable[[T], Tensor], has_samples: bool = True
    ) -> StepResult:
        """Runs one optimizer step on micro-batches; :class:`OptimizerStep` documents the arguments."""
        parameters, norm = trainable(self), self.updates.max_grad_norm
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        step = OptimizerStep(self.trainer.strategy, optimizer, schedule, parameters, norm)
        return step(micro_batches, loss, has_samples)

    # ------------------------------------------------------------------ deciding

    def metrics_of(self, split: str) -> SplitMetrics:
        """Returns the metrics of a split."""
        metrics = self.metrics[metric_key(split)]
        assert isinstance(metrics, SplitMetrics)
        return metrics

    def evaluate(self, batch: VideoBatch, split: str) -> dict[str, tuple[Prediction, ...]]:
        """Decides about a batch and returns the predictions for callbacks."""
        decider, metrics = self.decider(self.data.task), self.metrics_of(split)
        size = self.evaluation.clips_per_forward
        return {"predictions": evaluate_batch(decider, self.vlm, self.policy, batch, split, metrics, size)}

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """Decides about a batch of ``val``; a rank of several that has received a signal skips it."""
        nothing: dict[str, tuple[Prediction, ...]] = {"predictions": ()}
        return run_unless_stopped(self.trainer.strategy, partial(self.evaluate, batch, "val"), nothing)

    def test_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Decides about a batch of a test split."""
        return self.evaluate(batch, self.data.test_split_names[dataloader_idx])

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of ``val``."""
        self.log_dict(self.metrics_of("val").compute("val"))

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of every test split."""
        for split in self.data.test_split_names:
            self.log_dict(self.metrics_of(split).compute(split))

    def predict_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Generates texts about a batch and returns the records for ``callbacks/trace_writer.py``."""
        warn_unreadable(batch, "no text written")
        if not bool(batch.sample_mask.any()) or self._written.issuperset(batch.video_ids):
            return {"traces": ()}
        records = self.trace_generator(self.data.task).records(self.policy, batch, self.data.label_names)
        return {"traces": tuple(record for record in records if record.video_id not in self._written)}

    # ------------------------------------------------------------------ checkpoints and artefacts

    def stateful(self) -> Mapping[str, Stateful]:
        """Returns the objects whose state checkpoints store, by name; their state must be equal on every rank."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes all weights that are not trained; the base is identified by its hash."""
        checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"], self.also_saved_adapter)

    def lineage(self, folder: Path) -> Lineage:
        """Returns the origin of the weights that are written to ``folder``."""
        # A new adapter on full weights of an earlier stage has these weights as its base.
        on_weights = isinstance(self.policy, PeftModel) and self.start.full
        return Lineage(
            stage=self.stage_name,
            base_sha=checkpoint_sha(str(self.adapter_path)) if on_weights else self.vlm.base_sha(),
            parent_sha=self.start.sha,
            task_sha=self.data.task.sha(),
            label_names=tuple(self.data.label_names),
            definitions=tuple(spec.definition for spec in self.data.task.classes),
            seed=self.seed,
            global_step=self.trainer.global_step,
            inputs=describe_inputs(self.vlm, self.data.frames, self.decider(self.data.task).view),
            extra={} if self.vlm.note is None else {"note": self.vlm.note},
        )

    def export(self, run_dir: Path) -> Path:
        """Writes the trained weights to ``run_dir/adapter`` (or ``run_dir/weights``) and returns the folder."""
        return export_weights(self.policy, run_dir, self.lineage(run_dir).info(), self.vlm.processor)

    def export_adapter(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained adapter to ``folder`` for ``adapter_path``, with the weights ``state`` if given."""
        save_adapter(self.policy, folder, self.trained_adapter, self.lineage(folder).info(), state=state)
