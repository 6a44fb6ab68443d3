"""The naive way to decide about clips, with which the service and ``vidreason classify`` are compared.

One clip at a time is read and then decided about, and it is encoded again for every trace, and for every class name
behind every trace. The probabilities are those of the command.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vidreason.answering.loaded import LoadedModel
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.prompts import ReviewView
from vidreason.datamodules.types import Clip, Example, Prompt, Text, VideoSample
from vidreason.lightning_modules.decisions.deciders import LikelihoodDecider, ReviewDecider
from vidreason.lightning_modules.functional.calibration import apply_temperature
from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    label_log_probabilities,
    sequence_logprobs,
)
from vidreason.lightning_modules.traces.generation import TraceGenerator
from vidreason.lightning_modules.vlms.completions import completion_seed


class NaiveLoop:
    """Decides about one clip at a time, with a prefill for each trace and each class name behind each trace.

    Args:
        loaded: A run that compares class names, with or without a calibrator.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        answering = loaded.answering
        assert isinstance(answering.decider, LikelihoodDecider | ReviewDecider), "the run samples answers"
        self.loaded, self.decider, self.generator = loaded, answering.decider, answering.generator
        answering.vlm.vision_cache_options = None
        answering.vlm.__dict__.pop("vision_cache", None)

    def decide(self, path: Path, video_id: str) -> dict[str, float]:
        """Returns the probabilities of a clip.

        Args:
            path: The clip.
            video_id: Its id, by which the noise of its traces goes, unless it is a clip of the run's data set.
        """
        loaded = self.loaded
        video = read_frames(path, loaded.frames)
        clip = loaded.find_known(path) or Clip(path, None, video_id)
        sample = VideoSample(clip.video_id, video.frames, None, video.timing, clip)
        names = loaded.task.label_names
        with torch.inference_mode(), loaded.fabric.autocast(), quietly():
            prompt, choices = self._asked(sample, clip)
            rows = [torch.stack([self._score(sample, prompt, texts) for texts in row]) for row in choices]
            scores = torch.stack([label_log_probabilities(row) for row in rows])
            logprobs = average_over_traces(scores, torch.zeros(len(rows), dtype=torch.int64), 1)
        temperature = self.decider.temperature if isinstance(self.decider, ReviewDecider) else 1.0
        return dict(zip(names, apply_temperature(logprobs, temperature)[0].tolist(), strict=True))

    def _asked(self, sample: VideoSample, clip: Clip) -> tuple[Prompt, list[list[tuple[Text, ...]]]]:
        """Returns the prompt, and [K or 1][C] the texts behind it: a trace, if there is one, and a class name."""
        view, generator = self.decider.view, self.generator
        if isinstance(self.decider, LikelihoodDecider) or generator is None:
            return view.prompt(clip), [[(text,) for text in view.texts(clip)]]
        traces = tuple(self._trace(generator, sample, clip, k) for k in range(generator.options.samples))
        view = ReviewView(self.loaded.task, {clip.video_id: traces}, "all", self.decider.input)
        texts, rows = view.texts(clip), dict[int, list[tuple[Text, ...]]]()
        for text in texts:
            if text.parent >= 0:
                rows.setdefault(text.parent, []).append((texts[text.parent], replace(text, parent=0)))
        return view.prompt(clip), list(rows.values())

    def _score(self, sample: VideoSample, prompt: Prompt, texts: tuple[Text, ...]) -> torch.Tensor:
        vlm, model = self.loaded.answering.vlm, self.loaded.answering.model
        encoded = vlm.encode([Example(sample, prompt, texts)])
        found = vlm.score(model, encoded.prompts, encoded.texts)
        return sequence_logprobs(found.logprobs, encoded.texts.loss_mask)[-1]

    def _trace(self, generator: TraceGenerator, sample: VideoSample, clip: Clip, k: int) -> str:
        vlm, model = self.loaded.answering.vlm, self.loaded.answering.writer
        encoded = vlm.encode([Example(sample, generator.view.prompt(clip))])
        seeds = [[completion_seed(generator.seed, 0, clip.video_id, k)]]
        with generator.adapter_context(model):
            return vlm.generate(model, encoded.prompts, 1, generator.options.sampling, seeds).texts[0]
