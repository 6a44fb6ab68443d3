"""Atomic writing of checkpoints, and reading them without running code from them."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vidreason.datamodules.atomic_files import atomic_file, flush_to_disk
from vidreason.run_folder import CHECKPOINTS_FOLDER, LAST_CHECKPOINT


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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, which holds tensors and plain containers only, without running code from it.

    Raises:
        ValueError: If the file is no such checkpoint.
    """
    remedy = f"give a .ckpt of this program, such as {Path(CHECKPOINTS_FOLDER, LAST_CHECKPOINT)} of a run folder"
    if Path(path).is_dir():
        raise ValueError(f"--ckpt_path {path}: is a folder; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a file that is refused anyway
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise ValueError(
            f"--ckpt_path {path}: not a checkpoint of tensors and plain values (damaged, or a pickle that could run "
            f"code): {remedy}"
        ) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"--ckpt_path {path}: holds a {type(checkpoint).__name__} and no checkpoint; {remedy}")
    return checkpoint
