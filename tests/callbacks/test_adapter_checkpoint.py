import json

import pytest
import torch
from covering import sample
from lightning.pytorch.callbacks import ModelCheckpoint
from stage_world import adamw, run_dir

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule


class Scripted(RationaleSFTModule):
    """Logs the accuracies it is given instead of real ones, and remembers its weights at each validation."""

    def __init__(self, vlm, accuracies, **kwargs):
        super().__init__(vlm, optim=OptimOptions(optimizer=adamw), **kwargs)
        self.accuracies, self.seen = list(accuracies), []

    def on_validation_epoch_end(self):
        self.log("val/acc", self.accuracies[len(self.seen)])
        self.seen.append({n: p.detach().clone() for n, p in self.policy.named_parameters() if p.requires_grad})


def exported(folder, vlm):
    return {n: p for n, p in vlm.build(str(folder)).named_parameters() if p.requires_grad}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", sample([True, False], True))
def test_the_best_validation_is_handed_on(make_vlm, make_data, make_trainer, lora):
    vlm = make_vlm(lora)
    module = Scripted(vlm, [0.2, 0.8, 0.8, 0.5])
    make_trainer(max_epochs=4, callbacks=[AdapterCheckpoint("val/acc")]).fit(module, make_data(vlm))
    folder = run_dir(module) / ("adapter" if lora else "weights")
    weights = exported(folder, make_vlm(lora))
    assert same(module.seen[1], weights)
    assert not same(module.seen[3], weights)
    info = json.loads((folder / "vidreason.json").read_text())
    assert (info["stage"], info["global_step"], info["parent_sha"]) == ("sft_label", 4, "")
    assert info["base_sha"] == vlm.base_sha()


def test_without_monitor_the_last_weights_are(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    module = Scripted(vlm, [0.9, 0.1])
    make_trainer(max_epochs=2, callbacks=[AdapterCheckpoint()]).fit(module, make_data(vlm))
    assert same(module.seen[1], exported(run_dir(module) / "adapter", make_vlm()))


def test_an_unknown_metric_is_named(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    with pytest.raises(ValueError, match=r"'val/accuracy'.*val/acc"):
        make_trainer(max_epochs=1, callbacks=[AdapterCheckpoint("val/accuracy")]).fit(
            Scripted(vlm, [0.1]), make_data(vlm)
        )


class Stopping(RationaleSFTModule):
    """Raises in the second step."""

    def __init__(self, vlm, error):
        super().__init__(vlm, optim=OptimOptions(optimizer=adamw))
        self.error = error

    def training_step(self, batch, batch_idx):
        if self.global_step == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


def test_a_failed_run_leaves_the_good_adapter_alone(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    good = Scripted(vlm, [0.1])
    make_trainer(max_epochs=1, callbacks=[AdapterCheckpoint()]).fit(good, make_data(vlm))
    before = (run_dir(good) / "adapter" / "adapter_model.safetensors").read_bytes()
    vlm = make_vlm()
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(max_epochs=1, callbacks=[AdapterCheckpoint()]).fit(
            Stopping(vlm, RuntimeError("out of memory")), make_data(vlm)
        )
    assert (run_dir(good) / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_ctrl_c_hands_on_what_was_learnt(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    module = Stopping(vlm, KeyboardInterrupt())
    with pytest.raises(SystemExit):
        make_trainer(max_epochs=1, callbacks=[AdapterCheckpoint()]).fit(module, make_data(vlm))
    assert json.loads((run_dir(module) / "adapter" / "vidreason.json").read_text())["global_step"] == 1


def test_a_second_fit_into_the_same_folder_replaces_the_first(make_vlm, make_data, make_trainer):
    for accuracies in ([0.9, 0.9], [0.1, 0.2]):
        vlm = make_vlm()
        module = Scripted(vlm, accuracies)
        make_trainer(max_epochs=2, callbacks=[AdapterCheckpoint("val/acc")]).fit(module, make_data(vlm))
    assert json.loads((run_dir(module) / "adapter" / "vidreason.json").read_text())["global_step"] == 4


def test_a_fit_resumed_into_another_folder_hands_something_on(make_vlm, make_data, make_trainer):
    saving = ModelCheckpoint(save_last=True, save_top_k=0)
    module = Scripted(make_vlm(), [0.9])
    make_trainer("a", max_epochs=1, callbacks=[AdapterCheckpoint("val/acc"), saving]).fit(module, make_data(module.vlm))
    again = Scripted(make_vlm(), [0.5])
    make_trainer("b", max_epochs=2, callbacks=[AdapterCheckpoint("val/acc")]).fit(
        again, make_data(again.vlm), ckpt_path=saving.last_model_path, weights_only=True
    )
    assert same(again.seen[0], exported(run_dir(again) / "adapter", make_vlm()))
