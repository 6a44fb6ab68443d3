"""Encodes clips whose number and size of frames are known, without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.header import ClipHeader
from vidreason.datamodules.clips.placeholder_video import placeholder_video
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Encoded, Example, Prompt, VideoSample
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.planning.fake_model import devices_known
from vidreason.lightning_modules.vlms.text import chat


@dataclass(frozen=True)
class PromptTokens:
    """Number of tokens of one prompt."""

    visual: int
    text: int

    @property
    def total(self) -> int:
        """All tokens."""
        return self.visual + self.text


class PlannedClips:
    """Encodes clips with frames that have a size but no pixels.

    Args:
        vlm: The model family, of which the processor is needed.
        frames: Options of the frames.
    """

    def __init__(self, vlm: VLM, frames: FrameOptions) -> None:
        self.vlm, self.frames = vlm, frames
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._words: dict[Prompt, int] = {}
        self._added: dict[object, tuple[int, int]] = {}
        self._writes_times: bool | None = None

    def example(self, clip: Clip, header: ClipHeader | None, view: ClipView) -> Example:
        """Returns a clip with its prompt and texts; without header it is the placeholder of an unreadable clip."""
        return Example(self._sample(clip, header), view.prompt(clip), view.texts(clip))

    def tokens(self, clip: Clip, header: ClipHeader | None, view: ClipView) -> PromptTokens:
        """Returns the number of tokens of a clip's prompt.

        A processor only replaces the video in a prompt. What it adds is counted once for frames of the same number and
        size, at the same times where it writes these.
        """
        sample, prompt = self._sample(clip, header), view.prompt(clip)
        if prompt not in self._words:
            rendered = chat.prompt_text(self.vlm.processor, prompt, self.vlm.chat_template_kwargs)
            self._words[prompt] = len(chat.tokens(self.vlm.processor, rendered))
        shape = tuple(sample.frames.shape)
        key = (shape, sample.timing if self._times_count(sample, prompt) else None)
        if key not in self._added:
            self._added[key] = self._count(sample, prompt)
        visual, added = self._added[key]
        return PromptTokens(visual, self._words[prompt] + added - visual)

    def _count(self, sample: VideoSample, prompt: Prompt) -> tuple[int, int]:
        """Returns the visual tokens of a clip, and all tokens that the processor adds to its prompt."""
        ids = self._inputs(Example(sample, prompt))["input_ids"]
        visual = int(torch.isin(ids, torch.tensor(sorted(self.vlm.placeholder_ids))).sum())
        return visual, ids.numel() - self._words[prompt]

    def _times_count(self, sample: VideoSample, prompt: Prompt) -> bool:
        """Returns whether the processor writes the times of the frames, seen from a clip that is much slower."""
        if self._writes_times is None:
            timing = replace(sample.timing, fps=sample.timing.fps / 997)
            slower = replace(sample, timing=timing)
            self._writes_times = self._count(sample, prompt) != self._count(slower, prompt)
        return self._writes_times

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Encodes examples as ``VLM.encode`` does.

        Raises:
            ValueError: If a prompt and what stands behind it do not fit into the model's context.
        """
        with devices_known():
            try:
                return self.vlm.encode(examples)
            except RuntimeError:  # a processor that reads the pixels, for which black ones do
                return self.vlm.encode([_black(example) for example in examples])

    def _inputs(self, example: Example) -> dict[str, Tensor]:
        with devices_known():
            try:
                return self.vlm.prompt_inputs(example)
            except RuntimeError:
                return self.vlm.prompt_inputs(_black(example))

    def _sample(self, clip: Clip, header: ClipHeader | None) -> VideoSample:
        if header is None:
            sample = placeholder_video(clip, self.frames)
            shape, timing = tuple(sample.frames.shape), sample.timing
        else:
            timing = header.timing(self.frames)
            shape = (len(timing.indices), 3, *header.size(self.frames))
        with self._mode:
            frames = torch.empty(shape, dtype=torch.uint8)
        return VideoSample(clip.video_id, frames, clip.label, timing, clip, identity=str(shape))


def _black(example: Example) -> Example:
    frames = torch.zeros(example.sample.frames.shape, dtype=torch.uint8)
    return replace(example, sample=replace(example.sample, frames=frames))
