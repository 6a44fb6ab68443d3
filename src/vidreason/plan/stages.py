"""Plans a stage: tokens of its prompts, forward passes, memory by part, and the clips that fit into a memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from vidreason.datamodules.clips.header import ClipHeader, read_headers
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.types import Clip, Encoded
from vidreason.lightning_modules.fit.passes import Pass
from vidreason.lightning_modules.vlms.planning.memory import MemoryEstimate, Usage
from vidreason.lightning_modules.vlms.planning.prompts import PlannedClips, PromptTokens
from vidreason.lightning_modules.vlms.text.context import check_context_length, longest_texts
from vidreason.plan.commands import PlannedStage

USABLE = 0.9
"""Share of the memory that is planned with; the rest is for the CUDA context, kernels and fragmentation."""
MOST_CLIPS = 64
"""Largest number of clips of a forward pass outside of training that is looked for."""


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of the prompts of a pass."""

    least: int
    median: int
    most_of_95_percent: int
    most: int
    longest_clip: str
    visual: int
    """Visual tokens of the longest prompt."""
    behind: int
    """Longest text behind that prompt, or the longest completion."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a pass, by part."""

    weights: float
    """Bytes of the base's weights, in 4 bits where they are quantised."""
    adapters: float
    """Bytes of the trained adapter and of copies of trained weights."""
    gradients: float
    optimizer: float
    inputs: float
    """Pixels and tokens of a batch."""
    activations: float
    cache: float
    """Keys and values of sampled rows."""
    logits: float
    working: float

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class PassPlan:
    """The plan of one kind of pass."""

    name: str
    kind: str
    clips: int
    tokens: TokenStatistics
    bound: str
    """The setting that bounds the clips of a forward pass."""
    clips_per_forward: int
    forwards: int
    """Forward passes over prompts; with new tokens, as many times up to that many more."""
    new_tokens: int
    memory: Memory
    largest: int | None
    """Largest number of clips of a forward pass that fits into the given memory; None without one."""


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage."""

    name: str
    command: str
    steps: int
    precision: str
    parameters: int
    trained: int
    unreadable: int
    """Clips whose header could not be read."""
    passes: tuple[PassPlan, ...]


class StagePlanner:
    """Plans stages; models and headers of clips that several stages share are read once.

    Args:
        gpu: Whether ``vlm.dtype: auto`` is bfloat16, as on a GPU, or float32.
        memory: Bytes of the device; None looks for no largest number of clips.
    """

    def __init__(self, gpu: bool, memory: float | None) -> None:
        self._gpu, self._memory = gpu, memory
        self._estimates: dict[tuple[str, str], MemoryEstimate] = {}
        self._headers: dict[tuple[Path, Stretch | None], ClipHeader | None] = {}
        self._planned: dict[tuple[str, str, object], PlannedClips] = {}

    def plan(self, planned: PlannedStage) -> StagePlan:
        """Returns the plan of a stage.

        Raises:
            ValueError: If a prompt, with what stands behind it, does not fit into the model's context.
        """
        stage, data = planned.stage, planned.data
        estimate = self._estimate(planned)
        work = stage.workload(data, planned.command)
        trained_on = next((len(part.clips(data)) for part in work.passes if part.per_step), 0)
        steps = planned.steps(trained_on)
        fixed = self._fixed(planned, estimate, work.frozen_copies)
        passes = []
        unreadable: set[str] = set()
        for part in work.passes:
            clips = part.clips(data)
            if not clips:
                continue
            self._read_headers(clips, data.frames.timeout)
            unreadable |= {clip.video_id for clip in clips if self._header(clip) is None}
            passes.append(
                self._plan_pass(planned, part, clips, estimate, fixed, self._forwards(planned, part, len(clips), steps))
            )
        if not passes:
            raise ValueError(f"{planned.name}: there are no clips to plan with; check the data section")
        weights = estimate.fake.weights
        trained = weights.trained if planned.command == "fit" else 0
        precision = f"{str(estimate.fake.dtype).removeprefix('torch.')}, {planned.precision.name}"
        return StagePlan(
            planned.name, planned.command, steps, precision, weights.parameters, trained, len(unreadable), tuple(passes)
        )

    def _read_headers(self, clips: Sequence[Clip], timeout: float | None) -> None:
        unknown = [clip for clip in clips if (clip.path, clip.stretch) not in self._headers]
        for clip, header in zip(unknown, read_headers(unknown, timeout), strict=True):
            self._headers[clip.path, clip.stretch] = header

    def _header(self, clip: Clip) -> ClipHeader | None:
        return self._headers[clip.path, clip.stretch]

    def _estimate(self, planned: PlannedStage) -> MemoryEstimate:
        vlm, precision = planned.stage.vlm, planned.precision
        key = (planned.vlm, precision.name)
        if key not in self._estimates:
            half = vlm.dtype == "bfloat16" or (vlm.dtype == "auto" and self._gpu)
            dtype = torch.bfloat16 if half else torch.float32
            self._estimates[key] = MemoryEstimate(vlm, dtype, precision.autocast, precision.converted)
        return self._estimates[key]

    def _fixed(self, planned: PlannedStage, estimate: MemoryEstimate, copies: int) -> Memory:
        """Returns the memory of weights, gradients and optimizer, which does not depend on the pass."""
        weights = estimate.fake.weights
        copied = copies * (weights.adapter_bytes or weights.base_bytes)
        fits = planned.command == "fit"
        return Memory(
            weights=weights.base_bytes,
            adapters=weights.adapter_bytes + copied,
            gradients=weights.trained_bytes * fits,
            optimizer=estimate.optimizer_bytes(planned.stage.optim.optimizer) if fits else 0,
            inputs=0,
            activations=0,
            cache=0,
            logits=0,
            working=weights.largest_bytes,
        )

    def _forwards(self, planned: PlannedStage, part: Pass, clips: int, steps: int) -> int:
        """Returns how many batches of prompts go through the model in a pass, in the whole command."""
        if part.per_step:
            each = math.ceil(planned.batch / part.clips_per_forward)
            updates = planned.stage.updates.per_batch
            return each * (steps if part.kind == "update" else math.ceil(steps / updates))
        once = math.ceil(clips / part.clips_per_forward)
        repeated = part.name in ("validation", "temperature") and planned.command == "fit"
        return once * (planned.validations(len(planned.data.clips("train"))) if repeated else 1)

    def _plan_pass(
        self,
        planned: PlannedStage,
        part: Pass,
        clips: Sequence[Clip],
        estimate: MemoryEstimate,
        fixed: Memory,
        forwards: int,
    ) -> PassPlan:
        encoder = self._planned.setdefault(
            (planned.vlm, planned.precision.name, planned.data.frames), PlannedClips(estimate.vlm, planned.data.frames)
        )
        counted = [(encoder.tokens(clip, self._header(clip), part.view), clip) for clip in clips]
        tokens, longest = max(counted, key=lambda pair: pair[0].total)
        encoded = encoder.encode([encoder.example(longest, self._header(longest), part.view)])
        new = part.sampling.max_new_tokens if part.kind == "generate" else 0
        limit = planned.stage.vlm.context_length
        check_context_length([longest.video_id], encoded.prompts, [new], limit, "max_new_tokens asks for")
        padded = len({pair[0].total for pair in counted}) > 1
        usage = self._usage(planned, part, estimate, encoded, padded)
        pixels = sum(value.nbytes for value in encoded.prompts.inputs.values())
        batch = planned.batch if part.per_step else part.clips_per_forward

        def memory(size: int) -> Memory:
            used = usage(size)
            inputs = pixels * (batch if part.per_step else size)
            working = fixed.working + used.working
            parts = vars(fixed) | {"inputs": inputs, "activations": used.activations, "cache": used.cache}
            return Memory(**parts | {"logits": used.logits, "working": working})

        most = planned.batch if part.per_step else max(part.clips_per_forward, min(len(clips), MOST_CLIPS))
        limit_bytes = None if self._memory is None else USABLE * self._memory
        return PassPlan(
            name=part.name,
            kind=part.kind,
            clips=len(clips),
            tokens=_statistics(
                [pair[0] for pair in counted], tokens, longest, new or max(longest_texts(encoded.texts, 1))
            ),
            bound=part.bound,
            clips_per_forward=part.clips_per_forward,
            forwards=forwards,
            new_tokens=new,
            memory=memory(part.clips_per_forward),
            largest=None if limit_bytes is None else largest_that_fits(lambda n: memory(n).total, most, limit_bytes),
        )

    def _usage(
        self, planned: PlannedStage, part: Pass, estimate: MemoryEstimate, encoded: Encoded, padded: bool
    ) -> Callable[[int], Usage]:
        """Returns a function from clips of a forward pass to its memory."""
        jittered = planned.data.frames.sampling == "segment" and part.per_step
        cached = planned.stage.vlm.vision_cache_options is not None and not jittered

        @cache
        def usage(clips: int) -> Usage:
            if part.kind == "update":
                return estimate.update(encoded, clips, padded, cached)
            if part.kind == "score":
                return estimate.score(encoded, clips, padded, cached)
            return estimate.generate(encoded, clips, part.samples, part.sampling, padded, cached)

        return usage


def largest_that_fits(total: Callable[[int], float], most: int, limit: float) -> int:
    """Returns the largest number from 0 to ``most`` whose total is within a limit.

    Args:
        total: Bytes of a number of clips: convex, as the largest of sums that grow with the clips.
        most: Largest number of interest.
        limit: Largest total.

    >>> largest_that_fits(lambda n: 10 + 3 * n, 16, 25), largest_that_fits(lambda n: 10 + 3 * n, 16, 12)
    (5, 0)
    """
    if total(1) > limit:
        return 0
    fitting, too_many, each = 1, most + 1, 0.0
    # From below, since many clips take long to plan. A clip more never takes less than the clips before it.
    while too_many - fitting > 1 and total(fitting) + each <= limit:
        if too_many <= most:
            chord = (total(too_many) - total(fitting)) / (too_many - fitting)
            guess = max(fitting + int((limit - total(fitting)) / chord), (fitting + too_many) // 2)
        else:
            guess = min(fitting + int((limit - total(fitting)) / each) if each else 2, 8 * fitting)
        guess = min(max(guess, fitting + 1), too_many - 1)
        if total(guess) > limit:
            too_many = guess
        else:
            each, fitting = max((total(guess) - total(fitting)) / (guess - fitting), 1e-9), guess
    return fitting


def _statistics(counted: Sequence[PromptTokens], tokens: PromptTokens, longest: Clip, behind: int) -> TokenStatistics:
    totals = sorted(one.total for one in counted)
    return TokenStatistics(
        least=totals[0],
        median=round(statistics.median(totals)),
        most_of_95_percent=totals[math.ceil(0.95 * len(totals)) - 1],
        most=totals[-1],
        longest_clip=longest.video_id,
        visual=tokens.visual,
        behind=behind,
    )
