"""The context length of a model, and the check that prompts and texts fit into it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import AutoConfig

from vidreason.datamodules.types import EncodedPrompts, TextBatch

REMEDY = "lower data.init_args.frames.num_frames or data.init_args.frames.max_pixels"


def max_position_embeddings(path: str) -> int | None:
    """Returns the context length of a model's decoder; None if the configuration does not say.

    Args:
        path: Folder of a model in the hub's format, or a hub id.
    """
    length = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def prompt_tokens(prompts: EncodedPrompts) -> Tensor:
    """Returns the number of tokens of each prompt, [B] int64, the video's included."""
    return prompts.inputs["attention_mask"].sum(dim=1)


def longest_texts(texts: TextBatch, prompts: int) -> list[int]:
    """Returns for each prompt the length in tokens of the longest path of texts behind it; 0 without texts.

    Args:
        texts: N texts; a parent stands before its children.
        prompts: B.
    """
    longest, ends = [0] * prompts, list(map(int, texts.mask.sum(1)))
    for row, (owner, parent) in enumerate(zip(texts.owner.tolist(), texts.parent.tolist(), strict=True)):
        ends[row] += ends[parent] if parent >= 0 else 0
        longest[owner] = max(longest[owner], ends[row])
    return longest


def check_context_length(
    names: Sequence[str], prompts: EncodedPrompts, behind: Sequence[int], limit: int | None, what: str
) -> None:
    """Checks that each prompt and the tokens behind it fit into the model's context.

    Args:
        names: [B] ids of the clips.
        prompts: B prompts.
        behind: [B] tokens behind them.
        limit: Context length in tokens; None if unknown, which skips the check.
        what: What stands behind the prompts, for the message.

    Raises:
        ValueError: If a clip does not fit; the message names it, the numbers and the settings to change.
    """
    if limit is None:
        return
    for name, prompt, rest in zip(names, prompt_tokens(prompts).tolist(), behind, strict=True):
        if prompt + rest > limit:
            raise ValueError(
                f"clip {name}: its prompt has {prompt} tokens and {what} {rest}, but the model's context is {limit} "
                f"(max_position_embeddings): {REMEDY}"
            )
