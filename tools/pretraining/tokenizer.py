"""Trains the tokenizer of TinyVLM; ``python -m tools.pretraining.tokenizer FOLDER`` writes it.

It is trained on descriptions of the pretraining stream, so that most of their words are one token; as a byte-level
tokenizer, it can encode any other text. The training texts contain no class name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tools.pretraining.stream import pretraining_scene
from tools.pretraining.texts import ECHO_QUESTION, FRAMES_QUESTION, SLOTS_QUESTION, frame_by_frame, slots
from vidreason.datamodules.porch.texts import DESCRIBE_QUESTION, describe
from vidreason.datamodules.porch.world import stream
from vidreason.lightning_modules.vlms.tiny.processing import TinyVLMProcessor, make_processor
from vidreason.rewards.completion import render_completion

CLIPS = 4000
INSTRUCTIONS = (
    DESCRIBE_QUESTION,
    FRAMES_QUESTION,
    SLOTS_QUESTION,
    ECHO_QUESTION,
    "What is happening at the door? Think, then answer.",
    "Is this normal? Think, then answer.",
    "\nAccount: \nConclusion: ",
    render_completion("the end.", "a"),
)


def corpus() -> Iterator[str]:
    """Yields descriptions, compact forms, frame lists and instructions."""
    for index in range(CLIPS):
        scene = pretraining_scene(0, index)
        yield describe(scene.facts, stream(0, "pretrain", 0, index, "texts"))
        yield slots(scene.facts)
        if index % 4 == 0:
            yield frame_by_frame(scene)
        if index % 10 == 0:
            yield from INSTRUCTIONS


def embedded_processor() -> TinyVLMProcessor:
    """Returns the processor of the embedded base."""
    return make_processor(corpus())


if __name__ == "__main__":
    embedded_processor().save_pretrained(Path(sys.argv[1]))
