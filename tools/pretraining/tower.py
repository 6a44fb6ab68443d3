"""The first stage of pretraining TinyVLM: the vision tower is trained on questions about single frames.

At this size, the language loss alone does not train the tower; classification heads on single frames do, and are then
discarded. Shape letters: B clips, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from tools.pretraining.stream import FRAME_TARGETS, FrameBatch
from vidreason.lightning_modules.fit.resume import ResumeFit
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration

if TYPE_CHECKING:
    from vidreason.lightning_modules.vlms.base import VLM


class FramePretrainingModule(L.LightningModule):
    """Trains the vision tower of a TinyVLM on questions about single frames.

    Args:
        vlm: A TinyVLM with an unfrozen tower, usually from scratch.
        learning_rate: Peak learning rate of the one-cycle schedule.
        hidden: Width of the layer that all heads share.
    """

    def __init__(self, vlm: VLM, learning_rate: float = 2e-3, hidden: int = 256) -> None:
        super().__init__()
        self.vlm = vlm
        self.learning_rate, self.hidden = learning_rate, hidden
        self.model: TinyVLMForConditionalGeneration | None = None
        self.heads: nn.ModuleDict
        self._resume = ResumeFit()
        self.accuracy = nn.ModuleDict(
            {name: MulticlassAccuracy(values, average="macro") for name, values in FRAME_TARGETS.items()}
        )

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callback that resumes a fit from its checkpoints."""
        present: Sequence[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if self._resume in present else [self._resume]

    def configure_model(self) -> None:
        """Builds the model and the heads."""
        if self.model is not None:
            return
        model = self.vlm.build()
        if not isinstance(model, TinyVLMForConditionalGeneration):
            raise ValueError(f"frame pretraining trains TinyVLM's tower, not {type(model).__name__}")
        config = model.config
        cells = 4 * config.cells_per_frame * config.tower_channels[-1]
        model.requires_grad_(False)
        model.model.visual.requires_grad_(True)
        model.model.visual.to(memory_format=torch.channels_last)
        self.shared = nn.Sequential(nn.Flatten(), nn.Linear(cells, self.hidden), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(self.hidden, values) for name, values in FRAME_TARGETS.items()})
        self.model = model

    def answer(self, frames: Tensor) -> dict[str, Tensor]:
        """Maps frames [B, T, 3, H, W] uint8 to logits [B * T, values] for each question."""
        assert self.model is not None
        pixels = frames.flatten(0, 1).float() / 127.5 - 1.0  # -1..1, as the processor scales them
        hidden = self.shared(self.model.model.visual(pixels.contiguous(memory_format=torch.channels_last)))
        return {name: head(hidden) for name, head in self.heads.items()}

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        """Returns the cross-entropy, averaged over the questions."""
        logits = self.answer(batch.frames)
        losses = [nn.functional.cross_entropy(logits[n], batch.targets[n].flatten()) for n in FRAME_TARGETS]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """Logs the balanced accuracy of each question on validation clips."""
        for name, logits in self.answer(batch.frames).items():
            metric = self.accuracy[name]
            assert isinstance(metric, MulticlassAccuracy)
            metric(logits, batch.targets[name].flatten())
            self.log(f"val/{name}", metric, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW with a one-cycle schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Writes the model with the trained tower in the hub's format to ``<run_dir>/weights``."""
        if self.model is not None and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "weights"
            self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]  # its decorator misleads mypy
            self.model.save_pretrained(folder)
            self.vlm.processor.save_pretrained(folder)
