"""Attention over one packed row in plain SDPA calls: one for each prompt, one for all texts behind the same tokens.

The row holds prompts and texts one after another, without padding. A prompt attends to itself, causally; a text attends
to the tokens that it continues (its context) and to itself, aligned at the bottom right. No mask over the whole row is
ever made. The function stands in transformers' attention interface under ``NAME`` and is set on the text configuration
alone. It gets the lengths as the keyword ``packing``, which every decoder hands down to its layers, also where gradient
checkpointing runs a layer again. Without that keyword it is ``sdpa``.

Letters: S tokens of the row, M tokens of the memory, Q query heads, K key heads, D head size, n texts, W tokens of the
longest of them, T tokens of their context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap

NAME = "sdpa_shared_prefix"
Span = tuple[int, int]
"""From the first token up to, not with, the last"""
BLOCK = 256
"""Queries that attend at once where the mask is a tensor"""
UNKNOWN = ("softcap", "s_aux", "sliding_window", "position_bias")
"""What some decoders ask of their attention and this one does not do"""


class Group(NamedTuple):
    """Texts with the same context."""

    context: tuple[Span, ...]
    """Of the memory followed by the packed row"""
    rows: tuple[Span, ...]
    """Of the packed row, one behind the other"""


class KeysValues(NamedTuple):
    """Of one layer."""

    keys: Tensor
    """[1, K, M, D]"""
    values: Tensor
    """[1, K, M, D]"""


class Packing:
    """Layout of a packed row, and the keys and values that precede it.

    Args:
        groups: Prompts and texts in the order of the row, which they cover.
        device: Where the row is.
        memory: Keys and values of each layer that go before the row; none where the row holds its own prompts.
        keep: Whether to collect the row's own keys and values, to be the memory of other rows.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, memory: Sequence[KeysValues] = (), keep: bool = False
    ) -> None:
        spans = [span for group in groups for span in group.rows]
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)), "groups must cover the row in order"
        self.groups = tuple(groups)
        self.memory = tuple(memory)
        self.keep = keep
        self.kept: dict[int, KeysValues] = {}
        self.layers: set[int] = set()
        self.padded = [_padded(group.rows, device) for group in groups]
        self.masks = [_mask(group, device) for group in groups]

    def take_kept(self) -> list[KeysValues]:
        """Returns the collected keys and values in the order of the layers; recomputed layers collect nothing."""
        self.keep = False
        kept, self.kept = self.kept, {}
        return [kept[layer] for layer in sorted(kept)]


def _padded(rows: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Returns, for texts of unequal length, the [n·W] indices to gather and the indices of real tokens among them."""
    lengths = [end - start for start, end in rows]
    if len(set(lengths)) == 1:
        return None
    steps = torch.arange(max(lengths))
    starts, sizes = (torch.tensor(x)[:, None] for x in ([start for start, _ in rows], lengths))
    gather = starts + torch.minimum(steps, sizes - 1)  # filled with the last token, which no real query sees
    return gather.flatten().to(device), (steps < sizes).flatten().nonzero()[:, 0].to(device)


def _mask(group: Group, device: torch.device) -> Tensor | None:
    """Returns the causal mask of a text over its context and itself, aligned at the bottom right, [W, T + W]."""
    width = max(end - start for start, end in group.rows)
    length = width + sum(end - start for start, end in group.context)
    if width in (1, length):
        return None  # one token sees everything; without context plain causal attention will do
    if device.type != "cuda":
        return torch.ones(width, length, dtype=torch.bool, device=device).tril(length - width)
    with _disable_current_modes():  # a FLOP counter around the forward must not see this tensor being made
        bias: Tensor = causal_lower_right(width, length)  # makes no mask: the fused kernels know the alignment
    return bias


def install(model: nn.Module) -> None:
    """Sets the attention on the text configuration of ``model``; the vision tower keeps its own."""
    if text_config(model)._attn_implementation != NAME:
        unwrap(model).set_attn_implementation({"text_config": NAME})


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention over a packed row, with the interface of transformers.

    Args:
        module: The attention layer.
        query: [1, Q, S, D].
        key: [1, K, S, D].
        value: [1, K, S, D].
        attention_mask: Empty where ``packing`` is given.
        dropout: Of attention weights.
        scaling: Of queries times keys.
        packing: Where what stands in the row; None leaves it to ``sdpa``.
        kwargs: What else a decoder hands down.

    Returns:
        [1, S, Q, D].

    Raises:
        ValueError: A decoder asks for what only another attention does, or lost ``packing`` on the way.
    """
    if packing is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                f"{type(module).__name__} was not handed the lengths of a packed row: use vlm.route: expand"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if asked:
        raise ValueError(
            f"{type(module).__name__} needs {asked[0]}, which route 'packed' has not: use vlm.route: expand"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every decoder's attention has one
    packing.layers.add(layer)
    if packing.keep:
        packing.kept[layer] = KeysValues(key, value)
    before = packing.memory[layer] if packing.memory else None
    pieces = []
    for group, padded, mask in zip(packing.groups, packing.padded, packing.masks, strict=True):
        q, k, v = (_rows(x, group.rows, padded) for x in (query, key, value))
        if group.context:
            k = torch.cat([_context(key, before.keys if before else None, group.context, len(k)), k], dim=2)
            v = torch.cat([_context(value, before.values if before else None, group.context, len(v)), v], dim=2)
        out = _attend(q, k, v, mask, dropout, scaling).transpose(1, 2).flatten(0, 1)  # [n·W, Q, D]
        pieces.append(out if padded is None else out[padded[1]])
    return torch.cat(pieces)[None], None


def _rows(states: Tensor, rows: Sequence[Span], padded: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns the texts of a group, [n, heads, W, D], from [1, heads, S, D]."""
    row = states[0]
    taken = row[:, rows[0][0] : rows[-1][1]] if padded is None else row.index_select(1, padded[0])
    return taken.reshape(taken.shape[0], len(rows), -1, taken.shape[2]).transpose(0, 1)


def _context(states: Tensor, memory: Tensor | None, spans: Sequence[Span], n: int) -> Tensor:
    """Returns the context of a group, repeated for its n texts, [n, K, T, D]."""
    offset = 0 if memory is None else memory.shape[2]
    pieces = []
    for start, end in spans:
        if end <= offset:
            assert memory is not None
            pieces.append(memory[:, :, start:end])
        else:
            pieces.append(states[:, :, start - offset : end - offset])
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return joined.expand(n, -1, -1, -1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Returns the attention [n, Q, W, D] of queries over T + W keys."""
    width, before = query.shape[2], key.shape[2] - query.shape[2]
    if type(mask) is Tensor and width > BLOCK:
        # A kernel reads a mask whole, also where it forbids: blocks of queries leave out what none of them may see.
        blocks = []
        for start in range(0, width, BLOCK):
            end = min(start + BLOCK, width)
            seen = before + end
            inputs = query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], mask[start:end, :seen]
            blocks.append(_attend(*inputs, dropout, scaling))
        return torch.cat(blocks, dim=2)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and query.dtype == torch.float32:  # no fused kernel takes fewer key heads in fp32
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    result: Tensor = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=query.shape[2] == key.shape[2],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
