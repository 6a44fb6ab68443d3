"""K target texts per video in SFT: a padded batch that encodes the video for each, against the shared prefix, on a CPU.

    python benchmarks/sft_k_texts.py [--json FILE] [--family qwen] [--grid 8,16,16] [--group_size 4] [--text_tokens 64]

Forward and backward of the SFT loss in fp32, vision tower frozen, all else trained. ``ratio`` is CPU-seconds of naive
over those of the first epoch, where the vision cache is empty; ``ratio_with_cache`` over those of later epochs.
"""

from __future__ import annotations

from arms import cross_entropy, naive, shared
from harness import arguments, circumstances, gradient_difference, in_a_fork, measure, report

ARMS = {
    "naive": naive(cross_entropy),
    "ours": shared(cross_entropy),
    "ours+cache": shared(cross_entropy, cached=True, filled=True),
}

if __name__ == "__main__":
    setting, options = arguments(__doc__, group_size=4)
    found = measure(ARMS, setting)
    gradient, single = in_a_fork(gradient_difference, list(ARMS.values()), setting)
    headline = {"ratio": found["naive"].cpu_s / found["ours"].cpu_s}
    more = {
        "ratio_with_cache": found["naive"].cpu_s / found["ours+cache"].cpu_s,
        "grad_rel_diff": gradient,
        "grad_rel_diff_per_tensor": single,
    }
    report(headline, found, circumstances(setting), options.json, **more)
