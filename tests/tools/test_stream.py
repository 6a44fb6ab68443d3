"""Tests what the embedded base is pretrained on: wide looks, nothing that is reserved, and the frames' own answers."""

import hashlib

import numpy as np
import pytest
import torch

from tools.pretraining.stream import (
    FRAME_TARGETS,
    PorchFrameDataModule,
    StreamSampler,
    frame_targets,
    halve_chroma,
    pretraining_frames,
    pretraining_scene,
)
from tools.pretraining.texts import COLUMNS, person_columns
from vidreason.datamodules.porch.scene import FRAMES, TRAIN_CLOTHING, WIDTH
from vidreason.datamodules.porch.world import ABNORMAL, draw_any_facts, label_of, stream

SCENES = [pretraining_scene(0, index) for index in range(600)]


def test_pixels_are_pinned() -> None:
    """Frames of the stream; the embedded weights have seen these pictures and no others."""
    digest = hashlib.sha256()
    for index in (0, 4, 8, 12):  # every fourth clip keeps its full colour resolution
        digest.update(pretraining_frames(0, index, SCENES[index]).tobytes())
    assert digest.hexdigest() == "7cd0ed5274cb034437f103d22c2a72319bcaac12bb0e52f749acf4e4fa46bd7b"


def test_the_reserved_never_occurs() -> None:
    assert {scene.looks.wall for scene in SCENES} == {"plain", "brick"}, "stripe walls are reserved"
    assert not any(scene.looks.pattern for scene in SCENES), "patterned clothing is reserved"
    assert not any(scene.cluttered for scene in SCENES), "clutter and view are reserved"
    # at a speed of 1.3 or less, a walk lasts 9.9 / 1.3 = 7.6 frames or more
    for scene in SCENES:
        assert not np.isnan(scene.x[:7]).any()
    for index in (0, 1, 2):
        frames = pretraining_frames(0, index, SCENES[index]).astype(int)
        assert np.abs(frames[..., 0] - frames[..., 2]).max() > 30, "a monochrome camera is reserved"


def test_looks_are_wide() -> None:
    looks = [scene.looks for scene in SCENES]
    for name in ("clothing", "wall_hue", "trousers"):
        counts, _ = np.histogram([getattr(look, name) for look in looks], bins=10, range=(0, 1))
        assert counts.min() > 30, f"{name} leaves hues out"
    assert len({look.clothing for look in looks} - set(TRAIN_CLOTHING)) > 500
    assert {look.person for look in looks} == set(range(14, 33))
    assert {scene.sensor.jitter for scene in SCENES} == {0, 1, 2}
    assert {scene.sensor.noise for scene in SCENES} == set(range(2, 17))
    assert 0.4 < np.mean([look.night for look in looks]) < 0.6
    assert 0.3 < np.mean([look.wall == "brick" for look in looks]) < 0.5


def test_looks_say_nothing_about_what_happens() -> None:
    """No shortcut: night goes with nothing."""
    dark = np.array([scene.looks.night for scene in SCENES])
    abnormal = np.array([label_of(scene.facts) in ABNORMAL for scene in SCENES])
    lamp = np.array([scene.facts.lamp == "off" for scene in SCENES])
    assert abs(dark[abnormal].mean() - dark[~abnormal].mean()) < 0.12
    assert abs(dark[lamp].mean() - dark[~lamp].mean()) < 0.12


def test_facts_come_from_the_stream_without_a_script() -> None:
    for index in range(20):
        assert SCENES[index].facts == draw_any_facts(stream(0, "pretrain", 0, index, "facts"))


def test_columns() -> None:
    for scene in SCENES[:60]:
        for x, column in zip(scene.x, person_columns(scene), strict=True):
            if np.isnan(x) or x < 0 or x >= WIDTH:
                assert column == COLUMNS
            else:
                assert column * WIDTH / COLUMNS <= x < (column + 1) * WIDTH / COLUMNS
        targets = frame_targets(scene)
        assert {name: len(values) for name, values in targets.items()} == dict.fromkeys(FRAME_TARGETS, FRAMES)
        for name, values in targets.items():
            assert all(0 <= value < FRAME_TARGETS[name] for value in values)
        hidden = [column == COLUMNS for column in targets["person"]]
        assert not any(c and h for c, h in zip(targets["carried"], hidden, strict=True)), "nobody carries out of sight"


def test_halving_colour_keeps_brightness() -> None:
    frames = pretraining_frames(0, 0, SCENES[0])
    halved = halve_chroma(frames)
    weights = np.array([0.299, 0.587, 0.114])
    inside = (halved > 2).all(-1) & (halved < 253).all(-1)  # where nothing was clipped
    assert np.abs(frames @ weights - halved @ weights)[inside].max() < 1.5
    blue_minus_luma = (halved[..., 2] - halved @ weights).reshape(FRAMES, 32, 2, 48, 2)
    blocks = inside.reshape(FRAMES, 32, 2, 48, 2).all((2, 4))
    spread = np.ptp(blue_minus_luma.transpose(0, 1, 3, 2, 4).reshape(FRAMES, 32, 48, 4), -1)
    assert spread[blocks].max() < 2.5, "four neighbours share one colour"


def test_batches_of_frames() -> None:
    data = PorchFrameDataModule(clips_per_epoch=4, frames_per_clip=3, batch_size=2, num_workers=0, seed=5)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    frames, targets = batches[0]
    assert frames.shape == (2, 3, 3, 64, 96)
    assert frames.dtype == torch.uint8
    assert {name: tuple(t.shape) for name, t in targets.items()} == dict.fromkeys(FRAME_TARGETS, (2, 3))
    scene = pretraining_scene(5, 0)
    whole, answers = torch.from_numpy(pretraining_frames(5, 0, scene)).permute(0, 3, 1, 2), frame_targets(scene)
    for k in range(3):
        t = next(t for t in range(FRAMES) if whole[t].equal(frames[0, k]))
        assert {name: int(v[0, k]) for name, v in targets.items()} == {name: v[t] for name, v in answers.items()}


def test_no_clip_comes_twice() -> None:
    sampler = StreamSampler(list(range(6)), num_replicas=1, rank=0)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs += list(sampler)
    assert epochs == list(range(18))
    ranks = [list(StreamSampler(list(range(6)), num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == list(range(6))


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_sees_other_clips(seed: int) -> None:
    data = PorchFrameDataModule(clips_per_epoch=2, frames_per_clip=1, batch_size=2, num_workers=0, seed=seed)
    trained, unseen = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    again = next(iter(data.val_dataloader()))
    assert not trained.frames.equal(unseen.frames)
    assert again.frames.equal(unseen.frames)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stream_goes_on_behind_the_clips_that_were_seen(replicas):
    from tools.pretraining.stream import StreamSampler

    for rank in range(replicas):
        sampler = StreamSampler(list(range(10)), replicas, rank)  # type: ignore[arg-type]
        sampler.set_epoch(3)
        whole = list(sampler)
        sampler.consumed = (3, 2)
        assert list(sampler) == whole[2:]
        sampler.set_epoch(4)
        assert list(sampler) == [number + 10 for number in whole]
