import csv
import multiprocessing
import pickle
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import pytest
import torch

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clip_dataset import ClipKey, leave_signals_to_the_run
from vidreason.datamodules.clip_order import BalancedSampler, EveryClipOnce, SeededSampler
from vidreason.datamodules.decoding import FrameOptions
from vidreason.datamodules.prompts import DescribeView, LabelScoringView, LabelView, ReviewView
from vidreason.datamodules.types import Clip, Encoded, EncodedPrompts, Example, TextBatch


class FakeEncoder:
    """Prompts are the mean grey of each frame, texts their characters."""

    def encode(self, examples: Sequence[Example]) -> Encoded:
        frames = torch.stack([e.sample.frames.float().mean((1, 2, 3)) for e in examples])
        indices = torch.tensor([e.sample.timing.indices for e in examples])
        texts = [(owner, text) for owner, e in enumerate(examples) for text in e.texts]
        length = max((len(text.text) for _, text in texts), default=0)
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, (_, text) in enumerate(texts):
            ids[row, : len(text.text)] = torch.tensor([ord(c) for c in text.text])
        owner = torch.tensor([o for o, _ in texts], dtype=torch.int64)
        parent = torch.tensor([text.parent for _, text in texts], dtype=torch.int64)
        batch = TextBatch(ids, ids > 0, ids > 0, torch.zeros_like(ids, dtype=torch.bool), owner, parent)
        inputs = {"frames": frames, "indices": indices}
        return Encoded(EncodedPrompts(inputs, len(examples), torch.zeros(0, dtype=torch.int64)), batch)


class TwoClasses(VideoDataModule):
    """All that a data set of one's own has to write."""

    folder: Path
    counts = {"train": 10, "val": 2, "cal": 2, "test": 3, "test_night": 2}

    @property
    def label_names(self):
        return ("a", "b")

    def splits(self):
        return tuple(self.counts)

    def samples(self, split):
        return [
            Clip(self.folder / f"{i % 3}.mp4", "ab"[i % 2], f"{split}{i}", group=f"{split}{i // 2}")
            for i in range(self.counts.get(split, 0))
        ]


@pytest.fixture
def make(write_clip, tmp_path):
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", frames=24 + 12 * i, size=(48, 32))

    def build(counts=None, **options) -> TwoClasses:
        data = TwoClasses(FakeEncoder(), **{"frames": FrameOptions(num_frames=4), "batch_size": 4} | options)
        data.folder = tmp_path
        data.counts = counts or data.counts
        return data

    return build


def epoch(loader, number: int = 0):
    loader.sampler.set_epoch(number)
    return list(loader)


def order(batches):
    return [video_id for batch in batches for video_id in batch.video_ids]


def test_batches_carry_labels_texts_and_clips(make):
    data = make()
    data.set_view(LabelView(data.task))
    batches = epoch(data.train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(order(batches)) == sorted(clip.video_id for clip in data.samples("train"))
    for batch in batches:
        assert [("a", "b")[label] for label in batch.labels] == [clip.label for clip in batch.clips]
        assert [chr(row[0]) for row in batch.texts.ids] == [clip.label for clip in batch.clips]
        assert batch.texts.owner.tolist() == list(range(len(batch)))
        assert batch.prompts.batch_size == len(batch)
        assert batch.decode_ms > 0
        assert not batch.failed


def test_several_texts_per_clip_share_their_prompt(make):
    data = make()
    view = DescribeView(data.task, {"val0": ("x", "yy", "z")})
    (batch,) = data.loader("val", view)
    assert batch.texts.owner.tolist() == [0, 0, 0]
    assert len(batch) == 2


def test_order_depends_on_seed_and_epoch_alone(make):
    data, again, other = make(), make(num_workers=1), make(seed=1)
    for module in (data, again, other):
        module.set_view(LabelView(module.task))
    loader = data.train_dataloader()
    first, second = order(epoch(loader, 0)), order(epoch(loader, 1))
    torch.manual_seed(123)
    workers = again.train_dataloader()
    assert first == order(epoch(workers, 0))
    assert second == order(epoch(workers, 1))
    assert first != second
    assert first != order(epoch(other.train_dataloader(), 0))


def test_without_a_seed_of_its_own_it_follows_the_run(make):
    L.seed_everything(5)
    assert make().seed == 5
    assert make(seed=1).seed == 1


def test_loading_leaves_the_global_generator_alone(make):
    data = make()
    data.set_view(LabelView(data.task))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epoch(data.train_dataloader())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_jitter_depends_on_seed_epoch_and_clip(make, num_workers):
    def chosen(number, seed=0, batch_size=4):
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
    assert base != chosen(1)
    if not num_workers:
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
    assert batch.fillers == (lost,)
    frames = batch.prompts.inputs["frames"]
    assert [bool(row.any()) for row in frames] == [row != lost for row in range(4)]
    texts = [chr(row[0]) for row in batch.texts.ids]
    assert texts == [clip.label for clip in batch.clips], "what is run stays the same"
    assert batch.weighed_texts.loss_mask.any(dim=1).tolist() == [row != lost for row in range(4)]


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
    batch = collate([dataset[ClipKey(2, 0)], dataset[ClipKey(1, 0, counts=False)]])
    assert batch.fillers == (1,)
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
    data.set_view(LabelView(data.task))
    (loader,) = data.test_dataloader()
    batches = list(loader)
    assert [order([batch]) for batch in batches] == [["test0", "test2", "test3"], []]
    assert [[failed.clip.video_id for failed in batch.failed] for batch in batches] == [["test1"], ["test4"]]
    assert "1.mp4" in batches[0].failed[0].error
    assert batches[1].prompts is None
    assert batches[1].texts is None
    assert batches[1].labels.shape == (0,)


def test_clips_without_a_target_are_left_out_of_training_only(make, caplog):
    data = make()
    view = DescribeView(data.task, {"train1": ("x",), "train4": ("y", "z")})
    assert sorted(order(epoch(data.loader("train", view, train=True)))) == ["train1", "train4"]
    assert "8 of 10 clips have no target" in caplog.text
    assert len(order(data.loader("train", view))) == 10
    with pytest.raises(ValueError, match="no clip of split 'train' has a target"):
        data.loader("train", DescribeView(data.task, {}), train=True)


def test_each_phase_has_its_view_and_splits(make):
    data = make(predict_splits=["val", "test"], eval_batch_size=2)
    data.set_view(LabelView(data.task))
    data.set_eval_view(LabelScoringView(data.task))
    assert next(iter(data.train_dataloader())).texts.ids.shape[0] == 4
    (val,) = data.val_dataloader()
    assert next(iter(val)).texts.ids.shape[0] == 2 * 2
    assert data.test_split_names == ("test", "test_night")
    assert [len(order(loader)) for loader in data.test_dataloader()] == [3, 2]
    assert order(data.predict_dataloader()) == ["val0", "val1", "test0", "test1", "test2"]


def test_a_blind_view_sees_black(make):
    data = make()
    traces = {f"val{i}": ("trace",) for i in range(2)}
    (seen,) = data.loader("val", ReviewView(data.task, traces))
    (blind,) = data.loader("val", ReviewView(data.task, traces, input="trace"))
    assert seen.prompts.inputs["frames"].abs().sum() > 0
    assert blind.prompts.inputs["frames"].abs().sum() == 0


def test_missing_splits_are_completed(make):
    data = make({"train": 20, "test": 4})
    assert len(data.clips("test")) == 4
    assert {len(data.clips("val")), len(data.clips("cal"))} <= {2, 4}  # 15 % of 20, in groups of two
    assert all(clip.split == split for split in ("train", "val", "cal") for clip in data.clips(split))
    assert len({clip.video_id for split in ("train", "val", "cal") for clip in data.clips(split)}) == 20


def test_mistakes_are_named(make):
    data = make({"train": 1, "test": 2})
    with pytest.raises(ValueError, match="split 'val' has no clips"):
        data.loader("val", LabelView(data.task))
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="no split 'night'; the data have train, test"):
        data.loader("night", LabelView(data.task))
    with pytest.raises(ValueError, match="set_view"):
        data.train_dataloader()
    data.encoder = None
    with pytest.raises(ValueError, match="no encoder"):
        data.loader("test", LabelView(data.task))
    with pytest.raises(ValueError, match="batch sizes"):
        make(batch_size=0)


def test_foreign_labels_are_refused(make):
    data = make()
    clips = [Clip(data.folder / "0.mp4", "c", "x", where="mine.csv, row 2")]
    data.samples = lambda split: clips if split == "train" else []
    with pytest.raises(ValueError, match=r"lacks: mine\.csv, row 2: 'c'"):
        data.setup("fit")


def test_what_goes_to_a_worker_can_be_pickled(make):
    data = make()
    loader = data.loader("train", DescribeView(data.task, {"train0": ("x",)}), train=True)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch = collate([dataset[ClipKey(0, 2)]])
    assert batch.video_ids == ("train0",)


def test_ranks_share_an_epoch_between_them():
    parts = [list(SeededSampler(range(10), 2, rank, shuffle=True, seed=3)) for rank in range(2)]
    assert sorted(key.position for part in parts for key in part) == list(range(10))
    assert all(key.epoch == 0 for part in parts for key in part)
    assert all(key.counts for part in parts for key in part)


@pytest.mark.parametrize("clips", [5, 2, 1])
def test_clips_that_only_fill_a_rank_do_not_count(clips):
    ranks = 3
    parts = [list(SeededSampler(range(clips), ranks, rank, shuffle=True, seed=3)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(key.position for part in parts for key in part if key.counts) == list(range(clips))
    assert [key.counts for key in SeededSampler(range(clips), 1, 0, shuffle=True, seed=3)] == [True] * clips


def test_a_rank_without_a_clip_to_judge_gets_one_that_does_not_count():
    parts = [list(EveryClipOnce(range(2), 3, rank)) for rank in range(3)]
    assert [(key.position, key.counts) for part in parts for key in part] == [(0, True), (1, True), (0, False)]


def test_nothing_counts_behind_a_clip_that_only_fills(make):
    data = make()
    data.set_view(LabelView(data.task))
    dataset, collate = data.train_dataloader().dataset, data.train_dataloader().collate_fn
    batch = collate([dataset[ClipKey(0, 0)], dataset[ClipKey(1, 0, counts=False)]])
    assert batch.fillers == (1,)
    assert batch.counted.tolist() == [True, False]
    counted = batch.weighed_texts.loss_mask.any(dim=1)
    assert counted.tolist() == [owner == 0 for owner in batch.texts.owner.tolist()]
    assert bool(batch.texts.loss_mask.any(dim=1).all()), "what is run stays the same"
    assert batch.to("cpu").fillers == (1,)


class Watching(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(batch.video_ids)

    def validation_step(self, batch, batch_idx):
        assert batch.labels.device == self.device

    def configure_optimizers(self):
        return None


def fit(data, folder, epochs):
    model = Watching()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, datamodule=data)
    return model.seen


def test_lightning_counts_the_epochs_and_finds_the_splits(make, tmp_path):
    data = make({"train": 12, "test": 2})
    data.set_view(LabelView(data.task))
    run = tmp_path / "run"
    seen = fit(data, run, epochs=2)
    loader = data.train_dataloader()
    assert seen == {0: order(epoch(loader, 0)), 1: order(epoch(loader, 1))}
    with (run / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["video_id"], row["split"]) for row in rows} == {
        (clip.video_id, split) for split in ("train", "val", "cal", "test") for clip in data.clips(split)
    }


def test_given_splits_are_not_written(make, tmp_path):
    data = make()
    data.set_view(LabelView(data.task))
    fit(data, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run" / "splits.csv").exists()


def test_balanced_classes_are_equally_frequent_on_any_number_of_ranks(make):
    data = make(batch_size=2)
    data.counts = {**data.counts, "train": 9}
    data.set_view(LabelView(data.task))
    data.balance_classes = True
    loader = data.train_dataloader()
    assert type(loader.sampler) is BalancedSampler
    batches = epoch(loader, 1)
    assert [sorted(batch.labels.tolist()) for batch in batches[:4]] == [[0, 1]] * 4
    assert order(batches) != order(epoch(loader, 2))
    whole = list(BalancedSampler(loader.dataset, 1, 0, shuffle=True, seed=0))
    ranks = [list(BalancedSampler(loader.dataset, 3, rank, shuffle=True, seed=0)) for rank in range(3)]
    assert [key for turn in zip(*ranks, strict=True) for key in turn] == whole


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


def asleep(folder):
    leave_signals_to_the_run(0)
    (folder / "ready").touch()
    time.sleep(60)


def test_only_its_own_run_ends_a_worker(tmp_path):
    """A scheduler's SIGTERM and a terminal's Ctrl-C go to workers too; the run's own SIGTERM must still end them."""
    worker = multiprocessing.get_context("fork").Process(target=asleep, args=(tmp_path,), daemon=True)
    worker.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)  # another process sends it
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
