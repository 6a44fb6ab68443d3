"""Hides messages of libraries that require no action from the user."""

from __future__ import annotations

import logging
import warnings

import lightning as L
from transformers.utils import logging as transformers_logging

# Only messages that are expected in ordinary runs; anything else still reaches the user.
_WARNINGS = (
    r".*does not have many workers which may be a bottleneck.*",  # few workers, on purpose: clips are small
    r".*Found \d+ module\(s\) in eval mode at the start of training.*",  # frozen parts, on purpose
    r".*isinstance\(treespec, LeafSpec\).*",  # a deprecation in torch that Lightning triggers
    r".*is_gradient_checkpointing.* is deprecated.*",  # transformers, called by peft
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
)
_LINES = ("💡 Tip:", "TPU available:", "Loading `train_dataloader` to estimate number of stepping batches")


class Quiet(L.Callback):
    """Hides known harmless warnings, adverts and short progress bars from its construction on."""

    def __init__(self) -> None:
        for pattern in _WARNINGS:
            warnings.filterwarnings("ignore", message=pattern)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            if not any(isinstance(f, _DropLines) for f in logger.filters):
                logger.addFilter(_DropLines())
        transformers_logging.disable_progress_bar()


class _DropLines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_LINES)
