"""Qwen3.5: M-RoPE like Qwen2.5-VL, and gated DeltaNet (linear attention) in most layers of the decoder."""

from __future__ import annotations

from typing import Any

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.qwen import QwenVL


class Qwen3_5(QwenVL):  # noqa: N801  # the model's name
    """Qwen3.5; the pixel limit of its processor is one for the whole video, so that ``max_pixels`` is refused."""

    def video_options(self) -> dict[str, Any]:
        """Disables the processor's own limit of a frame."""
        return {**VLM.video_options(self), "cap_pixels_per_frame": False}
