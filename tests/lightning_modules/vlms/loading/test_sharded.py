"""FSDP2 on two processes: the packed route takes the place of the prompt's cache, one forward and one backward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import vlm_builders as builders
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.testing.samples import relative_gap


def run(rank: int, folder: Path, vlm: VLM) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    prompts = vlm.encode(
        [builders.make_example(prompt=p, seed=i + 10 * rank) for i, p in enumerate(("what happens?", "who?"))]
    ).prompts
    words = sorted(set(range(10, 500)) - vlm.suppressed_ids)
    texts = builders.text_rows([(0, -1, 5), (1, -1, 3 + rank), (0, -1, 4), (0, 0, 2)], words, seed=rank)
    grads: list[dict[str, torch.Tensor]] = []
    for route, sharded in (("naive", False), ("auto", True)):
        torch.manual_seed(0)
        model: Any = vlm.build()
        builders.randomise_lora(model)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in unwrap(model).get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        vlm.route = route  # type: ignore[assignment]
        scores = vlm.score(model, prompts, texts, with_entropy=True)
        assert scores.entropy is not None
        (scores.logprobs + scores.entropy).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if sharded:
            found = {name: g.full_tensor() for name, g in found.items()}
        else:
            for g in found.values():
                dist.all_reduce(g)
                g /= 2
        grads.append(found)
    torch.save(grads, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_equals_naive(make_vlm: Callable[..., VLM], tmp_path: Path, family: str, checkpointing: bool) -> None:
    lora = LoRAOptions(r=4, alpha=8)
    vlm = make_vlm(family, lora=lora, dtype="float32", gradient_checkpointing=checkpointing)
    vlm.processor  # noqa: B018  # loaded before the fork
    mp.start_processes(run, (tmp_path, vlm), nprocs=2, start_method="fork")
    naive, packed = torch.load(tmp_path / "0.pt")
    assert naive.keys() == packed.keys()
    assert relative_gap(packed, naive) < 1e-5
