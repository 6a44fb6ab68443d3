"""The folder that embeddings are kept in: its bound, and several processes that write to it."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vidreason.lightning_modules.vlms.vision_cache.embedding_store import EmbeddingStore


def test_the_folder_stays_within_its_bound(tmp_path: Path) -> None:
    """The entries longest unused go first; reading one counts as use."""
    store = EmbeddingStore(tmp_path, max_gb=5 * 4300e-9)
    for i in range(5):
        store.write(f"k{i}", {"x": torch.full((1000,), float(i))})
        os.utime(store.path(f"k{i}"), (1000 + i, 1000 + i))
    found = store.read("k0")
    assert found is not None
    assert found["x"].equal(torch.zeros(1000))
    store.write("k5", {"x": torch.ones(1000)})
    assert sorted(p.stem for p in tmp_path.glob("*.safetensors")) == ["k0", "k2", "k3", "k4", "k5"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= store.max_bytes
    with pytest.warns(UserWarning, match="max_gb is less"):
        store.write("large", {"x": torch.ones(10_000)})
    assert not store.path("large").exists()


def write_many(folder: Path, seed: int) -> None:
    """Writes and reads twenty entries that other processes write too."""
    store = EmbeddingStore(folder, max_gb=1.0)
    for i in torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist():
        store.write(f"k{i}", {"x": torch.full((20_000,), float(i))})
        found = store.read(f"k{i}")
        assert found is not None
        assert found["x"].eq(i).all()


def test_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"k{i}.safetensors" for i in range(20))
    with safe_open(tmp_path / "k7.safetensors", framework="pt") as file:
        assert file.get_tensor("x").eq(7).all()
