"""Route *naive*: prompt and pixels repeated for every path from a prompt to a leaf, and no cache.

It is the reference that the shared routes must equal in value and gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.prefix.head import Scored, Scoring, forward, scores_of
from vidreason.lightning_modules.vlms.prefix.layout import PER_TOKEN, PromptLayout, unwrap
from vidreason.lightning_modules.vlms.prefix.text_plan import TextPlan, targets


def naive_scores(
    layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, plan: TextPlan, scoring: Scoring
) -> list[Scored]:
    """Returns the scores of every token that counts."""
    device, base = texts.ids.device, prompts.inputs["input_ids"].shape[1]
    paths, lengths = plan.leaf_paths(), plan.lengths
    width = max(sum(lengths[row] for row in path) for path in paths)
    ids = texts.ids[:1, :1].repeat(len(paths), width)  # padded with a real token: 0 might stand for a placeholder
    mask = torch.zeros_like(ids)
    found: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # a row on several paths is scored on one of them
    for i, path in enumerate(paths):
        end = 0
        for row in path:
            ids[i, end : end + lengths[row]] = texts.ids[row, : lengths[row]]
            for col in plan.loss[row].nonzero()[:, 0].tolist():
                found[row, col] = (i, base + end + col - 1, row, col)
            end += lengths[row]
        mask[i, :end] = 1
    asked = targets(list(found.values()), device)

    owners = torch.tensor([plan.owner[path[-1]] for path in paths], device=device)
    inputs = layout.repeat_prompts(prompts.inputs, owners)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], dim=1)
    for name in PER_TOKEN:
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids, dtype=inputs[name].dtype)], dim=1)
    positions = layout.position_ids(unwrap(model), inputs)
    answer = scores_of(asked, texts.ids[asked.text_rows, asked.text_cols], scoring)
    out = forward(model, answer, **inputs, position_ids=positions, use_cache=False)
    return [Scored(asked.text_rows, asked.text_cols, out.logits)]
