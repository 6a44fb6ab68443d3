"""Sampling of completions: one prefill per prompt, separate noise per row, and finished rows leave the batch.

Letters: B prompts, G completions per prompt, N = B·G rows, L tokens of the longest completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vidreason.datamodules.types import EncodedPrompts
from vidreason.lightning_modules.vlms.prefix.expand import extend, prefill
from vidreason.lightning_modules.vlms.prefix.head import logits_at
from vidreason.lightning_modules.vlms.prefix.layout import PromptLayout
from vidreason.signals import check_stop

STEPS_BETWEEN_LOOKS = 8
"""Number of tokens after which the host asks a device which rows have ended; a CPU need not be waited for.

Rows that ended meanwhile are forwarded for up to seven tokens more, which are dropped.
"""


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    Args:
        max_new_tokens: Longest completion in tokens, end of turn included.
        temperature: Divisor of the logits; 0 is greedy decoding.
        top_p: Smallest total probability of the likeliest tokens that are kept; 1 keeps all.
        top_k: Number of likeliest tokens that are kept; 0 keeps all.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:  # NaN is not, either
            raise ValueError(f"sampling.temperature must not be negative (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must not be negative (0 keeps all), got {self.top_k}")


class Sampled(NamedTuple):
    """Tokens of the sampled completions in the order b0g0, b0g1, …."""

    ids: Tensor
    """[N, L] int64, padded on the right."""
    mask: Tensor
    """[N, L] bool, True on sampled tokens."""
    logprobs: Tensor
    """[N, L] fp32 log-probs at the sampling temperature, before top-p and top-k."""
    stopped: Tensor
    """[N] bool, True if a stop token was sampled."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets every module to eval mode and restores each module's mode afterwards."""
    # Modules are restored one by one: model.train() would put a frozen vision tower in train mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def draw_noise(seeds: Sequence[int], steps: int) -> Tensor:
    """Returns uniform noise [N, steps] float64; row i depends only on ``seeds[i]``."""
    rows = [np.random.Generator(np.random.PCG64(seed)).random(steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, steps, dtype=torch.float64)


def keep_likeliest(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Sets probabilities [n, V] outside top-k and top-p to 0; the likeliest token always stays."""
    if top_p >= 1 and not 0 < top_k < probs.shape[-1]:
        return probs
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k > 0:
        drop[:, top_k:] = True
        ordered = ordered.masked_fill(drop, 0)
    share = ordered / ordered.sum(-1, keepdim=True)
    drop |= share.cumsum(-1) - share >= top_p  # the token that crosses top_p is kept
    drop[:, 0] = False
    return probs.masked_fill(drop.scatter(-1, index, drop), 0)


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Returns tokens [n] at the quantiles ``uniforms`` [n] of unnormalised distributions ``probs`` [n, V]."""
    cdf = probs.double().cumsum(-1)  # in fp32 the sum over a large vocabulary would lose unlikely tokens
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, uniforms[:, None] * total, right=True)
    return torch.minimum(token, (cdf < total).sum(-1, keepdim=True))[:, 0]  # never a token of probability 0


@torch.no_grad()
def sample(
    layout: PromptLayout,
    model: nn.Module,
    prompts: EncodedPrompts,
    group_size: int,
    sampling: Sampling,
    noise: Tensor | None,
    stop_ids: Sequence[int],
    suppressed_ids: Sequence[int],
    pad_id: int,
) -> Sampled:
    """Samples ``group_size`` completions behind every prompt.

    Args:
        layout: The model family.
        model: The model; it samples in eval mode, and its modes are restored.
        prompts: B prompts.
        group_size: G, completions per prompt.
        sampling: Sampling options.
        noise: [N, max_new_tokens] uniforms in [0, 1); may be None if the temperature is 0.
        stop_ids: Tokens that end a completion and are part of it.
        suppressed_ids: Tokens that get probability 0.
        pad_id: Value of ``ids`` behind the end of a completion.

    Raises:
        StopRequested: If a signal to stop has arrived during a fit.
    """
    device = prompts.inputs["input_ids"].device
    batch, steps = prompts.batch_size, sampling.max_new_tokens
    n = batch * group_size
    ids = torch.full((n, steps), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(n, steps, device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    banned = torch.tensor(sorted(suppressed_ids), dtype=torch.long, device=device)
    noise = None if noise is None else noise.to(device)
    with evaluating(model):
        everyone = torch.arange(batch, device=device)
        last = torch.full_like(everyone, prompts.inputs["input_ids"].shape[1] - 1)
        logits, prefix = prefill(layout, model, prompts, logits_at(everyone, last))
        owner = everyone.repeat_interleave(group_size)
        logits, prefix = logits[owner], prefix.reserve(owner, steps - 1)  # the last token is not forwarded
        alive = torch.arange(n, device=device)
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        for step in range(steps):
            check_stop()  # sampling takes minutes on a large model, so a signal must not wait for the end
            scores = logits.float() / (sampling.temperature or 1.0)
            scores.index_fill_(-1, banned, -torch.inf)
            logp = scores.log_softmax(-1)
            if sampling.temperature == 0:
                token = logp.argmax(-1)
            else:
                assert noise is not None, "sampling at a temperature needs noise"
                token = inverse_cdf(keep_likeliest(logp.exp(), sampling.top_p, sampling.top_k), noise[alive, step])
            ids[alive, step] = token
            logprobs[alive, step] = logp.gather(-1, token[:, None])[:, 0]
            ended |= torch.isin(token, stops)
            if step + 1 == steps:
                break
            if device.type == "cpu" or (step + 1) % STEPS_BETWEEN_LOOKS == 0:
                rows = remaining(ended.tolist())
                if not rows:
                    break
                if len(rows) < len(alive):
                    index = torch.tensor(rows, dtype=torch.long).to(device)
                    alive, token, ended, prefix = alive[index], token[index], ended[index], prefix.keep(rows)
            first = torch.arange(len(alive), device=device)
            logits, prefix = extend(
                layout, model, prefix, token[:, None], None, logits_at(first, torch.zeros_like(first))
            )
    is_stop = torch.isin(ids[:, : step + 1], stops)
    mask = is_stop.cumsum(1) - is_stop.long() == 0  # up to the first stop
    length = int(mask.sum(1).max()) if n else 0
    ids, logprobs, mask = ids[:, :length], logprobs[:, :length], mask[:, :length]
    return Sampled(ids.where(mask, pad_id), mask, logprobs.where(mask, 0.0), is_stop.any(1))


def remaining(ended: Sequence[bool]) -> list[int]:
    """Returns the rows that have not ended, in an order in which as few as possible change their place."""
    alive = [row for row, over in enumerate(ended) if not over]
    stay = [row for row in alive if row < len(alive)]
    move = iter(alive[len(stay) :])
    return [row if not ended[row] else next(move) for row in range(len(alive))]
