"""Lightning attributes that lightning_internals.py relies on: a new version that lacks one of these fails here."""

import inspect

import lightning as L
import torch
from lightning.fabric.strategies import model_parallel
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from vidreason import lightning_internals
from vidreason.lightning_internals import forward_sigterm, torch_optimizer


def test_the_private_names_exist():
    for name in ("_monitor_candidates", "_save_topk_checkpoint", "_save_last_checkpoint", "_save_checkpoint"):
        assert callable(getattr(ModelCheckpoint, name)), name
    assert callable(ModelCheckpoint._remove_checkpoint)
    assert callable(_SignalConnector._sigterm_notifier_fn)
    assert {"state_dict", "module", "strict"} <= set(
        inspect.signature(model_parallel._load_raw_module_state).parameters
    )


def test_the_private_attributes_exist(tmp_path):
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    assert loop.batch_progress.total.processed == 0
    assert loop._batches_that_stepped == 0
    state = trainer.fit_loop.state_dict()
    assert {"epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"} <= set(state)
    assert "_batches_that_stepped" in state["epoch_loop.state_dict"]
    assert set(state["epoch_loop.batch_progress"]) == {"total", "current", "is_last_batch"}
    assert set(state["epoch_loop.batch_progress"]["total"]) == {"ready", "started", "processed", "completed"}
    assert isinstance(trainer._signal_connector, _SignalConnector)
    forward_sigterm(trainer)
    assert type(trainer._signal_connector).__name__ == "_ForwardSigterm"
    assert "_data_parallel_size" in vars(ModelParallelStrategy())
    assert "_last_checkpoint_saved" in vars(ModelCheckpoint(dirpath=tmp_path))


def test_the_optimizer_inside_lightnings_wrapper_is_found():
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert torch_optimizer(LightningOptimizer(plain)) is plain
    assert torch_optimizer(plain) is plain


def test_the_version_that_was_read_is_named():
    assert "lightning 2.6" in (lightning_internals.__doc__ or "")
