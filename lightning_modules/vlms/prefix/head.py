"""Computes logits or token scores at selected places inside a model's own forward.

The head sees the hidden states of those places only, and for scores a few at a time, so that no forward holds
[tokens, vocabulary]. Letters: n rows, W columns, H hidden size, M states, K tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidreason.lightning_modules.functional.logprobs import chunked_token_logprobs
from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap
from vidreason.lightning_modules.vlms.prefix.text_plan import Targets

Head = Callable[[Tensor], Tensor]
"""Hidden states [M, H] to logits [M, V]"""
Answer = Callable[[Tensor, Head], Tensor]
"""What a forward returns in place of its logits, from the hidden states [n, W, H] and the head"""

STATES_AT_ONCE = 128
"""Hidden states whose logits are held at once in scoring"""


class Scoring(NamedTuple):
    """How tokens are scored."""

    temperature: float
    suppressed: Tensor
    """[S] int64, tokens of probability 0"""
    with_entropy: bool


class Scored(NamedTuple):
    """Scores of K tokens of a TextBatch."""

    text_rows: Tensor
    """[K] int64"""
    text_cols: Tensor
    """[K] int64"""
    scores: Tensor
    """[2, K] log-probs and ``TokenScores.greedy``, or [3, K] with the entropies behind them; fp32"""


def logits_at(rows: Tensor, cols: Tensor) -> Answer:
    """Returns an ``Answer`` that computes the logits [M, V] at (rows, cols), [M] each."""
    return lambda hidden, head: head(hidden[rows, cols])


def scores_of(targets: Targets, ids: Tensor, scoring: Scoring) -> Answer:
    """Returns an ``Answer`` that computes the scores of the tokens ``ids`` [K], as in ``Scored.scores``."""

    def answer(hidden: Tensor, head: Head) -> Tensor:
        found = chunked_token_logprobs(
            hidden[targets.rows, targets.cols],
            ids,
            head,
            chunk_size=STATES_AT_ONCE,
            temperature=scoring.temperature,
            suppressed=scoring.suppressed,
            with_entropy=scoring.with_entropy,
            state=targets.state,
        )
        entropy = [] if found.entropy is None else [found.entropy]
        return torch.stack([found.logprobs, found.greedy, *entropy])

    return answer


def forward(model: nn.Module, answer: Answer, **inputs: Any) -> Any:
    """Runs ``model`` and returns ``answer`` instead of its logits.

    Everything happens inside the model's own forward, where sharded weights are whole, and goes through its own head
    module, adapters included.

    Raises:
        ValueError: The family does something to its logits behind the head that is not known here.
    """
    head, config = unwrap(model).get_output_embeddings(), text_config(model)
    assert head is not None, "the model has no language-model head"
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    answered: list[Tensor] = []
    inside = False

    def logits(states: Tensor) -> Tensor:
        raw: Tensor = head(states)
        return raw if cap is None else torch.tanh(raw / cap) * cap

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            answered.append(answer(args[0], logits))
        finally:
            inside = False
        return (args[0][:0], *args[1:])  # the call itself has nothing left to do

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if inside else answered[-1]

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    if cap is not None:
        config.final_logit_softcapping = None  # capped above, before the log-probs
    try:
        out = model(**inputs)
    finally:
        if cap is not None:
            config.final_logit_softcapping = cap
        for handle in handles:
            handle.remove()
    if out.logits is not answered[-1] and not torch.equal(out.logits, answered[-1]):
        raise ValueError(
            f"{type(unwrap(model)).__name__} changes its logits behind the head in a way that is not known here: "
            "its texts cannot be scored"
        )
    return out
