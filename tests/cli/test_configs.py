from pathlib import Path

import pytest

from vidreason.cli.main import main
from vidreason.config import files


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "package"
    (folder / "data").mkdir(parents=True)
    (folder / "grpo.yaml").write_text("# GRPO behind a cold start\ntrainer: {}\n")
    (folder / "data" / "porch.yaml").write_text("class_path: x\n")
    monkeypatch.setattr(files, "shipped_folder", lambda: folder)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def test_current_folder_wins_over_the_package(shipped):
    assert files.find_config("configs/grpo.yaml") == shipped / "grpo.yaml"
    Path("configs").mkdir()
    Path("configs/grpo.yaml").write_text("{}")
    assert files.find_config("configs/grpo.yaml") == Path("configs/grpo.yaml")


@pytest.mark.parametrize("name", ["grpo.yaml", "configs/nope.yaml", "configs/../grpo.yaml", "/configs/grpo.yaml", ""])
def test_nothing_else_is_looked_up_in_the_package(shipped, name):
    assert files.find_config(name) is None


def test_listing_names_every_file_and_its_first_comment(shipped, capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["configs/grpo.yaml", "GRPO behind a cold start"]
    assert lines[1].strip() == "configs/data/porch.yaml"


def test_copy_writes_the_tree_and_overwrites_nothing(shipped, capsys):
    assert main(["configs", "--copy", "mine"]) == 0
    assert Path("mine/data/porch.yaml").read_text() == "class_path: x\n"
    Path("mine/grpo.yaml").write_text("changed: true\n")
    Path("mine/data/porch.yaml").unlink()
    assert main(["configs", "--copy", "mine"]) == 2
    assert "mine/grpo.yaml exists" in capsys.readouterr().err
    assert Path("mine/grpo.yaml").read_text() == "changed: true\n"
    assert not Path("mine/data/porch.yaml").exists()


def test_the_package_ships_files():
    assert (files.shipped_folder() / "__init__.py").is_file()
