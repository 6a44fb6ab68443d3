"""Supervised fine-tuning: which texts are learnt, their loss, and what is refused."""

import dataclasses

import pytest
import torch
from covering import covering
from stage_world import adamw, parameters, run_dir

from vidreason.datamodules.prompts import DescribeView
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.optimizer_step import StepResult
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.functional.losses import weighted_text_loss
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import parse_completion, render_completion

OWN = TraceOptions(samples=2, sampling=Sampling(max_new_tokens=6), filter=RationaleFilter(complete=False, min_words=0))
TRACE = TargetOptions(kind="trace")
ADAMW = OptimOptions(optimizer=adamw)


def write_traces(path, module, data, external=False, **changes):
    """Hand-written descriptions of the training clips, under the header that ``module`` expects."""
    kind = "reason" if module.targets.compose == "reason" else "describe"
    header = module.trace_generator(data.task, kind).header
    header = TraceHeader(**{**dataclasses.asdict(header), "external": external, **changes})
    store = TraceStore.create(path, header)
    records = []
    for clip in data.clips("train"):
        for k in range(2):
            text = f"It is rather {('dark', 'bright')[k]}."
            if module.targets.compose == "reason":
                text = render_completion(text, clip.label if k else "nonsense")
            parsed = parse_completion(text)
            records.append(TraceRecord(clip.video_id, k, text, parsed.reasoning, parsed.answer, "stop", -1.0, 3))
    store.append(records)
    return path


def without_a_step(micro_batches, loss, has_samples):
    """Stands for ``optimizer_step_on``: computes the losses, and leaves the weights as they are."""
    assert has_samples
    assert [loss(micro_batch).ndim for micro_batch in micro_batches] == [0]
    return StepResult(torch.zeros(()), 0.0)


@pytest.mark.parametrize(("target", "lora"), covering(["label", "caption", "rationale", "trace"], [False, True]))
def test_each_target_trains(make_vlm, make_data, make_trainer, target, lora):
    vlm = make_vlm(lora)
    module = RationaleSFTModule(vlm, targets=TargetOptions(kind=target), optim=ADAMW, traces=OWN)
    trainer = make_trainer(max_steps=3)
    before = {}

    module.on_train_start = lambda: before.update(parameters(module))  # type: ignore[method-assign]
    trainer.fit(module, make_data(vlm))
    assert trainer.global_step == 3
    after = parameters(module)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert moved
    assert float(trainer.callback_metrics["train/loss"]) > 0
    assert {"train/grad_norm", "train/learning_rate"} <= set(trainer.callback_metrics)
    assert (run_dir(module) / "traces.jsonl").exists() == (target in ("rationale", "trace"))


def test_loss_is_the_function_on_the_batch_and_each_flag_counts(make_vlm, ready, tmp_path):
    vlm = make_vlm()
    probe = ready(RationaleSFTModule(vlm))
    module = RationaleSFTModule(vlm, targets=TRACE, traces=OWN)
    module.traces_file = str(write_traces(tmp_path / "t.jsonl", module, probe.data))
    module = ready(module, folder="b")
    batch = next(iter(module.data.train_dataloader()))
    texts = batch.texts
    assert len(texts) == 2 * len(batch)
    assert bool(texts.answer_mask.any(1).all())
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_dict = lambda *_: None
    module.optimizer_step_on = without_a_step
    with torch.no_grad():
        logprobs = vlm.score(module.policy, batch.prompts, texts).logprobs
        losses = {}
        for weight in (1.0, 3.0, None):
            module.targets = dataclasses.replace(module.targets, answer_weight=weight)
            module.training_step(batch, 0)
            losses[weight] = logged["train/loss"]
    answers, reasons = texts.loss_mask & texts.answer_mask, texts.loss_mask & ~texts.answer_mask
    reasoning, answer = -logprobs[reasons].mean(), -logprobs[answers].mean()
    assert losses[1.0] == pytest.approx(float(reasoning + answer), rel=1e-5)
    assert losses[3.0] == pytest.approx(float(reasoning + 3 * answer), rel=1e-5)
    assert losses[None] == pytest.approx(float(-logprobs[texts.loss_mask].mean()), rel=1e-5)
    assert len(set(losses.values())) == 3
    assert logged["train/loss_answer"] == pytest.approx(float(answer), rel=1e-5)
    same = weighted_text_loss(
        logprobs,
        texts.loss_mask,
        texts.answer_mask,
        answer_weight=1.0,
        reasoning_count=reasons.sum(),
        answer_count=answers.sum(),
    )
    assert losses[1.0] == pytest.approx(float(same.loss))


@pytest.mark.parametrize("compose", ["describe", "reason"])
def test_cold_start_targets_end_in_the_training_label(make_vlm, ready, tmp_path, compose):
    vlm = make_vlm()
    probe = ready(RationaleSFTModule(vlm))
    module = RationaleSFTModule(vlm, targets=dataclasses.replace(TRACE, compose=compose), traces=OWN)
    module.traces_file = str(write_traces(tmp_path / "t.jsonl", module, probe.data))
    module = ready(module, folder="b")
    for clip in module.data.clips("train"):
        texts = [text.text for text in module.data.view.texts(clip)]
        assert len(texts) == (2 if compose == "describe" else 1)
        assert all(parse_completion(text).answer == clip.label for text in texts)
        assert all(parse_completion(text).well_formed for text in texts)


def own_texts(path, module, clips, kind, label):
    """Two texts of ``kind`` about every clip; traces end in ``label(clip)``."""
    store = TraceStore.create(path, module.trace_generator(module.data.task, kind).header)
    texts = {
        "describe": lambda clip, k: f"Description {k}.",
        "reason": lambda clip, k: render_completion("Own.", label(clip)),
    }
    for clip in clips:
        parsed = [parse_completion(texts[kind](clip, k)) for k in range(2)]
        store.append(
            TraceRecord(clip.video_id, k, texts[kind](clip, k), p.reasoning, p.answer, "stop", -1.0, 3)
            for k, p in enumerate(parsed)
        )
    return str(path)


def reason_first(vlm, path, said):
    module = RationaleSFTModule(vlm, targets=TargetOptions("trace", "reason_first"), traces=OWN, traces_file=path)
    module.print = said.append
    return module


def test_own_traces_come_first_and_descriptions_fill_in(make_vlm, ready, tmp_path):
    vlm, said = make_vlm(), []
    probe = ready(RationaleSFTModule(vlm))
    clips = probe.data.clips("train")
    known = {clip.video_id for clip in clips[:4]}
    path = own_texts(tmp_path / "t", probe, clips, "reason", lambda c: c.label if c.video_id in known else "nonsense")
    module = ready(reason_first(vlm, path, said), folder="b")
    described = TraceStore.open(run_dir(module) / "descriptions.jsonl").by_video(kept_only=False)
    assert set(described) == {clip.video_id for clip in clips} - known, "written about no clip that has a trace"
    for clip in clips:
        texts = [text.text for text in module.data.view.texts(clip)]
        assert all(parse_completion(text).answer == clip.label for text in texts)
        assert ("Own." in "".join(texts)) == (clip.video_id in known)
        assert len(texts) == 2 or clip.video_id not in known
    kept = sum(any(r.kept for r in group) for group in described.values())
    shares = next(line for line in said if "clips learn comes" in line)
    assert shares.startswith("sft_trace: what 6 clips learn comes 4 (67%) from own traces that end in the label, ")
    assert f"{kept} (" in shares.split(", ")[1]


def test_a_cold_start_writes_what_its_file_does_not_hold(make_vlm, ready, tmp_path):
    vlm, said = make_vlm(), []
    probe = ready(RationaleSFTModule(vlm))
    path = own_texts(tmp_path / "d", probe, probe.data.clips("train"), "describe", None)
    module = ready(reason_first(vlm, path, said), folder="b")
    assert (run_dir(module) / "traces.jsonl").exists(), "its own traces"
    assert not (run_dir(module) / "descriptions.jsonl").exists(), "the file has them"
    for clip in module.data.clips("train"):
        texts = [text.text for text in module.data.view.texts(clip)]
        assert texts == [render_completion(f"Description {k}.", clip.label) for k in range(2)], "no trace was right"
    assert any("0 (0%) from own traces that end in the label, 6 (100%) from own desc" in line for line in said)


def test_traces_of_other_weights_task_or_prompt_are_refused(make_vlm, ready, tmp_path):
    vlm = make_vlm()
    probe = ready(RationaleSFTModule(vlm))
    for number, (target, external, changes, message) in enumerate(
        [
            ("rationale", False, {"adapter_sha": "x"}, "adapter"),
            ("rationale", False, {"base_sha": "x"}, "base"),
            ("trace", False, {"prompt_sha": "x"}, "prompt"),
            ("trace", True, {"prompt_sha": "x"}, "prompt"),
            ("trace", True, {"task_sha": "x"}, "task"),
            ("rationale", True, {}, "teacher"),
        ]
    ):
        module = RationaleSFTModule(vlm, targets=TargetOptions(kind=target))
        path = write_traces(tmp_path / f"{number}.jsonl", module, probe.data, external, **changes)
        module.traces_file = str(path)
        with pytest.raises(ValueError, match=message):
            ready(module, folder=f"refused{number}")


def test_cold_start_takes_a_teachers_traces(make_vlm, ready, tmp_path):
    vlm = make_vlm()
    probe = ready(RationaleSFTModule(vlm))
    module = RationaleSFTModule(vlm, targets=TRACE)
    module.traces_file = str(write_traces(tmp_path / "t.jsonl", module, probe.data, external=True, base_sha="teacher"))
    assert isinstance(ready(module, folder="b"), RationaleSFTModule)


def test_nothing_left_to_learn_is_an_error(make_vlm, ready):
    strict = dataclasses.replace(OWN, filter=RationaleFilter(min_words=50))
    with pytest.raises(ValueError, match=r"traces\.jsonl: no training clip.*too short"):
        ready(RationaleSFTModule(make_vlm(), targets=TargetOptions(kind="rationale"), traces=strict))


def test_a_missing_caption_column_is_named(make_vlm, ready):
    with pytest.raises(ValueError, match="column 'words'"):
        ready(RationaleSFTModule(make_vlm(), targets=TargetOptions(kind="caption", caption_field="words")))


def test_batch_size_of_the_stage_wins(make_vlm, ready):
    module = ready(RationaleSFTModule(make_vlm(), batch_size=2))
    assert len(next(iter(module.data.train_dataloader()))) == 2


def test_parse_rate_is_printed(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    answer = DecideOptions(by="answer", sampling=Sampling(max_new_tokens=4))
    module = RationaleSFTModule(vlm, targets=TRACE, traces=OWN, decide=answer)
    said = []
    module.print = said.append
    make_trainer(max_epochs=1).fit(module, make_data(vlm))
    assert any("parse rate on val 0.0% (3 clips" in line for line in said)
    assert any("the base writes 2 descriptions per clip" in line for line in said)


def test_captions_are_validated_by_their_loss(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    still = OptimOptions(lambda p: torch.optim.SGD(p, lr=1e-30))
    module = RationaleSFTModule(vlm, targets=TargetOptions(kind="caption"), optim=still)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_data(vlm))
    texts = {clip.video_id: (clip.fields["caption"],) for clip in module.data.clips("val")}
    batch = next(iter(module.data.loader("val", DescribeView(module.data.task, texts), batch_size=3)))
    with torch.no_grad():
        logprobs = vlm.score(module.policy.eval(), batch.prompts, batch.texts).logprobs
    expected = -float(logprobs[batch.texts.loss_mask].mean())
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-4)


def test_token_accuracy_is_the_share_of_likeliest_tokens(make_vlm, make_data, make_trainer):
    vlm = make_vlm(lora=False)
    module = RationaleSFTModule(vlm, targets=TargetOptions(kind="caption"), optim=ADAMW)
    trainer = make_trainer(max_epochs=12, limit_val_batches=0)
    trainer.fit(module, make_data(vlm))
    texts = {clip.video_id: (clip.fields["caption"],) for clip in module.data.clips("train")}
    hits, tokens, logged = 0, 0, {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_dict = lambda *_: None
    module.optimizer_step_on = without_a_step
    for batch in module.data.loader("train", DescribeView(module.data.task, texts), batch_size=1):
        ids, inputs = batch.texts.ids[0, batch.texts.loss_mask[0]], dict(batch.prompts.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = module.policy.eval()(**inputs).logits[0, -len(ids) - 1 : -1]
            logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
            module.training_step(batch, 0)
        of_clip = (logits.argmax(-1) == ids).tolist()
        assert logged["train/mean_token_accuracy"] == pytest.approx(sum(of_clip) / len(of_clip))
        hits, tokens = hits + sum(of_clip), tokens + len(of_clip)
    assert 0 < hits < tokens
    assert 0 < float(trainer.callback_metrics["train/mean_token_accuracy"]) <= 1


def test_training_lowers_the_loss(make_vlm, make_data, make_trainer):
    vlm = make_vlm(lora=False)
    losses = []

    class Watched(RationaleSFTModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            losses.append(float(self.trainer.callback_metrics["train/loss"]))

    make_trainer(max_epochs=8, limit_val_batches=0).fit(Watched(vlm, optim=ADAMW), make_data(vlm))
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
