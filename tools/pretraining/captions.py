"""The pretraining stream as questions and answers about clips, on which the embedded base learns to describe videos.

For every clip, one question asks for a description (sometimes in the compact form). A second question about the same
video asks either for a list of the frames, a dense target that makes the decoder use the video, or to repeat random
letters and tags, so that all tokens are trained. No question is about labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from tools.pretraining.stream import StreamSampler, pretraining_frames, pretraining_scene
from tools.pretraining.texts import ECHO_QUESTION, FRAMES_QUESTION, SLOTS_QUESTION, echo, frame_by_frame, slots
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.collating import BatchCollator
from vidreason.datamodules.clips.dataset import LoadedClip
from vidreason.datamodules.clips.samplers import ResumableLoader
from vidreason.datamodules.clips.workers import worker_options
from vidreason.datamodules.porch.scene import FRAMES
from vidreason.datamodules.porch.texts import DESCRIBE_QUESTION, describe
from vidreason.datamodules.porch.world import LABELS, stream
from vidreason.datamodules.types import BatchEncoder, Clip, Example, FrameTiming, Prompt, Text, VideoSample

FPS = 4.0
VALIDATION_SEED = 1_000_003
"""Added to the seed for the validation clips."""


def question_and_answer_example(seed: int, index: int, slot_share: float, echo_share: float) -> Example:
    """Returns clip number ``index`` of the stream with its two questions, which share the video, and the answers."""
    scene = pretraining_scene(seed, index)
    frames = torch.from_numpy(pretraining_frames(seed, index, scene)).permute(0, 3, 1, 2)
    words = stream(seed, "pretrain", 0, index, "texts")
    compact = words.random() < slot_share
    asked = SLOTS_QUESTION if compact else DESCRIBE_QUESTION
    said = slots(scene.facts) if compact else describe(scene.facts, words)
    random_text = echo(words) if words.random() < echo_share else None
    name = f"pretrain/{seed}/{index}"
    clip = Clip(Path(name), None, name, "train")
    sample = VideoSample(name, frames, None, FrameTiming(FPS, FRAMES, tuple(range(FRAMES))), clip)
    texts = (
        Text(asked, role="context"),
        Text(FRAMES_QUESTION if random_text is None else ECHO_QUESTION + random_text, role="context"),
        Text(said, parent=0),
        Text(random_text or frame_by_frame(scene), parent=1),
    )
    return Example(sample, Prompt("", open=True), texts)


class _CaptionDataset(Dataset[LoadedClip]):
    def __init__(self, seed: int, clips: int, slot_share: float, echo_share: float) -> None:
        self.seed, self.clips, self.slot_share, self.echo_share = seed, clips, slot_share, echo_share

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> LoadedClip:
        return LoadedClip(question_and_answer_example(self.seed, index, self.slot_share, self.echo_share), 0.0)


class PorchCaptionDataModule(VideoDataModule):
    """The pretraining stream of porch with questions and answers, for the decoder; new clips in every epoch.

    Args:
        encoder: Turns examples into tensors; the command line hands in the ``vlm`` section.
        clips_per_epoch: New clips in every epoch.
        slot_share: Share of clips with the compact form instead of a description.
        echo_share: Share of clips with random text instead of the list of frames.
        batch_size: Clips per batch; each has two answers.
        num_workers: Number of processes that render.
        seed: Seed of the stream.
    """

    provides_target_texts = True

    def __init__(
        self,
        encoder: BatchEncoder | None = None,
        clips_per_epoch: int = 2048,
        slot_share: float = 0.1,
        echo_share: float = 0.35,
        batch_size: int = 16,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.clips_per_epoch, self.slot_share, self.echo_share = clips_per_epoch, slot_share, echo_share

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels of porch, which the stream does not use."""
        return LABELS

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns no clips, since the stream has no files."""
        return ()

    def setup(self, stage: str) -> None:
        """Does nothing: the stream has no files to read."""
        self._clips = {}

    def train_dataloader(self) -> DataLoader[LoadedClip]:
        """Returns the training loader, which has new clips in every epoch."""
        dataset = _CaptionDataset(self.seed, self.clips_per_epoch, self.slot_share, self.echo_share)
        given = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        ranks = given or {"num_replicas": 1, "rank": 0}
        return self._stream_loader(dataset, StreamSampler(dataset, ranks["num_replicas"], ranks["rank"]))

    def val_dataloader(self) -> list[DataLoader[LoadedClip]]:
        """Returns the validation loader, with the same 256 clips of another seed each time."""
        unseen = _CaptionDataset(self.seed + VALIDATION_SEED, 256, self.slot_share, self.echo_share)
        return [self._stream_loader(unseen, None)]

    def _stream_loader(self, dataset: _CaptionDataset, sampler: StreamSampler | None) -> DataLoader[LoadedClip]:
        assert self.encoder is not None
        loader: DataLoader[LoadedClip] = (DataLoader if sampler is None else ResumableLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            **worker_options(self.num_workers, (__name__,)),
            collate_fn=BatchCollator(self.encoder, self.label_names),
        )
        if isinstance(loader, ResumableLoader):
            loader.trainer = self.trainer
        return loader
