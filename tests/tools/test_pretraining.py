"""Both steps of the recipe run: frames teach the tower, questions and answers reach the decoder."""

from pathlib import Path

import lightning as L
import pytest
import torch
from stage_world import QUIET
from torch import nn

from tools.pretraining.captions import PorchCaptionDataModule, question_and_answer_example
from tools.pretraining.stream import FRAME_TARGETS, PorchFrameDataModule
from tools.pretraining.tower import FramePretrainingModule
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM


def frames_module() -> FramePretrainingModule:
    return FramePretrainingModule(TinyVLM("scratch", freeze_vision=False), hidden=32)


def test_the_loss_on_a_fixed_batch_falls() -> None:
    module = frames_module()
    module.configure_model()
    batch = next(iter(PorchFrameDataModule(clips_per_epoch=4, batch_size=4, num_workers=0).train_dataloader()))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=module.learning_rate)
    losses = []
    for _ in range(3):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    expected = sum(torch.tensor(float(n)).log() for n in FRAME_TARGETS.values()) / len(FRAME_TARGETS)
    assert losses[0] == pytest.approx(float(expected), abs=0.3), "at first every answer is as likely as any other"


def test_fit_trains_the_tower_and_writes_a_model_folder(tmp_path: Path) -> None:
    module = frames_module()
    data = PorchFrameDataModule(clips_per_epoch=4, frames_per_clip=2, batch_size=2, num_workers=0)
    trainer = L.Trainer(
        devices=1,
        max_epochs=1,
        limit_val_batches=1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    start = {name: p.clone() for name, p in TinyVLM("scratch").build().named_parameters()}
    trainer.fit(module, data)
    assert trainer.global_step == 2
    assert {f"val/{name}" for name in FRAME_TARGETS} <= trainer.callback_metrics.keys()
    written = TinyVLM(str(tmp_path / "weights")).build()
    for name, parameter in written.named_parameters():
        assert parameter.equal(start[name]) == (not name.startswith("model.visual.")), name
    statistics = [m.num_batches_tracked for m in written.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(count) == 2 for count in statistics if count is not None)


def test_refuses_another_family() -> None:
    class Other(TinyVLM):
        def build(self, adapter_path: str | None = None) -> nn.Module:
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="trains TinyVLM's tower, not Linear"):
        FramePretrainingModule(Other("scratch")).configure_model()


def test_questions_and_answers_become_one_batch() -> None:
    vlm = TinyVLM("scratch", route="expand")
    data = PorchCaptionDataModule(vlm, clips_per_epoch=4, batch_size=2, num_workers=0, seed=3)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    batch: object = batches[0]
    assert isinstance(batch, VideoBatch)
    assert batch.prompts.inputs["pixel_values_videos"].shape == (2, 12, 3, 64, 96)
    assert batch.labels.tolist() == [-1, -1], "nothing has a label"
    assert batch.texts.owner.tolist() == [0] * 4 + [1] * 4
    assert batch.texts.parent.tolist() == [-1, -1, 0, 1, -1, -1, 4, 5]
    for owner in range(2):
        example = question_and_answer_example(3, owner, data.slot_share, data.echo_share)
        for i, text in enumerate(example.texts):
            row = 4 * owner + i
            said = vlm.tokenizer.decode(batch.texts.ids[row][batch.texts.loss_mask[row]])
            assert said == ("" if text.role == "context" else f"{text.text}<|end|>")
    model = vlm.build()
    assert isinstance(model, TinyVLMForConditionalGeneration)
    with torch.no_grad():
        scores = vlm.score(model, batch.prompts, batch.texts)
    count = int(batch.texts.loss_mask.sum())
    uniform = torch.tensor(float(model.config.text_config.vocab_size)).log()
    assert -scores.logprobs.sum() / count == pytest.approx(float(uniform), rel=0.1)


def test_validation_sees_the_same_unseen_clips() -> None:
    data = PorchCaptionDataModule(TinyVLM("scratch"), clips_per_epoch=2, batch_size=2, num_workers=0, seed=0)
    (loader,) = data.val_dataloader()
    once, again = (next(iter(loader)) for _ in range(2))
    trained = next(iter(data.train_dataloader()))
    pixels = [batch.prompts.inputs["pixel_values_videos"] for batch in (once, again, trained)]
    assert pixels[0].equal(pixels[1])
    assert not pixels[0].equal(pixels[2])
    assert len(loader) == 128
