"""Plans which tokens of a TextBatch have to be run, behind which tokens, and which hidden state predicts each token.

A plan is on the CPU, so that the device is synchronised once per batch. Letters: B prompts, N texts, L tokens of the
longest, K scored tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vidreason.datamodules.types import TextBatch


@dataclass(frozen=True)
class TextPlan:
    """The tree of a TextBatch as lists over its N rows."""

    owner: list[int]
    """Index of each row's prompt."""
    parent: list[int]
    """Row that each row continues, -1 for its prompt."""
    lengths: list[int]
    """Number of tokens without padding."""
    loss: Tensor
    """[N, L] bool on the CPU."""
    widths: list[int]
    """Number of tokens to run: all if a text that counts continues the row, else up to the last token that predicts a
    token that counts."""
    depth: list[int]
    """Number of texts between each row and its prompt."""

    def __len__(self) -> int:
        return len(self.owner)

    def above(self, row: int) -> int:
        """Returns the parent row of ``row``, or -1 - owner if that is a prompt."""
        return self.parent[row] if self.parent[row] >= 0 else -1 - self.owner[row]

    def path(self, row: int) -> list[int]:
        """Returns the rows from a prompt to ``row``, inclusive."""
        path = [row]
        while self.parent[path[-1]] >= 0:
            path.append(self.parent[path[-1]])
        return path[::-1]

    def first_targets(self, depth: int) -> list[int]:
        """Returns the rows of a depth whose first token counts."""
        return [row for row in range(len(self)) if self.depth[row] == depth and bool(self.loss[row, 0])]

    def inner_targets(self, row: int) -> list[int]:
        """Returns the columns of tokens of ``row`` that count and are predicted by a token of the same row."""
        return [column for column in self.loss[row].nonzero()[:, 0].tolist() if column > 0]

    def leaf_paths(self) -> list[list[int]]:
        """Returns the path to every leaf."""
        return [self.path(leaf) for leaf in sorted(set(range(len(self))) - set(self.parent))]

    def families(self) -> list[tuple[int, list[int]]]:
        """Returns the rows to run, grouped by the row or prompt that they continue (see ``above``), parents first."""
        found: dict[int, list[int]] = {}
        for row in sorted(range(len(self)), key=lambda r: self.depth[r]):
            if self.widths[row]:
                found.setdefault(self.above(row), []).append(row)
        return list(found.items())

    def forwards(self, above: Collection[int], by_length: bool) -> list[list[int]]:
        """Returns the rows to run behind the rows or prompts ``above`` (see ``above``), one list for each forward.

        Args:
            above: Rows, or prompts as -1 - owner.
            by_length: Rows that others continue share a forward only if they have the same length, so that no padding
                stands before what continues them.
        """
        continued = {self.parent[row] for row in range(len(self)) if self.widths[row]}
        found: dict[int, list[int]] = {}
        for row in range(len(self)):
            if self.widths[row] and self.above(row) in above:
                found.setdefault(self.lengths[row] if by_length and row in continued else 0, []).append(row)
        return list(found.values())


def plan_texts(texts: TextBatch) -> TextPlan:
    """Returns the plan of a batch, including how many tokens of each row have to be run.

    Raises:
        ValueError: If a row is empty or stands before its parent.
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
    widths = [max(target, 0) for target in last_target]  # the token before a target predicts it
    for row in range(n - 1, -1, -1):
        if parents[row] >= 0 and (last_target[row] >= 0 or widths[row] > 0):
            widths[parents[row]] = int(lengths[parents[row]])
    return TextPlan(owners, parents, lengths.tolist(), loss, widths, depth)


class Targets(NamedTuple):
    """K tokens and the M hidden states that predict them."""

    rows: Tensor
    """[M] int64, row of each state in the forward."""
    cols: Tensor
    """[M] int64, column of each state in the forward."""
    state: Tensor
    """[K] int64 on the CPU, non-decreasing: index of the state that predicts each token."""
    text_rows: Tensor
    """[K] int64, row of each token in the TextBatch."""
    text_cols: Tensor
    """[K] int64, column of each token in the TextBatch."""


def targets(found: Sequence[tuple[int, int, int, int]], device: torch.device) -> Targets:
    """Builds targets from (row of state, column of state, text row, text column), merging equal states."""
    places = {place: i for i, place in enumerate(sorted({(row, col) for row, col, _, _ in found}))}
    ordered = sorted(found, key=lambda target: places[target[:2]])
    state = torch.tensor([places[target[:2]] for target in ordered], dtype=torch.long)
    at = torch.tensor(list(places), dtype=torch.long).reshape(-1, 2).to(device)
    tokens = torch.tensor([target[2:] for target in ordered], dtype=torch.long).reshape(-1, 2).to(device)
    return Targets(at[:, 0], at[:, 1], state, tokens[:, 0], tokens[:, 1])


class Part(NamedTuple):
    """Some rows of a TextBatch."""

    rows: list[int]
    texts: TextBatch


def split_texts(texts: TextBatch, plan: TextPlan, size: int) -> list[Part]:
    """Splits a batch into parts of at most ``size`` texts behind the prompts, each with all texts that continue it.

    The first tokens of these texts no longer count, since the prompt predicts them, which is not in the part.
    """
    roots = sorted((row for row in range(len(plan)) if plan.parent[row] < 0), key=lambda row: plan.owner[row])
    part_of = {root: i // size for i, root in enumerate(roots)}
    parts: list[list[int]] = [[] for _ in range(-(-len(roots) // size))]
    for row in range(len(plan)):
        parts[part_of[plan.path(row)[0]]].append(row)
    loss = texts.loss_mask.clone()
    loss[roots, 0] = False
    counted = replace(texts, loss_mask=loss, answer_mask=texts.answer_mask & loss)
    return [Part(rows, _take(counted, plan, rows)) for rows in parts]


def _take(texts: TextBatch, plan: TextPlan, rows: list[int]) -> TextBatch:
    index = torch.tensor(rows, device=texts.ids.device)
    place = {row: i for i, row in enumerate(rows)} | {-1: -1}
    width = max(plan.lengths[row] for row in rows)
    parent = torch.tensor([place[plan.parent[row]] for row in rows], device=index.device)
    ids, mask, loss, answer = (x[index, :width] for x in (texts.ids, texts.mask, texts.loss_mask, texts.answer_mask))
    return TextBatch(ids, mask, loss, answer, texts.owner[index], parent)


class Joined(NamedTuple):
    """A TextBatch in which each text and its only child have become one row."""

    texts: TextBatch
    rows: Tensor | None
    """[N', L'] int64, the original row of each token; None if nothing was joined."""
    cols: Tensor | None
    """[N', L'] int64, the original column of each token; None if nothing was joined."""


def join_only_children(texts: TextBatch, plan: TextPlan) -> Joined:
    """Joins each text with its only child, which saves a row and one pass over the context."""
    children = Counter(plan.parent)
    joins = [parent >= 0 and children[parent] == 1 for parent in plan.parent]
    if not any(joins):
        return Joined(texts, None, None)
    chains: dict[int, list[int]] = {}
    head = list(range(len(plan)))
    for row in range(len(plan)):
        head[row] = head[plan.parent[row]] if joins[row] else row
        chains.setdefault(head[row], []).append(row)
    place = {row: i for i, row in enumerate(chains)}
    above = [-1 if plan.parent[row] < 0 else place[head[plan.parent[row]]] for row in chains]
    width = max(sum(plan.lengths[row] for row in chain) for chain in chains.values())
    where = torch.zeros(2, len(chains), width, dtype=torch.long)
    real = torch.zeros(len(chains), width, dtype=torch.bool)
    for i, chain in enumerate(chains.values()):
        at = [(row, column) for row in chain for column in range(plan.lengths[row])]
        where[:, i, : len(at)], real[i, : len(at)] = torch.tensor(at).T, True
    device = texts.ids.device
    rows, cols, real = where[0].to(device), where[1].to(device), real.to(device)
    ids, loss, answer = (x[rows, cols] for x in (texts.ids, texts.loss_mask, texts.answer_mask))
    owner, parent = texts.owner[torch.tensor(list(chains), device=device)], torch.tensor(above, device=device)
    return Joined(TextBatch(ids, real, loss & real, answer & real, owner, parent), rows, cols)
