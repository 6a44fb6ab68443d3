"""A stage's weights: built once, trained and handed on; ``base.py`` adds what the stage does with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_scheduler

from vidreason.datamodules.base import VideoDataModule, run_seed
from vidreason.datamodules.clips.samplers import batches_of_an_epoch
from vidreason.datamodules.task import Task
from vidreason.lightning_modules.lineage import REVIEWED, Lineage
from vidreason.lightning_modules.parameters import grad_norm, set_train_mode, trainable
from vidreason.lightning_modules.unread_clips import UnreadClipsModule
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions, save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY, checkpoint_sha
from vidreason.lightning_modules.vlms.loading.weight_folders import (
    adapter_sha,
    is_adapter_folder,
    read_info,
    save_weights,
)
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded
from vidreason.run_folder import ADAPTER_FOLDER, WEIGHTS_FOLDER


class _Start(NamedTuple):
    """The weights that a stage starts from."""

    path: str | None
    sha: str
    full: bool


class WeightsModule(UnreadClipsModule):
    """Weights of a vision-language model under a trainer.

    Args:
        vlm: The model family and checkpoint.
        adapter_path: ``adapter/`` or ``weights/`` of an earlier stage; null starts from the base.
        optimizer: The optimizer, without its parameters.
        schedule: Learning rate over the optimizer steps.
        warmup: Warm-up, as a share of all optimizer steps (below 1) or as a number of them (1 and above).
        seed: Seed of all sampling; null takes ``seed_everything``'s.
    """

    stage: ClassVar[str]
    """Name of the stage; a subclass that sets none is called by its class's name."""
    trained_adapter: ClassVar[str] = POLICY

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup must be a share of the steps or a number of them, got {warmup}")
        self.strict_loading = False  # checkpoints hold trainable parameters only
        self.vlm = vlm
        self.adapter_path = adapter_path
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.seed = run_seed(seed)
        self.model: nn.Module | None = None
        self._started_from: _Start | None = None

    # ------------------------------------------------------------------ where it runs

    @property
    def stage_name(self) -> str:
        """Name of the stage, for lineage and to keep checkpoints of different stages apart."""
        name: str = getattr(type(self), "stage", type(self).__name__)
        return name

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

    # ------------------------------------------------------------------ weights

    def configure_model(self) -> None:
        """Builds the weights once, then lets the stage complete its views with texts that only weights can write."""
        if self.model is None:
            self.model = self.build_model()
        self.refuse_other_fit()
        if self.trainer.state.fn != TrainerFn.PREDICTING:
            self.prepare_views()
        self.shard_weights()

    def weights(self) -> Sequence[nn.Module]:
        """Returns what was built."""
        return [self.policy]

    def build_model(self) -> nn.Module:
        """Returns the weights that the stage starts from.

        Raises:
            ValueError: ``adapter_path`` is of another base or size, or reviews another model's traces.
        """
        if self.adapter_path is not None and REVIEWED in (info := read_info(self.adapter_path)):
            raise ValueError(
                f"adapter_path: {self.adapter_path} was written by stage {info.get('stage')!r} and reviews another "
                "model's traces; give the adapter/ or weights/ of the stage before it"
            )
        return self.vlm.build(self.adapter_path)

    def prepare_views(self) -> None:
        """Completes the views with texts that the weights have to write; called before the loaders are made."""

    def on_train_start(self) -> None:
        """Puts what is trained into train mode; frozen parts (a tower's BatchNorm) stay as they are in evaluation."""
        super().on_train_start()
        set_train_mode(self.policy)

    @property
    def adapter_options(self) -> LoRAOptions | None:
        """The LoRA adapter that the stage works with; None where it works with the weights themselves."""
        return self.vlm.lora

    @property
    def parent_sha(self) -> str:
        """Hash of the weights that the stage starts from; empty for the base."""
        return self._start().sha

    @property
    def starts_from_weights(self) -> bool:
        """Whether ``adapter_path`` is a folder of full weights."""
        return self._start().full

    def _start(self) -> _Start:
        """What ``adapter_path`` holds, read once: the stage may write its own weights into that folder later."""
        path = self.adapter_path
        if self._started_from is None or self._started_from.path != path:
            full = path is not None and not is_adapter_folder(path)
            self._started_from = _Start(path, "" if path is None else adapter_sha(path), full)
        return self._started_from

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
        if is_sharded(self.policy) and type(optimizer).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"{type(optimizer).__name__} cannot step sharded weights: set model.init_args.optimizer to "
                "torch.optim.AdamW, or choose a strategy that does not shard (configs/strategy/qlora.yaml)"
            )
        total = self.total_steps()
        warmup = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps that follow a batch."""
        return 1

    def total_steps(self) -> int:
        """Optimizer steps of this fit.

        Counted here, since ``Trainer.estimated_stepping_batches`` starts the loaders before a checkpoint is restored,
        so that workers would fetch the first epoch's clips.

        Raises:
            ValueError: Where the trainer runs without end and the schedule needs one.
        """
        trainer = self.trainer
        limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
        if trainer.max_epochs is not None and trainer.max_epochs != -1:
            batches = batches_of_an_epoch(trainer, len(self.data.train_dataloader()))
            steps = math.ceil(batches / trainer.accumulate_grad_batches) * self.updates_per_batch
            limits.append(steps * trainer.max_epochs)
        if not limits:
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs to know where it ends")
        return max(1, min(limits))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped (automatic optimisation)."""
        if self.automatic_optimization:
            self.log("train/grad_norm", grad_norm(trainable(self)))
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        super().on_before_optimizer_step(optimizer)

    def mean_over_ranks(self, counts: Tensor) -> Tensor:
        """Gradients are averaged over ranks, so sums are divided by the ranks' mean counts."""
        mean: Tensor = self.trainer.strategy.reduce(counts.float(), reduce_op="mean")
        return mean

    def refuse_accumulation(self) -> None:
        """For losses that are means over a whole optimizer step, so that a step must be one batch.

        Raises:
            ValueError: The trainer accumulates gradients.
        """
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: the loss is a mean over "
                "the tokens of the whole optimizer step, so a step must be one batch; set it to 1 and raise "
                "model.init_args.batch_size, or use more devices"
            )

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

    # ------------------------------------------------------------------ artefacts

    def lineage(self, folder: Path) -> Lineage:
        """Returns where the weights come from that are written into ``folder``."""
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

    def export(self, run_dir: Path) -> Path:
        """Writes the trained weights for the next stage.

        Args:
            run_dir: The run folder.

        Returns:
            ``run_dir/adapter``, or after full fine-tuning ``run_dir/weights``, a model folder.
        """
        folder = run_dir / (ADAPTER_FOLDER if isinstance(self.policy, PeftModel) else WEIGHTS_FOLDER)
        info = self.lineage(folder).info()
        if isinstance(self.policy, PeftModel):
            save_adapter(self.policy, folder, POLICY, info)
        else:
            assert isinstance(self.policy, PreTrainedModel)
            save_weights(self.policy, folder, info, self.vlm.processor)
        return folder

    def export_beside(self, folder: Path) -> None:
        """Writes the adapter of the checkpoint that was just written or read; there is none after full fine-tuning."""
        state, self.gathered_state = self.gathered_state, {}
        if isinstance(self.policy, PeftModel):
            save_adapter(self.policy, folder, self.trained_adapter, self.lineage(folder).info(), state=state)
