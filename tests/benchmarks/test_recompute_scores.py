"""The scores of an evaluation against their definitions, by the script that does so for any run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated_run import write_run
from recompute_scores import recompute


def test_every_score_of_an_evaluation_is_found_again_and_a_wrong_one_is_seen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", trainings=("cold",))
    found = recompute(run, draws=False)
    assert {"acc", "macro_f1", "auroc", "nll", "brier", "ece", "aurc", "coverage_at_5", "scaled ece"} <= found.keys()
    assert max(found.values()) < 1e-6
    path = run / "evaluation" / "evaluation.json"
    content = json.loads(path.read_text())
    content["rows"][-1]["scores"]["aurc"] += 0.01
    path.write_text(json.dumps(content))
    assert recompute(run, draws=False)["aurc"] == pytest.approx(0.01)
