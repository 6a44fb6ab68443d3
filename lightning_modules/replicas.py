"""What a module does about its copies on other ranks (DDP): forwards that exchange nothing they need not exchange.

DDP sends the buffers of the first rank to all others in every forward, in validation too. Ranks with unequal numbers of
batches would wait for each other, and what is hashed by its last write (``vlms/vision_path.py``) would look changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def sync_changing_buffers(model: nn.Module | None) -> None:
    """Lets a replicated model exchange buffers where training changes them (batch normalisation), and else not at all.

    Args:
        model: What the strategy trains, its modules in the mode they train in.
    """
    if isinstance(model, DistributedDataParallel):
        norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
        model.require_forward_param_sync = any(norm.training for norm in norms)


@contextmanager
def unsynced(model: nn.Module | None) -> Iterator[None]:
    """Inside, forwards of a replicated model exchange nothing; all ranks begin with the buffers of the first.

    All ranks have to enter it together.
    """
    if not isinstance(model, DistributedDataParallel) or not model.will_sync_module_buffers():
        yield
        return
    model._sync_buffers()
    model.require_forward_param_sync = False
    try:
        yield
    finally:
        model.require_forward_param_sync = True
