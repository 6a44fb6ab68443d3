"""Tables of text for TensorBoard, whose Markdown renderer would drop the tags of completions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table whose cells show tags and line breaks literally.

    Example:
        >>> print(markdown_table(["text"], [["<think>a|b"]]))
        | text |
        | --- |
        | &lt;think&gt;a&#124;b |
    """
    lines = [header, ["---"] * len(header), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quoted_texts(texts: Sequence[tuple[str, str]], width: int = 110) -> str:
    """Returns long texts as Markdown, each below its title: in a table their column would be a few letters wide.

    Args:
        texts: Pairs of title and text.
        width: Characters of a line; code blocks, which keep tags as they are, do not wrap.

    Example:
        >>> print(quoted_texts([("clip a", "<think>b</think>")]))
        **clip a**
        <BLANKLINE>
            <think>b</think>
    """
    parts = []
    for title, text in texts:
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        parts.append(f"**{_escaped(title)}**\n\n" + "\n".join(f"    {line}" for line in lines or ["(nothing)"]))
    return "\n\n".join(parts)


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Writes a text to every TensorBoard logger of the trainer, if there is one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, trainer.global_step)


def log_image(trainer: L.Trainer, tag: str, image: torch.Tensor) -> None:
    """Writes a picture [3, H, W] uint8 to every TensorBoard logger of the trainer."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, image, trainer.global_step)


def _escaped(cell: object) -> str:
    text = f"{cell:.2f}" if isinstance(cell, float) else str(cell)
    # & comes first, because the other entities contain it
    for plain, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(plain, entity)
    return text
