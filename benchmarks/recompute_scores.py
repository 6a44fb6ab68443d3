"""Are the scores of ``vidreason evaluate`` what their definitions say? They are computed again from the predictions.

    python benchmarks/recompute_scores.py --run runs/mine [--json FILE]

Reads every ``predictions.jsonl`` of ``RUN/evaluation`` with numpy, scipy and scikit-learn alone, computes accuracy,
balanced accuracy, macro-F1, AUROC, NLL, Brier score, ECE, AURC and coverage from their definitions, the temperature by
a numerical search, the p-values by more random signs and the intervals by another bootstrap, and prints the largest
difference from ``evaluation.json`` by score. Differences of intervals are in widths of the interval: two bootstraps of
2,000 draws differ by up to about a tenth. Rows of groups and of the largest class, which has no predictions, are left
out.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figures import versions, write_json
from numpy.typing import NDArray
from scipy import optimize, special
from sklearn import metrics

Floats = NDArray[np.float64]
BINS = 15
DRAWS = 2000


@dataclass(frozen=True)
class Decided:
    """Decisions of one method about the N clips of a split."""

    ids: tuple[str, ...]
    groups: NDArray[np.int64]
    """[N]"""
    truth: NDArray[np.int64]
    """[N]"""
    chosen: NDArray[np.int64]
    """[N] -1 where there is no decision."""
    probs: Floats | None
    """[N, C]"""
    confidence: Floats | None
    """[N]"""

    def at(self, temperature: float) -> Decided:
        """Returns the decisions with probabilities at another temperature."""
        assert self.probs is not None
        probs = special.softmax(np.log(np.maximum(self.probs, 1e-30)) / temperature, axis=1)
        sure = [row[c] if c >= 0 else row.max() for row, c in zip(probs, self.chosen, strict=True)]
        return Decided(self.ids, self.groups, self.truth, self.chosen, probs, np.array(sure))


def read(file: Path, names: Sequence[str], samples: int | None) -> dict[str, Decided]:
    """Reads predictions by split; with ``samples``, decides by the most frequent answer of so many traces."""
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["split"]].append(row)
    return {split: _decided(own, list(names), samples) for split, own in rows.items()}


def _decided(rows: Sequence[Mapping[str, Any]], names: list[str], samples: int | None) -> Decided:
    groups = np.unique([row["group"] or row["video_id"] for row in rows], return_inverse=True)[1]
    truth = np.array([names.index(row["label"]) for row in rows])
    ids = tuple(row["video_id"] for row in rows)
    if samples is None:
        chosen = np.array([-1 if row["pred"] is None else names.index(row["pred"]) for row in rows])
        uniform = dict.fromkeys(names, 1 / len(names))
        probs = np.array([[(row["probs"] or uniform)[name] for name in names] for row in rows])
        sure = np.array([p[c] if c >= 0 else p.max() for p, c in zip(probs, chosen, strict=True)])
        return Decided(ids, groups, truth, chosen, probs, sure)
    picked, share = [], []
    for row in rows:
        answers = [trace["answer"] for trace in row["traces"][:samples]]
        counts = Counter(answer for answer in answers if answer in names)  # keeps the order of first appearance
        picked.append(names.index(counts.most_common(1)[0][0]) if counts else -1)
        share.append(max(counts.values(), default=0) / samples)
    return Decided(ids, groups, truth, np.array(picked), None, np.array(share) if samples > 1 else None)


def scores(d: Decided) -> dict[str, float | None]:
    """Computes every score from its definition."""
    right, decided = d.chosen == d.truth, sorted((set(d.truth) | set(d.chosen)) - {-1})
    found: dict[str, float | None] = {
        "acc": metrics.accuracy_score(d.truth, d.chosen),
        "balanced_acc": metrics.balanced_accuracy_score(d.truth, d.chosen),
        "macro_f1": metrics.f1_score(d.truth, d.chosen, labels=decided, average="macro", zero_division=0),
        "unparsed": float(np.mean(d.chosen == -1)),
    }
    if d.probs is not None and d.confidence is not None:
        classes = range(d.probs.shape[1])
        found["nll"] = -float(np.mean([np.log(max(p[t], 1e-12)) for p, t in zip(d.probs, d.truth, strict=True)]))
        found["brier"] = sum(metrics.brier_score_loss(d.truth == c, d.probs[:, c]) for c in classes)
        found["ece"] = calibration_error(d.confidence, right)
        by_size = np.array_split(np.argsort(d.confidence, kind="stable"), BINS)
        gaps = [abs(d.confidence[part].sum() - right[part].sum()) for part in by_size if len(part)]
        found["adaptive_ece"] = sum(gaps) / len(right)
        if set(d.truth) == set(classes):
            binary = len(classes) == 2
            given = d.probs[:, 1] if binary else d.probs / d.probs.sum(1, keepdims=True)
            found["auroc"] = metrics.roc_auc_score(d.truth, given, multi_class="ovr")
    if d.confidence is not None:
        accepted = [d.confidence >= level for level in set(d.confidence)]
        for percent in (5, 10):
            # in whole numbers: 1 - 19 / 20 is more than 0.05
            kept = [float(own.mean()) for own in accepted if 100 * (~right[own]).sum() <= percent * own.sum()]
            found[f"coverage_at_{percent}"] = max(kept, default=0.0)
        found["confidence"] = float(d.confidence.mean())
        found["aurc"] = area_under_risk_coverage(d.confidence, right)
    return found


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Returns the ECE over 15 equally wide bins by a loop over them."""
    total, edges = 0.0, np.linspace(0, 1, BINS + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        own = (confidence >= low) & ((confidence < high) | (high == 1))
        total += abs(float(confidence[own].sum() - right[own].sum()))
    return total / len(confidence)


def area_under_risk_coverage(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Returns the mean over k of the error expected among the k surest clips, where equal ones come in any order."""
    risks, before = [], 0.0
    for level in sorted(set(confidence), reverse=True):
        tied = confidence == level
        wrong, size, done = float((~right[tied]).sum()), int(tied.sum()), len(risks)
        risks += [(before + wrong * k / size) / (done + k) for k in range(1, size + 1)]
        before += wrong
    return float(np.mean(risks))


def temperature(cal: Decided) -> float:
    """Returns the temperature from 0.1 to 10 with the smallest mean negative log-likelihood on ``cal``."""

    def loss(log_t: float) -> float:
        probs = cal.at(float(np.exp(log_t))).probs
        assert probs is not None
        return metrics.log_loss(cal.truth, probs, labels=range(probs.shape[1]))

    found = optimize.minimize_scalar(loss, bounds=(np.log(0.1), np.log(10)), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def bootstrap(d: Decided, generator: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Returns 95 % percentile intervals over groups by drawing lists of groups."""
    members = [np.flatnonzero(d.groups == group) for group in range(d.groups.max() + 1)]
    drawn: dict[str, list[float]] = defaultdict(list)
    for _ in range(DRAWS):
        rows = np.concatenate([members[g] for g in generator.integers(0, len(members), len(members))])
        truth, chosen = d.truth[rows], d.chosen[rows]
        right = truth == chosen
        counts = [np.bincount(x[x >= 0], minlength=64) for x in (truth, chosen, truth[right])]
        labelled, decided, hits = (x.astype(float) for x in counts)
        drawn["acc"].append(float(right.mean()))
        drawn["balanced_acc"].append(float((hits[labelled > 0] / labelled[labelled > 0]).mean()))
        both = labelled + decided
        drawn["macro_f1"].append(float((2 * hits[both > 0] / both[both > 0]).mean()))
        if d.probs is not None and d.confidence is not None:
            probs = d.probs[rows]
            own = probs[np.arange(len(rows)), truth]
            drawn["nll"].append(-float(np.log(np.maximum(own, 1e-12)).mean()))
            drawn["brier"].append(float(((probs**2).sum(1) - 2 * own + 1).mean()))
            drawn["ece"].append(calibration_error(d.confidence[rows], right))
    return {name: tuple(np.percentile(values, [2.5, 97.5])) for name, values in drawn.items()}


def p_value(first: Decided, second: Decided, generator: np.random.Generator) -> float:
    """Returns the p-value of the sign-flip test over groups by 100,000 random sign patterns."""
    right = dict(zip(second.ids, second.chosen == second.truth, strict=True))
    change = (first.chosen == first.truth).astype(int) - np.array([right[name] for name in first.ids])
    sums = np.bincount(first.groups, weights=change)
    signs = generator.integers(0, 2, (100_000, len(sums))) * 2 - 1
    return float(np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9))


@dataclass
class Worst:
    """The largest differences by score."""

    found: Counter[str]

    def note(self, name: str, ours: float | None, again: float | None, scale: float = 1.0) -> None:
        """Takes in one score from ``evaluation.json`` and the same one computed again."""
        if (ours is None) != (again is None):
            raise ValueError(f"{name}: {ours} in evaluation.json, {again} here")
        self.found[name] = max(self.found[name], abs((ours or 0.0) - (again or 0.0)) / scale)

    def note_row(self, row: Mapping[str, Any], own: Decided, temperature: float | None) -> None:
        """Takes in the scores of a row, before and after its temperature."""
        for key, value in scores(own).items():
            self.note(key, row["scores"][key], value)
        if temperature is not None:
            self.note("temperature", row["temperature"], temperature, scale=temperature)
            for key, value in scores(own.at(row["temperature"])).items():
                self.note(f"scaled {key}", row["scaled"][key], value)

    def note_intervals(self, row: Mapping[str, Any], own: Decided, generator: np.random.Generator) -> None:
        """Takes in the intervals of a row."""
        for key, ends in (bootstrap(own, generator) if row["intervals"] else {}).items():
            low, high = row["intervals"][key]
            for ours, again in zip((low, high), ends, strict=True):
                self.note(f"interval of {key} (widths)", ours, again, scale=max(high - low, 1e-9))


def recompute(run: Path, draws: bool = True) -> dict[str, float]:
    """Returns the largest difference by score; with ``draws`` also those of intervals and p-values."""
    content = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    generator, worst, decided = np.random.default_rng(1), Worst(Counter()), dict[tuple[str, str], Decided]()
    temperatures: dict[str, float | None] = {}
    for row in content["rows"]:
        who, name = row["who"], row["who"]["method"]
        if row["group"] is not None or name == "majority":
            continue
        if name not in temperatures:
            by_split = _method(run, who, list(row["classes"]))
            decided |= {(name, split): found for split, found in by_split.items()}
            cal = by_split.get("cal")
            own = temperature(cal) if cal is not None and cal.probs is not None else None
            temperatures[name] = own if who["probe_of"] is None else temperatures[who["probe_of"]]
        worst.note_row(row, decided[name, row["split"]], temperatures[name])
        if draws:
            worst.note_intervals(row, decided[name, row["split"]], generator)
    for one in content["comparisons"] if draws else []:
        pair = [decided.get((one[who].partition(": ")[2], one["split"])) for who in ("first", "second")]
        if pair[0] is not None and pair[1] is not None:
            worst.note("p-value", one["difference"]["p_value"], p_value(pair[0], pair[1], generator))
    return dict(worst.found)


def _method(run: Path, who: Mapping[str, Any], names: Sequence[str]) -> dict[str, Decided]:
    slug, stages = re.sub(r"[^a-z0-9]+", "_", who["method"]), run / "evaluation" / "stages"
    (folder,) = (path for path in stages.iterdir() if re.sub(r"^\d+_", "", path.name) == slug)
    votes = re.search(r" vote of (\d+)$", who["method"])
    samples = int(votes[1]) if votes else 1 if who["mode"] == "answer" else None
    found = read(folder / "predictions.jsonl", names, samples)
    if who["mode"] != "calibrated":
        return found
    # the predictions are at the stage's own temperature, which is undone
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    weights = Path(config["model"]["init_args"]["calibrator_path"])
    weights = weights if weights.is_dir() else run.joinpath(*weights.parts[-3:])  # the run was moved
    fitted = json.loads((weights / "vidreason.json").read_text(encoding="utf-8"))["temperature"]
    return {split: one.at(1 / fitted) for split, one in found.items()}


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Prints the largest differences of a run, by score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn finds a clip without a decision odd
        worst = recompute(options.run)
    for name, difference in worst.items():
        show(f"{name:32} {difference:.2g}")
    packages = ("vidreason", "numpy", "scipy", "scikit-learn")
    write_json(options.json, {"versions": versions(packages), "largest differences": worst})


if __name__ == "__main__":
    main()
