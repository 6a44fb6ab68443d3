"""Scores many texts behind few prompts: each prompt, and each text that others continue, runs once.

Two routes share the prompt, both exact in value and gradient: *expand* (``expand.py``) repeats the keys and values of
the prompt for every text; *packed* (``packed.py``) forwards prompts and texts in one row and attends group by group.
The third, *naive* (``naive.py``), forwards the prompt again for every text and is the reference of the other two.

With chunks of texts, the prompts run once and their keys and values are kept. Each chunk is forwarded, and forwarded
again in the backward pass, where its gradient accumulates in the keys and values before the prompts' own backward.
Memory is then that of the prompts and one chunk, for any number of texts, at the cost of one more forward of the texts.
As with gradient checkpointing, the modes and the active adapter must be the same in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.prefix.expand import expand_prompts, expand_texts
from vidreason.lightning_modules.vlms.prefix.head import Scored, Scoring
from vidreason.lightning_modules.vlms.prefix.layout import (
    PromptLayout,
    is_sharded,
    layers_with_state,
    text_config,
    unwrap,
    would_checkpoint,
)
from vidreason.lightning_modules.vlms.prefix.naive import naive_scores
from vidreason.lightning_modules.vlms.prefix.packed import packed_prompts, packed_scores, packed_texts
from vidreason.lightning_modules.vlms.prefix.packing import NAME
from vidreason.lightning_modules.vlms.prefix.text_memory import texts_that_fit
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan, join_only_children, plan_texts, split_texts

Route = Literal["expand", "packed", "naive"]


LONG = 256
"""Length of a text in tokens above which packing is faster than a causal mask (``benchmarks/long_completions.py``)."""


class RouteOptions(NamedTuple):
    """The options ``route``, ``completion_chunk`` and ``text_memory_gb`` of ``VLM``."""

    route: Literal["auto", "expand", "packed", "naive"] = "auto"
    completion_chunk: int | None = None
    text_memory_gb: float | None = None


class Choice(NamedTuple):
    """A route, and the reason why it was chosen."""

    route: Route
    reason: str


def choose_route(options: RouteOptions, model: nn.Module, inputs: Mapping[str, Tensor], texts: TextBatch) -> Choice:
    """Returns the route of the options; for ``auto``, the route that suits model and texts.

    Args:
        options: The options.
        model: The model in the mode in which it will run.
        inputs: Inputs of the prompts.
        texts: The texts behind the prompts.

    Raises:
        ValueError: If the route would not be exact for this model or these settings; the message says why.
    """
    recomputes, sharded = would_checkpoint(model), is_sharded(model)
    against = {"packed": not_packed(model, inputs), "expand": _not_expanded(sharded)}
    if options.route == "auto":
        choice = _fitting(against, recomputes, sharded, texts)
    else:
        choice = Choice(options.route, "as vlm.route says")
    if against.get(choice.route) is not None:
        raise ValueError(_refusal(choice.route, against))
    if options.completion_chunk is not None or options.text_memory_gb is not None:
        why = "every chunk would gather sharded layers" if sharded else None
        why = "route 'naive' has no prefix to keep" if choice.route == "naive" else why
        if why is not None:
            raise ValueError(
                f"vlm.completion_chunk and vlm.text_memory_gb cannot be used: {why}; set both to null and put fewer "
                "prompts through the model at once"
            )
    return choice


def _refusal(route: Route, against: Mapping[str, str | None]) -> str:
    """Returns the error message about a route that cannot be used, with the alternatives."""
    also, ways_out = "", "packed (or auto)"
    if route == "packed":
        expand = against["expand"]
        also = f", and route 'expand' cannot serve it either: {expand}" if expand else ""
        ways_out = "naive" if expand else "expand or naive"
    return f"route '{route}' cannot be exact here: {against[route]}{also}; set vlm.route to {ways_out}"


def _fitting(against: Mapping[str, str | None], recomputes: bool, sharded: bool, texts: TextBatch) -> Choice:
    """Returns the route that ``auto`` chooses."""
    packs = against["packed"] is None
    if packs and recomputes:
        return Choice("packed", "decoder layers are recomputed in the backward pass")
    if sharded and (packs or against["expand"] is not None):
        return Choice("packed", "layers are sharded")
    if packs and bool((texts.parent >= 0).any()):
        return Choice("packed", "texts that continue texts then take one forward in all, not one a level")
    if packs and texts.ids.shape[1] > LONG:
        return Choice("packed", f"texts are longer than {LONG} tokens, and half of a mask over them would be waste")
    why = (
        "nothing is recomputed or sharded" if packs else f"route 'packed' would not be exact, since {against['packed']}"
    )
    return Choice("expand", why)


def _not_expanded(sharded: bool) -> str | None:
    """Returns why the expand route cannot be used for a model, or None."""
    if sharded and torch.is_grad_enabled():
        return "gradients reach sharded layers through the cache, where nothing gathers their weights"
    return None


def not_packed(model: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """Returns why the packed route cannot be used, or None; the route needs a causal decoder with ``sdpa``."""
    config, name = text_config(model), type(unwrap(model)).__name__
    kind = layers_with_state(model)
    if kind is not None:
        return f"{name} has {kind}"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"the last {config.num_kv_shared_layers} layers of {name} share keys and values"
    if getattr(config, "use_bidirectional_attention", None) or "token_type_ids" in inputs:
        return f"{name} attends in both directions within an image"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{name} caps its attention logits"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"vlm.attn_implementation is {config._attn_implementation}, and the route is built on sdpa"
    return None


def score_texts(
    layout: PromptLayout,
    model: nn.Module,
    prompts: EncodedPrompts,
    texts: TextBatch,
    scoring: Scoring,
    route: Route,
    options: RouteOptions,
) -> list[Scored]:
    """Scores every token in ``texts.loss_mask``; each prompt, and each text that others continue, runs once.

    Raises:
        ValueError: If a text row is empty or stands before its parent.
    """
    plan = plan_texts(texts)
    if not bool(plan.loss.any()):
        return []
    if route == "naive":
        return naive_scores(layout, model, prompts, texts, plan, scoring)
    joined = join_only_children(texts, plan)  # fewer rows; the scores are mapped back below
    if joined.rows is None or joined.cols is None:
        return _shared_scores(layout, model, prompts, texts, plan, scoring, route, options)
    found = _shared_scores(layout, model, prompts, joined.texts, plan_texts(joined.texts), scoring, route, options)
    return [
        Scored(joined.rows[x.text_rows, x.text_cols], joined.cols[x.text_rows, x.text_cols], x.scores) for x in found
    ]


def _shared_scores(
    layout: PromptLayout,
    model: nn.Module,
    prompts: EncodedPrompts,
    texts: TextBatch,
    plan: TextPlan,
    scoring: Scoring,
    route: Route,
    options: RouteOptions,
) -> list[Scored]:
    """Scores all texts by route *expand* or *packed*, at once or in chunks."""
    roots = plan.parent.count(-1)
    size = min(options.completion_chunk or roots, roots)
    if options.text_memory_gb is not None:
        length = prompts.inputs["input_ids"].shape[1]
        size = min(size, texts_that_fit(model, plan, length, route, options.text_memory_gb))
    if size < roots:
        return _in_chunks(layout, model, prompts, texts, plan, scoring, route, size)
    if route == "packed":
        return packed_scores(layout, model, prompts, texts, plan, scoring)
    scored, prefix = expand_prompts(layout, model, prompts, texts, plan, scoring)
    return scored + expand_texts(layout, model, prefix, texts, scoring)


def _in_chunks(
    layout: PromptLayout,
    model: nn.Module,
    prompts: EncodedPrompts,
    texts: TextBatch,
    plan: TextPlan,
    scoring: Scoring,
    route: Route,
    size: int,
) -> list[Scored]:
    """Forwards the prompts once, then chunks of ``size`` texts with all texts that continue them."""
    run: Callable[[TextBatch], list[Scored]]
    if route == "packed":
        scored, memory = packed_prompts(layout, model, prompts, texts, plan, scoring)

        def run(part: TextBatch) -> list[Scored]:
            return packed_texts(layout, model, memory, part, scoring)
    else:
        scored, prefix = expand_prompts(layout, model, prompts, texts, plan, scoring)

        def run(part: TextBatch) -> list[Scored]:
            return expand_texts(layout, model, prefix, part, scoring)

    def run_joined(part: TextBatch) -> tuple[Tensor, Tensor, Tensor]:
        found = run(part)
        if not found:
            nowhere = part.owner[:0]
            return nowhere, nowhere, torch.zeros(2 + scoring.with_entropy, 0, device=nowhere.device)
        rows, cols, scores = zip(*found, strict=True)
        return torch.cat(rows), torch.cat(cols), torch.cat(scores, dim=1)

    for rows, part in split_texts(texts, plan, size):
        # Autograd takes the chunks from the last to the first: it recomputes one, runs its backward and frees it.
        again = torch.is_grad_enabled()
        found = checkpoint(run_joined, part, use_reentrant=False) if again else run_joined(part)
        text_rows = torch.tensor(rows, device=texts.ids.device)[found[0]]
        scored.append(Scored(text_rows, found[1], found[2]))
    return scored
