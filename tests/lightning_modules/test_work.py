"""What a stage says it will do is what it then does, counted in the calls of the engine."""

from dataclasses import asdict

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.own_traces import TraceOptions
from vidreason.lightning_modules.rationale_filter import RationaleFilter
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.work import Work, clips_taken, length_of_fit

SHORT = Sampling(max_new_tokens=4)
OWN = TraceOptions(samples=2, sampling=SHORT, filter=RationaleFilter(complete=False, min_words=0))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def counting(vlm):
    """Counts what goes through a model from now on."""
    done = dict.fromkeys(asdict(Work()), 0)
    score, generate = vlm.score, vlm.generate

    def counted_score(model, prompts, texts, *args, **kwargs):
        kind = ("clips_learnt", "texts_learnt") if torch.is_grad_enabled() else ("clips_read", "texts_scored")
        done[kind[0]] += prompts.batch_size
        done[kind[1]] += len(texts)
        return score(model, prompts, texts, *args, **kwargs)

    def counted_generate(model, prompts, group_size, *args, **kwargs):
        done["clips_read"] += prompts.batch_size
        done["texts_written"] += prompts.batch_size * group_size
        return generate(model, prompts, group_size, *args, **kwargs)

    vlm.score, vlm.generate = counted_score, counted_generate
    return done


STAGES = {
    "label": lambda vlm: RationaleSFTModule(vlm, target="label", optimizer=adamw),
    "label_by_steps": lambda vlm: RationaleSFTModule(vlm, target="label", optimizer=adamw, min_steps=5),
    "rationale": lambda vlm: RationaleSFTModule(vlm, target="rationale", optimizer=adamw, traces_sampled=OWN),
    "cold_start": lambda vlm: RationaleSFTModule(
        vlm, target="trace", optimizer=adamw, traces_sampled=OWN, decide="answer", samples=3, sampling=SHORT
    ),
    "grpo": lambda vlm: GRPOModule(
        vlm, group_size=3, optimizer=adamw, train_sampling=SHORT, sampling=SHORT, cold_steps=99
    ),
    "grpo_twice": lambda vlm: GRPOModule(
        vlm,
        group_size=3,
        optimizer=adamw,
        train_sampling=SHORT,
        sampling=SHORT,
        cold_steps=99,
        inner_epochs=2,
        kl_coef=0.1,
    ),  # fmt: skip
    "calibration": lambda vlm: CalibrationModule(vlm, optimizer=adamw, traces_sampled=OWN),
    "all_labels": lambda vlm: CalibrationModule(vlm, optimizer=adamw, traces_sampled=OWN, loss="classes"),
}
LENGTHS = [{"max_epochs": 2}, {"max_epochs": 2, "check_val_every_n_epoch": 2}, {"max_steps": 4, "max_epochs": -1}]


@pytest.mark.parametrize("length", LENGTHS, ids=["epochs", "one_validation", "steps"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fit_does_what_it_says(make_vlm, make_data, make_trainer, stage, length):
    vlm = make_vlm()
    module, data, trainer = STAGES[stage](vlm), make_data(vlm), make_trainer(**length)
    said = module.work("fit", data, trainer)
    done = counting(vlm)
    trainer.fit(module, data)
    assert asdict(said) == done
    assert said.clips_learnt > 0


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("test", {}),
        ("test", {"decide": "answer", "samples": 3, "sampling": SHORT}),
        ("validate", {}),
        ("predict", {"traces_sampled": OWN}),
    ],
)
def test_other_commands_do_what_they_say(make_vlm, make_data, make_trainer, command, arguments):
    vlm = make_vlm()
    module, data, trainer = VLMModule(vlm, **arguments), make_data(vlm), make_trainer()
    said = module.work(command, data, trainer)
    done = counting(vlm)
    getattr(trainer, command)(module, data)
    assert asdict(said) == done


def test_a_calibrator_is_tested_on_traces_that_are_written_then(make_vlm, make_data, make_trainer, tmp_path):
    vlm = make_vlm()
    first = CalibrationModule(vlm, optimizer=adamw, traces_sampled=OWN)
    trainer = make_trainer(max_steps=1)
    trainer.fit(first, make_data(vlm))
    folder = first.export(tmp_path / "run")
    vlm = make_vlm()
    module, data = CalibrationModule(vlm, calibrator_path=str(folder), traces_sampled=OWN), make_data(vlm)
    trainer = make_trainer("test")
    said = module.work("test", data, trainer)
    done = counting(vlm)
    trainer.test(module, data)
    assert asdict(said) == done
    assert done["texts_written"] == 6 * 2  # two test splits of three clips, two traces each


def test_limits_of_the_trainer_count(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    module, data = RationaleSFTModule(vlm, target="label", optimizer=adamw), make_data(vlm)
    trainer = make_trainer(max_epochs=3, limit_train_batches=1, limit_val_batches=0)
    said = module.work("fit", data, trainer)
    assert said == Work(clips_learnt=9, texts_learnt=9)  # one batch of three clips in each of three epochs


def test_a_stage_that_has_not_said_how_it_learns_is_unknown(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    assert VLMModule(vlm).work("fit", make_data(vlm), make_trainer(max_epochs=1)) is None
    endless = RationaleSFTModule(vlm, target="label").work("fit", make_data(vlm), make_trainer(max_epochs=-1))
    assert endless is None


@pytest.mark.parametrize(
    ("clips", "limit", "taken"), [(10, None, 10), (10, 2, 8), (6, 2, 6), (10, 0.5, 5), (10, 1.0, 10), (10, 0, 0)]
)
def test_clips_taken(clips, limit, taken):
    assert clips_taken(clips, 4, limit) == taken


class Validated(L.LightningModule):
    """Counts batches and validations."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.validations = 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        self.validations += 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "val_check_interval": 4},
        {"max_epochs": 2, "val_check_interval": 0.25},
        {"max_epochs": 4, "check_val_every_n_epoch": 2, "val_check_interval": 5},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
        {"max_steps": 20},
        {"max_steps": 20, "check_val_every_n_epoch": None, "val_check_interval": 6},
        {"max_steps": 20, "val_check_interval": 3},
    ],
    ids=str,
)
def test_batches_and_validations_are_those_of_the_trainer(make_trainer, options):
    trainer, module = make_trainer(**options), Validated()
    said = length_of_fit(trainer, 100, 8, 0, updates=1)
    trainer.fit(module, DataLoader(torch.zeros(100), 8), DataLoader(torch.zeros(4), 8))
    assert said == (trainer.global_step, module.validations)


def test_steps_and_validations_of_a_fit(make_trainer):
    trainer = make_trainer(max_steps=40, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=20)
    assert length_of_fit(trainer, 100, 8, 0, updates=4) == (10, 0)  # forty steps are ten batches
    assert length_of_fit(trainer, 100, 8, 0, updates=1) == (40, 2)
    trainer = make_trainer(max_epochs=6, check_val_every_n_epoch=3)
    assert length_of_fit(trainer, 100, 8, 0, updates=1) == (78, 2)  # thirteen batches an epoch
