"""Shards a built model over ranks with FSDP2, and gathers it where ranks may run unequal forwards.

Each decoder layer is gathered for its own forward and backward; the rest (embeddings, head, a trained vision tower) is
gathered for the whole forward. A frozen tower is not sharded, so that a rank may skip it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vidreason.lightning_modules.vlms.prefix.layout import unwrap


def shard(model: nn.Module, mesh: DeviceMesh, frozen: Sequence[str] = ()) -> None:
    """Shards the parameters over the ranks of ``mesh``, in place; call it once, on every rank.

    Args:
        model: What ``VLM.build`` returned, with or without PEFT around it.
        mesh: One dimension of ranks.
        frozen: Dotted names of modules that are not sharded.

    Raises:
        ValueError: Trainable parameters are of several dtypes, which FSDP2 cannot gather together.
    """
    base = unwrap(model)
    kept = {p for name in frozen for p in base.get_submodule(name).parameters()}
    _check_one_dtype(model)
    for layer in base.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=kept)


def _check_one_dtype(model: nn.Module) -> None:
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    counted = Counter(trained.values()).most_common()
    if len(counted) > 1:
        odd = [name for name, dtype in trained.items() if dtype != counted[0][0]]
        raise ValueError(
            f"FSDP needs all trained parameters in one dtype; most are {counted[0][0]}, but {len(odd)} are not, for "
            f"example {', '.join(odd[:3])}: set vlm.init_args.dtype and trainer.precision so that they agree"
        )


def is_unsharded(model: nn.Module) -> bool:
    """Returns whether this rank holds every parameter as a plain tensor."""
    return not any(isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gathers all weights on every rank in the block, so that ranks need not run the same forwards.

    Does nothing if nothing is sharded. All ranks have to enter and leave together, and must not train in the block.
    """
    if is_unsharded(model):
        yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # the root comes first
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not sharded[0], recurse=False)


def unsharded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name; call it in ``unsharded``.

    ``model.state_dict()`` would shard them again first.
    """
    assert is_unsharded(model), "gather the weights first: with unsharded(model)"
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}
