"""Stages one after the other, interrupted ones too: what one writes, the next one reads."""

import contextlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import small_grpo
import stage_world as world
import torch
from covering import sample
from lightning.pytorch.callbacks import ModelCheckpoint

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.callbacks.trace_writer import TraceWriter
from vidreason.datamodules.prompts import ReasonView
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import CompletionForm, parse_completion

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
make_trainer, ready, adamw = world.make_trainer, world.ready, world.adamw

SHORT = Sampling(max_new_tokens=6)
DESCRIBE = TraceOptions(samples=2, sampling=SHORT, filter=RationaleFilter(complete=False))
REASON = replace(DESCRIBE, kind="reason")
ADAMW = OptimOptions(adamw)
ANSWER = DecideOptions("answer", sampling=SHORT)


@pytest.mark.parametrize("lora", sample([True, False], True))
def test_deepintuit_from_descriptions_to_calibrated_predictions(make_vlm, make_data, make_trainer, lora):
    def run(folder, module, command="fit", **kwargs):
        callbacks = [AdapterCheckpoint(), PredictionWriter(), TraceWriter()]
        trainer = make_trainer(folder, callbacks=callbacks, **kwargs)
        data = make_data(module.vlm)
        getattr(trainer, command)(module, data)
        return Path(trainer.default_root_dir)

    out = "adapter" if lora else "weights"
    described = run("1", VLMModule(make_vlm(lora), traces=DESCRIBE), "predict")
    cold = RationaleSFTModule(
        make_vlm(lora),
        TargetOptions("trace"),
        traces_file=str(described / "traces.jsonl"),
        optim=ADAMW,
        decide=ANSWER,
    )
    start = run("2", cold, max_epochs=2)
    grpo = small_grpo.make(
        make_vlm(lora), adapter_path=str(start / out), rewards=None, group_size=2, optimizer=adamw, warmup=10
    )
    refined = run("3", grpo, max_steps=1)
    reason = VLMModule(make_vlm(lora), adapter_path=str(refined / out), traces=REASON)
    traces = run("4", reason, "predict")
    calibration = CalibrationModule(
        make_vlm(lora),
        adapter_path=str(refined / out),
        traces_file=str(traces / "traces.jsonl"),
        traces=REASON,
        optim=ADAMW,
    )
    calibrated = run("5", calibration, max_epochs=1)
    final = CalibrationModule(make_vlm(lora), calibrator_path=str(calibrated / "adapter"), traces=REASON)
    tested = run("6", final, "test")
    lines = [json.loads(line) for line in (tested / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["pred"] in world.LABELS and len(line["traces"]) == 2 for line in lines)

    shas = [json.loads((folder / out / "vidreason.json").read_text()) for folder in (start, refined)]
    assert [s["stage"] for s in shas] == ["sft_trace", "grpo"]
    assert shas[0]["parent_sha"] == ""
    assert shas[1]["parent_sha"] == cold_sha(start / out)


def cold_sha(folder):
    from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha

    return adapter_sha(folder)


class Interrupted(RationaleSFTModule):
    """Ctrl-C before a given step."""

    stop_at = -1

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("stop_at", sample([1, 2, 3, 4, 5], 3))
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_vlm, make_data, make_trainer, stop_at):
    """Own rationales, so that the resumed run must not write them with half-trained weights."""

    def module(stop=-1):
        made = Interrupted(
            make_vlm(),
            TargetOptions("trace"),
            traces=DESCRIBE,
            optim=OptimOptions(adamw, "linear", warmup=0.25),
        )
        made.stop_at = stop
        return made

    def checkpoint():
        return ModelCheckpoint(save_last=True, save_top_k=0, save_on_exception=True, enable_version_counter=False)

    whole = module()
    make_trainer("whole", max_epochs=3, limit_val_batches=0).fit(whole, make_data(whole.vlm))

    cut = module(stop_at)
    first = checkpoint()
    with pytest.raises(SystemExit):
        make_trainer("cut", max_epochs=3, limit_val_batches=0, callbacks=[first]).fit(cut, make_data(cut.vlm))
    traces = Path(cut.trainer.default_root_dir) / "traces.jsonl"
    written = traces.read_text()
    resumed = module()
    make_trainer("cut", max_epochs=3, limit_val_batches=0, callbacks=[checkpoint()]).fit(
        resumed, make_data(resumed.vlm), ckpt_path=first.last_model_path, weights_only=True
    )
    assert traces.read_text() == written
    assert resumed.global_step == whole.global_step == 6
    other = dict(whole.named_parameters())
    for name, p in resumed.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, other[name], rtol=1e-5, atol=1e-7)


SAVES = {  # how a checkpoint comes to be, and after how many steps
    "by a validation": ({}, 2),
    "at the end of an epoch": ({"save_on_train_epoch_end": True}, 2),
    "by Ctrl-C": ({"save_on_exception": True}, 3),
    "every so many steps": ({"every_n_train_steps": 3}, 3),
}


@pytest.mark.parametrize(
    ("how", "workers"), sample(list(product(SAVES, (0, 1))), ("by Ctrl-C", 1), ("at the end of an epoch", 0))
)
def test_a_resumed_run_goes_on_with_the_next_clip(make_vlm, make_data, make_trainer, how, workers):
    """Workers ask for clips before the trainer has said which epoch it is."""
    options, steps = SAVES[how]
    seen = []

    class Watched(RationaleSFTModule):
        stop_at = -1

        def training_step(self, batch, batch_idx):
            if self.global_step == self.stop_at:
                raise KeyboardInterrupt
            seen.append((self.current_epoch, *batch.video_ids))
            return super().training_step(batch, batch_idx)

    def fit(folder, epochs, workers, stop_at=-1, **kwargs):
        module = Watched(make_vlm(), optim=ADAMW)
        module.stop_at = stop_at
        trainer = make_trainer(folder, max_epochs=epochs, callbacks=kwargs.pop("callbacks", []))
        trainer.fit(module, make_data(module.vlm, num_workers=workers), **kwargs)

    fit("whole", 3, workers=0)
    whole, saving = list(seen), ModelCheckpoint(save_last=True, save_top_k=0, **options)
    seen.clear()
    with contextlib.suppress(SystemExit):
        fit("cut", 1 if steps == 2 else 3, workers, stop_at=steps, callbacks=[saving])
    assert seen == whole[:steps]
    fit("resumed", 3, workers, ckpt_path=saving.last_model_path, weights_only=True)
    assert seen == whole
    assert len(set(whole)) == 6


def test_a_second_fit_into_the_same_folder_works(make_vlm, make_data, make_trainer):
    for _ in range(2):
        module = RationaleSFTModule(make_vlm(), TargetOptions("rationale"), traces=DESCRIBE, optim=ADAMW)
        make_trainer(max_steps=1, callbacks=[AdapterCheckpoint(), ModelCheckpoint(save_last=True, save_top_k=0)]).fit(
            module, make_data(module.vlm)
        )
    assert (Path(module.trainer.default_root_dir) / "adapter" / "adapter_model.safetensors").exists()


def test_the_same_seed_gives_the_same_run(make_vlm, make_data, make_trainer):
    def weights(folder, seed):
        module = small_grpo.make(make_vlm(), rewards=None, entropy_coef=0.01, optimizer=adamw, warmup=10, seed=seed)
        make_trainer(folder, max_steps=2, limit_val_batches=0).fit(module, make_data(module.vlm))
        return {n: p for n, p in module.named_parameters() if p.requires_grad}

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("mode", sample(["no_think", "answer_first"], "answer_first"))
def test_a_form_goes_through_cold_start_grpo_and_test(make_vlm, make_data, make_trainer, mode):
    form = CompletionForm(mode)
    cold = RationaleSFTModule(make_vlm(), TargetOptions("trace"), traces=DESCRIBE, optim=ADAMW, completion=form)
    data = make_data(cold.vlm)
    make_trainer("cold", max_steps=1, limit_val_batches=0, callbacks=[AdapterCheckpoint()]).fit(cold, data)
    targets = [text for texts in data.view.targets.values() for text in texts]
    assert targets
    assert all(text.startswith("<answer>") and parse_completion(text, form).well_formed for text in targets)
    grpo = small_grpo.make(
        make_vlm(),
        adapter_path=str(Path(cold.trainer.default_root_dir) / "adapter"),
        rewards=None,
        group_size=2,
        optimizer=adamw,
        warmup=10,
        completion=form,
    )
    data = make_data(grpo.vlm)
    make_trainer("grpo", max_steps=1, limit_val_batches=1).fit(grpo, data)
    asked = data.view.prompt(data.clips("train")[0]).text
    assert asked == ReasonView(data.task, form=form).prompt(data.clips("train")[0]).text
    tested = VLMModule(make_vlm(), decide=ANSWER, completion=form)
    data = make_data(tested.vlm)
    make_trainer("test").test(tested, data)
    assert data._eval_view.form == form
