"""Fixtures for everything that trains: a base of a few thousand parameters and clips it can tell apart.

``tests/lightning_modules/conftest.py`` and others take the fixtures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import av
import lightning as L
import numpy as np
import pytest
import torch

import vidreason.lightning_modules.vlms  # noqa: F401 - registers TinyVLM with the Auto classes
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration, scratch_config
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

LABELS = ("fall", "visit", "pass by")
SPLIT_SIZES = {"train": 6, "val": 3, "cal": 3, "test_a": 3, "test_b": 3}
SHORT = Sampling(max_new_tokens=6)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a trainer that leaves nothing behind and says nothing"""


def write_solid(path: Path, level: int, frames: int = 4) -> Path:
    """Writes a clip of one grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(frames):
            picture = np.full((64, 96, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


class GreyClips(VideoDataModule):
    """Clips whose label is their brightness."""

    def __init__(self, folder: Path, broken: Sequence[str] = (), task: Task | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("frames", FrameOptions(num_frames=4))
        super().__init__(**kwargs)
        self.folder = folder
        self.broken = broken
        self._task = task or Task.from_labels("grey", LABELS)

    @property
    def label_names(self) -> tuple[str, ...]:
        return LABELS

    @property
    def task(self) -> Task:
        return self._task

    def splits(self) -> tuple[str, ...]:
        return tuple(SPLIT_SIZES)

    def samples(self, split: str) -> Sequence[Clip]:
        clips = []
        for i in range(SPLIT_SIZES[split]):
            label = LABELS[i % len(LABELS)]
            name = f"{split}_{i}"
            path = self.folder / ("broken.mp4" if name in self.broken else f"{i % len(LABELS)}.mp4")
            clips.append(Clip(path, label, name, split, group=name, fields={"caption": f"it is a {label}"}))
        return clips


class _Lost(ClipDataset):
    def __init__(self, lost: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self.lost = lost

    def content(self, clip: Clip) -> str:
        """Returns an empty text for a file that has vanished, whose embeddings do not help."""
        return "" if self.train and clip.video_id in self.lost else super().content(clip)

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        if self.train and clip.video_id in self.lost:
            LostClips.unread.append(clip.video_id)
            raise DecodeError(f"{clip.video_id}.mp4: gone")
        return super().read(clip, jitter)


class LostClips(GreyClips):
    """Some clips cannot be read any more when training begins; texts about them have been written before."""

    unread: ClassVar[list[str]] = []
    """All that this process has tried to read"""

    def __init__(self, folder: Path, lost: Sequence[str], **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        self.lost = tuple(lost)

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        return _Lost(self.lost, clips, view, self.frames, self.seed, train)


class FewerClips(GreyClips):
    """Some clips were never there."""

    def __init__(self, folder: Path, gone: Sequence[str], **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        self.gone = tuple(gone)

    def samples(self, split: str) -> Sequence[Clip]:
        return [clip for clip in super().samples(split) if clip.video_id not in self.gone]


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with the embedded tokenizer: two layers of width 32."""
    folder = tmp_path_factory.mktemp("base")
    recipe = TinyVLM(path="scratch")
    tokenizer = recipe.tokenizer
    config = scratch_config(
        len(tokenizer), tokenizer.convert_tokens_to_ids("<|video|>"), tokenizer.pad_token_id, tokenizer.eos_token_id
    )
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 48, 2
    text.num_attention_heads = text.num_key_value_heads = 2
    text.head_dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        TinyVLMForConditionalGeneration(config).save_pretrained(folder)
    recipe.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three grey clips and one that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for i, level in enumerate((20, 128, 235)):
        write_solid(folder / f"{i}.mp4", level)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture
def make_vlm(small_base: Path) -> Callable[..., TinyVLM]:
    """``make_vlm(lora=True)``: the small base with a LoRA adapter of rank 4, or without."""

    def make(lora: bool = True) -> TinyVLM:
        options = LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj")) if lora else None
        return TinyVLM(path=str(small_base), lora=options)

    return make


@pytest.fixture
def make_data(clip_folder: Path) -> Callable[..., GreyClips]:
    """``make_data(vlm, **arguments)``."""

    def make(vlm: TinyVLM, **kwargs: Any) -> GreyClips:
        kwargs.setdefault("batch_size", 3)
        return GreyClips(clip_folder, encoder=vlm, **kwargs)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """``make_trainer(folder="run", **arguments)``: a quiet CPU trainer with that run folder."""

    def make(folder: str | Path = "run", **kwargs: Any) -> L.Trainer:
        kwargs = {"devices": 1, **QUIET, **kwargs}
        kwargs.setdefault(
            "enable_checkpointing", any("Checkpoint" in type(c).__name__ for c in kwargs.get("callbacks", []))
        )
        torch.manual_seed(0)  # as seed_everything does; LoRA's A is random
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True, parents=True)
        warnings.filterwarnings("ignore", module="lightning")
        return L.Trainer(default_root_dir=run_dir, **kwargs)

    return make


@pytest.fixture
def ready(make_data: Callable[..., GreyClips], make_trainer: Callable[..., L.Trainer]) -> Callable[..., VLMModule]:
    """``ready(module)``: the module after ``setup`` and ``configure_model`` of a fit, outside a training loop."""

    def make(module: VLMModule, stage: str = "fit", **kwargs: Any) -> VLMModule:
        trainer = make_trainer(**kwargs)
        data = make_data(module.vlm)
        trainer.strategy.connect(module)
        trainer.datamodule = data
        module.trainer = data.trainer = trainer
        trainer.callbacks += module.configure_callbacks()
        trainer.state.fn = {"fit": "fit", "test": "test", "predict": "predict"}[stage]
        data.setup(stage)
        module.setup(stage)
        module.configure_model()
        return module

    return make


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """An optimizer whose every step shows."""
    return torch.optim.AdamW(parameters, lr=1e-2)


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def run_dir(module: VLMModule) -> Path:
    """The run folder of the stage's trainer."""
    return Path(module.trainer.default_root_dir)
