"""Two gloo ranks learn what one process learns from the same global batch, and how it is cut up does not matter."""

import ddp_ranks as ddp
import pytest
import torch
from covering import sample

LIMIT_S = 300
NOT_SUMMED = {"train/num_tokens"}


@pytest.fixture(scope="module")
def two_ranks(small_base, clip_folder, tmp_path_factory):
    """The results of both ranks in every case; a hang fails after a time limit."""
    out = tmp_path_factory.mktemp("ranks")
    ddp.processes.launch(ddp.__file__, small_base, clip_folder, out, limit_s=LIMIT_S)
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ddp.CASES)
def test_two_ranks_equal_one_process(two_ranks, small_base, clip_folder, tmp_path, name):
    first, second = (rank[name] for rank in two_ranks)
    assert not set(first["seen"]) & set(second["seen"])
    one = ddp.run(name, small_base, clip_folder, tmp_path, 1, dead_clips=tuple(second["seen"]))
    assert first["steps"] == second["steps"] == one["steps"]
    assert first["seen"] | second["seen"] == one["seen"], "noise depends on neither batch nor rank"
    lengths = {len(text) for group in one["seen"].values() for text in group}
    assert len(lengths) > 3, "completions of the same length prove little"
    for rank in (first, second):
        for got, wanted in zip(rank["gradients"], one["gradients"], strict=True):
            assert got.keys() == wanted.keys()
            for key in wanted:
                torch.testing.assert_close(got[key], wanted[key], rtol=1e-5, atol=1e-6)
        for key, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][key], value, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(rank["logged"], one["logged"], strict=True):
            shared = [key for key in wanted if key.startswith(("train/", "rollout_mismatch/"))]
            for key in shared:
                assert got[key] == pytest.approx(wanted[key], rel=1e-5, abs=2e-6), key
    moved = [float(gradient.norm()) for gradient in one["gradients"][0].values()]
    assert max(moved) > 1e-3


@pytest.mark.slow
def test_a_rank_whose_groups_are_all_dead_gets_the_gradient_of_the_other(two_ranks):
    for name in ("dead", "dead_with_penalties"):
        first, second = (rank[name] for rank in two_ranks)
        assert first["logged"][0]["train/frac_reward_zero_std"] >= 0.5
        for key, gradient in first["gradients"][0].items():
            torch.testing.assert_close(gradient, second["gradients"][0][key])
        assert any(bool(gradient.any()) for gradient in second["gradients"][0].values())


@pytest.mark.parametrize(
    "loss_type",
    sample(["grpo", "gspo", "dr_grpo", "dapo", "cispo"], "gspo"),
)
def test_one_part_equals_as_many_as_prompts(small_base, clip_folder, tmp_path, monkeypatch, loss_type):
    runs = []
    for size in (None, 1):
        monkeypatch.setitem(ddp.CASES, "cut", {**ddp.CASES[loss_type], "prompts_per_forward": size})
        runs.append(ddp.run("cut", small_base, clip_folder, tmp_path, 1))
    whole, cut = runs
    assert whole["seen"] == cut["seen"]
    for a, b in zip(whole["logged"], cut["logged"], strict=True):
        for key in ("train/loss", "train/grad_norm", "train/kl", "rollout_mismatch/max"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    for a, b in zip(whole["gradients"], cut["gradients"], strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


def test_bnpo_is_the_one_that_depends_on_its_parts(small_base, clip_folder, tmp_path, monkeypatch):
    norms = []
    for size in (None, 1):
        monkeypatch.setitem(ddp.CASES, "cut", {"loss_type": "bnpo", "prompts_per_forward": size})
        norms.append(ddp.run("cut", small_base, clip_folder, tmp_path, 1)["logged"][0]["train/grad_norm"])
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
