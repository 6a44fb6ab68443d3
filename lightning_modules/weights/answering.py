"""The parts of a stage that decide about clips, usable without the stage: weights, decider and writer of traces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from vidreason.lightning_modules.decisions.deciders import AnswerDecider, Decider
from vidreason.lightning_modules.traces.generation import TraceGenerator
from vidreason.lightning_modules.vlms.base import VLM


@dataclass(frozen=True)
class Answering:
    """A model with what it needs to decide about clips."""

    vlm: VLM
    model: nn.Module
    """The model that decides, in eval mode."""
    decider: Decider
    generator: TraceGenerator | None = None
    """Writes the traces that the decider reviews; None if it reviews none."""
    policy: nn.Module | None = None
    """The model that writes the traces; None if ``model`` holds the policy's adapter, too."""
    clips_per_forward: int | None = None
    """Clips that go through the model at once; None is the whole batch."""

    @property
    def writer(self) -> nn.Module:
        """The model that writes traces."""
        return self.model if self.policy is None else self.policy

    def with_samples(self, samples: int | None) -> Answering:
        """Returns a copy with another number of traces or sampled answers per clip; None keeps the number."""
        if samples is None:
            return self
        if isinstance(self.decider, AnswerDecider):
            return replace(self, decider=replace(self.decider, samples=samples))
        if self.generator is None:
            return self
        options = replace(self.generator.options, samples=samples)
        return replace(self, generator=replace(self.generator, options=options))
