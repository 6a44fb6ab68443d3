"""One GRPO update of one video and G completions on a CPU: repeated prompts (naive) against the shared prefix.

    python benchmarks/grpo_update.py [--json FILE] [--family qwen] [--grid 8,16,16] [--group_size 8] [--text_tokens 64]

Forward and backward of the GRPO loss in fp32, vision tower frozen, all else trained, no optimizer. ``ours`` is the
route of ``vlm.route: auto``, with the vision cache filled by an earlier pass of the same run, as rollouts fill it.
"""

from __future__ import annotations

from typing import Any

from harness import Setting, arguments, circumstances, gradient_difference, in_a_process, measure, report
from variants import fan, grpo, naive, shared

from vidreason.lightning_modules.vlms.prefix.shared_prefix import RouteOptions, choose_route

VARIANTS = {
    "naive": naive(grpo),
    "expand": shared(grpo, route="expand"),
    "packed": shared(grpo, route="packed"),
    "expand+cache": shared(grpo, route="expand", cached=True, filled=True),
    "packed+cache": shared(grpo, route="packed", cached=True, filled=True),
}


def automatic(setting: Setting) -> str:
    """Returns the route that ``auto`` selects."""
    work = VARIANTS["expand+cache"](setting)
    return choose_route(RouteOptions(), work.model, {}, fan(setting)).route


def figures(setting: Setting) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Returns the headline figures, those of every variant, and further ones."""
    route = in_a_process(automatic, setting)
    found = measure(VARIANTS, setting)
    gradient, single = in_a_process(gradient_difference, list(VARIANTS.values()), setting)
    first, ours, bare = found["naive"], found[f"{route}+cache"], found[route]
    headline = {
        "naive_gflop": first.gflop,
        "ours_gflop": ours.gflop,
        "flop_ratio": first.gflop / ours.gflop,
        "flop_ratio_no_cache": first.gflop / bare.gflop,
        "cpu_ratio": first.cpu_s / ours.cpu_s,
        "rss_ratio": ours.peak_mb / first.peak_mb,
        "grad_rel_diff": gradient,
        "vision_calls_per_video": float(ours.vision_calls_in_run),
    }
    return headline, found, {"ours": f"{route}+cache", "grad_rel_diff_per_tensor": single}


if __name__ == "__main__":
    setting, options = arguments(__doc__)
    headline, found, more = figures(setting)
    report(headline, found, circumstances(setting), options.json, **more)
