"""The confidence below which a classifier abstains, as ``vidreason threshold`` writes it beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from vidreason.datamodules.atomic_files import write_text
from vidreason.lightning_modules.functional.calibration import apply_temperature

THRESHOLD_FILE = "threshold.json"


@dataclass(frozen=True)
class Threshold:
    """A threshold of the confidence, and what it was fitted on."""

    confidence: float
    """Decisions with a temperature-scaled confidence of at least this are accepted."""
    temperature: float
    error: float
    """The error among accepted decisions that was asked for."""
    bound: float
    """Upper 95 % bound of that error."""
    accepted: int
    """Groups of ``cal`` with an accepted decision."""
    wrong: int
    """Of these, groups with a wrong one."""
    coverage: float
    """Share of the clips of ``cal`` that are accepted."""
    weights_sha: str
    """Hash of the weights that it belongs to."""
    samples: int
    """Traces or completions per clip that it belongs to; 0 without."""

    def accepts(self, probs: Tensor) -> bool:
        """Returns whether a decision is accepted.

        Args:
            probs: [C] class probabilities before temperature scaling.
        """
        scaled = apply_temperature(probs.double().clamp(min=1e-30).log(), self.temperature)
        return float(scaled.max()) >= self.confidence

    def save(self, folder: Path) -> Path:
        """Writes ``threshold.json`` into the folder of the stage."""
        write_text(folder / THRESHOLD_FILE, json.dumps(asdict(self), indent=1) + "\n")
        return folder / THRESHOLD_FILE

    @classmethod
    def load(cls, folder: Path) -> Threshold | None:
        """Reads ``threshold.json`` from the folder of a stage; None if there is none.

        Raises:
            ValueError: If the file is damaged.
        """
        path = folder / THRESHOLD_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: not a threshold ({error}); delete it or run vidreason threshold again"
            ) from error
