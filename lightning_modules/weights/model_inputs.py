"""Records prompts and video settings of a model, which another program needs to get the same probabilities."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.text import chat


def describe_inputs(vlm: VLM, frames: FrameOptions, view: ClipView) -> dict[str, object]:
    """Returns the entry ``inputs`` of ``vidreason.json``.

    Args:
        vlm: The model family.
        frames: Options of the frames that are taken from a clip.
        view: What the model is asked.
    """
    fields = {name: f"<{name}>" for name in view.task.metadata_fields}
    prompt = view.prompt(Clip(Path(), None, "", fields=fields))
    frame = vlm.chat_frame
    words = vlm.tokenizer(
        [frame.words(name) for name in view.task.label_names], add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    given = vlm.frame_count(frames.num_frames)
    taken = {name: value for name, value in asdict(frames).items() if name not in ("reader", "timeout")}
    return {
        "prompt": chat.prompt_text(vlm.processor, prompt, vlm.chat_template_kwargs),
        "frames": {**taken, "given": given},
        "processor": {"do_sample_frames": False, "add_special_tokens": False, **vlm.video_options(given)},
        "lead": frame.lead,
        "turn_end": frame.turn_end,
        "reasoning_start": frame.reasoning_start,
        "end_of_turn": list(frame.end_of_turn),
        "answers": {n: [*ids, *frame.end_of_turn] for n, ids in zip(view.task.label_names, words, strict=True)},
        "suppressed_tokens": sorted(vlm.suppressed_ids),
    }
