"""The callback that skips unreadable clips is one of the trainer's, and the trainer's own choice of it comes first."""

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from stage_world import LostClips

from vidreason.lightning_modules.fit.resume import ResumeFit
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable, TooManyUnreadableError
from vidreason.lightning_modules.sft import RationaleSFTModule

LOST = ("train_1", "train_4")


def from_yaml(max_fraction: float) -> Callback:
    """What a YAML file names under ``trainer.callbacks``."""
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    named = {"class_path": f"{SkipUnreadable.__module__}.SkipUnreadable", "init_args": {"max_fraction": max_fraction}}
    callback: Callback = parser.instantiate_classes(parser.parse_object({"callback": named})).callback
    return callback


@pytest.fixture
def fit(make_vlm, make_trainer, clip_folder):
    """``fit(*callbacks)``: the trainer after an epoch in which two of six clips cannot be read."""

    def run(*callbacks):
        module = RationaleSFTModule(make_vlm())
        trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=list(callbacks))
        trainer.fit(module, LostClips(clip_folder, LOST, encoder=module.vlm, batch_size=3))
        return trainer

    return run


@pytest.mark.filterwarnings("ignore:.*the clip cannot be read", "ignore:.*could not be read")
def test_the_one_in_the_yaml_replaces_the_stages_own(fit):
    trainer = fit()
    (own,) = (callback for callback in trainer.callbacks if isinstance(callback, SkipUnreadable))
    assert own.max_fraction == 0.5
    strict = from_yaml(max_fraction=0.2)
    with pytest.raises(TooManyUnreadableError, match="2 of 6 training clips cannot be read: .*gone"):
        fit(strict)
    lenient = from_yaml(max_fraction=1.0)
    trainer = fit(lenient)
    assert [callback for callback in trainer.callbacks if isinstance(callback, SkipUnreadable)] == [lenient]
    assert sum(isinstance(callback, ResumeFit) for callback in trainer.callbacks) == 1


@pytest.mark.filterwarnings("ignore:.*the clip cannot be read", "ignore:.*could not be read")
def test_a_subclass_replaces_it_too(fit):
    class Mine(SkipUnreadable):
        pass

    mine = Mine(max_fraction=1.0)
    assert [callback for callback in fit(mine).callbacks if isinstance(callback, SkipUnreadable)] == [mine]


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match=r"SkipUnreadable\.max_fraction must be between 0 and 1"):
        SkipUnreadable(fraction)
