"""Two gloo ranks under ddp, fsdp and fsdp_qlora learn what one process learns from the same global batch.

On purpose uneven: three validation clips make two batches on one rank and one on the other, completions differ in
length, the groups of one rank are dead, and only some ranks sample groups again. A rank that waits for the other fails.
"""

import json

import pytest
import strategy_ranks as ranks
import torch

from vidreason.testing.samples import relative_gap

small_base, clip_folder = ranks.world.small_base, ranks.world.clip_folder

LIMIT_S = 900
SFT = ("sft_label", "sft_trace", "calibration")


@pytest.fixture(scope="module")
def out(small_base, clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks.processes.launch(ranks.__file__, small_base, clip_folder, folder, "all", limit_s=LIMIT_S)
    return folder


@pytest.fixture(scope="module")
def two(out):
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("stage", SFT)
def test_supervised_stages_equal_one_process(two, small_base, clip_folder, tmp_path, stage, strategy):
    first, second = (rank[stage, strategy] for rank in two)
    one = ranks.run(stage, strategy, small_base, clip_folder, tmp_path, 1)
    assert first["steps"] == second["steps"] == one["steps"] == 2
    for rank in (first, second):
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for got, wanted in zip(rank["gradients"], one["gradients"], strict=True):
            assert relative_gap(got, wanted) < 1e-5
        assert relative_gap(rank["weights"], one["weights"]) < 1e-6
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("stage", ranks.GRPO_CASES)
def test_grpo_equals_one_process(two, small_base, clip_folder, tmp_path, stage, strategy):
    first, second = (rank[stage, strategy] for rank in two)
    dead = tuple(second["seen"]) if stage == "grpo_dead" else ()
    one = ranks.run(stage, strategy, small_base, clip_folder, tmp_path, 1, dead)
    assert first["seen"] | second["seen"] == one["seen"]
    for rank in (first, second):
        for got, wanted in zip(rank["gradients"], one["gradients"], strict=True):
            assert relative_gap(got, wanted) < 1e-5
        assert relative_gap(rank["weights"], one["weights"]) < 1e-6
        for got, wanted in zip(rank["logged"], one["logged"], strict=True):
            for name in ("train/loss", "train/grad_norm", "train/reward"):
                assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=2e-6), name


@pytest.mark.slow
def test_every_clip_is_predicted_once(two, out):
    for strategy in ranks.STRATEGIES:
        path = out / "run" / f"sft_label_{strategy}" / "predictions.jsonl"
        ids = [json.loads(line)["video_id"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert sorted(ids) == sorted(f"{split}_{i}" for split in ("test_a", "test_b") for i in range(3))


@pytest.mark.slow
def test_what_sharded_ranks_hand_on_is_what_they_trained(two, out):
    from safetensors.torch import load_file

    for strategy in ("ddp", "fsdp", "fsdp_qlora"):
        weights = two[0]["sft_label", strategy]["weights"]
        handed = load_file(out / "run" / f"sft_label_{strategy}" / "adapter" / "adapter_model.safetensors")
        assert len(handed) == len(weights)
        for name, value in weights.items():
            key = name.removeprefix("model.").replace(".policy.", ".")
            torch.testing.assert_close(handed[key], value)
        saved = torch.load(out / "run" / f"sft_label_{strategy}" / "last.ckpt", weights_only=True)["state_dict"]
        assert saved.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(saved[name], value)


@pytest.mark.slow
def test_two_machines_of_one_process_equal_one_process(small_base, clip_folder, tmp_path):
    ranks.processes.launch(ranks.__file__, small_base, clip_folder, tmp_path, ranks.MACHINES, limit_s=LIMIT_S)
    one = ranks.run("sft_label", "ddp", small_base, clip_folder, tmp_path / "one", 1)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")["sft_label", "ddp"]
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert relative_gap(found["weights"], one["weights"]) < 1e-6
