"""Route *packed*: one forward over prompts and texts in a single row without padding.

It suits gradient checkpointing, under which it holds no cache, and sharded weights, which every forward gathers. The
attention over the row is in ``packing.py``.

Letters: B prompts, P tokens of all prompts together, R tokens of all texts that are run, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.prefix.head import Answer, Scored, Scoring, forward, scores_of
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN, PromptLayout, next_positions, text_config, unwrap
from vidreason.lightning_modules.vlms.prefix.packing import Group, KeysValues, Packing, Span, install
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan, plan_texts, targets


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts as the beginning of a packed row."""

    inputs: Mapping[str, Tensor]
    """Inputs of the model except mask and positions: per-token inputs [1, P] and unchanged pixels."""
    positions: Tensor
    """[1, P], or [A, 1, P]"""
    spans: tuple[Span, ...]
    """[B] place of each prompt in the row."""
    start: Tensor
    """[B] int64, position of the first token behind each prompt."""


@dataclass(frozen=True)
class Memory:
    """Prompts that have been forwarded: the keys and values of each layer, and the place of each prompt."""

    layers: Sequence[KeysValues]
    prompts: PackedPrompts


def pack_prompts(layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts) -> PackedPrompts:
    """Concatenates B prompts without their padding."""
    real = prompts.inputs["attention_mask"].bool()
    positions = layout.position_ids(unwrap(model), prompts.inputs)
    inputs = dict(prompts.inputs)
    del inputs["attention_mask"]
    for name in ("input_ids", *PER_TOKEN):
        if name in inputs:
            inputs[name] = inputs[name][real][None]
    ends = real.sum(1).cumsum(0).tolist()
    spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return PackedPrompts(inputs, positions[..., real].unsqueeze(-2), spans, next_positions(positions))


@dataclass(frozen=True)
class PackedTexts:
    """Texts as the end of a packed row."""

    ids: Tensor
    """[1, R] int64"""
    positions: Tensor
    """[1, R] positions along one rotary axis."""
    groups: list[Group]
    begin: dict[int, int]
    """First token of each text that is run, counted from the beginning of memory and row."""


def pack_texts(texts: TextBatch, plan: TextPlan, prompts: PackedPrompts, before: int, memory: int) -> PackedTexts:
    """Concatenates the tokens of all texts that have to be run, parents before their children.

    Args:
        texts: N texts.
        plan: The plan of these texts.
        prompts: The prompts of the texts.
        before: Number of tokens in the packed row before the texts.
        memory: Number of tokens in the memory, which precede the row.
    """
    tokens: list[tuple[int, int, int, int]] = []  # row, column, prompt, tokens between the prompt and this one
    groups: list[Group] = []
    begin: dict[int, int] = {}
    end = before + memory
    for above, children in plan.families():
        path = plan.path(above) if above >= 0 else []
        context = (prompts.spans[plan.owner[children[0]]], *((begin[r], begin[r] + plan.lengths[r]) for r in path))
        passed = sum(plan.lengths[row] for row in path)
        spans = []
        for row in children:
            begin[row] = end
            end += plan.widths[row]
            spans.append((begin[row] - memory, end - memory))
            tokens += [(row, column, plan.owner[row], passed + column) for column in range(plan.widths[row])]
        groups.append(Group(context, tuple(spans)))
    row_of, column_of, owner, offset = torch.tensor(tokens, dtype=torch.long).reshape(-1, 4).to(texts.ids.device).T
    return PackedTexts(texts.ids[row_of, column_of][None], (prompts.start[owner] + offset)[None], groups, begin)


def run_packed(model: nn.Module, answer: Answer, packing: Packing, **inputs: Any) -> Tensor:
    """Runs one forward over a packed row and returns the result of ``answer``.

    Raises:
        ValueError: If a layer of the decoder did not use the packed attention.
    """
    install(model)
    device = inputs["input_ids"].device
    out = forward(
        model,
        answer,
        **inputs,
        attention_mask=torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device),  # any other attention fails on it
        use_cache=False,
        packing=packing,
    )
    layers = int(text_config(model).num_hidden_layers)
    if packing.layers != set(range(layers)):
        raise ValueError(
            f"only layers {sorted(packing.layers)} of {layers} attend over the packed row: use vlm.route: expand"
        )
    logits: Tensor = out.logits
    return logits


def packed_scores(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, plan: TextPlan, scoring: Scoring
) -> list[Scored]:
    """Scores every token that counts in one forward of prompts and texts."""
    head = pack_prompts(layout, model, prompts)
    length = head.spans[-1][1]
    tail = pack_texts(texts, plan, head, before=length, memory=0)
    packing = Packing([*_alone(head), *tail.groups], texts.ids.device)
    inputs = dict(head.inputs)
    inputs["input_ids"] = torch.cat([head.inputs["input_ids"], tail.ids], dim=1)
    for name in PER_TOKEN:
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(tail.ids, dtype=inputs[name].dtype)], dim=1)
    positions = torch.cat([head.positions, layout.text_position_ids(tail.positions)], dim=-1)
    found = [*_first_targets(plan, head), *_inner_targets(plan, tail, 0)]
    return [_score(model, found, texts, scoring, packing, **inputs, position_ids=positions)]


def packed_prompts(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, plan: TextPlan, scoring: Scoring
) -> tuple[list[Scored], Memory]:
    """Forwards the prompts, and scores the first token of every text that directly follows one."""
    head = pack_prompts(layout, model, prompts)
    packing = Packing(_alone(head), texts.ids.device, keep=True)
    found = _first_targets(plan, head)
    scored = _score(model, found, texts, scoring, packing, **head.inputs, position_ids=head.positions)
    return [scored], Memory(packing.take_kept(), head)


def packed_texts(
    layout: PromptLayout, model: nn.Module, memory: Memory, texts: TextBatch, scoring: Scoring
) -> list[Scored]:
    """Forwards texts behind the memory of their prompts.

    Returns:
        The scores of all tokens that count, except those that a prompt predicts.
    """
    plan, length = plan_texts(texts), memory.prompts.spans[-1][1]
    if not any(plan.widths):
        return []
    tail = pack_texts(texts, plan, memory.prompts, before=0, memory=length)
    packing = Packing(tail.groups, texts.ids.device, memory=memory.layers)
    positions = layout.text_position_ids(tail.positions)
    found = _inner_targets(plan, tail, length)
    return [_score(model, found, texts, scoring, packing, input_ids=tail.ids, position_ids=positions)]


def _alone(prompts: PackedPrompts) -> list[Group]:
    return [Group((), (span,)) for span in prompts.spans]


def _first_targets(plan: TextPlan, prompts: PackedPrompts) -> list[tuple[int, int, int, int]]:
    """Returns the targets that the last token of a prompt predicts: first tokens of the texts directly behind it."""
    return [(0, prompts.spans[plan.owner[row]][1] - 1, row, 0) for row in plan.first_targets(0)]


def _inner_targets(plan: TextPlan, texts: PackedTexts, memory: int) -> list[tuple[int, int, int, int]]:
    """Returns the targets that a token of their own text or of their parent text predicts."""
    found = []
    for row, parent in enumerate(plan.parent):
        if parent >= 0 and bool(plan.loss[row, 0]):
            found.append((0, texts.begin[parent] + plan.lengths[parent] - 1 - memory, row, 0))
        found += [(0, texts.begin[row] + col - 1 - memory, row, col) for col in plan.inner_targets(row)]
    return found


def _score(
    model: nn.Module,
    found: list[tuple[int, int, int, int]],
    texts: TextBatch,
    scoring: Scoring,
    packing: Packing,
    **inputs: Tensor,
) -> Scored:
    asked = targets(found, texts.ids.device)
    answer = scores_of(asked, texts.ids[asked.text_rows, asked.text_cols], scoring)
    return Scored(asked.text_rows, asked.text_cols, run_packed(model, answer, packing, **inputs))
