"""Checkpoints of two ranks go on in one process and the reverse: the same prompts, and weights to 1e-5.

A signal to one of two ranks, in the midst of a batch, stops both where they can go on.
"""

import pytest
import resume_ranks as resume
import torch

from vidreason.testing.samples import relative_gap

small_base, clip_folder = resume.world.small_base, resume.world.clip_folder

LIMIT_S = 900
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def found(small_base, clip_folder, tmp_path_factory):
    """The record of two ranks; one process stops before them and goes on after them."""
    out = tmp_path_factory.mktemp("ranks")
    one = {}
    for strategy in STRATEGIES:
        for stage in (*resume.STAGES, "half"):
            given = (stage, strategy, small_base, clip_folder)
            one[stage, strategy, "whole"] = resume.fit(*given, out / f"alone_{stage}_{strategy}", 1)
            one[stage, strategy, "stopped"] = resume.fit(
                *given, out / f"one_{stage}_{strategy}", 1, stop=resume.signal.SIGTERM
            )
    resume.processes.launch(resume.__file__, small_base, clip_folder, out, ",".join(STRATEGIES), limit_s=LIMIT_S)
    for strategy in STRATEGIES:
        for stage in (*resume.STAGES, "half"):
            folder = out / f"two_{stage}_{strategy}"
            one[stage, strategy, "from two"] = resume.fit(stage, strategy, small_base, clip_folder, folder, 1)
    return one, [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


def shown(*runs):
    return sorted(entry for run in runs for entry in run["seen"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", resume.STAGES)
def test_ranks_go_on_where_one_process_was_and_the_reverse(found, stage, strategy):
    one, (first, second) = found
    whole = one[stage, strategy, "whole"]
    assert whole["steps"] in (6, 12)
    assert relative_gap(first[stage, strategy, "whole"]["weights"], whole["weights"]) < 1e-5
    stops = [one[stage, strategy, "stopped"], first[stage, strategy, "stopped"]]
    done = {stop["steps"] for stop in stops}
    assert done == {resume.STOP_AT * whole["steps"] // 6 + (1 if stage == "sft" else 0)}
    from_one = [rank[stage, strategy, "from one"] for rank in (first, second)]
    assert relative_gap(from_one[0]["weights"], whole["weights"]) < 1e-5
    assert relative_gap(one[stage, strategy, "from two"]["weights"], whole["weights"]) < 1e-5
    rest = [entry for entry in shown(whole) if entry[0] >= resume.STOP_AT + (stage == "sft")]
    assert shown(*from_one) == rest
    assert shown(one[stage, strategy, "from two"]) == rest


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rollout_batch_is_finished_before_a_stop_and_counted_once(found, strategy):
    """The signal comes in the first of the two optimizer steps on it; then the others go on."""
    one, (first, second) = found
    whole, stopped = (one["half", strategy, name] for name in ("whole", "stopped"))
    assert (stopped["steps"], first["half", strategy, "stopped"]["steps"]) == (10, 10)
    assert whole["num_tokens"] == whole["tokens"]
    from_one = [rank["half", strategy, "from one"] for rank in (first, second)]
    assert stopped["tokens"] + sum(rank["tokens"] for rank in from_one) == whole["tokens"]
    for rank in from_one:
        assert rank["num_tokens"] == whole["tokens"]
        assert rank["steps"] == whole["steps"]
        assert relative_gap(rank["weights"], whole["weights"]) < 1e-5
    before = sum(rank["half", strategy, "stopped"]["tokens"] for rank in (first, second))
    from_two = one["half", strategy, "from two"]
    assert before + from_two["tokens"] == from_two["num_tokens"] == whole["tokens"]
    assert relative_gap(from_two["weights"], whole["weights"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", resume.STAGES)
def test_ranks_that_were_stopped_end_as_those_that_were_not(found, stage, strategy):
    for rank in found[1]:
        whole, resumed = (rank[stage, strategy, name] for name in ("whole", "resumed"))
        assert relative_gap(resumed["weights"], whole["weights"]) < 1e-6
        assert whole["steps"] == resumed["steps"]
        assert whole["seen"][-len(resumed["seen"]) :] == resumed["seen"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "strategy"), [("grpo", "ddp"), ("sft", "fsdp")])
def test_ranks_of_which_one_was_killed_end_as_those_that_were_not(
    found, small_base, clip_folder, tmp_path, stage, strategy
):
    """SIGKILL; the other rank loses it and fails, and does not wait."""
    given = (resume.__file__, small_base, clip_folder, tmp_path)
    with pytest.raises(AssertionError):
        resume.processes.launch(*given, f"kill:{stage}:{strategy}", limit_s=300)
    assert not (tmp_path / "rank0.pt").exists()
    left = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["vidreason"]["progress"]
    assert left["batches"] == 3  # the first epoch
    resume.processes.launch(*given, f"resume:{stage}:{strategy}", limit_s=300)
    for rank in (0, 1):
        whole = found[1][rank][stage, strategy, "whole"]
        resumed = torch.load(tmp_path / f"rank{rank}.pt")[stage, strategy]
        assert relative_gap(resumed["weights"], whole["weights"]) < 1e-6
        assert resumed["seen"] == [entry for entry in whole["seen"] if entry[0] >= 3]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "strategy"), [("sft", "ddp"), ("grpo", "fsdp")])
def test_ranks_that_can_read_nothing_stop_where_they_can_go_on(small_base, clip_folder, tmp_path, stage, strategy):
    given = (resume.__file__, small_base, clip_folder, tmp_path)
    resume.processes.launch(*given, f"gone:{stage}:{strategy}", limit_s=300)
    whole = resume.fit(stage, strategy, small_base, clip_folder, tmp_path / "whole", 1)
    for rank in (0, 1):
        mended = torch.load(tmp_path / f"rank{rank}.pt")
        assert mended["saved"] == resume.STOP_AT
        assert mended["steps"] == whole["steps"]
        assert relative_gap(mended["weights"], whole["weights"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_leave_a_validation_together(small_base, clip_folder, tmp_path, strategy):
    """Only one of them hears of it, in the midst of writing; both save what they have learnt before it."""
    given = (resume.__file__, small_base, clip_folder, tmp_path)
    resume.processes.launch(*given, f"validation:grpo:{strategy}", limit_s=300)
    assert [torch.load(tmp_path / f"rank{rank}.pt")["steps"] for rank in (0, 1)] == [6, 6]  # of 12
    saved = torch.load(tmp_path / "signalled" / "last.ckpt", weights_only=True)["vidreason"]["progress"]
    assert saved["batches"] == 3
    assert saved["validation_due"]
