"""Pooled results of the demo over several seeds: accuracy, twin accuracy and ECE per method and level.

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--run_dir runs/seeds] [--json FILE]

Each seed is an ordinary ``vidreason demo --seed S`` with other clips in every split; finished runs are not repeated.
Pooled accuracy counts the clips of all seeds together, with the 95 % Wilson interval; the number after ± is the
standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from figures import write_json

from vidreason.cli.main import main as vidreason
from vidreason.pipelines.summary import wilson_interval


def main() -> None:
    """Runs the missing seeds and prints the pooled tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for seed in options.seeds:
        folder = options.run_dir / f"seed{seed}"
        if not (folder / "summary.json").is_file():
            status = vidreason(["demo", "--seed", str(seed), "--run_dir", str(folder)])
            if status:
                raise SystemExit(status)
        for row in json.loads((folder / "summary.json").read_text(encoding="utf-8")):
            rows[row["method"], row["split"].removeprefix("test_")].append(row)
    methods = list(dict.fromkeys(method for method, _ in rows))
    levels = list(dict.fromkeys(level for _, level in rows))
    pooled = {key: _pool(group) for key, group in rows.items()}
    print(f"seeds {options.seeds}, {rows[methods[0], levels[0]][0]['n']} test clips per level and seed")
    for name, title in (("acc", "accuracy %"), ("twin_acc", "twin accuracy %"), ("ece", "expected calibration error")):
        print(f"\n{title}\n{'method':12s}" + "".join(f"{level:>22s}" for level in levels))
        for method in methods:
            print(f"{method:12s}" + "".join(f"{_cell(pooled[method, level], name):>22s}" for level in levels))
    found = [{"method": method, "level": level, **pooled[method, level]} for method, level in pooled]
    write_json(options.json, {"seeds": options.seeds, "pooled": found})


def _pool(rows: list[dict[str, float]]) -> dict[str, float]:
    total = sum(int(row["n"]) for row in rows)
    right = sum(round(row["acc"] * row["n"]) for row in rows)  # the count behind the rate
    low, high = wilson_interval(right, total)
    return {
        "n": total,
        "acc": right / total,
        "acc_lo": low,
        "acc_hi": high,
        "acc_sd": statistics.stdev(row["acc"] for row in rows) if len(rows) > 1 else 0.0,
        "twin_acc": statistics.mean(row["twin_acc"] for row in rows),
        "ece": statistics.mean(row["ece"] for row in rows),
    }


def _cell(row: dict[str, float], name: str) -> str:
    if name == "acc":
        return (
            f"{100 * row['acc']:.1f} ({100 * row['acc_lo']:.0f}-{100 * row['acc_hi']:.0f}) ±{100 * row['acc_sd']:.1f}"
        )
    return f"{100 * row[name]:.1f}" if name == "twin_acc" else f"{row[name]:.3f}"


if __name__ == "__main__":
    main()
