"""Folders with the configuration and a processor of real models, without weights.

Sizes are those of the models' published configurations. The tokenizer is the small one of the tests, so that a word has
more tokens than with the real one; everything that depends on the size of frames is as in the real processor.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import family_builders
import vlm_builders

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.internvl import InternVL
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import Qwen3VL


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    kind: str
    """``qwen2_5``, ``qwen3`` or ``internvl``."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    vision: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> type[VLM]:
        """The class of the model family."""
        return {"qwen2_5": QwenVL, "qwen3": Qwen3VL, "internvl": InternVL}[self.kind]


_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
_QWEN3_8B_VISION = {
    **_QWEN3_VISION,
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_INTERN_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": [448, 448],
}

SHAPES = {
    "Qwen2.5-VL-3B": Shape("qwen2_5", 2048, 11008, 36, 16, 2, 151936, True, _QWEN2_5_VISION),
    "Qwen2.5-VL-7B": Shape("qwen2_5", 3584, 18944, 28, 28, 4, 152064, False, _QWEN2_5_VISION),
    "Qwen3-VL-2B": Shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True, _QWEN3_VISION),
    "Qwen3-VL-4B": Shape("qwen3", 2560, 9728, 36, 32, 8, 151936, True, _QWEN3_VISION),
    "Qwen3-VL-8B": Shape("qwen3", 4096, 12288, 36, 32, 8, 151936, False, _QWEN3_8B_VISION),
    "InternVL3-2B": Shape("internvl", 1536, 8960, 28, 12, 2, 151674, True, _INTERN_VISION),
}
_WRITERS = {
    "qwen2_5": vlm_builders.write_qwen,
    "qwen3": family_builders.write_qwen3,
    "internvl": family_builders.write_internvl,
}


def write_folder(folder: Path, shape: Shape, layers: int | None = None, vision: dict[str, Any] | None = None) -> Path:
    """Writes config.json and processor files.

    Args:
        folder: The folder.
        shape: The sizes.
        layers: Decoder layers; None is all.
        vision: Changes of the vision configuration.
    """

    def write(folder: Path, config: Any, processor: Any, *_: Any) -> Path:
        text = config.text_config
        text.hidden_size, text.intermediate_size = shape.hidden, shape.intermediate
        text.num_hidden_layers = layers or shape.layers
        text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.key_heads
        text.vocab_size, text.max_position_embeddings = shape.vocabulary, 128000
        if hasattr(text, "head_dim"):
            text.head_dim = 128
        if getattr(text, "layer_types", None):
            text.layer_types = ["full_attention"] * text.num_hidden_layers
        config.tie_word_embeddings = text.tie_word_embeddings = shape.tied
        for name, value in {**shape.vision, **(vision or {})}.items():
            setattr(config.vision_config, name, value)
        if shape.kind == "internvl":
            size = {"height": 448, "width": 448}
            processor.image_processor.size = processor.video_processor.size = size
            processor.image_seq_length = config.image_seq_length = 256
        else:
            config.vision_config.out_hidden_size = shape.hidden
            section = [16, 24, 24] if shape.kind == "qwen2_5" else [24, 20, 20]
            text.rope_parameters = {**text.rope_parameters, "mrope_section": section}
            for part in (processor.image_processor, processor.video_processor):
                part.patch_size = config.vision_config.patch_size
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    with (
        patch.object(vlm_builders, "write_checkpoint", write),
        patch.object(family_builders, "write_checkpoint", write),
    ):
        _WRITERS[shape.kind](folder)
    return folder


def main() -> None:
    """Writes a folder for every model into the folder that the command line names."""
    for name, shape in SHAPES.items():
        print(write_folder(Path(sys.argv[1]) / name, shape))


if __name__ == "__main__":
    main()
