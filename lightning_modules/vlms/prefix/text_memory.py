"""Estimates how many texts fit through a decoder at once under a memory limit.

The estimate covers what a forward of the texts holds in addition to weights and prompts, from the decoder's sizes.
"""

from __future__ import annotations

import torch
from torch import nn

from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap, would_checkpoint
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan


def texts_that_fit(model: nn.Module, plan: TextPlan, prompt_tokens: int, route: str, limit_gb: float) -> int:
    """Returns how many texts behind the prompts, each with all texts that continue it, fit into the limit.

    Args:
        model: The model in the mode it will run in.
        plan: The texts.
        prompt_tokens: Tokens of the longest prompt.
        route: ``expand`` or ``packed``.
        limit_gb: In GB of 1e9 bytes.

    Raises:
        ValueError: Not even one text fits.
    """
    tokens = [0] * len(plan)
    context = [0] * len(plan)
    for row in range(len(plan)):
        path = plan.path(row)
        tokens[path[0]] += plan.widths[row]
        context[path[0]] += prompt_tokens + sum(plan.lengths[r] for r in path[:-1]) if plan.widths[row] else 0
    roots = [row for row in range(len(plan)) if plan.parent[row] < 0]
    most = max(text_bytes(model, tokens[row], context[row], route) for row in roots)
    fit = int(limit_gb * 1e9 // max(most, 1))
    if fit < 1:
        raise ValueError(
            f"vlm.text_memory_gb: {limit_gb} GB do not hold one text of {max(tokens[r] for r in roots)} tokens, which "
            f"takes about {most / 1e9:.3g} GB"
        )
    return fit


def text_bytes(model: nn.Module, tokens: int, context: int, route: str) -> int:
    """Estimates the bytes that a text of ``tokens`` tokens behind ``context`` tokens holds in the decoder.

    In training a layer holds the states that its norms, projections and attention need in the backward pass, and the
    context's keys and values once more for this text. Recomputed layers hold their input only, and one layer at a time
    the rest; without gradient the same, but for the cache of the expanded prompt, which stands in every layer.
    """
    config, base = text_config(model), unwrap(model)
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys = heads * size, int(config.num_key_value_heads or heads) * size
    bytes_each: int = next(p.element_size() for p in base.get_input_embeddings().parameters())
    half = bytes_each < torch.float32.itemsize
    norms = (18 if half else 6) * hidden  # in half precision the norms keep fp32 copies
    states = tokens * (norms + 3 * queries + 3 * keys + 4 * int(config.intermediate_size))
    copies = 2 * keys * (context + tokens)
    layer, light = (states + copies) * bytes_each, tokens * hidden * bytes_each
    if not torch.is_grad_enabled():
        return layer + (layers * copies * bytes_each if route == "expand" else 0)
    return layer + layers * light if would_checkpoint(model) else layers * layer
