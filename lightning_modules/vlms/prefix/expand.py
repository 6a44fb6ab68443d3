"""Route *expand*: each prompt runs once, and its keys and values are repeated for every text behind it.

A text that others continue runs once too: one forward for each level of the tree ``TextBatch.parent``, or, if padding
would spoil the cache of a layer, one for each length of such texts. The cache is differentiable, so that gradients
reach the prompt and the vision tower. Sampling uses the same functions.

Letters: B prompts, n rows of one forward, S tokens already in the cache, W columns, K scored tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.prefix.caches import PaddedCache, ReservedLayer, new_cache
from vidreason.lightning_modules.vlms.prefix.head import Answer, Scored, Scoring, forward, scores_of
from vidreason.lightning_modules.vlms.prefix.layout import (
    PromptLayout,
    cache_keyword,
    layers_with_state,
    next_positions,
    unwrap,
)
from vidreason.lightning_modules.vlms.prefix.recompute import recomputed_layers
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan, plan_texts, targets


@dataclass(frozen=True)
class Prefix:
    """The tokens that n rows have in their cache: keys and values, mask, and the position of the next token."""

    cache: Any
    """A transformers ``Cache`` of n rows and S tokens; extending a prefix extends it in place."""
    mask: Tensor
    """[n, S] int64, 1 on real tokens."""
    start: Tensor
    """[n] int64, position of the next token."""
    padded: bool = True
    """False if the host knows that ``mask`` is 1 everywhere."""

    def select(self, rows: Tensor) -> Prefix:
        """Returns the prefix of selected rows, which may repeat; this prefix must not be used afterwards."""
        self.cache.batch_select_indices(rows)
        return Prefix(self.cache, self.mask[rows], self.start[rows])

    def reserve(self, rows: Tensor, room: int) -> Prefix:
        """Returns the prefix of selected rows, which may repeat, in storage with room for ``room`` tokens more.

        Layers with a sliding window or linear attention, which keep a limited number of states, grow as before. This
        prefix must not be used afterwards, and the new one has no gradient. The host waits for the device once.
        """
        layers: list[Any] = []
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer and layer.is_initialized:
                layers.append(ReservedLayer(layer, rows, room))
            else:
                layer.batch_select_indices(rows)
                layers.append(layer)
        padded = not bool(self.mask.all())
        cache = (PaddedCache if padded else Cache)(layers)
        return Prefix(cache, self.mask[rows], self.start[rows], padded)

    def keep(self, rows: Sequence[int]) -> Prefix:
        """Returns a reserved prefix of fewer rows; only rows that change their place are copied.

        Args:
            rows: Rows that stay, in their new order. A row that moves must come from behind those that stay.
        """
        device = self.mask.device
        moved = [(row, place) for place, row in enumerate(rows) if row != place]
        source, target = torch.tensor(moved, dtype=torch.long).reshape(-1, 2).to(device).T
        index = torch.tensor(rows, dtype=torch.long).to(device)
        for layer in self.cache.layers:
            if isinstance(layer, ReservedLayer):
                layer.move(source, target, len(rows))
            else:
                layer.batch_select_indices(index)
        return replace(self, mask=self.mask[index], start=self.start[index])

    def fork(self) -> Prefix:
        """Returns a prefix with the same keys and values that can be extended without changing this one."""
        # Shallow copies suffice: a layer extends by making new tensors and leaves the old ones.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return Prefix(cache, self.mask, self.start)


def prefill(layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, answer: Answer) -> tuple[Tensor, Prefix]:
    """Forwards every prompt once.

    Args:
        layout: The model family.
        model: The model, with or without PEFT around it.
        prompts: B prompts, left-padded.
        answer: Computes the first result from hidden states and head.

    Returns:
        The result of ``answer``, and the prefix of B rows.
    """
    inputs = prompts.inputs
    positions = layout.position_ids(unwrap(model), inputs)
    cache = new_cache(model)
    with recomputed_layers(model, cache):
        out = forward(model, answer, **inputs, position_ids=positions, use_cache=True, **{cache_keyword(model): cache})
    return out.logits, Prefix(cache, inputs["attention_mask"].long(), next_positions(positions))


def extend(
    layout: PromptLayout, model: nn.Module, prefix: Prefix, ids: Tensor, mask: Tensor | None, answer: Answer
) -> tuple[Tensor, Prefix]:
    """Forwards right-padded tokens behind a prefix.

    Args:
        layout: The model family.
        model: The model, with or without PEFT around it.
        prefix: The prefix of n rows; its cache grows in place.
        ids: [n, W] int64.
        mask: [n, W] bool, real tokens; None if all are.
        answer: Computes the first result from hidden states and head.

    Returns:
        The result of ``answer``, and the extended prefix.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)
    full = torch.cat([prefix.mask, torch.ones_like(ids) if mask is None else mask.long()], dim=1)
    lengths = ids.shape[1] if mask is None else mask.sum(dim=1)
    padded = prefix.padded or mask is not None
    with recomputed_layers(model, prefix.cache):
        out = forward(
            model,
            answer,
            input_ids=ids,
            attention_mask=full if padded else None,
            position_ids=layout.text_position_ids(prefix.start[:, None] + steps),
            use_cache=True,
            **{cache_keyword(model): prefix.cache},
        )
    # ``forward`` puts the answer in the place of the logits.
    return out.logits, Prefix(prefix.cache, full, prefix.start + lengths, padded)


def expand_prompts(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, plan: TextPlan, scoring: Scoring
) -> tuple[list[Scored], Prefix]:
    """Forwards the prompts, and scores the first token of every text that directly follows one."""
    last = prompts.inputs["input_ids"].shape[1] - 1
    asked = targets([(plan.owner[row], last, row, 0) for row in plan.first_targets(0)], texts.ids.device)
    ids = texts.ids[asked.text_rows, asked.text_cols]
    scores, prefix = prefill(layout, model, prompts, scores_of(asked, ids, scoring))
    return [Scored(asked.text_rows, asked.text_cols, scores)], prefix


def expand_texts(
    layout: PromptLayout, model: nn.Module, prefix: Prefix, texts: TextBatch, scoring: Scoring
) -> list[Scored]:
    """Forwards the texts behind the prefix of their prompts, which stays as it is.

    Returns:
        The scores of all tokens that count, except those that a prompt predicts.
    """
    plan, device = plan_texts(texts), texts.ids.device
    by_length = layers_with_state(model) is not None
    found = []

    def run(prefix: Prefix, place: Mapping[int, int]) -> None:
        """Forwards all texts behind a prefix, in which the row or prompt ``above`` (see ``TextPlan``) has a place."""
        for rows in plan.forwards(place, by_length):
            behind = torch.tensor([place[plan.above(row)] for row in rows], device=device)
            here = {row: i for i, row in enumerate(rows)}
            # A state predicts the next token of its row, and its last one the first token of texts that continue it.
            inner = [(here[row], col - 1, row, col) for row in rows for col in plan.inner_targets(row)]
            first = [
                (here[plan.parent[row]], plan.lengths[plan.parent[row]] - 1, row, 0)
                for row in plan.first_targets(plan.depth[rows[0]] + 1)
                if plan.parent[row] in here
            ]
            asked = targets([*inner, *first], device)
            answer = scores_of(asked, texts.ids[asked.text_rows, asked.text_cols], scoring)
            index, width = torch.tensor(rows, device=device), max(plan.widths[row] for row in rows)
            ids, mask = texts.ids[index, :width], texts.mask[index, :width]
            scores, extended = extend(layout, model, prefix.fork().select(behind), ids, mask, answer)
            found.append(Scored(asked.text_rows, asked.text_cols, scores))
            run(extended, here)

    run(prefix, {-1 - b: b for b in range(len(prefix.start))})
    return found
