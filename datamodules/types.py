"""Records from clips to batches.

Shape letters: B clips (prompts) in a batch, N texts behind them, L tokens of the longest text, T frames, C channels
(always 3), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from vidreason.datamodules.clips.sampling import Stretch


@dataclass(frozen=True)
class Clip:
    """One labelled row of a data set, before anything is decoded."""

    path: Path
    label: str | None
    video_id: str
    split: str = "train"
    group: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Metadata columns by name; only those that the task lists may enter a prompt."""
    where: str = ""
    """Location of the row (``manifest.csv, row 12``), for error messages."""
    stretch: Stretch | None = None
    """The part of the video that the clip is; None is all of it."""


@dataclass(frozen=True)
class FrameTiming:
    """The times of the frames that were taken from a clip."""

    fps: float
    """Frames per second of the file, not of the sample; the highest rate if it varies."""
    total_frames: int
    """Frames in the file; if the rate varies, the number at a constant rate ``fps``."""
    indices: tuple[int, ...]
    """[T] positions of the sampled frames at that rate: seconds x fps."""

    @property
    def duration(self) -> float:
        """Length of the file in seconds."""
        return self.total_frames / self.fps if self.fps > 0 else 0.0


@dataclass(frozen=True)
class KnownVideo:
    """Holds the processor's outputs for one video, except its pixels, from which a prompt is made without decoding.

    It stands for a video whose embeddings are in the vision cache, so that the vision tower does not need the pixels.

    It holds NumPy arrays, which go through the queues of a loader by value: each tensor would take a file descriptor.
    """

    video: str
    """``VideoSample.identity``."""
    shape: tuple[int, ...]
    """Shape of ``VideoSample.frames``."""
    timing: FrameTiming
    per_token: Mapping[str, NDArray[Any]]
    """[1, K] inputs with one entry per token, for the K tokens in front of the user's words."""
    others: Mapping[str, NDArray[Any]]
    """Inputs that are neither pixels nor per token, such as grids and times."""
    pixels: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtypes, as torch names them, and shapes of the pixels and their masks."""


@dataclass(frozen=True)
class VideoSample:
    """One clip before the processor."""

    video_id: str
    frames: Tensor
    """[T, C, H, W] uint8"""
    label: str | None
    timing: FrameTiming
    clip: Clip
    identity: str = ""
    """Equal for equal frames: a hash of the file's content and of how frames are taken; empty if they are drawn at
    random or the source is unknown."""
    known: KnownVideo | None = None
    """Set for a video that is not decoded because its embeddings are known: what its prompt needs. ``frames`` are then
    zeros of the right shape. None for a decoded video."""

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 4 or self.frames.shape[1] != 3:
            raise ValueError(
                f"{self.video_id}: frames must be uint8 [T, 3, H, W], got {self.frames.dtype} "
                f"{tuple(self.frames.shape)}"
            )
        if self.frames.shape[0] != len(self.timing.indices):
            raise ValueError(f"{self.video_id}: {self.frames.shape[0]} frames but {len(self.timing.indices)} indices")


@dataclass(frozen=True)
class FailedClip:
    """A clip that could not be read; it is reported, never replaced, and counts as wrong in evaluation."""

    clip: Clip
    error: str
    stopped: bool = False
    """True if a signal stopped the run during the read, so that nothing is known about the clip."""


@dataclass(frozen=True)
class Prompt:
    """The text of the user's turn, which follows the video."""

    text: str
    open: bool = False
    """True if the user's turn stays open, so that context texts can continue it (in calibration, one per trace)."""


@dataclass(frozen=True)
class Text:
    """One text behind a prompt, or behind another text of the same prompt."""

    text: str
    role: Literal["assistant", "context", "draft"] = "assistant"
    """``assistant``: the model's words, including the end of its turn; they count in the loss.
    ``context``: continues the user's open turn; it does not count.
    ``draft``: the first words of the model's turn, which other texts continue; they do not count."""
    parent: int = -1
    """Index of the text it continues within the same prompt's texts; -1 is the prompt itself."""
    learnt: Literal["all", "answer"] = "all"
    """``answer``: of the assistant's words, only those from ``<answer>`` on count in the loss."""


@dataclass(frozen=True)
class Example:
    """One clip with its prompt and the texts behind it."""

    sample: VideoSample
    prompt: Prompt
    texts: tuple[Text, ...] = ()


@dataclass(frozen=True)
class TextBatch:
    """Texts behind prompts as right-padded token rows; masks are True where a token counts."""

    ids: Tensor
    """[N, L] int64"""
    mask: Tensor
    """[N, L] bool, tokens that are not padding."""
    loss_mask: Tensor
    """[N, L] bool, tokens that count in a loss or a score; a subset of ``mask``."""
    answer_mask: Tensor
    """[N, L] bool, tokens from ``<answer>`` to the end of turn; a subset of ``loss_mask``."""
    owner: Tensor
    """[N] int64, index of the prompt."""
    parent: Tensor
    """[N] int64, row that each row continues, -1 for the prompt; a parent stands before its children."""

    def __post_init__(self) -> None:
        n, length = self.ids.shape
        for name in ("mask", "loss_mask", "answer_mask"):
            mask: Tensor = getattr(self, name)
            if mask.shape != (n, length) or mask.dtype != torch.bool:
                raise ValueError(f"TextBatch.{name} must be bool {(n, length)}, got {mask.dtype} {tuple(mask.shape)}")
        for name in ("owner", "parent"):
            index: Tensor = getattr(self, name)
            if index.shape != (n,):
                raise ValueError(f"TextBatch.{name} must be [{n}], got {tuple(index.shape)}")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def behind(self, start: int, stop: int) -> TextBatch:
        """Returns the texts behind the prompts ``start`` to ``stop`` - 1, for a batch of these prompts only."""
        rows = (self.owner >= start) & (self.owner < stop)
        place = rows.cumsum(0) - 1  # New row of each row that stays.
        length = int(self.mask[rows].sum(dim=1).max()) if bool(rows.any()) else 0
        parent = self.parent[rows]
        return TextBatch(
            ids=self.ids[rows, :length],
            mask=self.mask[rows, :length],
            loss_mask=self.loss_mask[rows, :length],
            answer_mask=self.answer_mask[rows, :length],
            owner=self.owner[rows] - start,
            parent=torch.where(parent < 0, parent, place[parent.clamp(min=0)]),
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TextBatch:
        """Returns a copy with ``function`` of each tensor."""
        names = ("ids", "mask", "loss_mask", "answer_mask", "owner", "parent")
        return TextBatch(*(function(getattr(self, name)) for name in names))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """Returns a copy on ``device``."""
        return self.mapped(_mover(device, non_blocking))


@dataclass(frozen=True)
class EncodedPrompts:
    """Processor outputs of B prompts, left-padded; only the VLM family that made them interprets them."""

    inputs: Mapping[str, Tensor]
    batch_size: int
    turn_end: Tensor
    """[K] int64, tokens that close an open user turn and open the assistant's; empty if prompts are closed."""
    videos: tuple[str, ...] = ()
    """[B] ``VideoSample.identity`` of each prompt's video; empty if unknown."""
    known: tuple[KnownVideo | None, ...] = ()
    """[B] What other prompts about the same videos need besides embeddings; empty or None if it cannot be told."""
    without_pixels: tuple[bool, ...] = ()
    """[B] True for a video that was not decoded: its pixels are 0, and have no last axis if no video was decoded. Empty
    if all videos were."""

    def mapped(self, function: Callable[[Tensor], Tensor]) -> EncodedPrompts:
        """Returns a copy with ``function`` of each tensor."""
        inputs = {name: function(value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, turn_end=function(self.turn_end))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EncodedPrompts:
        """Returns a copy on ``device``."""
        return self.mapped(_mover(device, non_blocking))


@dataclass(frozen=True)
class Encoded:
    """B encoded prompts and the N texts behind them."""

    prompts: EncodedPrompts
    texts: TextBatch

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """Returns a copy with ``function`` of each tensor."""
        return Encoded(self.prompts.mapped(function), self.texts.mapped(function))


class BatchEncoder(Protocol):
    """Turns examples into tensors; every model family implements it. It is pickled into worker processes."""

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Encodes B clips with their prompts and the N texts behind them."""
        ...


@dataclass(frozen=True)
class VideoBatch:
    """A collated batch of B clips, and the clips that could not be read.

    In training, an unreadable clip is one of the B clips too: a placeholder video whose ``sample_mask`` is False. In
    evaluation it is only in ``failed``, so that B is 0 if no clip of the batch could be read.
    """

    encoded: Encoded | None
    """None if B is 0."""
    labels: Tensor
    """[B] int64, index into the data module's ``label_names``; -1 without a label."""
    sample_mask: Tensor
    """[B] bool, True where the clip counts. A clip does not count if it could not be read, or only gives a rank as many
    clips as the others have. All clips have to be forwarded, since ranks must run the same forwards."""
    clips: tuple[Clip, ...]
    """[B]"""
    failed: tuple[FailedClip, ...] = ()
    decode_ms: float = 0.0
    """Mean milliseconds spent decoding one clip of this batch."""

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def prompts(self) -> EncodedPrompts:
        """The B prompts."""
        assert self.encoded is not None, "a batch without a readable clip has no prompts: check len(batch) first"
        return self.encoded.prompts

    @property
    def texts(self) -> TextBatch:
        """The N texts behind the prompts."""
        assert self.encoded is not None, "a batch without a readable clip has no texts: check len(batch) first"
        return self.encoded.texts

    @property
    def valid_texts(self) -> TextBatch:
        """All N texts, with ``loss_mask`` and ``answer_mask`` False behind clips that do not count."""
        rows = self.sample_mask[self.texts.owner][:, None]
        return replace(self.texts, loss_mask=self.texts.loss_mask & rows, answer_mask=self.texts.answer_mask & rows)

    @property
    def video_ids(self) -> tuple[str, ...]:
        """[B] ids in batch order."""
        return tuple(clip.video_id for clip in self.clips)

    def pin_memory(self) -> VideoBatch:
        """Returns a copy in page-locked memory, which a GPU reads by itself; the loader calls this."""
        return self.mapped(torch.Tensor.pin_memory)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> VideoBatch:
        """Returns a copy with ``function`` of each tensor."""
        encoded = None if self.encoded is None else self.encoded.mapped(function)
        labels, sample_mask = function(self.labels), function(self.sample_mask)
        return replace(self, encoded=encoded, labels=labels, sample_mask=sample_mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoBatch:
        """Returns a copy on ``device``; Lightning calls this to move a batch."""
        return self.mapped(_mover(device, non_blocking))


def _mover(device: torch.device | str, non_blocking: bool) -> Callable[[Tensor], Tensor]:
    """Returns a function that copies a tensor to a device, without waiting for it if the tensor is in pinned memory."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=non_blocking or tensor.is_pinned())

    return move
