"""Tries to run code by all that docs/security.md says cannot."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from vidreason.datamodules.sources.source import read_source
from vidreason.datamodules.task import Task

ROOT = Path(__file__).parents[1]


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_runs_nothing(tmp_path):
    torch.save({"state_dict": {}, "vidreason": Touches(tmp_path / "ran")}, tmp_path / "last.ckpt")
    pickle.loads(pickle.dumps(Touches(tmp_path / "control"))).close()
    assert (tmp_path / "control").exists(), "this pickle does run where it is allowed to"
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not (tmp_path / "ran").exists()
    loads = [
        (path.name, call)
        for folder in ("lightning_modules", "datamodules", "callbacks", "src")
        for path in (ROOT / folder).rglob("*.py")
        for call in re.findall(r"torch\.load\((.+)\)", path.read_text(encoding="utf-8"))
        if "..." not in call
    ]
    assert len(loads) >= 2
    assert [call for call in loads if not re.search(r"weights_only=(True|weights_only)", call[1])] == []


def test_a_task_file_builds_no_objects(tmp_path):
    (tmp_path / "task.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\nclasses: []\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        Task.from_yaml(tmp_path / "task.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_table_is_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    rows = ["path,label", "a.mp4,=cmd|' /C calc'!A0", "$(touch ran),b", "'; touch ran; '.mp4,{{7*7}}"]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    clips = read_source(tmp_path / "m.csv").clips
    assert [clip.label for clip in clips] == ["=cmd|' /C calc'!A0", "b", "{{7*7}}"]
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "m.csv"]


def test_remote_code_is_not_trusted():
    sources = [path for name in ("lightning_modules", "src", "datamodules") for path in (ROOT / name).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    assert not [path for path, text in texts.items() if re.search(r"trust_remote_code\s*=\s*True", text)]
