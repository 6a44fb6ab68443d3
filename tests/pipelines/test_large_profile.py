"""Whole pipelines of tiny checkpoints in the hub's format, from the command line, with the settings for 2 to 8 B."""

import json
from pathlib import Path

import pytest
import user_folder
import yaml
from families import FAMILIES

from vidreason.cli.main import main
from vidreason.config.scale import DEFAULT, leaves, read_profile
from vidreason.pipelines.spec import read_pipeline

here = user_folder.here
pytestmark = pytest.mark.slow

TRACES = "model.init_args.traces"
SHORT = {f"{TRACES}.sampling.max_new_tokens": 8}
# A random model neither ends its texts nor writes words.
ANY_TEXT = {f"{TRACES}.filter": {"complete": False, "min_words": 0}}
ONE_STEP = {"trainer.max_steps": 1, "trainer.max_epochs": -1, "trainer.check_val_every_n_epoch": None}
ANSWERS = {"model.init_args.decide.sampling.max_new_tokens": 8}
STAGES = {
    "generate": {**SHORT, **ANY_TEXT, f"{TRACES}.judge": False},
    "sft_cold_start": {**SHORT, **ANSWERS, **ONE_STEP, f"{TRACES}.samples": 1, "trainer.val_check_interval": 1},
    "grpo": {
        **ANSWERS,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "model.init_args.batch_size": 2,
        "model.init_args.rollouts.group_size": 2,
        "model.init_args.rollouts.sampling.max_new_tokens": 8,
    },
    "traces": {**SHORT, f"{TRACES}.samples": 1},
    "calibration": {**SHORT, **ONE_STEP, f"{TRACES}.samples": 1, "trainer.val_check_interval": 1},
    "test": {**SHORT, f"{TRACES}.samples": 1},
}
PARTS = {"traces": "generate", "test": "calibration"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["qwen3", "internvl"])
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_pipeline_of_a_checkpoint_runs_with_the_large_profile(capfd, tmp_path, family, strategy):
    base = FAMILIES[family][1](tmp_path / "base")
    options = ["--config", "configs/pipelines/deepintuit.yaml", "--data", "data.yaml", "--run_dir", "run"]
    options += ["--vlm", str(base), "--trainer.limit_val_batches", "1", "--vlm.init_args.vision_cache", "null"]
    options += ["--strategy", strategy] * (strategy == "full")
    for stage, settings in STAGES.items():
        for key, value in settings.items():
            options += [f"--{stage}.{key}", json.dumps(value)]
    assert main(["pipeline", *options]) == 0
    said = capfd.readouterr()
    Path("said.txt").write_text(said.out + said.err)
    name = f"{DEFAULT} under configs/scale/full_2b_8b.yaml" if strategy == "full" else DEFAULT
    assert f"settings of all stages: {name} (docs/budgets.md)" in said.out
    assert "sft_trace: what 2 clips learn comes 0 (0%) from own traces that end in the label" in said.out + said.err
    assert [row["method"] for row in json.loads(Path("run/summary.json").read_text())] == ["deepintuit"]

    spec = read_pipeline("configs/pipelines/deepintuit.yaml")
    given = set(yaml.safe_load(Path("data.yaml").read_text())["init_args"])
    for stage in spec.stages[:6]:  # the others are for texts that are no language
        part = PARTS.get(stage.name, stage.name)
        assert f"settings: {name}, part {part} (docs/budgets.md)" in said.err
        saved = yaml.safe_load((Path("run") / spec.folder(stage.name) / "config.yaml").read_text())
        flat = dict(leaves(saved))
        changed = {**stage.args, **STAGES[stage.name], "trainer.limit_val_batches": 1}
        checked = 0
        for section, settings in read_profile(DEFAULT, part, strategy == "full").items():
            for key, value in leaves(settings):
                dotted = f"{section}.{key}" if section == "trainer" else f"{section}.init_args.{key}"
                if dotted in changed or (section == "data" and key.split(".")[0] in given):
                    continue
                # a stage that only decides or predicts has no option of its own for some of them
                assert flat[dotted] == value, f"{stage.name}: {dotted}"
                checked += 1
        assert checked >= 4
        assert saved["vlm"]["init_args"]["gradient_checkpointing"] is True
    folder = Path("run") / spec.folder("grpo")
    assert (folder / ("weights" if strategy == "full" else "adapter")).is_dir() or "no completion could be parsed" in (
        said.out + said.err
    )
