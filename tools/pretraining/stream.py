"""The endless stream of porch clips on which the embedded base is pretrained.

Facts are drawn independently and looks from a wide distribution (``draw_scene(wide=True)``), without labels or scripts.
Variation reserved for tests (striped walls, patterned clothing, speeds above 1.3, monochrome, all of L4) does not
occur. Clips are rendered in memory, most of them with the halved colour resolution of a video file.
"""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.pretraining.texts import COLUMNS, person_columns
from vidreason.datamodules.clips.samplers import ResumableLoader, ResumableSampler
from vidreason.datamodules.clips.workers import worker_options
from vidreason.datamodules.porch.render import Frames, render
from vidreason.datamodules.porch.scene import FRAMES, WIDTH, Scene, draw_scene
from vidreason.datamodules.porch.world import draw_any_facts, stream


def pretraining_scene(seed: int, index: int) -> Scene:
    """Draws scene number ``index`` of the stream."""
    facts = draw_any_facts(stream(seed, "pretrain", 0, index, "facts"))
    return draw_scene(seed, "pretrain", 0, index, facts, wide=True)


def pretraining_frames(seed: int, index: int, scene: Scene) -> Frames:
    """Renders scene number ``index`` of the stream as [FRAMES, H, W, 3] uint8."""
    frames = render(scene, stream(seed, "pretrain", 0, index, "grain"), stream(seed, "pretrain", 0, index, "clutter"))
    return frames if index % 4 == 0 else halve_chroma(frames)


def halve_chroma(frames: Frames) -> Frames:
    """Averages colour, but not brightness, over 2 × 2 pixels, like 4:2:0 video."""
    pixels = frames.astype(np.float32)
    luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
    colour = pixels - luma[..., None]
    t, h, w, _ = colour.shape
    blocks = colour.reshape(t, h // 2, 2, w // 2, 2, 3).mean(axis=(2, 4))
    smooth = blocks.repeat(2, axis=1).repeat(2, axis=2)
    halved: Frames = (smooth + luma[..., None]).clip(0, 255).astype(np.uint8)
    return halved


FRAME_TARGETS = {"person": COLUMNS + 1, "at_door": 2, "carried": 2, "lying": 2, "lamp": 2, "door": COLUMNS}
"""Questions about a single frame, with the number of possible answers."""


class FrameBatch(NamedTuple):
    """Frames with the answers to the questions about each."""

    frames: Tensor
    """[B, T, 3, H, W] uint8"""
    targets: dict[str, Tensor]
    """[B, T] int64 answers for each name of ``FRAME_TARGETS``."""


def frame_targets(scene: Scene) -> dict[str, list[int]]:
    """Returns the [FRAMES] answers for each name of ``FRAME_TARGETS``."""
    columns = person_columns(scene)
    seen = [column < COLUMNS for column in columns]
    return {
        "person": columns,
        "at_door": [int(v) for v in scene.parcel_at_door],
        "carried": [int(c and s) for c, s in zip(scene.carrying, seen, strict=True)],
        "lying": [int(v) for v in scene.lying],
        "lamp": [int(v) for v in scene.lamp_on],
        "door": [int(scene.looks.door_x * COLUMNS / WIDTH)] * FRAMES,
    }


class StreamSampler(ResumableSampler):
    """Continues the numbers of clips from epoch to epoch, so that no clip is repeated."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        first = self.rank + self.seen * self.num_replicas
        return (start + i for i in range(first, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class _FrameDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    def __init__(self, seed: int, clips: int, frames_per_clip: int) -> None:
        self.seed, self.clips, self.frames_per_clip = seed, clips, frames_per_clip

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = pretraining_scene(self.seed, index)
        frames = pretraining_frames(self.seed, index, scene)
        chosen = np.sort(
            stream(self.seed, "pretrain", 0, index, "texts").random(FRAMES).argsort()[: self.frames_per_clip]
        )
        targets = {name: torch.tensor(values)[chosen] for name, values in frame_targets(scene).items()}
        return torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2), targets


class PorchFrameDataModule(L.LightningDataModule):
    """Single frames of the pretraining stream with answers, for the vision tower.

    Args:
        encoder: Not used; the command line passes it to every data module.
        clips_per_epoch: Number of new clips in every epoch.
        frames_per_clip: Frames drawn from each clip.
        batch_size: Clips per batch.
        num_workers: Number of processes that render.
        seed: Seed of the stream.
    """

    def __init__(
        self,
        encoder: object | None = None,
        clips_per_epoch: int = 2048,
        frames_per_clip: int = 4,
        batch_size: int = 16,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clips_per_epoch, self.frames_per_clip = clips_per_epoch, frames_per_clip
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def _loader(self, seed: int, clips: int, endless: bool) -> DataLoader[FrameBatch]:
        dataset = _FrameDataset(seed, clips, self.frames_per_clip)
        given = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        ranks = given or {"num_replicas": 1, "rank": 0}
        loader: DataLoader[FrameBatch] = (ResumableLoader if endless else DataLoader)(
            dataset,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=StreamSampler(dataset, ranks["num_replicas"], ranks["rank"]) if endless else None,
            **worker_options(self.num_workers, (__name__,)),
            collate_fn=_collate,
        )
        if isinstance(loader, ResumableLoader):
            loader.trainer = self.trainer
        return loader

    def train_dataloader(self) -> DataLoader[FrameBatch]:
        """Returns the training loader, which has new clips in every epoch."""
        return self._loader(self.seed, self.clips_per_epoch, endless=True)

    def val_dataloader(self) -> DataLoader[FrameBatch]:
        """Returns the validation loader, with the same 512 clips of another seed each time."""
        return self._loader(self.seed + 1_000_003, 512, endless=False)


def _collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> FrameBatch:
    return FrameBatch(
        torch.stack([frames for frames, _ in items]),
        {name: torch.stack([targets[name] for _, targets in items]) for name in FRAME_TARGETS},
    )
