"""Log-probabilities of a loaded model on clips of noise, to compare a run with its exported folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vidreason.answering.loaded import LoadedModel
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.decoded import NOMINAL_FPS
from vidreason.datamodules.prompts import ClipView, LabelScoringView, ReviewView
from vidreason.datamodules.types import Clip, Example, FrameTiming, VideoSample
from vidreason.lightning_modules.decisions.deciders import ReviewDecider
from vidreason.rewards.completion import render_completion

CLIPS = 2
_SIDE = 112
"""Height and width in pixels."""


def probe(loaded: LoadedModel) -> Tensor:
    """Returns log-probabilities of the tokens of all class names behind clips of noise, [N] float64.

    Policy and reviewer are asked one after the other, the reviewer behind a trace for each class.
    """
    answering, task = loaded.answering, loaded.task
    samples = [_noise(number, loaded.frames.num_frames) for number in range(CLIPS)]
    fields = dict.fromkeys(task.metadata_fields, "1")
    clips = [Clip(Path(sample.video_id), None, sample.video_id, fields=fields) for sample in samples]
    view: ClipView = LabelScoringView(task)
    decider = answering.decider
    if isinstance(decider, ReviewDecider):
        traces = tuple(render_completion(f"It may be {name}.", name) for name in task.label_names)
        view = ReviewView(task, {clip.video_id: traces for clip in clips}, "all", decider.input)
    asked = [(answering.vlm, answering.model, view, None)]
    if answering.generator is not None:
        context = answering.generator.adapter_context
        asked.append((answering.generator.vlm, answering.writer, LabelScoringView(task), context))  # type: ignore[arg-type]
    found: list[Tensor] = []
    device = loaded.fabric.device
    for vlm, model, shown, activate in asked:
        for sample, clip in zip(samples, clips, strict=True):
            encoded = vlm.encode([Example(sample, shown.prompt(clip), shown.texts(clip))])
            encoded = encoded.mapped(lambda tensor: tensor.to(device))
            with torch.inference_mode(), loaded.fabric.autocast(), quietly():
                if activate is None:
                    scores = vlm.score(model, encoded.prompts, encoded.texts)
                else:
                    with activate(model):
                        scores = vlm.score(model, encoded.prompts, encoded.texts)
            found.append(scores.logprobs[encoded.texts.loss_mask].double().cpu())
    return torch.cat(found)


def _noise(number: int, frames: int) -> VideoSample:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (frames, 3, _SIDE, _SIDE), generator=generator, dtype=torch.uint8)
    name = f"noise {number}"
    timing = FrameTiming(NOMINAL_FPS, frames * 4, tuple(range(0, frames * 4, 4)))
    return VideoSample(name, pixels, None, timing, Clip(Path(name), None, name))
