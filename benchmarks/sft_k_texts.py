"""SFT with K target texts per video on a CPU: the video encoded for each text (naive) against the shared prefix.

    python benchmarks/sft_k_texts.py [--json FILE] [--family qwen] [--grid 8,16,16] [--group_size 4] [--text_tokens 64]

Forward and backward of the SFT loss in fp32, vision tower frozen, all else trained. ``ratio`` is CPU-seconds of naive
over those of the first epoch, when the vision cache is empty; ``ratio_with_cache`` is that of later epochs.
"""

from __future__ import annotations

from harness import report_ratios
from variants import cross_entropy, naive, shared

VARIANTS = {
    "naive": naive(cross_entropy),
    "ours": shared(cross_entropy),
    "ours+cache": shared(cross_entropy, cached=True, filled=True),
}

if __name__ == "__main__":
    report_ratios(__doc__, VARIANTS, "ours", ratio_with_cache="ours+cache")
