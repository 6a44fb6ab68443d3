"""LLaVA-OneVision and LLaVA-NeXT-Video: frames of one size, each pooled to a fixed number of tokens."""

from __future__ import annotations

from vidreason.lightning_modules.vlms.base import VLM


class LlavaOnevision(VLM):
    """LLaVA-OneVision or LLaVA-NeXT-Video, depending on the checkpoint."""

    vision_modules = ("model.vision_tower",)
    casts_pixels = True

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the projector."""
        return (*self.vision_modules, "model.multi_modal_projector", "lm_head")
