"""Every shipped YAML builds what it names; no weights are loaded and nothing is rendered."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import stage_world as world
import yaml
from covering import sample

from vidreason.callbacks.progress import RunProgress
from vidreason.config.trainer_cli import build
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.probe import LinearProbeModule
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.generation import Sampling

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
make_trainer = world.make_trainer

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = {
    "sft_label.yaml": ("fit", RationaleSFTModule),
    "sft_rationale.yaml": ("fit", RationaleSFTModule),
    "sft_cold_start.yaml": ("fit", RationaleSFTModule),
    "grpo.yaml": ("fit", GRPOModule),
    "calibration.yaml": ("fit", CalibrationModule),
    "generate.yaml": ("predict", VLMModule),
    "test.yaml": ("test", VLMModule),
    "linear_probe.yaml": ("test", LinearProbeModule),
}
RECIPES = sorted(p.name for p in (CONFIGS / "recipes").glob("*.yaml"))
FITS = [name for name, (command, _) in STAGES.items() if command == "fit"]
OVERLAYS = sorted(p.name for p in (CONFIGS / "strategy").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", STAGES)
def test_stage_files_are_complete(name):
    command, kind = STAGES[name]
    cli = build(command, ["--config", str(CONFIGS / name)])
    assert type(cli.model) is kind
    assert cli.model.vlm is cli.datamodule.encoder
    assert cli.model.model is None, "weights are born in configure_model"
    assert any(isinstance(callback, RunProgress) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", STAGES)
def test_stage_files_set_nothing_of_a_section_but_its_file(name):
    """Whoever replaces the section replaces all of it."""
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert all(isinstance(content[section], str) for section in ("data", "vlm"))


@pytest.mark.parametrize("name", sample(FITS, "calibration.yaml"))
def test_what_fits_can_be_tested_with_the_same_file(name):
    assert build("test", ["--config", str(CONFIGS / name)]).model is not None


@pytest.mark.parametrize("overlay", sample(OVERLAYS, "fsdp_qlora.yaml", "full.yaml", "multi_node.yaml"))
def test_strategy_overlays(overlay):
    cli = build("fit", ["--config", str(CONFIGS / "grpo.yaml"), "--config", str(CONFIGS / "strategy" / overlay)])
    expected = yaml.safe_load((CONFIGS / "strategy" / overlay).read_text())
    vlm = expected.get("vlm", {}).get("init_args", {})
    if "lora" in vlm:
        assert (cli.model.vlm.lora is None) == (vlm["lora"] is None)
    if "quantize" in vlm:
        assert cli.model.vlm.quantize == vlm["quantize"]
    strategy = expected.get("trainer", {}).get("strategy")
    if isinstance(strategy, dict):
        assert type(cli.trainer.strategy).__name__ == strategy["class_path"].rsplit(".", 1)[1]
    assert isinstance(cli.model, GRPOModule)


@pytest.mark.parametrize("recipe", sample(RECIPES, "dapo.yaml", "answer_first.yaml", "rlcr.yaml"))
def test_a_recipe_is_switched_on_by_its_overlay(recipe):
    base, overlay = CONFIGS / "grpo.yaml", CONFIGS / "recipes" / recipe
    model = build("fit", ["--config", str(base), "--config", str(overlay)]).model
    asked = yaml.safe_load(overlay.read_text())["model"]["init_args"]
    added = asked.pop("rewards+", [])
    form = asked.pop("completion", {})
    lengths = [group["sampling"]["max_new_tokens"] for group in asked.values() if "sampling" in group]
    for group, settings in asked.items():
        settings.pop("sampling", None)
        assert {name: getattr(getattr(model, group), name) for name in settings} == settings
    assert [type(reward).__name__ for reward in model.rewards] == [
        "AccuracyReward",
        "FormatReward",
        *(reward["class_path"].rsplit(".", 1)[1] for reward in added),
    ]
    assert {name: getattr(model.completion, name) for name in form} == form
    longest = model.rollouts.sampling.max_new_tokens
    assert all(length == longest == model.decide.sampling.max_new_tokens for length in lengths)
    overlong = [reward.max_tokens for reward in model.rewards if reward.name == "overlong"]
    assert overlong in ([], [longest])


@pytest.mark.parametrize("recipe", sample(RECIPES, "gspo.yaml"))
def test_a_recipe_trains(recipe, make_vlm, make_data, make_trainer):
    module = build("fit", ["--config", str(CONFIGS / "grpo.yaml"), "--config", str(CONFIGS / "recipes" / recipe)]).model
    module.vlm = make_vlm()
    short = Sampling(max_new_tokens=6)
    module.batch_size, module.decide = 3, replace(module.decide, sampling=short)
    module.rollouts = replace(module.rollouts, sampling=short, group_size=3, max_unparsed_steps=99)
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data(module.vlm))
    assert trainer.global_step >= 2
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


def test_all_strategies_of_the_documentation_exist():
    wanted = {"ddp", "fsdp", "fsdp_qlora", "full", "lora", "qlora", "single"}
    assert {name.removesuffix(".yaml") for name in OVERLAYS} >= wanted


@pytest.mark.parametrize("name", sample(FITS, "grpo.yaml"))
def test_debug_overlay(name):
    cli = build("fit", ["--config", str(CONFIGS / name), "--config", str(CONFIGS / "debug.yaml")])
    assert cli.trainer.max_steps == 2
    assert cli.datamodule.sizes["train"] <= 16, "a handful of clips"


def test_every_class_of_ours_is_named_by_its_package():
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            if "class_path:" in line and not line.lstrip().startswith("#"):
                name = line.split("class_path:")[1].split(",")[0].strip(" '\"{}")
                assert name.startswith(("vidreason.", "torch.", "lightning.")), f"{path}: {name}"
