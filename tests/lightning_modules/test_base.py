"""Tests what every stage has: decisions, written texts, checkpoints, its name, and the options that it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_grpo import grouped
from stage_world import run_dir

from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.callbacks.throughput import Throughput
from vidreason.callbacks.trace_writer import TraceWriter
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.prompts import DescribeView, LabelScoringView, LabelView, ReasonView
from vidreason.datamodules.task import Task
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.resume import KEY, check_checkpoint_file
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceGenerator, TraceOptions
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.lightning_modules.weights.parameters import set_train_mode

SHORT = Sampling(max_new_tokens=4)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_zero_shot_likelihood_is_that_of_the_whole_class_name(make_vlm, make_data, make_trainer):
    """Against the model's own forward on prompt + name + end of turn, one clip and one class at a time."""
    vlm = make_vlm(lora=False)
    data = make_data(vlm)
    module = VLMModule(vlm)
    trainer = make_trainer(callbacks=[PredictionWriter()])
    trainer.test(module, data, verbose=False)
    lines = read_lines(run_dir(module) / "predictions.jsonl")
    assert [(p["video_id"], p["split"]) for p in lines] == [
        (f"{s}_{i}", s) for s in ("test_a", "test_b") for i in range(3)
    ]

    batch = next(iter(data.loader("test_a", LabelScoringView(data.task), batch_size=1)))
    names, model = data.label_names, module.policy.eval()
    expected = []
    for row in range(len(names)):
        ids = batch.texts.ids[row][batch.texts.mask[row]]
        assert vlm.tokenizer.decode(ids[:-1]) == names[row]
        inputs = dict(batch.prompts.inputs)
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt - 1 : -1].float()
        logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
        expected.append(logits.log_softmax(-1).gather(1, ids[:, None]).sum())
    probs = torch.stack(expected).softmax(0)
    assert list(lines[0]["probs"].values()) == pytest.approx(probs.tolist(), abs=1e-4)
    assert lines[0]["pred"] == names[int(probs.argmax())] == lines[0]["answer"]


def test_metrics_are_logged_per_split_under_plain_names(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    trainer = make_trainer()
    trainer.test(VLMModule(vlm), make_data(vlm), verbose=False)
    logged = set(trainer.callback_metrics)
    wanted = {"acc", "balanced_acc", "macro_f1", "unparsed_rate", "nll", "brier", "ece", "f1/fall", "f1/pass by"}
    assert {f"{split}/{name}" for split in ("test_a", "test_b") for name in wanted} <= logged
    assert not [name for name in logged if "dataloader" in name]


def test_unreadable_clips_are_reported_written_and_counted_wrong(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    data = make_data(vlm, broken=("test_a_0", "test_a_1", "test_a_2"), eval_batch_size=2)
    trainer = make_trainer(callbacks=[PredictionWriter()])
    with pytest.warns(UserWarning, match="counted wrong in test_a, the clip cannot be read") as reported:
        trainer.test(VLMModule(vlm), data, verbose=False)
    lines = [p for p in read_lines(run_dir(trainer.lightning_module) / "predictions.jsonl") if p["split"] == "test_a"]
    about = [str(warning.message) for warning in reported if "counted wrong" in str(warning.message)]
    assert [str(clip.path) for clip in data.clips("test_a")] == [message.partition(":")[0] for message in about]
    assert [p["failed"] for p in lines] == [True] * 3
    assert [p["pred"] for p in lines] == [None] * 3
    assert float(trainer.callback_metrics["test_a/acc"]) == 0
    assert float(trainer.callback_metrics["test_b/unparsed_rate"]) == 0


def test_generated_answers_of_a_random_base_are_unparsed_and_wrong(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    answers = DecideOptions(by="answer", samples=2, sampling=SHORT)
    trainer = make_trainer(callbacks=[PredictionWriter()])
    trainer.test(VLMModule(vlm, decide=answers), make_data(vlm), verbose=False)
    lines = read_lines(run_dir(trainer.lightning_module) / "predictions.jsonl")
    assert all(p["unparsed"] and p["pred"] is None and len(p["traces"]) == 2 for p in lines)
    assert float(trainer.callback_metrics["test_a/unparsed_rate"]) == 1
    assert float(trainer.callback_metrics["test_a/acc"]) == 0


def test_predict_writes_and_goes_on_where_it_was(make_vlm, make_data, make_trainer, monkeypatch):
    options = TraceOptions(kind="reason", samples=2, sampling=SHORT)

    def write(folder):
        vlm = make_vlm()
        module = VLMModule(vlm, traces=options)
        data = make_data(vlm, predict_splits=("val", "cal"), eval_batch_size=2)
        trainer = make_trainer(folder, callbacks=[TraceWriter()])
        trainer.predict(module, data)
        return module

    path = run_dir(write("a")) / "traces.jsonl"
    whole = path.read_text().splitlines()
    assert len(whole) == 1 + 6 * 2
    half = path.parents[1] / "b" / "traces.jsonl"
    half.parent.mkdir()
    half.write_text("\n".join(whole[:7]) + "\n")
    written = []
    original = TraceGenerator.records

    def records(generator, model, batch, label_names):
        written.append(batch.video_ids)
        return original(generator, model, batch, label_names)

    monkeypatch.setattr(TraceGenerator, "records", records)
    write("b")
    assert sorted(half.read_text().splitlines()) == sorted(whole)
    assert written == [("cal_0", "cal_1"), ("cal_2",)] or ("val_0", "val_1") not in written


def test_the_views_follow_the_options(make_vlm):
    vlm, task = make_vlm(), Task.from_labels("t", ("a", "b"))
    assert isinstance(VLMModule(vlm).decider(task).view, LabelScoringView)
    assert isinstance(VLMModule(vlm, decide=DecideOptions(by="answer")).decider(task).view, ReasonView)
    assert isinstance(VLMModule(vlm, traces=TraceOptions(kind="reason")).trace_generator(task).view, ReasonView)
    hinted = VLMModule(vlm, traces=TraceOptions(label_hint=True)).trace_generator(task).view
    assert isinstance(hinted, DescribeView)
    assert hinted.label_hint


def test_checkpoints_hold_what_trains_and_know_their_stage(make_vlm, make_data, make_trainer, tmp_path):
    vlm = make_vlm()
    trainer = make_trainer(max_steps=1)
    module = RationaleSFTModule(vlm)
    trainer.fit(module, make_data(vlm))
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[KEY]["stage"] == "sft_label"
    assert set(checkpoint["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in checkpoint["state_dict"])
    other = RationaleSFTModule(make_vlm(), targets=TargetOptions(kind="caption"))
    with pytest.raises(ValueError, match=r"'sft_label'.*'sft_caption'.*adapter_path"):
        make_trainer("other", max_steps=2).fit(other, make_data(other.vlm), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize(("warmup", "expected"), [(0.5, [0.0, 0.5, 1.0, 0.5]), (1, [0.0, 1.0, 2 / 3, 1 / 3])])
def test_warmup_is_a_share_or_a_number_of_steps(make_vlm, make_data, make_trainer, warmup, expected):
    vlm = make_vlm()
    rates = []

    class Watched(RationaleSFTModule):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    optim = OptimOptions(lambda p: torch.optim.SGD(p, lr=1.0e-6), schedule="linear", warmup=warmup)
    make_trainer(max_epochs=2).fit(Watched(vlm, optim=optim), make_data(vlm))
    assert [rate / 1e-6 for rate in rates] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (OptimOptions, {"warmup": -1}, r"optim\.warmup"),
        (UpdateOptions, {"clips_per_forward": 0}, r"updates\.clips_per_forward"),
        (UpdateOptions, {"max_grad_norm": -1.0}, r"updates\.max_grad_norm"),
        (DecideOptions, {"samples": 0}, r"decide\.samples"),
        (TraceOptions, {"samples": 0}, r"traces\.samples"),
    ],
)
def test_wrong_options_are_refused(options, values, message):
    with pytest.raises(ValueError, match=message):
        options(**values)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_dropout_drops_in_training_alone(make_vlm, ready, dropout):
    vlm = make_vlm()
    vlm.lora = replace(vlm.lora, dropout=dropout)
    module = ready(RationaleSFTModule(vlm))
    with torch.no_grad():
        for name, p in module.policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    batch = next(iter(module.data.train_dataloader()))

    def score():
        with torch.no_grad():
            return vlm.score(module.policy, batch.prompts, batch.texts).logprobs

    set_train_mode(module.policy)
    assert not module.policy.get_base_model().model.visual.training, "the frozen tower keeps its statistics"
    assert torch.equal(score(), score()) == (dropout == 0)
    module.policy.eval()
    assert torch.equal(score(), score())


def test_a_stage_of_ones_own_has_its_own_name(make_vlm, make_data, make_trainer):
    class Smooth(VLMModule):
        def training_step(self, batch, batch_idx):
            return -self.vlm.score(self.policy, batch.prompts, batch.texts).logprobs.mean()

        def train_view(self, task):
            return LabelView(task)

    class Smoother(Smooth):
        pass

    assert VLMModule(make_vlm()).stage_name == "zero_shot"
    saving = ModelCheckpoint(save_last=True, save_top_k=0)
    module = Smooth(make_vlm())
    make_trainer("a", max_steps=1, limit_val_batches=0, callbacks=[saving]).fit(module, make_data(module.vlm))
    other = Smoother(make_vlm())
    with pytest.raises(ValueError, match="by stage 'Smooth', but the stage running is 'Smoother'"):
        make_trainer("b", max_steps=2).fit(
            other, make_data(other.vlm), ckpt_path=saving.last_model_path, weights_only=True
        )


def test_a_foreign_checkpoint_is_refused_by_a_look_into_it(make_vlm, make_data, make_trainer):
    saving = ModelCheckpoint(save_last=True, save_top_k=0)
    label = RationaleSFTModule(make_vlm())
    make_trainer("a", max_steps=1, limit_val_batches=0, callbacks=[saving]).fit(label, make_data(label.vlm))
    check_checkpoint_file(saving.last_model_path, label)
    trace = RationaleSFTModule(make_vlm(), targets=TargetOptions(kind="trace"))
    with pytest.raises(ValueError, match="written by stage 'sft_label', but the stage running is 'sft_trace'"):
        check_checkpoint_file(saving.last_model_path, trace)


def watched(model, vlm, calls):
    """Collects the forwards of the tower."""
    tower = unwrap(model).get_submodule(vlm.vision_modules[0])
    tower.register_forward_hook(lambda *_: calls.append(1))
    return model


@pytest.mark.parametrize("stage", ["sft", "grpo", "calibration", "test"])
def test_the_tower_runs_once_per_video_in_every_stage(make_vlm, make_data, make_trainer, stage, tmp_path, monkeypatch):
    """Three files under many names, over epochs, sampling, scoring, validation; the next run finds them on disk."""
    calls = []
    few = {"group_size": 2, "train_sampling": SHORT, "sampling": SHORT, "cold_steps": 99}
    traces = TraceOptions(kind="reason", samples=2, sampling=SHORT)
    make = {
        "sft": RationaleSFTModule,
        "grpo": lambda vlm: GRPOModule(vlm, **grouped(few)),
        "calibration": lambda vlm: CalibrationModule(vlm, traces=traces),
        "test": VLMModule,
    }[stage]
    build = TinyVLM.build
    monkeypatch.setattr(TinyVLM, "build", lambda self, path=None: watched(build(self, path), self, calls))
    decoded, read = [], ClipDataset.read
    monkeypatch.setattr(
        ClipDataset, "read", lambda self, clip, jitter: decoded.append(clip.video_id) or read(self, clip, jitter)
    )
    for expected in (3, 0):
        vlm = make_vlm(lora=True)
        vlm.vision_cache_options = VisionCacheOptions(folder=str(tmp_path / "embeddings"))
        calls.clear()
        trainer = make_trainer(f"run{expected}", max_epochs=2 if expected else 1, callbacks=[Throughput()])
        if stage == "test":
            trainer.test(make(vlm), make_data(vlm), verbose=False)
        else:
            trainer.fit(make(vlm), make_data(vlm))
        assert len(calls) == expected
        assert bool(decoded) == bool(expected), "what is known is not even decoded"
        decoded.clear()
        assert 0 < float(trainer.callback_metrics["vision_cache/hit_rate"]) <= 1
        assert float(trainer.callback_metrics["vision_cache/gb"]) > 0
