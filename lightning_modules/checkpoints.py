"""Checkpoints on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vidreason.datamodules.whole_files import whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """As Lightning's, but where the disk is full the earlier checkpoint stays and no half one lies beside it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where to.
            storage_options: Not used.

        Raises:
            OSError: Naming ``path``, where it cannot be written.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with whole_file(Path(path)) as draft:
            draft.write_bytes(content.getbuffer())
