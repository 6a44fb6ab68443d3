"""Predicts the memory of a forward and backward pass by running the code of scoring and sampling on a fake model.

Two runs with few decoder layers, which differ by one layer (or by one period of a decoder with several kinds of
layers), give what a layer adds; the other layers are extrapolated. A batch is one clip, repeated.

Letters: B prompts, G completions per prompt, N = B·G rows, L decoder layers, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vidreason.datamodules.types import Encoded, EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import take_prompts
from vidreason.lightning_modules.vlms.generation import Sampling, evaluating, inverse_cdf, keep_likeliest
from vidreason.lightning_modules.vlms.planning.fake_model import FakeModel
from vidreason.lightning_modules.vlms.planning.live_bytes import LiveBytes
from vidreason.lightning_modules.vlms.prefix.expand import extend, prefill
from vidreason.lightning_modules.vlms.prefix.head import logits_at
from vidreason.lightning_modules.vlms.prefix.layout import PromptLayout
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCache, VisionCacheOptions


@dataclass(frozen=True)
class Usage:
    """Bytes of tensors at the peak of a pass, without weights, gradients and the state of the optimizer."""

    activations: float = 0
    """Bytes that autograd saves for the backward pass."""
    cache: float = 0
    """Keys and values, or states, of the rows that are sampled."""
    logits: float = 0
    """Bytes of logits and of what is computed from them."""
    working: float = 0
    """Bytes of all other tensors at the peak: of one layer, of the vision tower, and gradients of activations."""

    @property
    def total(self) -> float:
        """All parts together."""
        return self.activations + self.cache + self.logits + self.working


class PlannedVision(VisionCache):
    """Keeps the embeddings of a planned clip, and the memory that the vision path took to compute them.

    Args:
        known: Tensors that do not count.

    Attributes:
        peak: Bytes of the vision path of one clip; 0 if it runs with the decoder, since it is trained.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__(VisionCacheOptions(memory_gb=1e6), lambda: "planned", lambda sample: {})
        self.peak = 0
        self._unchanged = known

    def _keys(self, model: nn.Module, parts: Sequence[object], prompts: EncodedPrompts) -> list[str]:
        return list(prompts.videos)

    def _fed(
        self, compute: Callable[..., Any], layout: PromptLayout, prompts: EncodedPrompts, keys: Sequence[str]
    ) -> Callable[..., Any]:
        @wraps(compute)
        def measured(*args: Any, **kwargs: Any) -> Any:
            live = LiveBytes(self._unchanged)
            with live:
                features = compute(*args, **kwargs)
            self.peak = max(self.peak, live.peak)
            return features

        return super()._fed(measured, layout, prompts, keys)


class MemoryEstimate:
    """Memory of the passes of one model.

    Args:
        vlm: The model family and checkpoint.
        dtype: Dtype of the base's weights.
        autocast: Dtype of mixed precision; None is off.
        converted: Dtype that the trainer converts all weights to; None leaves them.
    """

    def __init__(
        self,
        vlm: VLM,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
        converted: torch.dtype | None = None,
    ) -> None:
        self.vlm = copy.copy(vlm)
        self.vlm._processor = vlm.processor
        self.vlm._logged_tokens = True
        self.fake = FakeModel(vlm, dtype, converted)
        self.vlm.note_pixel_dtype(self.fake.model)
        self._vision = PlannedVision(self.fake.known())
        self.vlm.__dict__["vision_cache"] = self._vision  # in place of the cached property
        self._autocast = autocast
        self._seen: set[str] = set()

    def update(self, encoded: Encoded, clips: int, padded: bool = False, cached: bool = True) -> Usage:
        """Returns the memory of the forward and backward pass of a micro-batch.

        Args:
            encoded: One prompt and the texts behind it.
            clips: Number of clips; each is ``encoded``.
            padded: Whether prompts of a micro-batch differ in length.
            cached: Whether vision embeddings are computed clip by clip and kept.
        """
        batch = repeated(self.vlm, encoded, clips, padded)
        for parameter in self.fake.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                with self.fake.mode:
                    parameter.grad = torch.empty_like(parameter)

        def run(model: nn.Module, live: LiveBytes) -> list[Usage]:
            with live.saving():
                scores = self.vlm.score(model, batch.prompts, batch.texts)
            scores.logprobs.sum().backward()
            return [self._parts(live, live.saved)]

        return self._with_vision(self._extrapolated(run, batch)[0], clips, cached)

    def score(self, encoded: Encoded, clips: int, padded: bool = False, cached: bool = True) -> Usage:
        """Returns the memory of scoring texts without gradients; the arguments are those of ``update``."""
        batch = repeated(self.vlm, encoded, clips, padded)

        def run(model: nn.Module, live: LiveBytes) -> list[Usage]:
            with torch.no_grad(), evaluating(model):
                self.vlm.score(model, batch.prompts, batch.texts)
            return [self._parts(live, 0)]

        return self._with_vision(self._extrapolated(run, batch)[0], clips, cached)

    def generate(
        self,
        encoded: Encoded,
        clips: int,
        samples: int,
        sampling: Sampling,
        padded: bool = False,
        cached: bool = True,
    ) -> Usage:
        """Returns the memory of sampling, at the prefill or when the completions are longest.

        Args:
            encoded: One prompt.
            clips: Number of clips.
            samples: Completions per clip.
            sampling: Options of sampling.
            padded: Whether prompts of a batch differ in length.
            cached: Whether vision embeddings are computed clip by clip and kept.
        """
        batch = repeated(self.vlm, encoded, clips, padded)
        rows = torch.arange(clips).repeat_interleave(samples)

        def run(model: nn.Module, live: LiveBytes) -> list[Usage]:
            with self._sampling(model, batch.prompts):
                answer = logits_at(torch.arange(clips), _last(batch.prompts))
                _, prefix = prefill(self.vlm, model, batch.prompts, answer)
                kept = _cache_bytes(prefix.cache)
                prompts = Usage(cache=kept, working=max(live.peak - kept, 0))
                prefix = prefix.reserve(rows, sampling.max_new_tokens - 1)
                before, start = _cache_bytes(prefix.cache), live.now
                live.peak = live.now
                last = logits_at(torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.long))
                one = torch.ones(len(rows), 1, dtype=torch.long)
                _, prefix = extend(self.vlm, model, prefix, one, None, last)
            grown = _cache_bytes(prefix.cache) - before
            longest = before + sampling.max_new_tokens * grown
            return [prompts, Usage(cache=longest, working=max(live.peak - start - grown, 0))]

        prompts, step = self._extrapolated(run, batch)
        prompts = self._with_vision(prompts, clips, cached)
        chosen = self._choice_bytes(len(rows), sampling)
        if chosen > step.working:  # the next token is chosen when the layers are done
            step = replace(step, logits=chosen, working=0)
        return max(prompts, step, key=lambda usage: usage.total)

    def optimizer_bytes(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> float:
        """Returns the bytes of the state that an optimizer keeps about the trained parameters.

        Args:
            make: Returns the optimizer of some parameters.
        """
        parameter = nn.Parameter(torch.zeros(1024))
        optimizer = make([parameter])
        if type(optimizer).__module__.startswith("bitsandbytes"):
            bits: int = getattr(getattr(optimizer, "args", None), "optim_bits", 8)
            return self.fake.weights.trained * 2 * bits / 8
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        each = sum(value.nbytes for value in state if value.numel() > 1) / parameter.nbytes
        return self.fake.weights.trained_bytes * each

    def _parts(self, live: LiveBytes, saved: int) -> Usage:
        logits = live.logits_at_peak
        return Usage(saved, 0, logits, max(live.peak - saved - logits, 0))

    def _extrapolated(self, run: Callable[[nn.Module, LiveBytes], list[Usage]], batch: Encoded) -> list[Usage]:
        """Returns the usages of all layers from those of few, which ``run`` returns."""
        tensors = [*batch.prompts.inputs.values(), *vars(batch.texts).values()]
        found = []
        first, second = self.fake.depths
        self._see(batch, first)
        for depth in sorted({first, second}):
            live = LiveBytes([*self.fake.known(), *tensors], self.fake.vocabulary)
            with self.fake.depth(depth) as model, self._precision(), live:
                found.append(run(model, live))
        if second == self.fake.layers:
            return found[-1]
        steps = (self.fake.layers - first) / (second - first)
        names = [field.name for field in fields(Usage)]

        def value(low: Usage, high: Usage, name: str) -> float:
            few, more = float(getattr(low, name)), float(getattr(high, name))
            return few + steps * max(more - few, 0)

        return [Usage(*(value(*pair, name) for name in names)) for pair in zip(found[0], found[-1], strict=True)]

    def _see(self, batch: Encoded, depth: int) -> None:
        """Computes the embeddings of the clip once, apart from what is measured."""
        if batch.prompts.videos[0] in self._seen:
            return
        self._seen.add(batch.prompts.videos[0])
        one = take_prompts(self.vlm, batch.prompts, torch.zeros(1, dtype=torch.long))
        with self.fake.depth(depth) as model, self._precision(), LiveBytes(), self._sampling(model, one):
            prefill(self.vlm, model, one, logits_at(torch.arange(1), _last(one)))

    def _with_vision(self, usage: Usage, clips: int, cached: bool) -> Usage:
        tower = self._vision.peak * (1 if cached else clips)
        return usage if usage.total >= tower else Usage(working=tower)

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast("cpu", dtype=self._autocast)

    @contextmanager
    def _sampling(self, model: nn.Module, prompts: EncodedPrompts) -> Iterator[None]:
        with torch.no_grad(), evaluating(model), self._vision.feeding(self.vlm, model, prompts, "expand"):
            yield

    def _choice_bytes(self, rows: int, sampling: Sampling) -> int:
        """Returns the bytes of choosing one token of each row."""
        with self.fake.mode:
            logits = torch.empty(rows, self.fake.vocabulary, dtype=self.fake.dtype)
            noise = torch.empty(rows, dtype=torch.float64)
        live = LiveBytes()
        with live:
            probs = logits.float().log_softmax(-1).exp()
            if sampling.temperature > 0:
                inverse_cdf(keep_likeliest(probs, sampling.top_p, sampling.top_k), noise)
        return live.peak + int(logits.nbytes)


def _last(prompts: EncodedPrompts) -> Tensor:
    return torch.full((prompts.batch_size,), prompts.inputs["input_ids"].shape[1] - 1)


def repeated(vlm: VLM, encoded: Encoded, clips: int, padded: bool) -> Encoded:
    """Returns one prompt with its texts ``clips`` times; if ``padded``, the last prompt is a token shorter."""
    prompts = take_prompts(vlm, encoded.prompts, torch.zeros(clips, dtype=torch.long))
    if padded and clips > 1:
        mask = prompts.inputs["attention_mask"].clone()
        mask[-1, 0] = 0
        prompts = replace(prompts, inputs={**prompts.inputs, "attention_mask": mask})
    texts, n = encoded.texts, len(encoded.texts)
    offset = (torch.arange(clips) * n).repeat_interleave(n)
    parent = texts.parent.repeat(clips)
    return Encoded(
        prompts,
        TextBatch(
            ids=texts.ids.repeat(clips, 1),
            mask=texts.mask.repeat(clips, 1),
            loss_mask=texts.loss_mask.repeat(clips, 1),
            answer_mask=texts.answer_mask.repeat(clips, 1),
            owner=torch.arange(clips).repeat_interleave(n),
            parent=torch.where(parent < 0, parent, parent + offset),
        ),
    )


def _cache_bytes(cache: Any) -> int:
    """Returns the bytes of keys, values and states in a cache."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        values = [
            item for value in vars(layer).values() for item in (value.values() if isinstance(value, dict) else [value])
        ]
        storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
        found |= {storage._cdata: storage.nbytes() for storage in storages}
    return sum(found.values())
