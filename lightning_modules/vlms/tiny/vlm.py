"""TinyVLM as a model family: the embedded base, one from scratch, or one from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration, scratch_config


def embedded_folder() -> Path:
    """Returns the folder of the base that comes with the package."""
    return Path(str(files("vidreason.lightning_modules.vlms.tiny") / "weights"))


class TinyVLM(VLM):
    """A video VLM of 1.7 M parameters that runs on any CPU; it describes clips of a doorbell camera.

    Args:
        path: ``embedded`` is the base that comes with the package, ``scratch`` the same with random weights (for
            pretraining), anything else a model folder.
        dtype: Dtype of the base's weights.
        seed: Seed of the random weights of ``scratch``.
        freeze_projector: Do not train the projector either, if ``freeze_vision`` is set: what the decoder sees of a
            clip is then fixed, so that it is computed once in a run.
    """

    casts_pixels = True

    def __init__(
        self,
        path: str = "embedded",
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        seed: int = 0,
        freeze_projector: bool = False,
        **kwargs: Any,
    ) -> None:
        self.freeze_projector = freeze_projector
        self.scratch = path == "scratch"
        self.seed = seed
        folder = str(embedded_folder()) if path in {"embedded", "scratch"} else path
        super().__init__(folder, dtype=dtype, **kwargs)

    @property
    def vision_modules(self) -> tuple[str, ...]:
        """The tower, and the projector if it is frozen."""
        return ("model.visual", "model.projector") if self.freeze_projector else ("model.visual",)

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns the number of visual tokens of one prompt, which is the same for every frame."""
        return int(inputs["pixel_values_videos"].shape[1] * self.processor.tokens_per_frame)

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Loads the model and attaches ``adapter_path`` or a new adapter; ``scratch`` makes random weights instead."""
        if not self.scratch:
            return super().build(adapter_path)
        if adapter_path is not None or self.lora is not None:
            raise ValueError("vlm.path: scratch is for pretraining; adapters need a trained base")
        tokenizer = self.tokenizer
        # The global generator of torch stays unchanged.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = TinyVLMForConditionalGeneration(
                scratch_config(
                    len(tokenizer),
                    tokenizer.convert_tokens_to_ids("<|video|>"),
                    tokenizer.pad_token_id,
                    tokenizer.eos_token_id,
                )
            )
        model.model.visual.requires_grad_(not self.freeze_vision)
        model.train()
        return model
