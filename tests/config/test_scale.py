"""Profiles of ``configs/scale/``: which one a stage takes, what overrides it, and where its values come from."""

import re
from pathlib import Path

import pytest
import yaml

from vidreason.config.command_files import order_files
from vidreason.config.files import shipped_folder
from vidreason.config.scale import DEFAULT, leaves, read_profile, read_stage
from vidreason.config.trainer_cli import VideoCLI
from vidreason.config.vlm_shorthand import SECTIONS

BUDGETS = Path(__file__).parents[2] / "docs" / "budgets.md"
PROFILES = ("embedded", "lora_2b_8b", "full_2b_8b")
PARTS = ("generate", "sft_rationale", "sft_label", "sft_cold_start", "grpo", "calibration", "test")
QWEN = ["--vlm", "configs/vlm/qwen2_5_vl_3b.yaml"]
GRPO = ["--config", "configs/grpo.yaml"]
LR = "model.init_args.optim.optimizer.init_args.lr"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parsed(argv, command="fit"):
    """The parsed configuration; nothing is built but the parser."""
    cli = VideoCLI(command, argv, execute=False, with_trainer=False)
    return cli, cli.config[command]


def chosen(argv):
    found = order_files(argv)
    return read_stage(found.arguments, found.stage_file, found.replaced)


def documented():
    """(part, setting) to the values of the three profiles, as the table of docs/budgets.md has them."""
    rows = re.findall(r"^\| (\w+) \| ((?:vlm|data|model|trainer)\.\S+) \| (.*) \|$", BUDGETS.read_text(), flags=re.M)
    table = {}
    for part, setting, rest in rows:
        *values, source = (cell.strip() for cell in rest.split("|"))
        assert f"- **{source}** " in BUDGETS.read_text(), f"{setting} has no source"
        table[part, setting] = [values[1] if value == "=" else value for value in values]
    return table


@pytest.mark.parametrize(("index", "name"), list(enumerate(PROFILES)))
def test_every_value_is_the_documented_one(index, name):
    file, full = (DEFAULT, True) if name == "full_2b_8b" else (f"configs/scale/{name}.yaml", False)
    table = documented()
    for part in PARTS:
        settings = read_profile(file, part, full)
        shipped = {f"{s}.{key}": value for s, values in settings.items() for key, value in leaves(values)}
        told = {key: values[index] for (rows, key), values in table.items() if rows in ("all", part) and values[index]}
        assert shipped == {key: as_shipped(value, shipped.get(key)) for key, value in told.items()}, part


def as_shipped(text, value):
    return float(text) if isinstance(value, float) else yaml.safe_load(text)


@pytest.mark.parametrize("name", PROFILES[:2])
def test_stage_files_name_every_part(name):
    content = yaml.safe_load((shipped_folder() / "scale" / f"{name}.yaml").read_text())
    stages = [yaml.safe_load(path.read_text()) for path in shipped_folder().glob("*.yaml")]
    assert set(content["parts"]) == {stage["profile"] for stage in stages if "profile" in stage} == set(PARTS)


def test_every_model_section_names_its_profile():
    for section in set(SECTIONS.values()):
        scale = yaml.safe_load((shipped_folder() / section).read_text())["init_args"]["scale"]
        assert scale == ("configs/scale/embedded.yaml" if "tiny" in section else DEFAULT)


def test_the_model_decides():
    assert chosen(GRPO).file == "configs/scale/embedded.yaml"
    assert (chosen([*GRPO, *QWEN]).file, chosen([*GRPO, *QWEN]).full) == (DEFAULT, False)
    assert chosen([*GRPO, *QWEN, "--config", "configs/strategy/full.yaml"]).full
    assert chosen([*GRPO, *QWEN, "--vlm.init_args.lora=null"]).full
    assert chosen([*GRPO, *QWEN, "--config", "configs/debug.yaml"]).file == "configs/scale/embedded.yaml"
    Path("mine.yaml").write_text("class_path: vidreason.lightning_modules.vlms.qwen.QwenVL\ninit_args: {path: x}\n")
    assert chosen([*GRPO, "--vlm", "mine.yaml"]).file == DEFAULT, "a section that names none"


def test_a_model_of_billions_of_parameters_takes_its_own_settings():
    cli, config = parsed([*GRPO, *QWEN])
    assert config[LR] == 1e-5
    assert (config.trainer.max_steps, config["model.init_args.batch_size"]) == (200, 32)
    assert cli.model.updates.clips_per_forward == cli.model.evaluation.clips_per_forward == 1
    assert cli.model.vlm.gradient_checkpointing
    assert cli.model.rollouts.sampling.max_new_tokens == cli.model.decide.sampling.max_new_tokens == 512
    assert cli.model.loss.clip_eps_high == 0.28, "from the stage file"
    assert parsed([*GRPO, *QWEN, "--config", "configs/strategy/full.yaml"])[1][LR] == 1e-6


def test_files_and_flags_override_it_and_the_listing_says_so(capsys):
    Path("over.yaml").write_text("model: {init_args: {batch_size: 5}}\ntrainer: {max_steps: 7}\n")
    Path("data.yaml").write_text(
        "class_path: vidreason.datamodules.porch.data.PorchDataModule\ninit_args: {eval_batch_size: 40}\n"
    )
    cli, config = parsed([*GRPO, *QWEN, "--config", "over.yaml", f"--{LR}=3e-6", "--data", "data.yaml"])
    assert (config["model.init_args.batch_size"], config.trainer.max_steps, config[LR]) == (5, 7, 3e-6)
    assert config["data.init_args.eval_batch_size"] == 40
    assert config["data.init_args.frames.num_frames"] == 16, "what the section leaves open comes from the profile"
    head, *lines = cli.settings()
    assert head == f"settings: {DEFAULT}, part grpo (docs/budgets.md)"
    text = "\n".join(lines)
    for words in (
        "batch_size 5 (profile: 32)",
        "optim.optimizer.lr 3e-06 (profile: 1e-05)",
        "max_steps 7 (profile: 200)",
        "eval_batch_size 40 (profile: 4)",
        "val_check_interval 50",
        "gradient_checkpointing true",
    ):
        assert words in text
    settings = read_profile(DEFAULT, "grpo", full=False)
    assert text.count(", ") + len(lines) == sum(len(list(leaves(values))) for values in settings.values())


def test_a_saved_configuration_needs_no_profile():
    cli, config = parsed([*GRPO, *QWEN, f"--{LR}=3e-6"])
    cli.parser.save(cli.config, "saved.yaml", overwrite=True, multifile=False)
    saved = yaml.safe_load(Path("saved.yaml").read_text())["fit"]
    assert saved["profile"] == "grpo"
    Path("again.yaml").write_text(yaml.safe_dump({**saved, "profile": None}))
    again = parsed(["--config", "again.yaml"])[1]
    kept = [key for key in vars(config.as_flat()) if key.startswith(("model.", "vlm.", "trainer.max", "data."))]
    assert {key: again.get(key) for key in kept if "__path__" not in key} == {
        key: config.get(key) for key in kept if "__path__" not in key
    }


@pytest.mark.parametrize(("given", "said"), [("grop", "did you mean 'grpo'"), ("x", "it has generate, sft_rationale")])
def test_an_unknown_part_is_one_line(given, said):
    with pytest.raises(ValueError, match=said):
        read_profile(DEFAULT, given, full=False)


def test_a_missing_profile_is_one_line():
    with pytest.raises(ValueError, match=r"vlm.scale: no file configs/scale/7b.yaml"):
        read_profile("configs/scale/7b.yaml", "grpo", full=False)


def test_no_stage_or_trainer_file_sets_what_a_profile_sets():
    """Such a value would hold for models of every size."""
    for part in PARTS:
        settings = read_profile(DEFAULT, part, full=False)
        stage = next(
            content
            for path in shipped_folder().glob("*.yaml")
            if (content := yaml.safe_load(path.read_text())).get("profile") == part
        )
        model = {key for key, _ in leaves(stage["model"]["init_args"])}
        trainer = yaml.safe_load((shipped_folder() / stage["trainer"]).read_text())
        assert not model & {key for key, _ in leaves(settings.get("model", {}))}
        assert not set(trainer) & set(settings.get("trainer", {}))
