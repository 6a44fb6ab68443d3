"""A data module whose clips have known embeddings: what is decoded in an epoch, with and without workers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import stage_world
import torch
from stage_world import GreyClips, write_solid
from torch import Tensor, nn
from two_classes import epoch

from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import ClipView, DescribeView, LabelView
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.lightning_modules.vlms.vision_cache import cache as vision_cache
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions

clip_folder, make_vlm, small_base = stage_world.clip_folder, stage_world.make_vlm, stage_world.small_base


class _Logged(ClipDataset):
    log: Path

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        with self.log.open("a") as file:  # workers are processes
            file.write(f"{clip.video_id}\n")
        return super().read(clip, jitter)


class Fed:
    """A model and clips whose decoding is logged."""

    def __init__(self, make_vlm: Callable[..., TinyVLM], clips: Path, tmp_path: Path, **options: Any) -> None:
        self.vlm = make_vlm()
        self.vlm.vision_cache_options = VisionCacheOptions(folder=str(tmp_path / "embeddings"))
        self.model: nn.Module = self.vlm.build().eval()
        log = self.log = tmp_path / "log"

        class Data(GreyClips):
            def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
                made = _Logged(clips, view, self.frames, self.seed, train)
                made.log = log
                return made

        self.data = Data(clips, encoder=self.vlm, **{"batch_size": 2, **options})

    def decoded(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def logprobs(self, batches: Sequence[VideoBatch]) -> dict[str, Tensor]:
        """The log-probabilities of each clip's texts, by its id; fills the cache."""
        found = {}
        for batch in batches:
            with torch.no_grad():
                rows = self.vlm.score(self.model, batch.prompts, batch.texts).logprobs
            found |= {name: row[row != 0] for name, row in zip(batch.video_ids, rows, strict=True)}
        return found


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_epoch_decodes_nothing(make_vlm, clip_folder, tmp_path, num_workers) -> None:  # type: ignore[no-untyped-def]
    """Other epochs, prompts, splits and runs give the values of decoded clips."""
    fed = Fed(make_vlm, clip_folder, tmp_path, num_workers=num_workers)
    loader = fed.data.loader("train", LabelView(fed.data.task), train=True)
    first = epoch(loader, 0)
    expected = fed.logprobs(first)
    assert len(fed.decoded()) == 6
    assert all(value.numel() for batch in first for value in batch.prompts.inputs.values())
    for number in (1, 2):
        batches = epoch(loader, number)
        assert not any(batch.prompts.inputs["pixel_values_videos"].numel() for batch in batches)
        assert all(batch.decode_ms == 0 for batch in batches)
        close(fed.logprobs(batches), expected)
    other = DescribeView(fed.data.task, {f"val_{i}": ("a light grey picture",) for i in range(3)})
    known = fed.logprobs(list(fed.data.loader("val", other)))
    assert fed.decoded() == [], "validation shows the files of training"
    later = Fed(make_vlm, clip_folder, tmp_path, num_workers=num_workers)
    close(later.logprobs(epoch(later.data.loader("train", LabelView(fed.data.task), train=True))), expected)
    assert later.decoded() == [], "nor does the first epoch of another run"
    fed.vlm.vision_cache_options = None
    del fed.vlm.vision_cache
    plain = fed.logprobs(list(fed.data.loader("val", other)))
    assert len(fed.decoded()) == 3
    assert all(known[name].equal(value) for name, value in plain.items()), "in the same batches, to the bit"


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Batches of other clips pad, and so round, differently."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_a_file_that_was_replaced_is_decoded(make_vlm, clip_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    own = tmp_path / "own"
    own.mkdir()
    for i in range(3):
        write_solid(own / f"{i}.mp4", 60 * i)
    fed = Fed(make_vlm, own, tmp_path)
    loader = fed.data.loader("train", LabelView(fed.data.task))
    before = fed.logprobs(list(loader))
    fed.decoded()
    write_solid(own / "1.mp4", 200)
    after = fed.logprobs(list(loader))
    assert fed.decoded() == ["train_1", "train_4"]
    assert [name for name in before if not before[name].equal(after[name])] == ["train_1", "train_4"]
    (own / "2.mp4").unlink()
    batches = list(loader)
    assert [failed.clip.video_id for batch in batches for failed in batch.failed] == ["train_2", "train_5"]


def test_an_unreadable_clip_among_known_ones(make_vlm, clip_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Its black video has the shape of the others, which need not be decoded for it."""
    fed = Fed(make_vlm, clip_folder, tmp_path, broken=("train_3",), batch_size=6)
    loader = fed.data.loader("train", LabelView(fed.data.task), train=True)
    (cold,) = epoch(loader, 0)
    expected = fed.logprobs([cold])
    fed.decoded()
    (warm,) = epoch(loader, 0)
    assert fed.decoded() == ["train_3"]
    assert warm.sample_mask.equal(cold.sample_mask)
    assert warm.prompts.inputs["pixel_values_videos"].shape == cold.prompts.inputs["pixel_values_videos"].shape
    assert sum(warm.prompts.without_pixels) == 5
    found = fed.logprobs([warm])
    assert all(found[name].equal(value) for name, value in expected.items())


def test_jittered_frames_are_always_decoded(make_vlm, clip_folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    monkeypatch.setattr(vision_cache, "rank_zero_info", said.append)
    fed = Fed(make_vlm, clip_folder, tmp_path, frames=FrameOptions(num_frames=2, sampling="segment"))
    loader = fed.data.loader("train", LabelView(fed.data.task), train=True)
    for number in (0, 1):
        fed.logprobs(epoch(loader, number))
        assert len(fed.decoded()) == 6
    assert len(said) == 1
    assert "not cached: the frames are jittered" in said[0]
    assert "every clip is decoded in every epoch" in said[0]
    assert not (tmp_path / "embeddings").exists()
