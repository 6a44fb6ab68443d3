"""``--vlm`` with a hub id or a model folder."""

import json
from pathlib import Path

import pytest
import yaml

from vidreason.cli.main import main
from vidreason.config import vlm_shorthand
from vidreason.config.files import shipped_folder
from vidreason.config.trainer_cli import build
from vidreason.config.vlm_shorthand import SECTIONS, expand, is_shorthand, shorthand_settings
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.tiny.vlm import embedded_folder
from vidreason.pipelines.call import read_call
from vidreason.pipelines.inputs import StageInputs
from vidreason.run_folder import RunState

PIPELINE = ["--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "run"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    return "my model"


@pytest.fixture
def _unreachable(monkeypatch):
    def offline(name, file):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more lines")

    vlm_shorthand._from_hub.cache_clear()
    monkeypatch.setattr("transformers.utils.hub.cached_file", offline)


def test_what_is_a_shorthand(model):
    assert is_shorthand(model)
    assert is_shorthand("./nothing/here")
    assert is_shorthand("HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    for other in ("configs/vlm/tiny.yaml", "vlm/mine.yml", "pkg.module.Class", '{"class_path": "x/y"}', "tiny"):
        assert not is_shorthand(other)


def test_a_folder_becomes_the_section_of_its_family(model, tmp_path):
    shipped = yaml.safe_load((shipped_folder() / "vlm" / "qwen2_5_vl_3b.yaml").read_text())
    shipped["init_args"]["path"] = str(tmp_path / model)
    assert expand(model) == shipped
    assert shorthand_settings(model)["vlm.init_args.path"] == str(tmp_path / model)
    assert shorthand_settings("configs/vlm/tiny.yaml") == shorthand_settings(None) == {}


def test_fit_builds_it(model, tmp_path):
    vlm = build(
        "test", ["--config", "configs/test.yaml", "--vlm", model, "--vlm.init_args.max_pixels", "50176"]
    ).model.vlm
    assert isinstance(vlm, QwenVL)
    assert (vlm.path, vlm.max_pixels) == (str(tmp_path / model), 50176)
    tiny = build("test", ["--config", "configs/test.yaml", f"--vlm={embedded_folder()}"]).model.vlm
    assert tiny.lora is None


def test_it_replaces_the_section_of_the_stage_file(model, tmp_path):
    Path("mine.yaml").write_text(
        "class_path: vidreason.lightning_modules.vlms.tiny.vlm.TinyVLM\ninit_args: {lora: {r: 3}}\n"
    )
    stage = yaml.safe_load((shipped_folder() / "test.yaml").read_text())
    sections = {key: f"{shipped_folder()}/{stage[key]}" for key in ("data", "trainer")}
    Path("stage.yaml").write_text(yaml.safe_dump({**stage, **sections, "vlm": "mine.yaml"}))
    assert build("test", ["--config", "stage.yaml"]).model.vlm.lora is not None
    assert build("test", ["--config", "stage.yaml", "--vlm", str(embedded_folder())]).model.vlm.lora is None


def test_a_pipeline_hands_it_on_as_it_was_typed(model, tmp_path):
    spec = read_call([*PIPELINE, "--vlm", model]).spec
    inputs = StageInputs(spec, tmp_path / "run", RunState(spec.name))
    line = inputs.command_line(spec.stages[0], tmp_path / "run")
    assert line[line.index("--vlm") + 1] == model
    before = inputs.given(spec.stages[0])
    (tmp_path / model / "weights.safetensors").write_text("other weights")
    assert inputs.given(spec.stages[0]) != before, "a stage runs again on a changed model"


@pytest.mark.usefixtures("_unreachable")
@pytest.mark.parametrize("argv", [["pipeline", *PIPELINE], ["fit", "--config", "configs/sft_label.yaml"]])
def test_an_unreachable_hub_is_one_line_with_the_remedy(model, capsys, argv):
    assert main([*argv, "--vlm", "Qwen/Qwen2.5-VL-3B-Instruct"]) == 2
    *notices, error = capsys.readouterr().err.splitlines()
    assert not any("error" in line for line in notices)
    assert "--vlm Qwen/Qwen2.5-VL-3B-Instruct: not on this machine, and the hub does not give it" in error
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIR" in error


def test_other_mistakes(model, tmp_path):
    with pytest.raises(ValueError, match=r"neither a section file \(\.yaml\) nor a model folder"):
        expand("./nothing")
    (tmp_path / model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"a model of type 'bert'.*subclass \S+vlms.base.VLM .*extending.*qwen2_5_vl"):
        expand(model)
    (tmp_path / model / "config.json").write_text("{")
    with pytest.raises(ValueError, match="does not say its model_type"):
        expand(model)


def test_every_shipped_family_has_a_shorthand():
    assert {Path(name).name for name in SECTIONS.values()} == {
        p.name for p in (shipped_folder() / "vlm").glob("*.yaml")
    }
