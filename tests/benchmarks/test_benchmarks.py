"""The benchmarks run, their variants compute the same, and they cost what they claim in FLOPs and vision calls."""

import json
import os
import subprocess
import sys
from importlib import import_module as load
from pathlib import Path

import harness
import pytest
import torch
from covering import covering

ROOT = Path(__file__).parents[2]
FAMILIES = ("tiny", "qwen", "smolvlm")
GRADIENTS = ("calibration_epoch", "grpo_update", "sft_k_texts", "long_completions")


@pytest.mark.parametrize(("script", "family"), covering(GRADIENTS, FAMILIES))
def test_variants_have_one_gradient(script: str, family: str) -> None:
    setting = harness.Setting(family, (2, 4, 4), 3, 6, 1)
    overall, single = harness.gradient_difference(list(load(script).VARIANTS.values()), setting)
    assert 0 < overall < 1e-5
    assert single < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_have_one_score(family: str) -> None:
    assert 0 < load("label_scoring").largest_difference(harness.Setting(family, (2, 4, 4), 5, 3, 1)) < 1e-5


SETTING = harness.Setting("qwen", (2, 8, 8), 8, 8, 0)


def test_an_update_costs_fewer_flops_and_one_vision_call_in_a_run() -> None:
    found = {name: harness.count(make, SETTING) for name, make in load("grpo_update").VARIANTS.items()}
    assert found["naive"].gflop / found["expand"].gflop > 3
    for route in ("expand", "packed"):
        assert found[route].vision_calls == 1
        cached = found[f"{route}+cache"]
        assert (cached.vision_calls, cached.vision_calls_in_run) == (0, 1)
        assert cached.gflop < found[route].gflop


@pytest.mark.slow
def test_calibration_and_label_scoring_make_one_vision_call() -> None:
    epoch = {name: harness.count(make, SETTING) for name, make in load("calibration_epoch").VARIANTS.items()}
    assert all(epoch[f"{r}+cache"][1:] == (0, 2) for r in ("expand", "auto"))
    assert epoch["auto"].vision_calls == 1  # both videos together; a cache has each computed alone
    labels = {name: harness.count(make, SETTING) for name, make in load("label_scoring").VARIANTS.items()}
    assert (labels["naive"].vision_calls, labels["ours"].vision_calls) == (8, 1)


def test_flops_are_counted_where_torch_does_not() -> None:
    """Attention by hand: two products of [n, heads, queries, keys] x size forward, five of them backward."""
    q, k, v = (torch.randn(1, 4, length, 16, requires_grad=True) for length in (8, 24, 24))
    with harness.flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 4 * 8 * 24 * 16
    with harness.flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * 4 * 8 * 24 * 16


@pytest.mark.slow
def test_the_reference_costs_what_the_targets_were_set_on() -> None:
    """Naive: 328.9 GFLOP, measured elsewhere; targets 6.4 with the vision cache and 4.9 without."""
    script, setting = load("grpo_update"), harness.Setting("qwen", (8, 16, 16), 8, 64, 0)
    parameters = sum(p.numel() for p in script.VARIANTS["naive"](setting).model.parameters())
    assert parameters == pytest.approx(13.26e6, rel=1e-3)
    cost = {name: harness.count(make, setting).gflop for name, make in script.VARIANTS.items()}
    assert cost["naive"] == pytest.approx(328.9, rel=0.02)
    for route in ("expand", "packed"):
        assert cost["naive"] / cost[f"{route}+cache"] >= 6.4
        assert cost["naive"] / cost[route] >= 4.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "keys"),
    [
        (
            "grpo_update",
            "naive_gflop ours_gflop flop_ratio flop_ratio_no_cache cpu_ratio rss_ratio grad_rel_diff "
            "vision_calls_per_video",
        ),
        ("sft_k_texts", "ratio"),
        ("calibration_epoch", "ratio"),
        ("label_scoring", "ratio"),
    ],
)
def test_scripts_write_their_figures(tmp_path: Path, script: str, keys: str) -> None:
    file = tmp_path / "figures.json"
    command = f"benchmarks/{script}.py --grid 1,4,4 --group_size 3 --text_tokens 6 --seed 3 --family tiny --repeats 1"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command.split(), "--json", str(file)], cwd=ROOT, check=True, env={**os.environ, **threads}
    )
    found = json.loads(file.read_text())
    assert list(found) == [*keys.split(), "details"]
    assert {"date", "device", "versions", "load_average", "setting", "variants"} <= set(found["details"])
    assert found["details"]["setting"]["family"] == "tiny"
    if script == "grpo_update":
        assert found["vision_calls_per_video"] == 1


def test_a_grid_is_checked() -> None:
    with pytest.raises(ValueError, match="square frames"):
        load("reference_model").make_vlm("smolvlm", (2, 4, 8), 0)
    with pytest.raises(ValueError, match="must be even"):
        load("reference_model").make_vlm("qwen", (2, 4, 3), 0)


@pytest.mark.slow
def test_scaling_draws_its_figure(tmp_path: Path) -> None:
    found = load("scaling").main(["--quick", "--figure", str(tmp_path / "scaling.png")])
    assert [p["group_size"] for p in found["G"]] == [1, 2]
    assert found["G"][1]["naive_gflop"] == pytest.approx(2 * found["G"][0]["naive_gflop"])
    assert 1 < found["marginal_gflop"] / found["own_gflop"] < 1.5
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_warm_cache_feeds_without_decoding() -> None:
    found = load("feed").main(["--tiny", "--clips", "4", "--repeats", "1"])
    alone, workers = found["rows"]
    assert (alone["workers"], workers["workers"]) == (0, 2)
    assert (alone["cold"]["decodes"], alone["cold"]["processed"]) == (4, 4)
    assert (alone["frames_only"]["decodes"], alone["frames_only"]["processed"]) == (0, 4)
    assert (alone["warm"]["decodes"], alone["warm"]["processed"]) == (0, 0)
    assert alone["fp32_bytes"] == 2 * alone["bf16_bytes"] > 0
    assert alone["warm_bytes"] == workers["warm_bytes"] == 0
