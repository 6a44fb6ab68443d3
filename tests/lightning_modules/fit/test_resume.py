"""What a checkpoint has to say before a fit is resumed from it, and that no stage loses the callback that asks."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vidreason.lightning_modules.fit.resume import FORMAT, KEY, ResumeFit, check_checkpoint_file
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
