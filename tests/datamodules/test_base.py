"""A data module: batches, views, splits, and what it refuses."""

import csv
import types

import lightning as L
import pytest
import torch
import two_classes
from two_classes import epoch, order

from vidreason.datamodules.clips.dataset import ClipKey
from vidreason.datamodules.prompts import DescribeView, LabelScoringView, LabelView, ReviewView
from vidreason.datamodules.types import Clip

make = two_classes.make


def test_batches_carry_labels_texts_and_clips(make):
    data = make()
    data.connect(train_view=LabelView(data.task))
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


def test_without_a_seed_of_its_own_it_follows_the_run(make):
    L.seed_everything(5)
    assert make().seed == 5
    assert make(seed=1).seed == 1


def test_loading_leaves_the_global_generator_alone(make):
    data = make()
    data.connect(train_view=LabelView(data.task))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epoch(data.train_dataloader())
    assert torch.equal(state, torch.get_rng_state())


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
    data.connect(train_view=LabelView(data.task), eval_view=LabelScoringView(data.task))
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
    with pytest.raises(ValueError, match="connect"):
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


def test_nothing_counts_behind_a_clip_that_only_fills(make):
    data = make()
    data.connect(train_view=LabelView(data.task))
    dataset, collate = data.train_dataloader().dataset, data.train_dataloader().collate_fn
    batch = collate([dataset[ClipKey(0, 0)], dataset[ClipKey(1, 0, valid=False)]])
    assert batch.sample_mask.tolist() == [True, False]
    counted = batch.valid_texts.loss_mask.any(dim=1)
    assert counted.tolist() == [owner == 0 for owner in batch.texts.owner.tolist()]
    assert bool(batch.texts.loss_mask.any(dim=1).all()), "what is run stays the same"
    assert batch.to("cpu").sample_mask.tolist() == [True, False]


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
    data.connect(train_view=LabelView(data.task))
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
    data.connect(train_view=LabelView(data.task))
    fit(data, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run" / "splits.csv").exists()


def test_a_gpu_gets_pinned_batches_without_waiting(make, monkeypatch):
    """Every tensor of a batch is pinned; a pinned tensor is moved without waiting for it."""
    data = make()
    loader = data.loader("val", LabelView(data.task))
    assert not loader.pin_memory
    (batch,) = loader
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    whole = batch.pin_memory()
    texts = [getattr(batch.texts, name) for name in ("ids", "mask", "loss_mask", "answer_mask", "owner", "parent")]
    tensors = [*batch.prompts.inputs.values(), batch.prompts.turn_end, *texts, batch.labels, batch.sample_mask]
    assert sorted(pinned) == sorted(tensor.data_ptr() for tensor in tensors)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() == batch.labels.data_ptr())
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, d, non_blocking: moved.append(non_blocking) or real(t, d, non_blocking=False)
    )
    whole.to("cpu")
    assert sorted(moved) == [False] * (len(tensors) - 1) + [True]
    device = types.SimpleNamespace(root_device=torch.device("cuda"))
    data.trainer = types.SimpleNamespace(strategy=device, distributed_sampler_kwargs=None)
    assert data.loader("val", LabelView(data.task)).pin_memory
    data.pin_memory = False
    data.num_workers, data.prefetch_batches = 1, 3
    loader = data.loader("val", LabelView(data.task))
    assert (loader.pin_memory, loader.prefetch_factor) == (False, 3)
    with pytest.raises(ValueError, match="prefetch_batches must be at least 1"):
        make(prefetch_batches=0)
