"""Settings of a GPU's process, on a trainer that says it has one."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidreason.cli import main as cli
from vidreason.config import out_of_memory
from vidreason.lightning_modules.fit import cuda_settings
from vidreason.lightning_modules.fit.cuda_settings import CudaSettings


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("device", "tf32", "expected"), [("cuda", True, "high"), ("cuda", False, "highest")])
def test_tf32_is_set_on_a_gpu_and_said(monkeypatch: pytest.MonkeyPatch, device: str, tf32: bool, expected: str) -> None:
    said: list[str] = []
    monkeypatch.setattr(cuda_settings, "rank_zero_info", said.append)
    torch.set_float32_matmul_precision("medium")
    nothing: Any = None
    cpu: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    CudaSettings(tf32).setup(cpu, nothing, "fit")
    assert (torch.get_float32_matmul_precision(), said) == ("medium", [])
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    CudaSettings(tf32).setup(trainer, nothing, "fit")
    assert torch.get_float32_matmul_precision() == expected
    assert len(said) == 1
    assert ("TF32" in said[0]) == tf32


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(main=lambda _: 0))
    for own in (None, "max_split_size_mb:64"):
        for other in names:
            monkeypatch.delenv(other, raising=False)
        if own is not None:
            monkeypatch.setenv(name, own)
        assert cli.main(["plan"]) == 0
        found = {key: os.environ[key] for key in names if key in os.environ}
        assert found == ({names[0]: "expandable_segments:True"} if own is None else {name: own})
        assert ("expandable" in out_of_memory._allocator()) == (own is None)
        for other in names:
            os.environ.pop(other, None)
