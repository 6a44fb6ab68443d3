"""Rounding of the shared prefix in bfloat16 on a device, compared with that of naive scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference_model import Grid, make_prompts, make_texts, make_vlm
from torch import Tensor
from variants import naive_logprobs

from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions


def exactness(device: str, grid: Grid, length: int) -> list[dict[str, Any]]:
    """Compares log-probs and gradients in bf16 with naive ones in fp32, for a model of the reference's size.

    Args:
        device: Device of the model.
        grid: Grid of the video.
        length: Tokens of each of 4 completions.

    Returns:
        For naive and each route the errors relative to fp32, and those over the errors of naive in bf16.
    """
    vlm = make_vlm("qwen", grid, 0, dtype="float32", lora=LoRAOptions(r=16, alpha=32), device=device, vision_cache=None)
    model = vlm.build().eval()
    prompts = make_prompts("qwen", grid, 1, 0, device)
    texts = make_texts([length] * 4, [0] * 4, [-1] * 4, 0, device)

    def run(score: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        found = score()
        (found.float().sum() / texts.loss_mask.sum()).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        return [found.detach().float(), torch.cat(gradients)]

    def naive() -> Tensor:
        return naive_logprobs(vlm, model, prompts, texts)

    exact = run(naive)
    model.to(torch.bfloat16)
    rough = [float((a - b).norm() / b.norm()) for a, b in zip(run(naive), exact, strict=True)]
    rows = [{"route": "naive", "logprobs": rough[0], "gradient": rough[1]}]
    for vlm.route in ("expand", "packed"):
        found = run(lambda: vlm.score(model, prompts, texts).logprobs)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        times = [error / base for error, base in zip(errors, rough, strict=True)]
        rows.append({"route": vlm.route, "logprobs": errors[0], "gradient": errors[1], "times_naive": max(times)})
    return rows
