"""One stage of a pipeline: an ordinary command, its settings, and the artefacts of earlier stages that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vidreason.run_folder import Artefact

Command = Literal["fit", "predict", "test"]

ARTEFACT_OF: Mapping[str, Artefact] = {"fit": "adapter", "predict": "traces", "test": "predictions"}


@dataclass(frozen=True)
class Reference:
    """An artefact of an earlier stage."""

    stage: str
    artefact: Artefact

    def __str__(self) -> str:
        return f"{self.stage}.{self.artefact}"


@dataclass(frozen=True)
class Condition:
    """A condition on the texts that an earlier stage wrote, which that stage judges to be language or not.

    It holds if the judgement equals ``language``; False asks for texts that are no language.
    """

    stage: str
    language: bool

    def __str__(self) -> str:
        return f"{'' if self.language else 'not '}{self.stage}.language"


@dataclass(frozen=True)
class StageSpec:
    """One stage: an ordinary command and its inputs from earlier stages."""

    name: str
    command: Command
    config: str
    args: Mapping[str, object]
    """Dotted settings that override the config (``trainer.max_steps: 5``)."""
    inputs: Mapping[str, tuple[Reference | None, ...]]
    """Dotted setting to the artefacts that may fill it, of which the first that exists is used; None, as the last,
    leaves the setting out."""
    on_unparsed: Literal["stop", "skip"] = "stop"
    """``stop`` ends the pipeline if no completion of this stage could be parsed; ``skip`` goes on without the stage."""
    strategy: str | None = None
    """A file that is overlaid on the config, such as ``configs/strategy/qlora.yaml``."""
    when: Condition | None = None
    """The condition under which the stage runs; None is always."""
    cross_fit: bool = True
    """False for a stage that keeps the traces of the final policy where the pipeline has ``folds``."""
    lists: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    """Dotted setting to artefacts that it gets together, as a list."""

    @property
    def artefact(self) -> Artefact:
        """The artefact that the stage writes."""
        return ARTEFACT_OF[self.command]
