"""The benchmark against TRL at a tiny size: both sides do the same work, and the ratios are what they say."""

import argparse
from importlib import import_module

import pytest

pytest.importorskip("trl")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    variants, parent = import_module("grpo_step_variants"), import_module("grpo_step_vs_trl")
    folder = tmp_path_factory.mktemp("model")
    parent.write_model(folder, "tiny")
    options = argparse.Namespace(steps=1, prompts=2, group_size=3, completion=5, side=56)
    return {variant: variants.run_variant(variant, str(folder), options) for variant in parent.VARIANTS}


def test_both_sides_get_the_same_prompts_and_write_as_much(runs):
    assert {run["prompt_tokens"] for run in runs.values()} == {8 * 4 + 37}
    assert {run["completion_tokens"] for run in runs.values()} == {5}


def test_only_video_arms_see_pixels_and_ours_once_per_prompt_and_forward(runs):
    patches = 8 * 16 * 2  # eight pictures of 4 x 4 patches, two prompts
    assert runs["video_ours"]["vision_patches"] == 2 * patches, "sampling and update"
    assert runs["video_trl"]["vision_patches"] == 2 * 3 * patches, "once for every completion"
    assert runs["text_ours"]["vision_patches"] == runs["text_trl"]["vision_patches"] == 0


def test_both_sides_learn_in_every_step(runs):
    for run in runs.values():
        assert run["grad_norm"] > 0
        assert len(run["step"]) == len(run["update"]) == 1
        assert 0 < run["update"][0] < run["step"][0]
        assert run["step_gflop"] > 0


def test_ratios_are_medians_of_medians(runs):
    parent = import_module("grpo_step_vs_trl")

    def variant(*steps):
        return [{"step": step, "update": [s / 4 for s in step], "prompt_tokens": 9} for step in steps]

    made = parent.summarise(
        {
            "video_trl": variant([4.0, 6.0, 100.0], [8.0], [7.0]),  # medians 6, 8, 7
            "video_ours": variant([2.0], [2.0], [50.0]),
            "text_trl": variant([3.0]),
            "text_ours": variant([2.0]),
        }
    )
    assert made["video_step_ratio"] == 3.5
    assert made["video_update_ratio"] == 3.5
    assert made["text_step_ratio"] == made["text_update_ratio"] == 1.5
    assert made["video_trl_step_cpu_s"] == 7
    assert sum("ratio" in name for name in made) == 4
