"""Converts the weights of a pretraining run to the bfloat16 folder that the package ships.

``python -m tools.pretraining.shipping runs/pretrain_describe/weights FOLDER``
"""

from __future__ import annotations

import sys
from pathlib import Path

from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM


def ship(trained: Path, folder: Path) -> None:
    """Writes the model (in bfloat16) and the processor of ``trained`` to ``folder``."""
    recipe = TinyVLM(str(trained))
    model = recipe.build()
    assert isinstance(model, TinyVLMForConditionalGeneration)
    model.bfloat16()
    model.save_pretrained(folder)
    recipe.processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # readable for all users of an installed package


if __name__ == "__main__":
    ship(Path(sys.argv[1]), Path(sys.argv[2]))
