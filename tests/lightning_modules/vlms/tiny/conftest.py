"""A TinyVLM checkpoint with random weights, far enough from uniform that differences show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    vlm = TinyVLM("scratch")
    model = vlm.build()
    assert isinstance(model, PreTrainedModel)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        assert parameter.isfinite().all(), name
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    model.save_pretrained(path)
    vlm.processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_tiny(folder: Path) -> Callable[..., TinyVLM]:
    def make(**options: Any) -> TinyVLM:
        return TinyVLM(str(folder), **options)

    return make
