"""PorchDataModule: the embedded world with open instances as a data set.

Clips are rendered to mp4 files with a manifest on first use, and then read like a user's own clips. Splits train, val
and cal have level L0; ``test_L0`` to ``test_L4`` contain twin pairs (the same scene with one event edited so that the
label changes), which share a group. The facts of each clip are in ``facts.jsonl`` for scoring only: they are not in the
manifest and cannot enter a prompt.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vidreason.datamodules.atomic_files import naming
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.porch.render import render, to_mono, write_mp4
from vidreason.datamodules.porch.scene import SHORTCUT, draw_scene
from vidreason.datamodules.porch.texts import rationale
from vidreason.datamodules.porch.world import ABNORMAL, LABELS, Facts, draw_facts, draw_twins, label_of, stream
from vidreason.datamodules.prompts import ReasonView
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.rewards.completion import render_completion

_LOG = logging.getLogger(__name__)
_VERSION = 4
"""Incremented when pictures or draws change, so that clips of an older version are not used."""


@dataclass(frozen=True)
class _Item:
    split: str
    """Name in the manifest, for example ``test_L0``."""
    stream: str
    """Name in the random streams, a key of ``SPLIT_CODES``; all test levels share ``test``."""
    level: int
    index: int
    facts: Facts
    name: str
    group: str


class PorchDataModule(ManifestDataModule):
    """Clips of a doorbell camera with a fixed label set and increasingly unseen instances per test level.

    Args:
        data_dir: Folder of rendered clips; each combination of settings has a sub-folder.
        train_clips: Clips of split train (L0, with the shortcut).
        val_clips: Clips of split val (L0).
        cal_clips: Clips of split cal (L0).
        test_clips: Clips per test level, or one number for each of ``levels``; even, since they are twin pairs.
        levels: Test levels, 0 to 4.
        camera: ``mono`` renders for a monochrome camera, which the pretraining of the embedded base excludes.
        policy: Use two labels, normal and abnormal, instead of eight.
        shortcut: Share of L0 clips in which night correlates with abnormal labels and clothing with the label.
        label_noise: Share of training labels that are replaced by another one.
        world_seed: Seed of the clips; null takes ``seed``.
        teacher_traces: File for a teacher's traces about split train, which a cold start may learn instead of the
            model's own; null writes none.
    """

    def __init__(
        self,
        data_dir: str = "runs/porch",
        train_clips: int = 128,
        val_clips: int = 64,
        cal_clips: int = 64,
        test_clips: int | list[int] = 80,
        levels: Sequence[int] = (0, 1, 2, 3, 4),
        camera: Literal["colour", "mono"] = "colour",
        policy: bool = False,
        shortcut: float = SHORTCUT,
        label_noise: float = 0.0,
        world_seed: int | None = None,
        teacher_traces: str | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = [test_clips] * len(levels) if isinstance(test_clips, int) else test_clips
        if any(size % 2 for size in sizes) or not set(levels) <= set(range(5)):
            raise ValueError(f"test_clips must be even and levels within 0..4, got {test_clips} and {list(levels)}")
        if len(sizes) != len(levels):
            raise ValueError(f"test_clips {test_clips}: give one number, or one for each of the levels {list(levels)}")
        if not 0 <= shortcut <= 1 or not 0 <= label_noise <= 1:
            raise ValueError(f"shortcut and label_noise are shares, got {shortcut} and {label_noise}")
        super().__init__(data_dir, "tasks/porch_policy.yaml" if policy else "tasks/porch.yaml", **kwargs)
        self.sizes = {"train": train_clips, "val": val_clips, "cal": cal_clips}
        self.test_clips, self.levels = test_clips, tuple(levels)
        self.test_sizes = dict(zip(levels, sizes, strict=True))
        self.camera, self.policy = camera, policy
        self.shortcut, self.label_noise = shortcut, label_noise
        self.world_seed = self.seed if world_seed is None else world_seed
        self.teacher_traces = None if teacher_traces is None else Path(teacher_traces)
        self._teacher_wrote = False
        if not 0 <= self.world_seed < 2**32:
            raise ValueError(f"the seed of the clips must be in 0 .. 2**32 - 1, got {self.world_seed}")
        self.folder = Path(data_dir) / self._name()
        self.manifest = self.folder / "manifest.csv"

    def _name(self) -> str:
        settings = [_VERSION, self.world_seed, self.sizes, self.test_clips, self.levels, self.camera, self.policy,
                    self.shortcut, self.label_noise]  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return f"seed{self.world_seed}-{self.camera}-{digest}"

    def prepare_data(self) -> None:
        """Renders the clips if they do not exist, and writes the teacher's traces if they are configured."""
        if not self.manifest.is_file():
            self._render()
        if self.teacher_traces is not None and not self._teacher_wrote:
            self.write_teacher_traces(self.teacher_traces)
            self._teacher_wrote = True

    def write_teacher_traces(self, path: Path) -> None:
        """Writes rationales about the clips of split train, with rule and label, as traces of another model.

        Args:
            path: The file; an existing file is replaced.
        """
        task = Task.from_yaml("tasks/porch_policy.yaml" if self.policy else "tasks/porch.yaml")
        draft = path.with_name(f"{path.name}.part{os.getpid()}")
        header = TraceHeader(True, "", "", ReasonView(task).sha(), task.sha(), {"teacher": "porch rationales"})
        draft.unlink(missing_ok=True)
        records = []
        for item in (item for item in self._items() if item.split == "train"):
            reasoning, answer = rationale(item.facts, self._words(item)), self._label_shown(label_of(item.facts))
            text = render_completion(reasoning, answer)
            records.append(TraceRecord(item.name, 0, text, reasoning, answer, "stop", 0.0, 0))
        TraceStore.create(draft, header).append(records)
        draft.replace(path)

    def _render(self) -> None:
        """Renders all clips to a temporary folder, which is then renamed, so that no incomplete folder is used."""
        items = self._items()
        _LOG.info("rendering %d clips into %s", len(items), self.folder)
        draft = self.folder.with_name(f"{self.folder.name}.part{os.getpid()}")
        try:
            for item in tqdm(items, desc="rendering", unit="clip", leave=False):
                self._write_clip(draft / "clips" / f"{item.name}.mp4", item)
            self._write_facts(draft / "facts.jsonl", items)
            self._write_manifest(draft / "manifest.csv", items)
            if not self.manifest.is_file():  # another process may have been faster
                draft.rename(self.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # left by an interruption, or by the slower process

    def _read(self) -> None:
        self.prepare_data()
        super()._read()

    def _items(self) -> list[_Item]:
        items = []
        for split, count in self.sizes.items():
            for i in range(count):
                # Labels in turn, so that all classes of a split are about equally frequent.
                facts = draw_facts(stream(self.world_seed, split, 0, i, "facts"), LABELS[i % len(LABELS)])
                name = f"{split}/{i:05d}"
                items.append(_Item(split, split, 0, i, facts, name, name))
        for level in self.levels:
            for pair in range(self.test_sizes[level] // 2):
                twins = draw_twins(stream(self.world_seed, "test", level, pair, "facts"), pair)
                for letter, facts in zip("ab", twins, strict=True):
                    split, group = f"test_L{level}", f"test_L{level}/{pair:04d}"
                    items.append(_Item(split, "test", level, pair, facts, f"{group}{letter}", group))
        return items

    def _write_clip(self, path: Path, item: _Item) -> None:
        seed = self.world_seed
        scene = draw_scene(seed, item.stream, item.level, item.index, item.facts, shortcut=self.shortcut)
        frames = render(
            scene,
            stream(seed, item.stream, item.level, item.index, "grain"),
            stream(seed, item.stream, item.level, item.index, "clutter"),
        )
        write_mp4(path, to_mono(frames) if self.camera == "mono" else frames)

    def _label(self, item: _Item) -> str:
        label = label_of(item.facts)
        rng = stream(self.world_seed, item.stream, item.level, item.index, "labels")
        if item.split == "train" and rng.random() < self.label_noise:
            others = [name for name in LABELS if name != label]
            label = others[int(rng.integers(len(others)))]
        return self._label_shown(label)

    def _label_shown(self, label: str) -> str:
        if self.policy:
            return "abnormal" if label in ABNORMAL else "normal"
        return label

    def _write_manifest(self, path: Path, items: Sequence[_Item]) -> None:
        with naming(path), path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "split", "group", "video_id"])
            for item in items:
                label = self._label(item)
                rows.writerow([f"clips/{item.name}.mp4", label, item.split, item.group, item.name])

    def _write_facts(self, path: Path, items: Sequence[_Item]) -> None:
        with naming(path), path.open("w", encoding="utf-8") as file:
            for item in items:
                written = rationale(item.facts, self._words(item))
                row = {"video_id": item.name, "facts": item.facts.as_dict(), "rationale": written}
                file.write(json.dumps(row) + "\n")

    def _words(self, item: _Item) -> np.random.Generator:
        return stream(self.world_seed, item.stream, item.level, item.index, "texts")

    def facts(self) -> dict[str, dict[str, str]]:
        """Returns the facts of each clip by video id; for scoring descriptions, never for training."""
        self.prepare_data()
        lines = (self.folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["video_id"]: row["facts"] for row in map(json.loads, lines)}
