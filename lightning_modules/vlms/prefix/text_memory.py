"""Estimates how many texts a decoder can forward at once within a memory limit.

The estimate follows from the sizes of the decoder and covers the texts only, not weights or prompts.
"""

from __future__ import annotations

import torch
from torch import nn

from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap, would_checkpoint
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan


def texts_that_fit(model: nn.Module, plan: TextPlan, prompt_tokens: int, route: str, limit_gb: float) -> int:
    """Returns how many texts behind the prompts, each with all texts that continue it, fit into the limit.

    Args:
        model: The model in the mode in which it will run.
        plan: The plan of the texts.
        prompt_tokens: Number of tokens of the longest prompt.
        route: ``expand`` or ``packed``.
        limit_gb: Memory limit in GB of 1e9 bytes.

    Raises:
        ValueError: If not even one text fits.
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
    """Estimates the memory in bytes of a text of ``tokens`` tokens behind ``context`` tokens in the decoder.

    In training, a layer keeps the states that norms, projections and attention need in the backward pass, and a copy of
    the keys and values of the context. With gradient checkpointing, all layers keep their input and one layer at a time
    keeps its states. Without gradients, one layer at a time has states. In both cases, all layers have a cache for
    ``expand``.
    """
    config, base = text_config(model), unwrap(model)
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys = heads * size, int(config.num_key_value_heads or heads) * size
    bytes_each: int = next(p.element_size() for p in base.get_input_embeddings().parameters())
    half = bytes_each < torch.float32.itemsize
    norms = (18 if half else 6) * hidden  # in half precision, norms compute in fp32 and keep the copies
    states = tokens * (norms + 3 * queries + 3 * keys + 4 * int(config.intermediate_size))
    copies = 2 * keys * (context + tokens)
    layer, light = (states + copies) * bytes_each, tokens * hidden * bytes_each
    cache = layers * copies * bytes_each if route == "expand" else 0
    if not torch.is_grad_enabled():
        return layer + cache
    return layer + layers * light + cache if would_checkpoint(model) else layers * layer
