"""A user's folder with classes and YAML files of their own, small enough to train in milliseconds."""

import sys
from pathlib import Path

import pytest
import yaml

CLASSES = """
import json
import os
import signal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.lightning_modules.vlms.base import VLM


class Recipe(VLM):
    vision_modules = ()


class Numbers(L.LightningDataModule):
    def __init__(
        self,
        encoder: VLM | None = None,
        batch_size: int = 2,
        where: dict[str, str] | None = None,
        task: str | None = None,
        broken: str | None = None,
        num_workers: int = 0,
    ):
        super().__init__()
        if broken == "init":
            raise ValueError("clips.csv, row 3: unknown label 'dog'")
        self.encoder, self.batch_size, self.where, self.task = encoder, batch_size, where, task
        self.broken, self.num_workers = broken, num_workers

    def train_dataloader(self):
        rows = Broken() if self.broken else torch.ones(8, 4)
        loader = StoppedAtStart if self.broken == "stopped" else torch.utils.data.DataLoader
        return loader(rows, batch_size=self.batch_size, num_workers=self.num_workers)

    test_dataloader = train_dataloader


class StoppedAtStart(torch.utils.data.DataLoader):
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C while workers are started
        return super().__iter__()


class OtherNumbers(Numbers):
    def __init__(self, encoder: VLM | None = None, batch_size: int = 3, extra: int = 0):
        super().__init__(encoder, batch_size)
        self.extra = extra


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise DecodeError(f"clip_{index}.mp4: cannot be read")


class Stage(L.LightningModule):
    def __init__(
        self,
        vlm: VLM,
        optimizer: OptimizerCallable = torch.optim.SGD,
        interrupt_at: int = -1,
        killed: bool = False,
    ):
        super().__init__()
        self.killed = killed
        self.vlm, self.optimizer, self.interrupt_at, self.net = vlm, optimizer, interrupt_at, None

    def configure_model(self):
        if self.net is None:
            self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        if self.global_step == self.interrupt_at:
            # SIGTERM: as a scheduler does, or a machine that is shut down; SIGINT: Ctrl-C
            os.kill(os.getpid(), signal.SIGTERM if self.killed else signal.SIGINT)
        return self.net(batch).pow(2).mean()

    def test_step(self, batch, index):
        self.log("test/loss", self.net(batch).pow(2).mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class LibraryBug(Stage):
    def training_step(self, batch, index):
        return json.loads("{")


class WithoutVLM(L.LightningModule):
    def __init__(self, size: int = 1):
        super().__init__()
"""

STAGE = """
trainer: trainer/cpu.yaml
model:
  class_path: {module}.Stage
  init_args:
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data: data/numbers.yaml
vlm: vlm/recipe.yaml
"""

SECTIONS = {
    "trainer/cpu.yaml": "accelerator: cpu\nmax_steps: 2\nenable_progress_bar: false\nenable_model_summary: false\n",
    "data/numbers.yaml": "class_path: {module}.Numbers\ninit_args: {{batch_size: 4, where: {{subset: a}}}}\n",
    "data/other.yaml": "class_path: {module}.OtherNumbers\ninit_args: {{extra: 7}}\n",
    "vlm/recipe.yaml": "class_path: {module}.Recipe\ninit_args: {{path: here}}\n",
    "vlm/other.yaml": "class_path: {module}.Recipe\ninit_args: {{path: elsewhere}}\n",
}


def write_configs(folder: Path, module: str) -> None:
    for name, text in {"stage.yaml": STAGE, **SECTIONS}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(module=module))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The user's folder, made the current one; its module is found as any user's is: through the current folder."""
    module = f"clips_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(CLASSES)
    write_configs(tmp_path / "configs", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    (tmp_path / "module").write_text(module)
    yield tmp_path
    sys.modules.pop(module, None)


ONE_STEP = {
    "trainer": {
        "max_steps": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "logger": False,
        "limit_val_batches": 1,
    }
}
TABLE = {
    "class_path": "vidreason.datamodules.manifest.ManifestDataModule",
    "init_args": {"manifest": "t.csv", "batch_size": 2, "num_workers": 0, "frames": {"num_frames": 2}},
}


@pytest.fixture
def here(tmp_path, monkeypatch, write_clip):
    """Eight clips of two classes, a table, a data section and an overlay that makes every stage one step long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    lines = ["path,label,split"]
    for i, split in enumerate(["train", "train", "val", "val", "cal", "cal", "test", "test"]):
        write_clip(Path("clips", "ab"[i % 2], f"{i}.mp4"), i + 2, size=(48, 32))
        lines.append(f"clips/{'ab'[i % 2]}/{i}.mp4,{'ab'[i % 2]},{split}")
    Path("t.csv").write_text("\n".join(lines) + "\n")
    Path("data.yaml").write_text(yaml.safe_dump(TABLE))
    Path("small.yaml").write_text(yaml.safe_dump(ONE_STEP))
    return tmp_path
