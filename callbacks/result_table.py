"""Prints the metrics of all test splits as one table."""

from __future__ import annotations

import lightning as L

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
        pl_module.print(result_table(metrics, pl_module.data.test_split_names))


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
    columns = [name for name in COLUMNS if any(f"{split}/{name}" in metrics for split in splits)]
    width = max(map(len, ("split", *splits)))
    lines = [["split".ljust(width), *columns]]
    for split in splits:
        values = [metrics.get(f"{split}/{name}") for name in columns]
        lines.append([split.ljust(width), *("-" if v is None else f"{v:.3f}" for v in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
