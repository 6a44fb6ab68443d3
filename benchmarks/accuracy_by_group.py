"""Accuracy of a finished test with and without some groups, for example one that is a known shortcut.

python benchmarks/accuracy_by_group.py runs/x/stages/06_test/predictions.jsonl --without synopsis
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.pipelines.summary import wilson_interval


def main() -> None:
    """Prints one line per split with all groups and one without the excluded groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--without", nargs="+", required=True, metavar="GROUP")
    options = parser.parse_args()
    predictions = read_predictions(options.predictions)
    for split in dict.fromkeys(p.split for p in predictions):
        own = [p for p in predictions if p.split == split]
        print(f"{split:12s} all groups{'':24s} {_accuracy(own)}")
        kept = [p for p in own if p.group not in options.without]
        print(f"{split:12s} without {', '.join(options.without):26s} {_accuracy(kept)}")


def _accuracy(predictions: Sequence[Prediction]) -> str:
    if not predictions:
        return "no clips"
    right, n = sum(p.right for p in predictions), len(predictions)
    low, high = wilson_interval(right, n)
    return f"{100 * right / n:5.1f} % ({100 * low:.1f}-{100 * high:.1f}), n {n}"


if __name__ == "__main__":
    main()
