"""Log-probs of many texts behind few prompts: each prompt runs once, and so does each text that others continue.

*Expand* forwards the prompts once and hands every text its prompt's keys and values; a text that others continue is
forwarded once too, level by level through ``TextBatch.parent``. The cache is differentiable, so gradients reach the
prompt and the vision tower. *Naive* repeats prompt and pixels for every path from a prompt to a leaf; it is the
reference that expand must equal in value and gradient.

Letters: B prompts, P prompt tokens, N texts, L tokens of the longest text, n rows of one forward, S tokens already in
the cache, K scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vidreason.datamodules.types import EncodedPrompts, TextBatch


class PromptLayout(Protocol):
    """What differs between families in how prompts are laid out; implemented by ``VLM``."""

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Positions of left-padded inputs, [B, P], or [A, B, P] for A rotary axes."""

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Turns text positions [n, L] into what the decoder takes."""

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Inputs of the prompts ``index`` [n], pixels included."""


class TargetLogits(NamedTuple):
    """Logits that predict K tokens of a TextBatch."""

    rows: Tensor
    """[K] int64, text row of the predicted token"""
    cols: Tensor
    """[K] int64, its column"""
    logits: Tensor
    """[K, V]"""


@dataclass(frozen=True)
class Prefix:
    """What is behind n rows: their keys and values, which of them are real, and the position that comes next."""

    cache: Any
    """A transformers ``Cache`` of n rows and S tokens; extending a prefix extends it in place"""
    mask: Tensor
    """[n, S] int64, 1 on real tokens"""
    start: Tensor
    """[n] int64, position of the next token"""

    def select(self, rows: Tensor) -> Prefix:
        """Gathers rows (repeating or dropping them); the old prefix must not be used afterwards."""
        self.cache.batch_select_indices(rows)
        return Prefix(self.cache, self.mask[rows], self.start[rows])


def unwrap(model: Any) -> Any:
    """The transformers ``PreTrainedModel`` inside ``model``, which may be wrapped by PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def would_checkpoint(model: nn.Module) -> bool:
    """Whether a decoder layer would recompute its activations, and with that silently drop the cache."""
    return any(
        isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training
        for layer in unwrap(model).get_decoder().modules()
    )


@contextmanager
def _head_at(model: nn.Module, rows: Tensor, cols: Tensor) -> Iterator[None]:
    """Inside, the model's own head sees only the hidden states at (rows, cols): logits are [K, V], not [n, L, V]."""
    head = unwrap(model).get_output_embeddings()
    assert head is not None, "the model has no language-model head"

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, cols], *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def prefill(layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, ask: Tensor) -> tuple[Tensor, Prefix]:
    """Forwards every prompt once.

    Args:
        layout: The family.
        model: The model, with or without PEFT around it.
        prompts: B prompts, left-padded.
        ask: [K] int64, prompts whose next-token logits are wanted.

    Returns:
        The logits [K, V] behind the last token of the prompts in ``ask``, and the prefix of B rows.
    """
    inputs = prompts.inputs
    positions = layout.position_ids(unwrap(model), inputs)
    batch, length = inputs["input_ids"].shape
    with _head_at(model, ask, torch.full_like(ask, length - 1)):
        out = model(**inputs, position_ids=positions, use_cache=True)
    start = positions.reshape(-1, batch, length).amax(dim=(0, 2)) + 1
    return out.logits, Prefix(out.past_key_values, inputs["attention_mask"].long(), start)


def extend(
    layout: PromptLayout, model: nn.Module, prefix: Prefix, ids: Tensor, mask: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Prefix]:
    """Forwards right-padded tokens behind a prefix.

    Args:
        layout: The family.
        model: The model, with or without PEFT around it.
        prefix: The prefix of n rows; its cache grows in place.
        ids: [n, W] int64.
        mask: [n, W] bool, real tokens.
        rows: [K] int64, rows whose logits are wanted.
        cols: [K] int64, and at which column.

    Returns:
        The logits [K, V] that come after the tokens at (rows, cols), and the longer prefix.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)
    full = torch.cat([prefix.mask, mask.long()], dim=1)
    with _head_at(model, rows, cols):
        out = model(
            input_ids=ids,
            attention_mask=full,
            position_ids=layout.text_position_ids(prefix.start[:, None] + steps),
            past_key_values=prefix.cache,
            use_cache=True,
        )
    return out.logits, Prefix(prefix.cache, full, prefix.start + mask.sum(dim=1))


class _Level(NamedTuple):
    """Texts of one depth that have to be forwarded or are predicted from the depth above; everything on the CPU."""

    run: Tensor
    """[n] rows to forward"""
    run_from: Tensor
    """[n] their predecessor's place among the prompts or among ``run`` of the level above"""
    width: int
    """columns to forward"""
    first: Tensor
    """[m] rows whose first token counts"""
    first_from: Tensor
    """[m] their predecessor's place"""


def _plan(texts: TextBatch) -> list[_Level]:
    """Sorts rows by depth and finds how much of each has to be forwarded; one copy from the device.

    A row is run up to its last token where others that count continue it, else up to its last predictor.
    """
    owner, parent, lengths, loss = (x.cpu() for x in (texts.owner, texts.parent, texts.mask.sum(1), texts.loss_mask))
    n, length = loss.shape
    parents, owners = parent.tolist(), owner.tolist()
    depth = [0] * n
    for row, above in enumerate(parents):
        if above >= row or (above >= 0 and owners[above] != owners[row]):
            raise ValueError(f"text row {row}: parent {above} must be an earlier row of the same prompt {owners[row]}")
        depth[row] = depth[above] + 1 if above >= 0 else 0
    if n and int(lengths.min()) == 0:
        raise ValueError(f"text row {int(lengths.argmin())} has no token: leave out empty texts")
    last_target = torch.where(loss, torch.arange(length), -1).amax(1).tolist() if length else []
    widths = [max(target, 0) for target in last_target]
    for row in range(n - 1, -1, -1):
        if parents[row] >= 0 and (last_target[row] >= 0 or widths[row] > 0):
            widths[parents[row]] = int(lengths[parents[row]])

    levels: list[_Level] = []
    place = {-1 - b: b for b in range(max(owners, default=-1) + 1)}  # prompts stand as -1 - owner
    for d in range(max(depth, default=-1) + 1):
        rows = [row for row in range(n) if depth[row] == d]
        above = {row: parents[row] if parents[row] >= 0 else -1 - owners[row] for row in rows}
        run = [row for row in rows if widths[row] > 0]
        first = [row for row in rows if bool(loss[row, 0])]
        levels.append(
            _Level(
                torch.tensor(run, dtype=torch.long),
                torch.tensor([place[above[row]] for row in run], dtype=torch.long),
                max((widths[row] for row in run), default=0),
                torch.tensor(first, dtype=torch.long),
                torch.tensor([place[above[row]] for row in first], dtype=torch.long),
            )
        )
        place = {row: i for i, row in enumerate(run)}
    return levels


def _unique(index: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values, sorted, and where each entry went among them."""
    values, where = torch.unique(index, return_inverse=True)
    return values, where


def expand_logits(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch
) -> Iterator[TargetLogits]:
    """Logits of every token in ``texts.loss_mask``, each prompt and each continued text forwarded once.

    Raises:
        ValueError: A decoder layer would checkpoint, so that texts would be scored without the video; or a text row is
            empty or stands before its parent.
    """
    if would_checkpoint(model):
        raise ValueError(
            "route 'expand' needs the prompt's keys and values, which gradient checkpointing drops in train mode: "
            "set vlm.route to 'naive' (or 'auto'), or vlm.gradient_checkpointing to false"
        )
    device = texts.ids.device
    levels = _plan(texts)
    if not any(len(level.run) or len(level.first) for level in levels):
        return
    ask, where = _unique(levels[0].first_from.to(device))
    logits, prefix = prefill(layout, model, prompts, ask)
    if len(where):
        yield TargetLogits(levels[0].first.to(device), torch.zeros_like(where), logits[where])

    for level, below in zip(levels, [*levels[1:], None], strict=True):
        if not len(level.run):
            return
        run = level.run.to(device)
        mask = texts.mask[run, : level.width]
        inner = texts.loss_mask[run, 1 : level.width + 1].nonzero()  # token j + 1 is predicted at column j
        rows, cols = inner[:, 0], inner[:, 1]
        ask = where = torch.empty(0, dtype=torch.long, device=device)
        if below is not None:
            ask, where = _unique(below.first_from.to(device))
        prefix = prefix.select(level.run_from.to(device))
        logits, prefix = extend(
            layout,
            model,
            prefix,
            texts.ids[run, : level.width],
            mask,
            torch.cat([rows, ask]),
            torch.cat([cols, texts.mask[run[ask]].sum(1) - 1]),
        )
        if len(rows):
            yield TargetLogits(run[rows], cols + 1, logits[: len(rows)])
        if below is not None and len(where):
            yield TargetLogits(below.first.to(device), torch.zeros_like(where), logits[len(rows) :][where])


def naive_logits(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch
) -> Iterator[TargetLogits]:
    """The same logits with prompt and pixels repeated for every path from a prompt to a leaf, and no cache.

    Raises:
        ValueError: A text row is empty or stands before its parent.
    """
    _plan(texts)  # refuses what expand refuses
    if not bool(texts.loss_mask.any()):
        return
    device, base = texts.ids.device, prompts.inputs["input_ids"].shape[1]
    lengths, loss, paths = texts.mask.sum(1).tolist(), texts.loss_mask.cpu(), _paths(texts.parent.tolist())
    width = max(sum(lengths[row] for row in path) for path in paths)
    ids = texts.ids[:1, :1].repeat(len(paths), width)  # padded with a real token: 0 might stand for a placeholder
    mask = torch.zeros_like(ids)
    targets: dict[int, list[tuple[int, int, int, int]]] = {}  # by text row: row, column, sequence, predictor's place
    for i, path in enumerate(paths):
        end = 0
        for row in path:
            ids[i, end : end + lengths[row]] = texts.ids[row, : lengths[row]]
            counted = loss[row].nonzero()[:, 0].tolist()
            targets.setdefault(row, [(row, col, i, base + end + col - 1) for col in counted])
            end += lengths[row]
        mask[i, :end] = 1
    rows, cols, sequence, place = torch.tensor(
        [target for row in targets.values() for target in row], device=device
    ).unbind(1)

    inputs = layout.repeat_prompts(
        prompts.inputs, texts.owner[torch.tensor([path[-1] for path in paths], device=device)]
    )
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], dim=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids, dtype=inputs[name].dtype)], dim=1)
    positions = layout.position_ids(unwrap(model), inputs)
    with _head_at(model, sequence, place):
        out = model(**inputs, position_ids=positions, use_cache=False)
    yield TargetLogits(rows, cols, out.logits)


def _paths(parents: list[int]) -> list[list[int]]:
    """Rows from a root to a leaf, one list for every leaf."""
    paths = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
    return paths
