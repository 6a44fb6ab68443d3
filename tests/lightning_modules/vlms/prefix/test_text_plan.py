"""Tests which texts of a tree have to be run."""

import torch

from vidreason.datamodules.types import TextBatch
from vidreason.lightning_modules.vlms.prefix.text_plan import join_only_children, plan_texts


def tree(parent: list[int], lengths: list[int]) -> TextBatch:
    """Row i holds tokens 10 i, 10 i + 1, ...; the last of each counts."""
    steps = torch.arange(max(lengths))
    mask = steps < torch.tensor(lengths)[:, None]
    loss = steps == torch.tensor(lengths)[:, None] - 1
    ids = 10 * torch.arange(len(lengths))[:, None] + steps
    return TextBatch(
        ids, mask, loss, torch.zeros_like(mask), torch.zeros(len(parent), dtype=torch.long), torch.tensor(parent)
    )


def test_only_children_are_joined() -> None:
    """0 has one child, 3, which has one, 4; 1 has two, 2 and 5."""
    texts = tree([-1, -1, 1, 0, 3, 1], [2, 1, 1, 3, 1, 2])
    joined = join_only_children(texts, plan_texts(texts))
    assert joined.rows is not None
    assert joined.cols is not None
    rows = [row[real].tolist() for row, real in zip(joined.texts.ids, joined.texts.mask, strict=True)]
    assert rows == [[0, 1, 30, 31, 32, 40], [10], [20], [50, 51]]
    assert joined.texts.parent.tolist() == [-1, -1, 1, 1]
    counted = joined.texts.loss_mask
    assert counted[0].tolist() == [False, True, False, False, True, True]
    assert torch.equal(texts.ids[joined.rows, joined.cols][counted], joined.texts.ids[counted])
    assert sorted(zip(joined.rows[counted].tolist(), joined.cols[counted].tolist(), strict=True)) == sorted(
        (row, column) for row, column in texts.loss_mask.nonzero().tolist()
    )


def test_a_fan_stays_as_it_is() -> None:
    texts = tree([-1, -1, 0, 0], [2, 1, 1, 1])
    joined = join_only_children(texts, plan_texts(texts))
    assert joined.texts is texts
    assert joined.rows is None


def test_forwards_put_no_padding_before_a_continuation() -> None:
    """0, 1 and 2 have children and 3 has none; 4 to 7 are the children, of which 7 has nothing to run."""
    plan = plan_texts(tree([-1, -1, -1, -1, 0, 1, 1, 2], [3, 2, 3, 5, 2, 4, 2, 1]))
    assert plan.forwards([-1], by_length=False) == [[0, 1, 2, 3]]
    assert plan.forwards([-1], by_length=True) == [[0], [1], [2, 3]]
    assert plan.forwards([0, 1, 2], by_length=True) == [[4, 5, 6]]
    assert plan.forwards([1], by_length=True) == [[5, 6]]
    assert plan.forwards([3], by_length=True) == []
