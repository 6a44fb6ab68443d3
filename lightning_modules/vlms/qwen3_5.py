"""Qwen3.5: videos like Qwen3-VL, and gated DeltaNet (linear attention) in most layers of the decoder."""

from __future__ import annotations

from vidreason.lightning_modules.vlms.qwen3 import Qwen3VL


class Qwen3_5(Qwen3VL):  # noqa: N801  # the model's name
    """Qwen3.5; ``max_pixels`` is the limit of one frame."""
