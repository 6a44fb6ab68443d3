"""Two gloo ranks made uneven on purpose finish, and learn what one process learns: ddp, fsdp and fsdp_qlora.

A vision cache that is warm on one rank, validation clips on one rank only or none that can be read, completions of
unequal length, clips that two ranks cannot divide, training clips that cannot be read. A rank that
waits for the other fails.
"""

import json

import pytest
import torch
import uneven_ranks as ranks

from vidreason.testing.samples import relative_gap

small_base, clip_folder = ranks.world.small_base, ranks.world.clip_folder

LIMIT_S = 900
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(small_base, clip_folder, tmp_path_factory):
    out, warmed = tmp_path_factory.mktemp("uneven"), tmp_path_factory.mktemp("warm")
    for strategy in ("ddp", "fsdp_qlora"):
        ranks.warm(small_base, clip_folder, warmed, strategy)
    ranks.processes.launch(ranks.__file__, small_base, clip_folder, out, warmed, "all", limit_s=LIMIT_S)
    found = [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]
    return [{**rank, "folder": out} for rank in found]


def equal_one_process(two, key, one):
    for rank in two:
        found = rank[key]
        assert found["steps"] == one["steps"]
        for got, wanted in zip(found["gradients"], one["gradients"], strict=True):
            assert relative_gap(got, wanted) < 1e-5
        assert relative_gap(found["weights"], one["weights"]) < 1e-6
        for name, value in one.get("metrics", {}).items():
            assert found["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("case", ranks.CASES)
def test_validation_may_be_uneven(two, small_base, clip_folder, tmp_path, case, strategy):
    one = ranks.supervised(case, strategy, small_base, clip_folder, tmp_path, 1)
    assert one["metrics"]
    equal_one_process(two, (case, strategy), one)
    if case == "failed":
        assert one["metrics"]["val/unparsed_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
def test_traces_of_all_ranks_are_in_one_file_once(two, small_base, clip_folder, tmp_path, strategy):
    one = ranks.written(strategy, small_base, clip_folder, tmp_path, 1)
    both = two[0]["folder"] / one.relative_to(tmp_path)
    wanted, found = ([json.loads(line) for line in path.read_text().splitlines()[1:]] for path in (one, both))
    assert len(found) == len(wanted) == 5 * 2
    texts = {(row["video_id"], row["sample"]): row["text"] for row in found}
    assert texts == {(row["video_id"], row["sample"]): row["text"] for row in wanted}
    assert len(set(texts.values())) > 3, "equal texts prove little"


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("stage", ranks.LAST_BATCH)
def test_a_clip_that_fills_the_last_batch_has_no_weight(two, small_base, clip_folder, tmp_path, stage, strategy):
    one = ranks.last_batch(stage, strategy, small_base, clip_folder, tmp_path, 1)
    assert one["steps"] == {"sft_label": 4, "calibration": 4}.get(stage, 2)
    equal_one_process(two, ("last", stage, strategy), one)


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("stage", ["sft_label", "grpo"])
def test_a_vision_cache_may_be_warm_on_one_rank(two, small_base, clip_folder, tmp_path, stage, strategy):
    one = ranks.cached(stage, strategy, small_base, clip_folder, tmp_path, 1, None)
    first, second = (rank["cache", stage, strategy]["counts"] for rank in two)
    assert first.get("tower", 0) == 0
    assert 0 < second["tower"] < one["counts"]["tower"]
    equal_one_process(two, ("cache", stage, strategy), one)


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("stage", ranks.LAST_BATCH)
def test_clips_that_cannot_be_read_have_no_weight(two, small_base, clip_folder, tmp_path, stage, strategy):
    """All of one rank's in the first epoch, some of both ranks' in the second."""
    given = (stage, strategy, small_base, clip_folder)
    one = ranks.lost(*given, tmp_path / "lost", 1)
    first, second = (rank["lost", stage, strategy]["unread"] for rank in two)
    if stage == "sft_trace":  # clips that have no trace to learn are in no batch
        assert first or second
    else:
        assert set(second[:3]) == set(ranks.SECOND)
        assert sorted([*first, *second[3:]]) == sorted(ranks.SECOND)
        assert first
        assert second[3:]
    equal_one_process(two, ("lost", stage, strategy), one)
    never_there = ranks.lost(*given, tmp_path / "never", 1, gone=True)
    equal_one_process(two, ("lost", stage, strategy), never_there)


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
def test_a_batch_of_which_nothing_can_be_read_ends_both_ranks(small_base, clip_folder, tmp_path, strategy):
    arguments = (small_base, clip_folder, tmp_path, tmp_path, f"failing_{strategy}")
    status, said = ranks.processes.finish(ranks.__file__, *arguments, limit_s=LIMIT_S)
    assert status != 0
    ends = [line for line in said.splitlines() if "TooManyUnreadableError: 6 of 6 training clips cannot" in line]
    assert len(ends) == 2, "one of each rank"
    assert all("; and 3 more: repair them" in line for line in ends), "each names what all could not read"
