"""Tests the order of clips: by seed and epoch, shared between ranks, classes balanced."""

import pytest
import torch
import two_classes
from two_classes import epoch, order

from vidreason.datamodules.clips.samplers import (
    BalancedSampler,
    NonRepeatingDistributedSampler,
    SeededDistributedSampler,
)
from vidreason.datamodules.prompts import LabelView

make = two_classes.make


def test_order_depends_on_seed_and_epoch_alone(make):
    data, again, other = make(), make(num_workers=1), make(seed=1)
    for module in (data, again, other):
        module.connect(train_view=LabelView(module.task))
    loader = data.train_dataloader()
    first, second = order(epoch(loader, 0)), order(epoch(loader, 1))
    torch.manual_seed(123)
    workers = again.train_dataloader()
    assert first == order(epoch(workers, 0))
    assert second == order(epoch(workers, 1))
    assert first != second
    assert first != order(epoch(other.train_dataloader(), 0))


def test_ranks_share_an_epoch_between_them():
    parts = [list(SeededDistributedSampler(range(10), 2, rank, shuffle=True, seed=3)) for rank in range(2)]
    assert sorted(key.position for part in parts for key in part) == list(range(10))
    assert all(key.epoch == 0 for part in parts for key in part)
    assert all(key.valid for part in parts for key in part)


@pytest.mark.parametrize("clips", [5, 2, 1])
def test_clips_that_only_fill_a_rank_do_not_count(clips):
    ranks = 3
    parts = [list(SeededDistributedSampler(range(clips), ranks, rank, shuffle=True, seed=3)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(key.position for part in parts for key in part if key.valid) == list(range(clips))
    assert [key.valid for key in SeededDistributedSampler(range(clips), 1, 0, shuffle=True, seed=3)] == [True] * clips


def test_a_rank_without_a_clip_to_judge_gets_one_that_does_not_count():
    parts = [list(NonRepeatingDistributedSampler(range(2), 3, rank)) for rank in range(3)]
    assert [(key.position, key.valid) for part in parts for key in part] == [(0, True), (1, True), (0, False)]


def test_balanced_classes_are_equally_frequent_on_any_number_of_ranks(make):
    data = make(batch_size=2)
    data.counts = {**data.counts, "train": 9}
    data.connect(train_view=LabelView(data.task), balance_classes=True)
    loader = data.train_dataloader()
    assert type(loader.sampler) is BalancedSampler
    batches = epoch(loader, 1)
    assert [sorted(batch.labels.tolist()) for batch in batches[:4]] == [[0, 1]] * 4
    assert order(batches) != order(epoch(loader, 2))
    whole = list(BalancedSampler(loader.dataset, 1, 0, shuffle=True, seed=0))
    ranks = [list(BalancedSampler(loader.dataset, 3, rank, shuffle=True, seed=0)) for rank in range(3)]
    assert [key for turn in zip(*ranks, strict=True) for key in turn] == whole
