"""Tests the progress that Lightning's loops are told, with hand-made counters."""

import pytest

from vidreason.lightning_modules.fit.progress import FitProgress


def told(batches, per_epoch=4, accumulated=1, due=False):
    loops = {"epoch_loop.state_dict": {}}
    FitProgress(batches, per_epoch, accumulated, due).write_into(loops)
    progress = loops["epoch_loop.batch_progress"]
    epoch = loops["epoch_progress"]["current"]
    return {
        "epoch": (epoch["ready"], epoch["started"], epoch["processed"], epoch["completed"]),
        "current": tuple(progress["current"][k] for k in ("ready", "started", "processed", "completed")),
        "total": tuple(progress["total"][k] for k in ("ready", "started", "processed", "completed")),
        "last": progress["is_last_batch"],
        "logged": loops["epoch_loop.state_dict"]["_batches_that_stepped"],
        "val": tuple(loops["epoch_loop.val_loop.batch_progress"]["total"].values()),
    }


@pytest.mark.parametrize(
    ("batches", "due", "epoch", "current", "total", "last"),
    [
        (0, False, (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), False),
        (1, False, (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 0), False),
        (4, False, (1, 1, 0, 0), (4, 4, 4, 3), (4, 4, 4, 3), True),
        (5, False, (2, 2, 1, 1), (1, 1, 1, 0), (5, 5, 5, 4), False),
        (6, True, (2, 2, 1, 1), (2, 2, 2, 2), (6, 6, 6, 6), False),
        (8, True, (2, 2, 1, 1), (4, 4, 4, 4), (8, 8, 8, 8), True),
    ],
)
def test_counters_are_those_of_the_end_of_a_batch_or_of_the_middle_of_a_validation(
    batches, due, epoch, current, total, last
):
    got = told(batches, due=due)
    assert (got["epoch"], got["current"], got["total"], got["last"]) == (epoch, current, total, last)
    assert got["val"] == ((1, 1, 0, 0) if due else (0, 0, 0, 0))


@pytest.mark.parametrize(("batches", "steps"), [(0, 0), (1, 0), (2, 1), (3, 1), (5, 3), (7, 4), (10, 6)])
def test_an_epochs_last_batch_always_steps(batches, steps):
    assert FitProgress(batches, 5, 2, False).logged_steps == steps
