"""Scores every class name behind a new clip on a CPU: one forward per label against one prefill.

    python benchmarks/label_scoring.py [--json FILE] [--family qwen] [--grid 8,16,16] [--group_size 27]
        [--text_tokens 8]

No gradient, fp32. ``--group_size`` is the number of classes, ``--text_tokens`` the length of a class name. The clip is
new to both sides: the vision cache is off. ``ratio`` is CPU-seconds of naive over ours.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Setting, arguments, circumstances, in_a_process, measure, report
from reference_model import make_prompts
from variants import fan, naive_logprobs, shared, shared_logprobs, variant

VARIANTS = {"naive": variant(partial(naive_logprobs, at_once=1), None), "ours": shared(None)}


def largest_difference(setting: Setting) -> float:
    """Returns the largest difference between the log-probs of both sides."""
    work, texts = VARIANTS["ours"](setting), fan(setting)
    prompts = make_prompts(setting.family, setting.grid, 1, setting.seed)
    with torch.no_grad():
        sides = [score(work.vlm, work.model, prompts, texts) for score in (naive_logprobs, shared_logprobs)]
    return float((sides[0] - sides[1]).abs().max())


if __name__ == "__main__":
    setting, options = arguments(__doc__, group_size=27, text_tokens=8)
    found = measure(VARIANTS, setting)
    headline = {"ratio": found["naive"].cpu_s / found["ours"].cpu_s}
    difference = in_a_process(largest_difference, setting)
    report(headline, found, circumstances(setting), options.json, logprob_difference=difference)
