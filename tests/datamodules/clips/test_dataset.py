"""One clip in a worker: which frames are drawn, what cannot be read, equal frames, signals."""

import pickle

import pytest
import torch
import two_classes
from two_classes import FakeEncoder, epoch, order

from vidreason.datamodules.clips.dataset import ClipKey
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.prompts import DescribeView, LabelView, ReviewView

make = two_classes.make


def test_jitter_depends_on_seed_epoch_and_clip(make):
    def chosen(number, seed=0, batch_size=4, num_workers=0):
        data = make(
            frames=FrameOptions(num_frames=4, sampling="segment"),
            num_workers=num_workers,
            seed=seed,
            batch_size=batch_size,
        )
        loader = data.loader("train", LabelView(data.task), train=True)
        epoch(loader, 7)  # what was drawn before changes nothing, also where workers live on
        batches = epoch(loader, number)
        rows = torch.cat([batch.prompts.inputs["indices"] for batch in batches]).tolist()
        return dict(zip(order(batches), map(tuple, rows), strict=True))

    base = chosen(0)
    assert base == chosen(0, batch_size=3)
    assert base == chosen(0, num_workers=1)
    assert base != chosen(1)
    assert base != chosen(0, seed=1)
    assert len({base[f"train{i}"] for i in (0, 3, 6, 9)}) > 1  # the same file under four ids


def test_evaluation_never_jitters(make):
    data = make(frames=FrameOptions(num_frames=4, sampling="segment"))
    (batch,) = data.loader("val", LabelView(data.task))
    assert batch.prompts.inputs["indices"][0].tolist() == [3, 9, 15, 21]


def broken(make, **options):
    data = make({"train": 4, "val": 2, "cal": 2, "test": 5}, **options)
    (data.folder / "1.mp4").write_text("no video")
    return data


@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_training_an_unreadable_clip_is_black_and_without_weight(make, num_workers):
    """It keeps its place, prompt and texts; its frames are as many and as large as those of the others."""
    data = broken(make, num_workers=num_workers)
    (batch,) = epoch(data.loader("train", LabelView(data.task), train=True))
    whole = make({"train": 4, "val": 2, "cal": 2, "test": 5})
    assert order([batch]) == order(epoch(whole.loader("train", LabelView(whole.task), train=True)))
    (lost,) = (row for row, clip in enumerate(batch.clips) if clip.video_id == "train1")
    assert [failed.clip.video_id for failed in batch.failed] == ["train1"]
    assert "1.mp4" in batch.failed[0].error
    assert batch.sample_mask.tolist() == [row != lost for row in range(4)]
    frames = batch.prompts.inputs["frames"]
    assert [bool(row.any()) for row in frames] == [row != lost for row in range(4)]
    texts = [chr(row[0]) for row in batch.texts.ids]
    assert texts == [clip.label for clip in batch.clips], "what is run stays the same"
    assert batch.valid_texts.loss_mask.any(dim=1).tolist() == [row != lost for row in range(4)]


class Shapes(FakeEncoder):
    def encode(self, examples):
        self.seen = [(tuple(e.sample.frames.shape), e.sample.identity, e.sample.timing) for e in examples]
        return super().encode(examples)


def test_black_frames_are_like_those_of_the_batch(make):
    data = broken(make, frames=FrameOptions(num_frames=6, max_pixels=600))
    data.encoder = Shapes()
    loader = data.loader("train", LabelView(data.task), batch_size=1, train=True)
    dataset, collate = loader.dataset, loader.collate_fn
    collate([dataset[ClipKey(1, 0)], dataset[ClipKey(2, 0)]])
    (black, blank, timing), (other, identity, its_timing) = data.encoder.seen
    assert (black, timing) == (other, its_timing)
    assert blank != identity
    assert blank == f"blank {other}", "a cache must not take it for the clip"
    collate([dataset[ClipKey(1, 0)]])
    ((alone, _, timing),) = data.encoder.seen
    assert alone[:2] == (6, 3)
    assert alone[2] * alone[3] <= 600
    assert len(timing.indices) == 6
    batch = collate([dataset[ClipKey(2, 0)], dataset[ClipKey(1, 0, valid=False)]])
    assert batch.sample_mask.tolist() == [True, False]
    assert not batch.failed, "it is named where it counts"


@pytest.mark.parametrize("train", [True, False])
def test_what_the_system_does_not_let_read_is_no_clip_either(make, train):
    data = broken(make)
    loader = data.loader("train", LabelView(data.task), train=train)

    def gone(clip, jitter):
        raise OSError(5, "Input/output error", str(clip.path))

    loader.dataset.read = gone
    found = loader.dataset[ClipKey(0, 0)]
    assert "Input/output error" in found.failed.error
    assert (found.content is None) == (not train)


def test_elsewhere_it_is_set_aside(make):
    data = broken(make)
    data.connect(train_view=LabelView(data.task))
    (loader,) = data.test_dataloader()
    batches = list(loader)
    assert [order([batch]) for batch in batches] == [["test0", "test2", "test3"], []]
    assert [[failed.clip.video_id for failed in batch.failed] for batch in batches] == [["test1"], ["test4"]]
    assert "1.mp4" in batches[0].failed[0].error
    assert len(batches[1]) == 0
    for name in ("prompts", "texts"):
        with pytest.raises(AssertionError, match="check len"):
            getattr(batches[1], name)
    assert batches[1].labels.shape == (0,)


def test_what_goes_to_a_worker_can_be_pickled(make):
    data = make()
    loader = data.loader("train", DescribeView(data.task, {"train0": ("x",)}), train=True)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch = collate([dataset[ClipKey(0, 2)]])
    assert batch.video_ids == ("train0",)


def identities(data, train=False, view=None):
    loader = data.loader("train", view or LabelView(data.task), batch_size=10, train=train)
    dataset = loader.dataset
    return [dataset[ClipKey(i, 0)].content.sample.identity for i in range(len(dataset))]


def test_equal_frames_have_one_identity(make, tmp_path, write_clip):
    """The file's content and which frames were taken; not its name, and nothing where frames are drawn anew."""
    first = identities(make())
    assert len(set(first)) == 3  # ten clips of three files
    assert all(first)
    assert identities(make()) == first
    (tmp_path / "1.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())
    assert identities(make())[1] == first[0]
    write_clip(tmp_path / "0.mp4", frames=30, size=(48, 32))
    assert identities(make())[0] not in first
    for other in (FrameOptions(num_frames=3), FrameOptions(num_frames=4, max_pixels=600)):
        assert identities(make(frames=other))[2] != first[2]
    jittered = make(frames=FrameOptions(num_frames=4, sampling="segment"))
    assert set(identities(jittered, train=True)) == {""}
    assert all(identities(jittered))


def test_a_blind_view_has_an_identity_of_its_own(make):
    data = make()
    blind = ReviewView(data.task, {f"train{i}": ("a trace",) for i in range(10)}, "all", input="trace")
    assert len(set(identities(data, view=blind))) == 1
    assert set(identities(data, view=blind)).isdisjoint(identities(data))
