"""Atomic writing of checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vidreason.datamodules.atomic_files import atomic_file, flush_to_disk


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the earlier one and then replaces that, so that a crash or a full disk keeps it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: The content.
            path: The file.
            storage_options: Not used.

        Raises:
            OSError: If the file cannot be written; the message names it.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        for left in path.parent.glob(f".*.{path.name}"):  # drafts of processes that were killed while writing
            left.unlink(missing_ok=True)
        with atomic_file(path) as draft:
            draft.write_bytes(content.getbuffer())
            flush_to_disk(draft)
