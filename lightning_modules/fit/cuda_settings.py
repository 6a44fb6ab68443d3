"""Settings of a CUDA device that hold for the whole process."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info


class CudaSettings(L.Callback):
    """Sets the precision of float32 matrix products on a CUDA device; on other devices it does nothing.

    Args:
        tf32: Whether their inputs are rounded to TF32 (10 bits of mantissa), at several times the speed. Products in
            bfloat16, and everything that is no matrix product, stay as they are.
    """

    def __init__(self, tf32: bool = True) -> None:
        self.tf32 = tf32

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sets and logs the precision."""
        if trainer.strategy.root_device.type != "cuda":
            return
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        rank_zero_info(
            "float32 matrix products on the GPU use "
            + ("TF32 (callback CudaSettings with tf32: false turns it off)" if self.tf32 else "full precision")
        )
