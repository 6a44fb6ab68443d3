"""Checks before training that every prompt, with what is to stand behind it, fits into the model's context.

Only the headers of clips are read. The data workers check each batch again, since a header may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.header import ClipHeader, read_headers
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Example
from vidreason.lightning_modules.fit.passes import Pass
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.planning.prompts import PlannedClips
from vidreason.lightning_modules.vlms.text.context import check_context_length


class CheckContext(L.Callback):
    """Stops a fit before training if a clip's prompt is too long."""

    def __init__(self) -> None:
        self._headers: dict[str, ClipHeader | None] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks prompts, known texts and the room for completions, before weights are loaded.

        Raises:
            ValueError: If a clip does not fit; the message has its id, the numbers and the settings to change.
        """
        module: Any = pl_module
        if stage != "fit" or module.data.provides_target_texts:
            return
        for part in module.workload(module.data, stage).passes:
            runs = part.name != "validation" or trainer.limit_val_batches != 0
            if runs and not part.stand_ins:
                self._check(module.vlm, module.data, part.clips(module.data), part.view, _room(part))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the prompts of training with their texts, which are written by now.

        Raises:
            ValueError: If a clip does not fit.
        """
        module: Any = pl_module
        view: ClipView | None = module.data.view
        if view is not None and not module.data.provides_target_texts:
            clips = [clip for clip in module.data.clips("train") if view.keep(clip)]
            self._check(module.vlm, module.data, clips, view, 0)

    def _check(self, vlm: VLM, data: VideoDataModule, clips: Sequence[Clip], view: ClipView, room: int) -> None:
        if vlm.context_length is None:
            return
        planned = PlannedClips(vlm, data.frames)
        unknown = [clip for clip in clips if clip.video_id not in self._headers]
        headers = read_headers(unknown, data.frames.timeout)
        self._headers |= {clip.video_id: header for clip, header in zip(unknown, headers, strict=True)}
        for example in self._longest(planned, clips, view):
            encoded = planned.encode([example])
            names = [example.sample.video_id]
            check_context_length(names, encoded.prompts, [room], vlm.context_length, "max_new_tokens asks for")

    def _longest(self, planned: PlannedClips, clips: Sequence[Clip], view: ClipView) -> Iterable[Example]:
        """Yields, of all clips with frames of the same number and size, those with the most words and the latest frame.

        All others have as many visual tokens and fewer of text.
        """
        longest: dict[tuple[tuple[int, ...], str], tuple[float, Clip]] = {}
        for clip in clips:
            header = self._headers[clip.video_id]
            if header is None:  # reported when it is read
                continue
            timing = header.timing(planned.frames)
            shape = (len(timing.indices), *header.size(planned.frames))
            texts = view.texts(clip)
            sizes = {
                "prompt": len(view.prompt(clip).text),
                "texts": max((len(text.text) for text in texts), default=0),
                "time": timing.indices[-1] / timing.fps,
            }
            for what, size in sizes.items():
                if (shape, what) not in longest or longest[shape, what][0] < size:
                    longest[shape, what] = (size, clip)
        chosen = {clip.video_id: clip for _, clip in longest.values()}
        for clip in chosen.values():
            yield planned.example(clip, self._headers[clip.video_id], view)


def _room(part: Pass) -> int:
    return part.sampling.max_new_tokens if part.kind == "generate" else 0
