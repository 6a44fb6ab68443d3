"""A finished stage is skipped on what it really reads, and runs again where that cannot be proven."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pipeline_world
import pytest
from pipeline_world import FakeTrainer, run

from vidreason.pipelines.commands import Builds, fingerprint_own_classes
from vidreason.pipelines.content import code_prints, file_print, listing_print
from vidreason.pipelines.state import changed_inputs

project, trainer = pipeline_world.project, pipeline_world.trainer


def replace_keeping_size_and_time(path: Path, content: bytes) -> None:
    before = path.stat()
    assert before.st_size == len(content)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def clips(project: Path) -> dict[str, Path]:
    """A table whose clips lie elsewhere: behind ``root``, a link to a folder, and in a folder of frames."""
    (project / "tables").mkdir()
    (project / "tables/t.csv").write_text("path,label\na.mp4,a\nlinked/b.mp4,b\nframes,b\n")
    (project / "data.yaml").write_text("init_args: {manifest: tables/t.csv, root: clips}\n")
    (project / "generate.yaml").write_text("data: data.yaml\n")
    found = {"root": Path("clips/a.mp4"), "link": Path("far/b.mp4"), "frames": Path("clips/frames/1.png")}
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    Path("clips/linked").symlink_to(Path("far").absolute())
    return found


@pytest.mark.parametrize("place", ["root", "link", "frames"])
def test_a_replaced_clip_runs_everything_wherever_it_lies(clips, trainer: FakeTrainer, place: str) -> None:
    run(trainer)
    assert run(trainer) == 0
    assert trainer.calls == []
    replace_keeping_size_and_time(clips[place], b"new")
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]


def test_a_root_of_the_command_line_counts(clips, trainer: FakeTrainer) -> None:
    Path("data.yaml").write_text("init_args: {manifest: tables/t.csv}\n")
    root = ("--data.init_args.root", "clips")
    run(trainer, *root)
    clips["root"].write_bytes(b"newer")
    assert run(trainer, *root) == 0
    assert trainer.stages[0] == "generate"


def test_where_frames_are_kept_and_how_fast_they_come_does_not_count(clips, trainer: FakeTrainer) -> None:
    frames = "{manifest: tables/t.csv, root: clips, frames: {num_frames: 4}}"
    Path("data.yaml").write_text(f"init_args: {frames}\n")
    run(trainer)
    moved = frames.replace(": 4}", ": 4, cache: /fast, cache_gb: 9}, pin_memory: true")
    Path("data.yaml").write_text(f"init_args: {moved}\n")
    assert run(trainer, "--data.init_args.frames.cache", "/other", "--data.init_args.num_workers", "3") == 0
    assert trainer.calls == []
    Path("data.yaml").write_text(f"init_args: {moved.replace('cache_gb: 9', 'cache_format: jpeg')}\n")
    assert run(trainer) == 0
    assert trainer.stages == ["generate", "cold", "grpo", "test"]


def test_a_large_file_is_hashed_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    before = file_print(path)
    content[-1] = 1
    replace_keeping_size_and_time(path, bytes(content))
    assert file_print(path) != before
    (tmp_path / "loop").symlink_to(tmp_path)
    assert listing_print([tmp_path]) == listing_print([tmp_path]), "a link that leads back ends"


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A class of the user's own that imports a module of theirs, which imports another one of a package."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_reward.py").write_text("import json\nimport torch\nfrom mine_words import words\n")
    (tmp_path / "mine_words.py").write_text("def words():\n    from mine_pack.lists import ALL\n    return ALL\n")
    (tmp_path / "mine_pack").mkdir()
    (tmp_path / "mine_pack/__init__.py").write_text("")
    (tmp_path / "mine_pack/lists.py").write_text("from . import more\nALL = more.ALL\n")
    (tmp_path / "mine_pack/more.py").write_text("ALL = 1\n")
    return tmp_path


def test_a_class_is_all_that_it_imports_outside_of_installed_packages(own_code: Path) -> None:
    before = code_prints("mine_reward.Reward")
    names = {"mine_reward", "mine_words", "mine_pack", "mine_pack.lists", "mine_pack.more"}
    assert before.keys() == {f"code {name}" for name in names}
    assert not names & sys.modules.keys(), "nothing is imported"
    (own_code / "mine_pack/more.py").write_text("ALL = 2\n")
    assert changed_inputs(before, code_prints("mine_reward.Reward")) == ["code mine_pack.more"]
    assert code_prints("torch.optim.AdamW") == {}
    assert code_prints("vidreason.rewards.accuracy.AccuracyReward") == {}


def test_code_that_is_loaded_by_name_is_not_proven(own_code: Path) -> None:
    (own_code / "mine_words.py").write_text("import importlib\nwords = importlib.import_module('x' + 'y').words\n")
    prints = code_prints("mine_reward.Reward")
    (named,) = changed_inputs(prints, prints)
    assert named.startswith("code mine_words (unproven: ")
    assert "import_module()" in named
    assert changed_inputs(prints, prints, prove=False) == []


DATA = """
from pathlib import Path
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import Clip


class Own(VideoDataModule):
    label_names = ("a", "b")

    def splits(self):
        return ("train",)

    def samples(self, split):
        return [Clip(path, "ab"[i % 2], path.name, split) for i, path in enumerate(sorted(Path("own").iterdir()))]


class Other(Own):
    def fingerprint(self):
        return Path("notes.txt").read_text()
"""


class FakeBuild:
    """The inputs that a command would use."""

    def __init__(self, datamodule: object) -> None:
        self.datamodule, self.model = datamodule, object()


def test_what_a_data_module_lists_and_names_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    (project / "own_clips.py").write_text(DATA)
    from own_clips import Other, Own  # type: ignore[import-not-found]

    Path("own").mkdir()
    Path("own/1.mp4").write_bytes(b"old")
    Path("notes.txt").write_text("1")

    def prints(data: object) -> dict[str, str]:
        built = Builds()
        built._known[("fit",)] = FakeBuild(data)  # type: ignore[assignment]
        return fingerprint_own_classes(built, ["fit"])

    own, other = prints(Own()), prints(Other())
    replace_keeping_size_and_time(Path("own/1.mp4"), b"new")
    Path("notes.txt").write_text("2")
    assert changed_inputs(own, prints(Own())) == ["Own.samples()"]
    assert changed_inputs(other, prints(Other())) == ["Other.fingerprint()", "Other.samples()"]
    (unproven,) = changed_inputs(prints(object()), prints(object()))
    assert "neither samples() nor fingerprint()" in unproven


def test_packages_elsewhere_are_installed_and_folders_are_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below, nested = tmp_path / "system" / "dist-packages", tmp_path / "mine_outer" / "mine_inner"
    for folder in (below, nested):
        folder.mkdir(parents=True)
        monkeypatch.syspath_prepend(folder if folder == below else tmp_path)
    (below / "their_package.py").write_text("class Reward: ...\n")
    (nested / "mine_part.py").write_text("import their_package\n")
    (tmp_path / "mine_reward2.py").write_text("import mine_outer.mine_inner.mine_part\n")
    assert code_prints("their_package.Reward") == {}
    assert code_prints("mine_reward2.Reward").keys() == {"code mine_reward2", "code mine_outer.mine_inner.mine_part"}
