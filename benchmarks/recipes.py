"""Recipes of cold start, GRPO and calibrator, compared on seeds that no reported figure uses.

    python benchmarks/recipes.py --seeds 100 101 102 [--recipes shipped grpo_80_steps] [--until test] [--json FILE]

Every recipe changes settings of the shipped stages (``recipes.yaml``). The figures are shares of 200 clips at L1, for
the greedy traces before and after GRPO: all eight facts stated as they are, the world's decision list applied to the
stated facts, the answer, the answer where all facts are right; and the calibrated decision (``--until test``). Facts
serve as a diagnosis only: nothing is trained on them. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence_report import diagnose
from figures import versions, write_json

from vidreason.cli.main import main as vidreason
from vidreason.datamodules.porch.world import Facts, label_of
from vidreason.datamodules.traces import TraceStore
from vidreason.demo.run import DATA
from vidreason.lightning_modules.decisions.predictions import Prediction, Trace, read_predictions
from vidreason.pipelines.spec import read_pipeline
from vidreason.run_folder import RunState, artefact_path

FIRST = "shipped"
"""The recipe whose descriptions the others learn from."""
_COLD = "sft_cold_start.model.init_args"
RECIPES: Mapping[str, Mapping[str, object]] = {
    FIRST: {},
    "answer_weight_1": {
        f"{_COLD}.targets.answer_weight": 1.0,
        f"{_COLD}.optim.optimizer.init_args.lr": 3e-4,
        "sft_cold_start.trainer.max_steps": 150,
        "sft_cold_start.trainer.val_check_interval": 150,
    },
    "no_swapped_traces": {f"{_COLD}.targets.swapped": 0},
    "projector_trained": {"vlm.init_args.freeze_projector": False},
    "grpo_80_steps": {"grpo.trainer.max_steps": 80},
    "grpo_at_rate_1e-4": {
        "grpo.trainer.max_steps": 120,
        "grpo.trainer.val_check_interval": 40,
        "grpo.model.init_args.optim.optimizer.init_args.lr": 1e-4,
    },
    "grpo_at_rate_1e-4_with_kl": {
        "grpo.trainer.max_steps": 80,
        "grpo.trainer.val_check_interval": 20,
        "grpo.model.init_args.optim.optimizer.init_args.lr": 1e-4,
        "grpo.model.init_args.loss.kl_coef": 0.1,
    },
    "traces_at_temperature_1": {
        f"{stage}.model.init_args.traces.sampling.temperature": 1.0 for stage in ("traces", "calibration", "test")
    },
    "calibrator_at_rate_1e-3": {"calibration.model.init_args.optim.optimizer.init_args.lr": 1e-3},
    "calibrator_with_its_own_prompt": {
        "calibration.model.init_args.input": "video+trace",
        "test.model.init_args.input": "video+trace",
        "calibration.model.init_args.optim.optimizer.init_args.lr": 3e-3,
        "calibration.trainer.max_epochs": 4,
        "calibration.trainer.check_val_every_n_epoch": 4,
    },
}
"""Settings that a recipe changes, by dotted key."""
CLIPS = 200


def options(recipe: str, seed: int, folder: Path, until: str) -> list[str]:
    """Returns the options of ``vidreason pipeline`` for a recipe."""
    line = ["--config", str(Path(__file__).with_suffix(".yaml")), "--run_dir", (folder / recipe).as_posix()]
    line += ["--data", DATA, "--seed", str(seed), "--until", until]
    data = {"data_dir": (folder / "porch").as_posix(), "seed": seed, "levels": [1], "test_clips": CLIPS}
    for key, value in [*((f"data.init_args.{name}", v) for name, v in data.items()), *RECIPES[recipe].items()]:
        line += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    if recipe != FIRST:
        for stage in unchanged_stages(recipe):
            line += ["--use", f"{stage}={(folder / FIRST).as_posix()}"]
    return line


def unchanged_stages(recipe: str) -> list[str]:
    """Returns the stages before the first one that a recipe changes; they are taken from the shipped recipe's run."""
    names = [stage.name for stage in read_pipeline(str(Path(__file__).with_suffix(".yaml"))).stages]
    # A key of a section, such as vlm, changes all stages but the descriptions, which the base writes as it is.
    changed = [names.index(key.partition(".")[0]) if key.partition(".")[0] in names else 1 for key in RECIPES[recipe]]
    return names[: min(changed)]


def figures_of(run: Path, world: Path) -> dict[str, Any]:
    """Returns the figures of a finished recipe.

    Args:
        run: Its run folder.
        world: The folder with the rendered clips.
    """
    state = RunState.load(run)
    assert state is not None, f"{run} has run"
    (facts_file,) = world.glob("*/facts.jsonl")
    lines = facts_file.read_text(encoding="utf-8").splitlines()
    truth = {row["video_id"]: row["facts"] for row in map(json.loads, lines)}
    found: dict[str, Any] = {}
    for stage in ("cold_start_greedy", "grpo_greedy"):
        if stage in state.stages and (written := artefact_path(run / state.stages[stage].folder, "traces")):
            found[stage] = asdict(diagnose(_answers(written, truth), truth))
    if "test" in state.stages and (path := artefact_path(run / state.stages["test"].folder, "predictions")):
        decided = read_predictions(path)
        found["calibrated_right"] = sum(p.right for p in decided) / len(decided)
    return found


def _answers(written: Path, truth: Mapping[str, Mapping[str, str]]) -> list[Prediction]:
    """Returns the first trace of each clip of a trace file as a decision."""
    found = []
    for video_id, records in TraceStore.open(written).by_video(kept_only=False).items():
        label, answer = label_of(Facts(**truth[video_id])), records[0].answer
        trace = Trace(records[0].text, answer)
        found.append(Prediction(video_id, "test_L1", "", label, answer, {}, answer, answer is None, False, (trace,)))
    return found


def main() -> int:
    """Runs recipes by seed and prints their figures; returns the exit status of the first run that stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--until", choices=("cold_start_greedy", "grpo_greedy", "test"), default="test")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        folder = given.run_dir / f"seed{seed}"
        for recipe in [FIRST, *(name for name in given.recipes if name != FIRST)]:
            if status := vidreason(["pipeline", *options(recipe, seed, folder, given.until)]):
                return status
            rows.append({"recipe": recipe, "seed": seed, **figures_of(folder / recipe, folder / "porch")})
            print(json.dumps(rows[-1]), flush=True)
    write_json(given.json, {"clips": CLIPS, "versions": versions(("vidreason", "torch")), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
