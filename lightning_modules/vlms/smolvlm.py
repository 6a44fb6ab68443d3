"""SmolVLM2: batched frames and one position per token; its processor needs the package num2words."""

from __future__ import annotations

from vidreason.lightning_modules.vlms.base import VLM


class SmolVLM(VLM):
    """SmolVLM2."""

    vision_modules = ("model.vision_model",)

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the connector."""
        return (*self.vision_modules, "model.connector", "lm_head")
