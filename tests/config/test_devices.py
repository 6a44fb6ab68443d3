"""Devices that are asked for, compared with those there are."""

import pytest
import torch
from errors_page import TOO_MANY_GPUS, rows_that_say

from vidreason.config.machine import check_devices


@pytest.mark.parametrize(
    ("there", "accelerator", "devices", "refused"),
    [
        (0, "cpu", 4, False),
        (0, "auto", "auto", False),
        (0, "auto", 1, False),
        (0, "auto", 4, True),
        (0, "gpu", 1, True),
        (0, "cuda", "auto", True),
        (2, "gpu", 2, False),
        (2, "gpu", "0,1", False),
        (2, "gpu", "2,", True),
        (2, "auto", [2], True),
        (2, "auto", "3", True),
        (2, "gpu", -1, False),
    ],
)
def test_devices_are_compared_with_those_there_are(monkeypatch, there, accelerator, devices, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if not refused:
        check_devices(accelerator, devices)
        return
    with pytest.raises(ValueError, match=r"trainer\.(accelerator|devices) is .*, but this machine has") as caught:
        check_devices(accelerator, devices)
    (row,) = rows_that_say(str(caught.value), "Commands and runs")
    assert row.startswith(TOO_MANY_GPUS) == (there > 0)
