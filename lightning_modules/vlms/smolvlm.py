"""SmolVLM2: batched frames, one position per token; its processor needs the package num2words."""

from __future__ import annotations

from vidreason.lightning_modules.vlms.base import VLM


class SmolVLM(VLM):
    """SmolVLM2, by the checkpoint at ``path``."""

    vision_modules = ("model.vision_model",)

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Names of unquantised modules; the matrix of the connector is one of them."""
        return (*self.vision_modules, "model.connector", "lm_head")
