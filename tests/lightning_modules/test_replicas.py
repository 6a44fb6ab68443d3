"""What DDP exchanges in a forward: buffers where training changes them, and nothing in validation."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vidreason.lightning_modules.replicas import sync_changing_buffers, unsynced


@pytest.fixture
def replicated():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    dist.destroy_process_group()


def test_buffers_are_exchanged_where_training_changes_them(replicated):
    sync_changing_buffers(replicated)
    assert replicated.will_sync_module_buffers()
    with unsynced(replicated):
        assert not replicated.will_sync_module_buffers()
        replicated(torch.zeros(3, 2))
    assert replicated.will_sync_module_buffers()


def test_frozen_buffers_are_not_exchanged(replicated):
    replicated.module[1].eval()
    sync_changing_buffers(replicated)
    assert not replicated.will_sync_module_buffers()
    with unsynced(replicated):
        assert not replicated.will_sync_module_buffers()
    assert not replicated.will_sync_module_buffers()


def test_other_models_are_left_alone():
    plain = nn.Linear(2, 2)
    sync_changing_buffers(plain)
    with unsynced(plain), unsynced(None):
        plain(torch.zeros(1, 2))
