"""Checkpoints on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vidreason.datamodules.atomic_files import atomic_file, flush_to_disk


class AtomicCheckpointIO(TorchCheckpointIO):
    """As Lightning's, but a crash or a full disk leaves the earlier checkpoint, and no half one beside it for long."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where to.
            storage_options: Not used.

        Raises:
            OSError: Naming ``path``, where it cannot be written.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        for left in path.parent.glob(f".*.{path.name}"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        with atomic_file(path) as draft:
            draft.write_bytes(content.getbuffer())
            flush_to_disk(draft)
