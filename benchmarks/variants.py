"""The variants of the CPU benchmarks: texts behind videos scored in one forward and one backward, in different ways.

``naive`` is the method of trainers without a shared prefix: prompt and pixels repeated for every text, logits of the
text only (``logits_to_keep``), no cache, sdpa, no padding. It calls the model's own forward and shares no code with the
shared prefix, so that changes there do not affect it. Letters: N texts, L tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Make, Setting, Work
from reference_model import Grid, make_prompts, make_texts, make_vlm
from torch import Tensor, nn

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.functional.losses import grpo_loss
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN, unwrap
from vidreason.lightning_modules.vlms.vision_cache.cache import IN_MEMORY

Score = Callable[[nn.Module, EncodedPrompts, TextBatch], Tensor]
"""Function that returns log-probs [N, L], 0 at tokens that do not count."""
Loss = Callable[[Tensor, TextBatch], Tensor]
SMALL: Grid = (1, 4, 4)


def naive_logprobs(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, at_once: int = 0) -> Tensor:
    """Returns log-probs [N, L] of leaves of equal length, each behind its own copy of prompt and pixels.

    Args:
        vlm: The model family, which repeats its pixels.
        model: The model.
        prompts: B prompts of equal length.
        texts: N texts; the parent of a text is repeated before it and not scored.
        at_once: Rows per forward; 0 runs all at once.
    """
    parents = texts.parent.tolist()
    leaves = [row for row in range(len(texts)) if row not in parents]
    blank = torch.zeros(texts.ids.shape, device=texts.ids.device)
    size = at_once or len(leaves)
    for start in range(0, len(leaves), size):
        rows = leaves[start : start + size]
        index = torch.tensor(rows, device=blank.device)
        length = int(texts.mask[rows[0]].sum())
        ids = texts.ids[index, :length]
        if parents[rows[0]] >= 0:
            above = texts.parent[index]
            ids = torch.cat([texts.ids[above, : int(texts.mask[above[0]].sum())], ids], dim=1)
        inputs = vlm.repeat_prompts(prompts.inputs, texts.owner[index])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        # Given, since those of transformers differ from the published ones for Qwen2.5-VL.
        inputs["position_ids"] = vlm.position_ids(unwrap(model), inputs)
        for name in PER_TOKEN:
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids, dtype=inputs[name].dtype)], dim=1)
        logits = model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
        logits[..., sorted(vlm.suppressed_ids)] = -torch.inf  # log-probs are those of the sampling distribution
        found = logits.log_softmax(-1).gather(-1, texts.ids[index, :length, None])[..., 0]
        padded = torch.nn.functional.pad(found, (0, blank.shape[1] - length))
        blank = blank.index_put((index,), padded)
    return blank


def shared_logprobs(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch) -> Tensor:
    """Returns log-probs [N, L] through the shared prefix."""
    return vlm.score(model, prompts, texts).logprobs


def fan(setting: Setting) -> TextBatch:
    """Returns ``group_size`` texts directly behind one video."""
    n = setting.group_size
    return make_texts([setting.text_tokens] * n, [0] * n, [-1] * n, setting.seed)


def rows(texts: TextBatch, start: int, end: int) -> TextBatch:
    """Returns the texts from row ``start`` to ``end``, all behind one prompt."""
    names = ("ids", "mask", "loss_mask", "answer_mask", "owner", "parent")
    return TextBatch(*(getattr(texts, name)[start:end] for name in names))


def grpo(logprobs: Tensor, texts: TextBatch) -> Tensor:
    """Returns the GRPO loss of a second pass over the rollouts: ratios differ from 1, so that clipping acts."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(texts.ids.shape, generator=generator).to(logprobs.device)
    advantages = torch.linspace(-1.5, 1.5, len(texts), device=logprobs.device)
    old = logprobs.detach() + noise
    return grpo_loss(logprobs, advantages, texts.loss_mask, normalizer=texts.loss_mask.sum(), old_logprobs=old).loss


def cross_entropy(logprobs: Tensor, texts: TextBatch) -> Tensor:
    """Returns the SFT loss: the mean negative log-prob."""
    return -logprobs.sum() / texts.loss_mask.sum()


def variant(
    score: Callable[..., Tensor],
    loss: Loss | None,
    texts: Callable[[Setting], TextBatch] = fan,
    videos: int = 1,
    filled: bool = False,
    cached: bool = False,
    **options: Any,
) -> Make:
    """Returns a variant that builds the model, scores texts and runs backward; it can be pickled.

    Args:
        score: ``naive_logprobs`` or ``shared_logprobs``.
        loss: Loss of the log-probs; None scores without gradient.
        texts: Returns the texts behind the videos.
        videos: Number of prompts, which are scored together.
        filled: Whether an earlier pass of the same run fills the vision cache.
        cached: Whether there is a vision cache.
        options: Further arguments of ``VLM``.
    """
    options["vision_cache"] = IN_MEMORY if cached else None
    return partial(_build, score, loss, texts, videos, filled, options)


def _build(
    score: Callable[..., Tensor],
    loss: Loss | None,
    texts: Callable[[Setting], TextBatch],
    videos: int,
    filled: bool,
    options: Mapping[str, Any],
    setting: Setting,
) -> Work:
    """Builds a variant of :func:`variant`."""
    grid = tuple(max(pair) for pair in zip(setting.grid, SMALL, strict=True))
    if setting.family in ("smolvlm", "tiny"):
        grid = setting.grid  # frames have one size there
    vlm = make_vlm(setting.family, grid, setting.seed, **options)  # type: ignore[arg-type]
    model = vlm.build()
    prompts = make_prompts(setting.family, setting.grid, videos, setting.seed)
    batch = texts(setting)

    def run(given: EncodedPrompts, behind: TextBatch, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            logprobs = score(vlm, model, given, behind)
            if backward and loss is not None:
                loss(logprobs, behind).backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        run(prompts, batch, loss is not None)

    def small() -> None:
        size = SMALL if setting.family == "qwen" else (1, *setting.grid[1:])
        few = Setting(setting.family, size, 2, 4, setting.seed + 99)
        run(make_prompts(setting.family, size, videos, few.seed), texts(few), loss is not None)
        model.zero_grad()

    def fill() -> None:
        run(prompts, batch, backward=False)

    return Work(vlm, model, step, small, fill if filled else None)


naive = partial(variant, naive_logprobs)
shared = partial(variant, shared_logprobs)
