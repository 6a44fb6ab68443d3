"""LLaVA-OneVision: frames of one size, pooled to a fixed number of tokens each, and one position per token."""

from __future__ import annotations

from vidreason.lightning_modules.vlms.base import VLM


class LlavaOnevision(VLM):
    """LLaVA-OneVision."""

    vision_modules = ("model.vision_tower",)

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the projector."""
        return (*self.vision_modules, "model.multi_modal_projector", "lm_head")
