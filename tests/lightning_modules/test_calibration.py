"""Calibration: the reviewer beside its policy, its loss, its probabilities, and the folder that it hands on."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from covering import sample
from stage_world import adamw, run_dir

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.datamodules.prompts import ReasonView
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.optimizer_step import StepResult
from vidreason.lightning_modules.fit.resume import ResumeFit
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha, read_info
from vidreason.lightning_modules.weights.reviewer import CALIBRATOR
from vidreason.rewards.completion import CompletionForm, render_completion, render_reasoning

OWN = TraceOptions(kind="reason", samples=2, sampling=Sampling(max_new_tokens=5))
ADAMW = OptimOptions(optimizer=adamw)


def make(vlm, **kwargs):
    return CalibrationModule(vlm, **{"optim": ADAMW, "traces": OWN, **kwargs})


POLICIES = {}
"""The folder of each policy that has been trained, by whether it is an adapter; no test writes there"""


@pytest.fixture
def policy(make_vlm, make_data, make_trainer, tmp_path_factory):
    """``policy(lora)``: folder of a policy that has been trained a little, once for all tests."""

    def train(lora=True):
        if lora not in POLICIES:
            vlm = make_vlm(lora)
            module = RationaleSFTModule(vlm, optim=ADAMW)
            folder = tmp_path_factory.mktemp("policy")
            make_trainer(folder, max_steps=2, limit_val_batches=0).fit(module, make_data(vlm))
            POLICIES[lora] = str(module.export(run_dir(module)))
        return POLICIES[lora]

    return train


@pytest.mark.parametrize("lora", sample([True, False], True))
def test_fit_then_test_from_the_folder_alone(make_vlm, make_data, make_trainer, policy, lora):
    start = policy(lora)
    vlm = make_vlm(lora)
    module = make(vlm, adapter_path=start)
    trainer = make_trainer("cal", max_epochs=1, callbacks=[AdapterCheckpoint("val/nll_scaled", "min")])
    trainer.fit(module, make_data(vlm))
    logged = set(trainer.callback_metrics)
    assert {"val/temperature", "val/ece", "val/ece_scaled", "val/nll_scaled", "val/acc", "train/loss"} <= logged
    folder = run_dir(module) / "adapter"
    info = json.loads((folder / "vidreason.json").read_text())
    assert info["temperature"] == pytest.approx(module.scaling.temperature)
    assert 0.1 <= info["temperature"] <= 10
    assert (folder / "policy" / "adapter_config.json").exists() == lora
    assert info["policy"] == ("policy" if lora else os.path.relpath(start, folder))

    vlm = make_vlm(lora)
    tested = make(vlm, calibrator_path=str(folder))
    trainer = make_trainer("test", callbacks=[PredictionWriter()])
    trainer.test(tested, make_data(vlm), verbose=False)
    assert tested.scaling.temperature == pytest.approx(info["temperature"])
    lines = [json.loads(line) for line in (run_dir(tested) / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(len(p["traces"]) == 2 and not p["unparsed"] for p in lines)
    assert {"test_a/ece", "test_a/ece_scaled", "test_a/temperature"} <= set(trainer.callback_metrics)

    trained, loaded = dict(module.policy.named_parameters()), dict(tested.policy.named_parameters())
    calibrator = [name for name in trained if f".{CALIBRATOR}." in name]
    assert calibrator
    for name in calibrator:
        torch.testing.assert_close(trained[name], loaded[name])


def test_calibrator_starts_as_the_policy_and_leaves_it_alone(make_vlm, make_data, make_trainer, policy):
    vlm = make_vlm()
    module = make(vlm, adapter_path=policy())
    start = {}

    def remember():
        start.update({n: p.detach().clone() for n, p in module.policy.named_parameters()})

    module.on_train_start = remember
    make_trainer("cal", max_steps=2, limit_val_batches=0).fit(module, make_data(vlm))
    now = dict(module.policy.named_parameters())
    for name in start:
        if f".{CALIBRATOR}." in name:
            assert torch.equal(start[name], start[name.replace(CALIBRATOR, "policy")])
    moved = {name for name in start if not torch.equal(start[name], now[name])}
    assert moved
    assert all(f".{CALIBRATOR}." in name for name in moved)


def test_traces_are_the_policys_not_the_calibrators(make_vlm, ready, policy):
    start = policy()
    module = ready(make(make_vlm(), adapter_path=start))
    plain = ready(RationaleSFTModule(make_vlm(), adapter_path=start), folder="b")
    with torch.no_grad():
        for name, p in module.policy.named_parameters():
            if f".{CALIBRATOR}." in name:
                p.add_(1.0)
    theirs = plain.trace_generator(plain.data.task, "reason")
    batch = next(iter(plain.data.loader("val", theirs.view, batch_size=3)))
    names, ours = plain.data.label_names, module.trace_generator(module.data.task)
    assert ours.header.prompt_sha == theirs.header.prompt_sha
    texts = [record.text for record in ours.records(module.policy, batch, names)]
    assert len(texts) == 3 * 2
    theirs = replace(theirs, options=OWN)
    assert texts == [record.text for record in theirs.records(plain.policy, batch, names)]
    assert module.policy.active_adapter == CALIBRATOR


def test_every_split_gets_its_traces_and_given_ones_are_not_sampled_again(make_vlm, ready, policy):
    start = policy()
    first = ready(make(make_vlm(), adapter_path=start))
    assert set(first._policy_traces) == {c.video_id for s in ("train", "val", "cal") for c in first.data.clips(s)}
    path = run_dir(first) / "traces.jsonl"
    again = ready(make(make_vlm(), adapter_path=start, traces_file=str(path)), folder="again")
    assert not (run_dir(again) / "traces.jsonl").exists()
    assert again._policy_traces == first._policy_traces
    with pytest.raises(ValueError, match="adapter"):
        ready(make(make_vlm(), traces_file=str(path)), folder="base")
    cooler = replace(OWN, sampling=replace(OWN.sampling, temperature=0.3))
    with pytest.raises(ValueError, match=r"was sampled with .*'temperature': 1.0.*samples with .*0.3"):
        ready(make(make_vlm(), adapter_path=start, traces_file=str(path), traces=cooler), folder="cooler")
    more = replace(OWN, samples=3)
    third = ready(make(make_vlm(), adapter_path=start, traces_file=str(path), traces=more), folder="more")
    assert {len(group) for group in third._policy_traces.values()} == {3}, "too few are completed"


def test_traces_of_train_come_from_policies_that_have_not_seen_it(make_vlm, ready, policy):
    start = policy()
    first = ready(make(make_vlm(), adapter_path=start))
    path, train = run_dir(first) / "traces.jsonl", [clip.video_id for clip in first.data.clips("train")]
    store = TraceStore.open(path)
    folds = []
    for number, ids in enumerate((train[::2], train[1::2][:-1])):
        other = TraceStore.create(path.with_name(f"{number}"), replace(store.header, adapter_sha=f"{number}" * 64))
        other.append(replace(r, text=f"fold {number}") for r in store.records() if r.video_id in ids)
        folds.append(str(other.path))
    crossed = ready(make(make_vlm(), adapter_path=start, traces_file=str(path), fold_traces=folds), folder="crossed")
    found = {name: {record.text for record in group} for name, group in crossed._policy_traces.items()}
    assert all(found[name] == {"fold 0"} for name in train[::2])
    assert all(found[name] == {"fold 1"} for name in train[1::2][:-1])
    assert train[1::2][-1] not in found, "what no fold has is not written by the policy, which knows it"
    assert not (run_dir(crossed) / "traces.jsonl").exists()
    for split in ("val", "cal"):
        names = [clip.video_id for clip in first.data.clips(split)]
        assert all(crossed._policy_traces[name] == first._policy_traces[name] for name in names)
    for files, message in (([str(path)], "own policy, which has trained on these"), (folds * 2, "an earlier file has")):
        with pytest.raises(ValueError, match=message):
            ready(make(make_vlm(), adapter_path=start, traces_file=str(path), fold_traces=files), folder="own")


def test_a_calibrator_trained_on_in_its_own_folder_keeps_its_policy(make_vlm, make_data, make_trainer, policy):
    start = policy()
    folder = None
    for _ in range(2):
        vlm = make_vlm()
        module = make(vlm, adapter_path=start) if folder is None else make(vlm, calibrator_path=str(folder))
        make_trainer("cal", max_steps=2, limit_val_batches=0, callbacks=[AdapterCheckpoint()]).fit(
            module, make_data(vlm)
        )
        folder = run_dir(module) / "adapter"
        assert adapter_sha(folder / "policy") == adapter_sha(start)
        assert json.loads((folder / "vidreason.json").read_text())["parent_sha"] == adapter_sha(start)


def test_a_calibrator_of_another_task_is_refused(make_vlm, make_data, make_trainer, policy):
    vlm = make_vlm()
    module = make(vlm, adapter_path=policy())
    make_trainer("cal", max_steps=1, limit_val_batches=0, callbacks=[AdapterCheckpoint()]).fit(module, make_data(vlm))
    other = make(make_vlm(), calibrator_path=str(run_dir(module) / "adapter"))
    data = make_data(other.vlm)
    data._task = replace(data.task, question="Is it dark?")
    with pytest.raises(ValueError, match="trained on another task file"):
        make_trainer("other").test(other, data, verbose=False)


def test_unlabelled_and_unreadable_clips_of_cal(make_vlm, ready, policy):
    module = ready(make(make_vlm(), adapter_path=policy()))
    module.fit_temperature()
    fitted = module.scaling.temperature
    clips = module.data._clips
    module.data._clips = {**clips, "cal": (*clips["cal"], replace(clips["val"][0], label=None))}
    module.fit_temperature()
    assert module.scaling.temperature == pytest.approx(fitted), "a clip without a label says nothing about temperature"
    module.data._clips = {**clips, "cal": tuple(replace(clip, path=Path("gone.mp4")) for clip in clips["cal"])}
    with pytest.raises(ValueError, match="no clip of split cal"):
        module.fit_temperature()


@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_loss(make_vlm, ready, kind):
    module = ready(make(make_vlm(), objective=kind))
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_dict = lambda *_: None

    def without_a_step(micro_batches, loss, has_samples):
        assert has_samples
        assert [loss(micro_batch).ndim for micro_batch in micro_batches] == [0]
        return StepResult(torch.zeros(()), 0.0)

    module.optimizer_step_on = without_a_step
    batch = next(iter(module.data.train_dataloader()))
    names = module.data.label_names
    with torch.no_grad():
        module.training_step(batch, 0)
        full = module.data.loader(
            "train", module.decider(module.data.task).review("all"), batch_size=len(batch), train=True
        )
        everything = next(iter(full))
        assert everything.video_ids == batch.video_ids
        logprobs = module.vlm.score(module.policy, everything.prompts, everything.texts).logprobs
    texts = everything.texts
    label_rows = texts.loss_mask.any(1).nonzero().flatten().tolist()
    assert len(label_rows) == len(batch) * 2 * len(names)
    tokens, classes = [], []
    for start in range(0, len(label_rows), len(names)):
        rows = label_rows[start : start + len(names)]
        truth = int(batch.labels[int(texts.owner[rows[0]])])
        sums = torch.stack([logprobs[r][texts.loss_mask[r]].sum() for r in rows])
        tokens.append(logprobs[rows[truth]][texts.loss_mask[rows[truth]]])
        classes.append(sums.log_softmax(0)[truth])
    expected = -torch.cat(tokens).mean() if kind == "tokens" else -torch.stack(classes).mean()
    assert logged["train/loss"] == pytest.approx(float(expected), rel=1e-4)


def test_probabilities_are_averaged_over_traces_then_scaled(make_vlm, ready):
    module = ready(make(make_vlm()))
    batch = next(iter(module.data.loader("val", module.decider(module.data.task).view, batch_size=3)))
    with torch.no_grad():
        logprobs = module.vlm.score(module.policy, batch.prompts, batch.texts).logprobs
        rows = batch.texts.loss_mask.any(1)
        sums = (logprobs * batch.texts.loss_mask).sum(1)[rows].view(3, 2, 3)
        mean = sums.softmax(-1).mean(1)
        module.scaling.temperature = 2.5
        decisions = module.decider(module.data.task).decide(module.vlm, module.policy, batch)
    torch.testing.assert_close(decisions.unscaled, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(decisions.probs, (mean.log() / 2.5).softmax(-1), rtol=1e-4, atol=1e-6)
    assert all(len(traces) == 2 for traces in decisions.traces)


def test_a_calibrator_that_goes_on_from_the_reasoning_starts_from_the_policys_answers(make_vlm, ready):
    """Behind each trace, an untrained one gives a class what the policy gives the completion that answers it."""
    module = ready(make(make_vlm(), input="video+reasoning"))
    view = module.decider(module.data.task).view
    batch = next(iter(module.data.loader("val", view, batch_size=3)))
    names, traces = module.data.label_names, module.decider(module.data.task).traces
    whole = {
        clip.video_id: tuple(
            render_completion(render_reasoning(record.text)[len("<think>") : -len("</think>")], name)
            for record in traces[clip.video_id]
            for name in names
        )
        for clip in batch.clips
    }
    flat = next(iter(module.data.loader("val", ReasonView(module.data.task, whole), batch_size=3)))
    with torch.no_grad(), module.reviewer.policy_active(module.policy):
        logprobs = module.vlm.score(module.policy, flat.prompts, flat.texts).logprobs
        policys = (logprobs * flat.texts.answer_mask).sum(1)
    with torch.no_grad():
        logprobs = module.vlm.score(module.policy, batch.prompts, batch.texts).logprobs
        rows = batch.texts.loss_mask.any(1)
        own = (logprobs * batch.texts.loss_mask).sum(1)[rows]
    assert len(own) == 3 * 2 * 3
    torch.testing.assert_close(own, policys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [CompletionForm("no_think"), CompletionForm(confidence=True)])
def test_a_calibrator_goes_on_from_reasoning_in_its_own_form_only(make_vlm, form):
    with pytest.raises(ValueError, match="input to video"):
        make(make_vlm(), input="video+reasoning", completion=form)
    assert make(make_vlm(), input="video+trace", completion=form).completion == form


@pytest.mark.parametrize("shown", ["trace", "video"])
def test_ablations_run(make_vlm, make_data, make_trainer, shown):
    vlm = make_vlm()
    module = make(vlm, input=shown)
    make_trainer(max_steps=1).fit(module, make_data(vlm))
    assert (run_dir(module) / "traces.jsonl").exists() == (shown == "trace")


def test_a_calibrator_of_something_else_is_refused(make_vlm, make_data, make_trainer, policy, ready):
    start = policy()
    module = ready(make(make_vlm(), adapter_path=start))
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).add_(0.1)
    module.vlm.note = "what others have to know"
    folder = str(module.export(run_dir(module)))
    assert read_info(folder)["note"] == "what others have to know"
    assert "note" not in read_info(start)
    for kwargs, message in [
        ({"calibrator_path": start}, "sft_label"),
        ({"calibrator_path": folder, "input": "trace"}, "input"),
        ({"calibrator_path": folder, "input": "video+reasoning"}, "input"),
        ({"calibrator_path": folder, "adapter_path": folder}, "another policy"),
    ]:
        with pytest.raises(ValueError, match=message):
            ready(make(make_vlm(), **kwargs), stage="test", folder="refused")
    with pytest.raises(ValueError, match="calibrator_path"):
        ready(make(make_vlm(), adapter_path=start), stage="test", folder="refused")


def test_resuming_keeps_the_temperature(make_vlm, ready):
    module = ready(make(make_vlm()))
    module.scaling.temperature, module.scaling.fitted_at = 1.7, 3
    checkpoint = {}
    ResumeFit().on_save_checkpoint(module.trainer, module, checkpoint)
    other = ready(make(make_vlm()))
    other.trainer.state.fn = "validate"
    ResumeFit().on_load_checkpoint(other.trainer, other, checkpoint)
    assert (other.scaling.temperature, other.scaling.fitted_at) == (1.7, 3)
