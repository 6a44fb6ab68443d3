"""The files of docs/extending.md, run as they stand there in a project of somebody else's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import vlm_builders
from covering import sample

from vidreason.cli.main import main
from vidreason.testing.contract import TRAINED, FamilyContract, pairwise_cases

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
PARTS = ("A data module", "A reward", "A policy loss", "A model family", "A stage")
MOST_LINES = 40


def blocks(part: str, language: str) -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {part}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """Every file of the page, by the name in its first line."""
    named = [block for part in PARTS for language in ("python", "yaml") for block in blocks(part, language)]
    return {block.partition("\n")[0].removeprefix("# "): block for block in named}


def commands(part: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(part, "bash") for line in block.splitlines()]


@pytest.fixture
def project(tmp_path, write_clip):
    """A folder with the page's files, clips and a model folder, in which nothing of vidreason lies."""
    for name, text in files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for split, count in {"train": 8, "test": 2}.items():
        for i in range(count):
            write_clip(tmp_path / "clips" / split / ("open", "shut")[i % 2] / f"{i}.mp4", i + 2)
    vlm_builders.write_smolvlm(tmp_path / "my_model")
    return tmp_path


def test_the_page_has_a_short_complete_file_for_each():
    assert [len(commands(part)) for part in PARTS] == [1] * len(PARTS)
    for part in PARTS:
        (code,) = blocks(part, "python")
        assert len(code.splitlines()) < MOST_LINES
        assert re.match(r"# my_\w+\.py\n", code)


FEWER = [
    *("--data.init_args.train_clips=4", "--data.init_args.val_clips=2", "--data.init_args.cal_clips=2"),
    *("--data.init_args.test_clips=2", "--model.init_args.batch_size=4", "--model.init_args.rollouts.group_size=4"),
]
"""The options of the commands of GRPO here; ``test_all_run_from_the_installed_command`` runs them without it"""


@pytest.mark.parametrize("part", sample(PARTS, *(part for part in PARTS if part != "A reward")))
def test_each_runs_as_printed(project, monkeypatch, part):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (argv,) = commands(part)
    assert argv[0] == "vidreason"
    try:
        assert main([*argv[1:], *(FEWER if "configs/grpo.yaml" in argv else ())]) == 0
        if part not in ("A reward", "A policy loss"):  # debug.yaml ends these after two steps
            assert any(list(run.glob("*/*.safetensors")) for run in Path("runs").iterdir())
        mine = {Path(name).stem for name in files() if name.endswith(".py")}
        assert any(name in sys.modules and Path(sys.modules[name].__file__).parent == project for name in mine)
    finally:
        for name in files():
            sys.modules.pop(Path(name).stem, None)


@pytest.mark.slow
def test_all_run_from_the_installed_command(project):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for part in PARTS:
        for argv in commands(part):
            command = [sys.executable, "-m", *argv]
            done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_family_passes_the_tests_of_the_shipped_ones(project):
    (code,) = blocks("Tests of a model family", "python")
    ((program, *arguments),) = commands("Tests of a model family")
    assert program == "pytest"
    (project / arguments[0]).write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", program, *arguments, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    functions = [name for name in dir(FamilyContract) if name.startswith("test_")]
    cases = pairwise_cases(FamilyContract.routes)
    assert len(cases) >= len(TRAINED) * len(FamilyContract.routes)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == len(functions) - 1 + len(cases)
