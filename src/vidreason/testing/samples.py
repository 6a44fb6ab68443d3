"""Clips of noise, prompts and texts to test model families on, and how far results are apart.

Letters: N texts, L tokens of the longest text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidreason.datamodules.types import Clip, EncodedPrompts, Example, FrameTiming, Prompt, Text, TextBatch, VideoSample
from vidreason.lightning_modules.vlms.base import VLM

PROMPTS = ("what happens?", "describe the video, step by step, and say who arrives at the door", "who?")
FAN = [(0, -1, 5), (0, -1, 1), (2, -1, 7), (0, -1, 3), (1, -1, 4)]
"""Texts behind ``PROMPTS`` as (owner, parent, length): unequal counts and lengths, one token."""
TREE = [*FAN, (0, 0, 2), (2, 2, 4), (0, 0, 1), (0, 3, 6), (0, 5, 3), (0, 5, 1), (1, 4, 1)]
"""The same, and texts that continue any earlier one, on three levels."""
FIRST_TOKEN, LAST_TOKEN = 10, 500
"""Range of the ids of random tokens."""


def make_example(
    texts: Sequence[Text | str] = (),
    prompt: str = "what happens?",
    open_prompt: bool = False,
    seed: int = 0,
    frames: int = 4,
    size: tuple[int, int] = (56, 56),
    identity: str = "",
) -> Example:
    """Returns a clip of noise, 4 frames per second before frames were taken, with a prompt and texts.

    Args:
        texts: Texts behind the prompt; strings are assistant's turns.
        prompt: Words of the prompt.
        open_prompt: Whether the user's turn is left open.
        seed: Seed of the pixels; the clip is named after it.
        frames: Number of frames.
        size: Height and width in pixels.
        identity: Key of the vision cache; empty for clips that are not cached.
    """
    pixels = torch.randint(0, 256, (frames, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    name = f"clip{seed}"
    timing = FrameTiming(fps=4.0, total_frames=16, indices=tuple(range(0, 16, 16 // frames))[:frames])
    sample = VideoSample(name, pixels, None, timing, Clip(Path(f"{name}.mp4"), None, name), identity)
    return Example(sample, Prompt(prompt, open_prompt), tuple(Text(t) if isinstance(t, str) else t for t in texts))


def text_rows(rows: Sequence[tuple[int, int, int]], vocab: Sequence[int], seed: int = 0) -> TextBatch:
    """Returns random texts, each given as (owner, parent, length); about a quarter of the tokens does not count."""
    generator = torch.Generator().manual_seed(seed)
    length = max(row[2] for row in rows)
    ids = torch.tensor(vocab)[torch.randint(len(vocab), (len(rows), length), generator=generator)]
    mask = torch.arange(length) < torch.tensor([row[2] for row in rows])[:, None]
    loss = mask & (torch.rand(len(rows), length, generator=generator) < 0.75)
    owner, parent = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    return TextBatch(ids, mask, loss, torch.zeros_like(mask), owner, parent)


def make_prompts(vlm: VLM, seed: int = 0, words: Sequence[str] = PROMPTS, **options: Any) -> EncodedPrompts:
    """Returns the prompts, each behind a clip of its own; ``options`` are those of ``make_example``."""
    return vlm.encode([make_example(prompt=p, seed=seed + i, **options) for i, p in enumerate(words)]).prompts


def make_texts(vlm: VLM, rows: Sequence[tuple[int, int, int]] = TREE, seed: int = 0) -> TextBatch:
    """Returns ``text_rows`` of tokens that the family may write."""
    known = range(FIRST_TOKEN, min(LAST_TOKEN, len(vlm.tokenizer)))
    return text_rows(rows, sorted(set(known) - vlm.suppressed_ids), seed)


def gradients(vlm: VLM, model: nn.Module, prompts: EncodedPrompts, texts: TextBatch, route: Any) -> dict[str, Tensor]:
    """Returns gradients by parameter, with log-probs and entropies [N, L] as ``logprobs`` and ``entropy``.

    The loss is a weighted sum of log-probs and entropies at temperature 0.8, with random weights.
    """
    vlm.route = route
    model.zero_grad()
    scores = vlm.score(model, prompts, texts, temperature=0.8, with_entropy=True)
    assert scores.entropy is not None
    weights = torch.randn(scores.logprobs.shape, generator=torch.Generator().manual_seed(1))
    loss = (scores.logprobs * weights + scores.entropy * weights.flip(0)).sum()
    loss.backward()
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    out["logprobs"], out["entropy"] = scores.logprobs.detach(), scores.entropy.detach()
    return out


def randomise_lora(model: nn.Module, seed: int = 0) -> None:
    """Gives LoRA's B values: at initialisation it is 0, and with it the gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all tensors together, []."""
    total: Tensor = torch.stack([tensor.norm() for tensor in tensors]).norm()
    return total


def relative_gap(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Returns the norm of all differences over the norm of all that is wanted; both need the same names."""
    assert got.keys() == wanted.keys()
    total = norm_of(wanted.values())
    assert float(total) > 0
    return float(norm_of(got[name] - wanted[name] for name in wanted) / total)
