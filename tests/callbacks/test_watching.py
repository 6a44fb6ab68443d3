"""Callbacks that only watch: what they show, and that a run without them is the same to the bit."""

from pathlib import Path

import numpy as np
import pytest
import small_grpo
import torch
from stage_world import adamw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidreason.callbacks.film_strip import (
    CAPTION_HEIGHT,
    STRIP_FRAMES,
    STRIP_GAP,
    STRIP_HEIGHT,
    captioned_strips,
    film_strip,
)
from vidreason.callbacks.prediction_logger import PredictionLogger, wrong_and_sure
from vidreason.callbacks.progress import RunProgress
from vidreason.callbacks.result_table import ResultTable
from vidreason.callbacks.rollout_logger import RolloutLogger
from vidreason.callbacks.tensorboard_text import markdown_table, quoted_texts
from vidreason.callbacks.throughput import Throughput
from vidreason.config.loggers import RunTensorBoard
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.predictions import Prediction
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.format import FormatReward
from vidreason.rewards.length import LengthReward

SHORT = Sampling(max_new_tokens=4)


def everything():
    return [PredictionLogger(clips=2), RolloutLogger(every_n_steps=1), Throughput(), RunProgress()]


def make(vlm, kind):
    if kind == "sft":
        return RationaleSFTModule(vlm, optim=OptimOptions(optimizer=adamw))
    rewards = [FormatReward(), LengthReward(min_words=0, max_words=9)]
    short = {"train_sampling": SHORT, "sampling": SHORT}
    return small_grpo.make(vlm, rewards=rewards, group_size=2, entropy_coef=0.1, warmup=10, optimizer=adamw, **short)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_watchers_change_nothing_and_show_everything(make_vlm, make_data, make_trainer, tmp_path, kind):
    results = {}
    for watched in (True, False):
        vlm = make_vlm()
        module = make(vlm, kind)
        losses = []
        module.on_train_batch_end = lambda *_, m=module, s=losses: s.append(
            float(m.trainer.callback_metrics["train/loss"])
        )
        trainer = make_trainer(
            f"{watched}",
            max_steps=2,
            val_check_interval=2,
            log_every_n_steps=1,
            logger=RunTensorBoard(tmp_path / f"{watched}", trains=True),
            callbacks=everything() if watched else [],
            enable_progress_bar=watched,
        )
        trainer.fit(module, make_data(vlm))
        results[watched] = losses, {n: p for n, p in module.named_parameters() if p.requires_grad}
    (losses, weights), (plain_losses, plain_weights) = results[True], results[False]
    assert losses == plain_losses
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)

    events = read(tmp_path / "True" / "tb")
    scalars = set(events.Tags()["scalars"])
    assert {"main/train/loss", "watch/train/step_time", "watch/data/wait_s", "main/val/acc"} <= scalars
    assert len(scalars) <= 40
    assert not {"train/loss", "data/decode_ms", "epoch"} & scalars
    resident = [event.value for event in events.Scalars("watch/memory/resident")]
    status = Path("/proc/self/status").read_text()  # "VmHWM:  812345 kB", the peak up to now
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    assert 0.05 < resident[0] <= resident[-1] <= peak * (1 + 1e-6)
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert {"val/decisions", "val/wrong_and_sure"} <= texts
    assert ("train/rollouts" in texts) == (kind == "grpo")
    images = set(events.Tags()["images"])
    assert {"val/confusion", "val/wrong_and_sure"} <= images
    assert ("val/reliability" in images) == (kind == "sft")  # a greedy answer of GRPO's policy has no probability
    assert ("train/rollouts/clips" in events.Tags()["images"]) == (kind == "grpo")
    if kind == "grpo":
        table = events.Tensors("train/rollouts/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "|  | clip | label | reward | format | length | advantage | tokens |" in table
        rows = [line for line in table.splitlines() if line.startswith("| ")]
        assert len(rows) == 2 + 2 * 2
        assert all(f"**{row.split('|')[1].strip()}, reward " in table for row in rows[2:])  # its text is below
        asked = events.Tensors("train/rollouts/prompts/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "First reason about what happens" in asked
        assert {"main/train/reward", "main/train/rewards/format/mean", "watch/timing_s/gen", "train/entropy"} <= scalars
        assert not {"prefix/saved_tokens", "main/train/rewards/format/std"} & scalars


def test_a_test_has_tables_and_no_dots(make_vlm, make_data, make_trainer, tmp_path):
    module = VLMModule(make_vlm())
    watchers = [PredictionLogger(clips=2), Throughput(), ResultTable()]
    logger = RunTensorBoard(tmp_path, trains=False)
    trainer = make_trainer(logger=logger, log_every_n_steps=1, callbacks=watchers)
    trainer.test(module, make_data(module.vlm), verbose=False)
    logger.finalize("success")
    events = read(tmp_path / "tb")
    assert events.Tags()["scalars"] == []
    assert {"test_a/confusion", "test_a/reliability", "test_b/wrong_and_sure"} <= set(events.Tags()["images"])
    table = events.Tensors("test/scores/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"| test_a | {float(trainer.callback_metrics['test_a/acc']):.3f} |" in table


def test_wrong_and_sure_decisions_come_first():
    def clip(name, pred, sure):
        probs = {"a": sure, "b": 1 - sure} if sure else {}
        return Prediction(name, "val", "", "b", pred, probs, None, pred is None, False)

    clips = [clip("right", "b", 0.1), clip("less", "a", 0.6), clip("none", None, 0.0), clip("sure", "a", 0.99)]
    assert [p.video_id for p in wrong_and_sure(clips)] == ["sure", "less", "none"]


@pytest.mark.parametrize("broken", [(), ("test_a_0", "test_b_1")])
def test_unreadable_clips_are_counted(make_vlm, make_data, make_trainer, broken):
    module = VLMModule(make_vlm())
    trainer = make_trainer(callbacks=[Throughput()])
    trainer.test(module, make_data(module.vlm, broken=broken), verbose=False)
    assert float(trainer.callback_metrics["data/decode_failures"]) == len(broken)


def test_a_strip_shows_frames_side_by_side(tmp_path, write_clip):
    write_clip(tmp_path / "clip.mp4", [np.full((16, 32, 3), 20 * k, np.uint8) for k in range(12)])
    strip = film_strip(tmp_path / "clip.mp4").float()
    width = STRIP_HEIGHT * 2
    assert strip.shape == (3, STRIP_HEIGHT, (width + STRIP_GAP) * STRIP_FRAMES - STRIP_GAP)
    assert strip[..., :width].mean() + 50 < strip[..., -width:].mean(), "time runs from left to right"
    sheet = captioned_strips([("first", strip.byte()), ("second", strip[..., :width].byte())])
    assert sheet.shape == (3, 2 * (CAPTION_HEIGHT + STRIP_HEIGHT), strip.shape[2])
    assert (sheet[:, :CAPTION_HEIGHT] < 99).any(), "a caption is written"
    assert torch.equal(sheet[:, CAPTION_HEIGHT : CAPTION_HEIGHT + STRIP_HEIGHT].float(), strip)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert film_strip(tmp_path / "broken.mp4") is None


def test_tables_keep_tags_readable():
    assert markdown_table(["a"], [["<think>x|y\nz"]]).splitlines()[2] == "| &lt;think&gt;x&#124;y<br>z |"
    assert quoted_texts([("a", "<think>\nx " + "y" * 200)], width=40).splitlines()[2:5] == [
        "    <think>",
        "    x " + "y" * 38,
        "    " + "y" * 40,
    ]


def test_progress_counts_the_whole_fit(make_vlm, make_data, make_trainer, capsys):
    vlm = make_vlm()
    module = make(vlm, "sft")
    make_trainer(max_epochs=3, callbacks=[RunProgress(refresh_s=0)], enable_progress_bar=True).fit(
        module, make_data(vlm)
    )
    shown = capsys.readouterr().err
    assert "sft_label: training" in shown
    assert "6/6" in shown
    assert "validating" in shown


def test_progress_of_the_other_ranks_is_not_shown(make_vlm, make_data, make_trainer, capsys):
    """All ranks but the first switch it off; it trains and validates none the less."""
    bar = RunProgress(refresh_s=0)
    bar.disable()
    vlm = make_vlm()
    trainer = make_trainer(max_epochs=2, callbacks=[bar], enable_progress_bar=True)
    trainer.fit(RationaleSFTModule(vlm), make_data(vlm))
    assert trainer.global_step == 4
    assert "training" not in capsys.readouterr().err
