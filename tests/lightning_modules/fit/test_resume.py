"""Tests what a checkpoint must hold to be resumed from, and that no stage loses the callback that asks."""

import math
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vidreason.lightning_modules.fit.resume import FORMAT, KEY, ResumeFit, check_checkpoint_file
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable
from vidreason.lightning_modules.sft import RationaleSFTModule


@pytest.fixture
def checkpoint(make_vlm, make_data, make_trainer):
    """Path and content of a checkpoint after one step."""
    saving = ModelCheckpoint(save_last=True, save_top_k=0)
    module = RationaleSFTModule(make_vlm())
    make_trainer("a", max_steps=1, limit_val_batches=0, callbacks=[saving]).fit(module, make_data(module.vlm))
    return saving.last_model_path, torch.load(saving.last_model_path, weights_only=True)


def older(content):
    """As versions before format 2 wrote it."""
    saved = content.pop(KEY)
    content["vidreason_stage"] = saved["stage"]
    return content


def unnumbered(content):
    content[KEY].pop("format")
    return content


def of_a_later_version(content):
    content[KEY]["format"] = FORMAT + 1
    return content


def foreign(content):
    content.pop(KEY)
    return content


@pytest.mark.parametrize(
    ("change", "writer"),
    [
        (older, "an older version of vidreason"),
        (unnumbered, "an older version of vidreason"),
        (of_a_later_version, "a newer version of vidreason"),
        (foreign, "another program"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_by_name(
    checkpoint, make_vlm, make_data, make_trainer, change, writer
):
    path, content = checkpoint
    torch.save(change(content), path)
    message = f"written by {writer}, not in format {FORMAT}: start the stage again without --ckpt_path"
    with pytest.raises(ValueError, match=message) as refused:
        check_checkpoint_file(path, RationaleSFTModule(make_vlm()))
    assert "\n" not in str(refused.value)
    module = RationaleSFTModule(make_vlm())
    with pytest.raises(ValueError, match=message):
        make_trainer("b", max_steps=2).fit(module, make_data(module.vlm), ckpt_path=path, weights_only=True)


class Watching(Callback):
    """Any callback of a stage of one's own."""


def test_a_stage_that_drops_the_callbacks_of_its_base_is_refused(make_vlm, make_data, make_trainer):
    class Own(RationaleSFTModule):
        def configure_callbacks(self):
            return [Watching()]

    module = Own(make_vlm())
    remedy = r"Own\.configure_callbacks leaves out ResumeFit: return \[\*super\(\)\.configure_callbacks\(\), \.\.\.\]"
    with pytest.raises(ValueError, match=remedy) as refused:
        make_trainer(max_steps=1).fit(module, make_data(module.vlm))
    assert "\n" not in str(refused.value)
    assert module.model is None, "it is refused before weights are loaded"


def test_a_stage_may_add_callbacks_to_those_of_its_base(make_vlm, make_data, make_trainer):
    class Own(RationaleSFTModule):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), Watching()]

    module = Own(make_vlm())
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, make_data(module.vlm))
    assert {ResumeFit, SkipUnreadable, Watching} <= {type(callback) for callback in trainer.callbacks}


class Rates(Callback):
    """The learning rate of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def cosine(rate=0.5, **kwargs):
    return OptimOptions(lambda parameters: torch.optim.AdamW(parameters, lr=rate, **kwargs), "cosine")


@pytest.fixture
def fit(make_vlm, make_data, make_trainer):
    """``fit(folder, steps, optim, ckpt_path, **data)``: the rates of a fit, and its last checkpoint."""

    def run(folder, steps, optim, ckpt_path=None, **data):
        saving, rates = ModelCheckpoint(save_last=True, save_top_k=0), Rates()
        module = RationaleSFTModule(make_vlm(), optim=optim)
        trainer = make_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=[saving, rates])
        trainer.fit(module, make_data(module.vlm, **data), ckpt_path=ckpt_path, weights_only=True)
        return rates.seen, saving.last_model_path

    return run


def test_a_longer_fit_has_its_own_schedule_from_the_first_step_on(fit):
    _, path = fit("a", 2, cosine())
    rates, _ = fit("b", 5, cosine(), path)
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 5)) for step in (2, 3, 4)])


@pytest.mark.parametrize(
    ("optim", "data", "named"),
    [
        (cosine(0.25), {}, r"lr is 0\.25, was 0\.5"),
        (cosine(weight_decay=0.5), {}, r"weight_decay is 0\.5, was 0\.01"),
        (
            OptimOptions(lambda parameters: torch.optim.AdamW(parameters, lr=0.5)),
            {},
            "schedule is constant, was cosine",
        ),
        (cosine(), {"batch_size": 2}, "3 clips per batch .* with 2 clips each"),
        (cosine(), {"seed": 7}, "with seed 0, now it is 7"),
    ],
)
def test_what_a_checkpoint_cannot_take_over_is_refused_by_name(fit, optim, data, named):
    _, path = fit("a", 1, cosine())
    with pytest.raises(ValueError, match=f"{named}.*--reset_optimizer") as refused:
        fit("b", 2, optim, path, **data)
    assert "\n" not in str(refused.value)


def test_weights_only_begin_another_fit(make_vlm, make_data, make_trainer, fit):
    _, path = fit("a", 2, cosine())
    saved = torch.load(path, weights_only=True)["state_dict"]
    module = RationaleSFTModule(make_vlm(), optim=cosine(0.25))
    module.weights_to_load = path
    began = {}

    class Beginning(Callback):
        def on_train_start(self, trainer, pl_module):
            began.update({name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad})

    rates = Rates()
    trainer = make_trainer("b", max_steps=1, limit_val_batches=0, callbacks=[Beginning(), rates])
    trainer.fit(module, make_data(module.vlm, batch_size=2))
    assert began.keys() == saved.keys()
    assert all(torch.equal(began[name], saved[name]) for name in saved)
    assert rates.seen == [0.25]


def test_a_file_that_is_no_checkpoint_is_refused_without_running_its_code(tmp_path, make_vlm):
    class Runs:
        def __reduce__(self):
            return (print, ("the file ran code",))

    torch.save({"state_dict": {}}, tmp_path / "cut.ckpt")
    cut = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Runs()))
    torch.save({"state_dict": Runs()}, tmp_path / "code.ckpt")
    (tmp_path / "text.ckpt").write_text("path,label")
    (tmp_path / "folder.ckpt").mkdir()
    for path in tmp_path.glob("*.ckpt"):
        with pytest.raises(ValueError, match=f"--ckpt_path {path}: .*last.ckpt of a run folder$") as refused:
            check_checkpoint_file(path, RationaleSFTModule(make_vlm()))
        assert "\n" not in str(refused.value)
