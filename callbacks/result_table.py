"""Prints the metrics of all test splits as one table, which is also a text in TensorBoard."""

from __future__ import annotations

import lightning as L

from vidreason.callbacks.tensorboard_text import log_text, markdown_table
from vidreason.lightning_modules.base import VLMModule

COLUMNS = ("acc", "balanced_acc", "macro_f1", "ece", "ece_scaled", "nll", "brier", "unparsed_rate")


class ResultTable(L.Callback):
    """Prints one row per split, in place of Lightning's table with a column per loader and a row per class."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disables Lightning's own table."""
        if stage == "test":
            trainer.test_loop.verbose = False

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the table."""
        assert isinstance(pl_module, VLMModule)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        splits = pl_module.data.test_split_names
        pl_module.print(result_table(metrics, splits))
        header, *rows = _rows(metrics, splits)
        log_text(trainer, "test/scores", markdown_table(header, rows))


def result_table(metrics: dict[str, float], splits: tuple[str, ...]) -> str:
    """Returns a plain-text table of the metrics that were logged.

    Args:
        metrics: Values by ``<split>/<name>``.
        splits: Names of the splits, one row each.

    Example:
        >>> print(result_table({"test/acc": 0.5, "test/nll": 1.25}, ("test",)))
        split    acc    nll
        test   0.500  1.250
    """
    lines = _rows(metrics, splits)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _rows(metrics: dict[str, float], splits: tuple[str, ...]) -> list[list[str]]:
    """Returns the header and one row per split, as texts."""
    columns = [name for name in COLUMNS if any(f"{split}/{name}" in metrics for split in splits)]
    lines = [["split", *columns]]
    for split in splits:
        values = [metrics.get(f"{split}/{name}") for name in columns]
        lines.append([split, *("-" if v is None else f"{v:.3f}" for v in values)])
    return lines
