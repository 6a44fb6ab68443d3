"""Time of an epoch of calibration on a CPU: K traces behind each video, and the label behind each trace.

    python benchmarks/calibration_epoch.py [--json FILE] [--family qwen] [--grid 8,16,16] [--group_size 4]
        [--text_tokens 64]

A batch of two videos; forward and backward of the label's cross-entropy through a LoRA adapter, in fp32. The naive side
encodes the video for every trace; ours is a second epoch, for which the first has filled the vision cache. ``ratio`` is
CPU-seconds of naive over those of ``vlm.route: auto``, which selects ``packed`` here and runs the whole tree in one
forward; ``ratio_expand`` is the ratio to ``expand``, which needs one forward per level.
"""

from __future__ import annotations

from typing import Any

from harness import Make, Setting, report_ratios
from reference_model import CALIBRATOR, make_texts
from variants import cross_entropy, naive, shared

from vidreason.datamodules.types import TextBatch

LABEL_TOKENS = 8
VIDEOS = 2


def tree(setting: Setting) -> TextBatch:
    """Returns K traces behind each video, and a label behind each trace."""
    n = setting.group_size * VIDEOS
    owner = [row // setting.group_size for row in range(n)]
    # rows: all traces (parent -1, the video), then all labels (parent: the row of their trace)
    lengths = [setting.text_tokens] * n + [min(LABEL_TOKENS, setting.text_tokens)] * n
    return make_texts(lengths, owner * 2, [-1] * n + list(range(n)), setting.seed)


def ours(**options: Any) -> Make:
    """Returns a variant that runs the shared prefix."""
    return shared(cross_entropy, tree, videos=VIDEOS, lora=CALIBRATOR, **options)


VARIANTS = {
    "naive": naive(cross_entropy, tree, videos=VIDEOS, lora=CALIBRATOR),
    "auto+cache": ours(cached=True, filled=True),
    "expand+cache": ours(route="expand", cached=True, filled=True),
    "auto": ours(),
}

if __name__ == "__main__":
    report_ratios(__doc__, VARIANTS, "auto+cache", ratio_expand="expand+cache", ratio_no_cache="auto")
