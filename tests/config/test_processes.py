"""Tests the line about a run's strategy, and the refusal to wait for machines that nobody named."""

import pytest

from vidreason.config.machine import check_machines, describe
from vidreason.config.trainer_cli import build

OVERLAY = "configs/strategy/{}.yaml"


def made(*overlays, more=()):
    configs = [word for name in overlays for word in ("--config", OVERLAY.format(name))]
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", *more]
    return build("fit", ["--config", "configs/sft_label.yaml", *configs, *on_cpu])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "LOCAL_RANK", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("overlays", "said"),
    [
        ((), "SingleDevice, 1 process, precision 32-true; trains the model's own weights"),
        pytest.param(
            ("qlora",),
            "SingleDevice, 1 process, precision 32-true; trains a LoRA adapter (r 16) on a base in 4 bits",
            marks=pytest.mark.slow,
        ),
        (("ddp", "lora"), "DDP, 1 process, precision 32-true; trains a LoRA adapter (r 16) on a base as it is"),
        (("fsdp_qlora",), "FSDP2, 1 process, precision 32-true; trains a LoRA adapter (r 16) on a base in 4 bits"),
    ],
)
def test_the_strategy_is_said(overlays, said):
    cli = made(*overlays)
    assert describe(cli.trainer, cli.model).startswith(said)


def test_a_calibrator_is_an_adapter_and_a_test_trains_nothing():
    cli = build("fit", ["--config", "configs/calibration.yaml", "--trainer.accelerator", "cpu"])
    assert "trains a LoRA adapter (r 16) on a base as it is" in describe(cli.trainer, cli.model)
    qlora = ["--config", OVERLAY.format("qlora"), "--trainer.accelerator", "cpu"]
    cli = build("test", ["--config", "configs/test.yaml", *qlora])
    said = describe(cli.trainer, cli.model, trains=False)
    assert said.endswith("runs a LoRA adapter (r 16) on a base in 4 bits (nf4)")


def test_other_machines_have_to_be_named(monkeypatch):
    trainer = made("multi_node").trainer
    with pytest.raises(ValueError, match=r"num_nodes is 2.*MASTER_ADDR.*ddp\.yaml"):
        check_machines(trainer)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_machines(trainer)
    monkeypatch.delenv("MASTER_ADDR")
    check_machines(made("ddp").trainer)


def test_torchrun_names_them(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    check_machines(made("multi_node").trainer)
