"""Evaluation in pieces: no more clips than ``eval.clips_per_forward`` at once, and the results of a whole batch."""

import json

import pytest
import torch
from stage_world import SHORT, run_dir

from vidreason.callbacks.trace_writer import TraceWriter
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.pieces import EvalOptions

SAMPLED = Sampling(max_new_tokens=6, temperature=1.0)
STAGES = {
    "likelihood": lambda vlm, **k: VLMModule(vlm, **k),
    "answer": lambda vlm, **k: VLMModule(vlm, decide=DecideOptions("answer", samples=2, sampling=SAMPLED), **k),
    "caption": lambda vlm, **k: RationaleSFTModule(vlm, targets=TargetOptions(kind="caption"), **k),
    "calibration": lambda vlm, **k: CalibrationModule(
        vlm, traces=TraceOptions(kind="reason", samples=2, sampling=SHORT), **k
    ),
}


@pytest.fixture
def counted(make_vlm):
    """A family that records how many clips go through the model at once without a gradient."""

    def make():
        vlm = make_vlm()
        sizes = []
        score, generate = vlm.score, vlm.generate

        def scored(model, prompts, *args, **kwargs):
            sizes.extend([prompts.batch_size] * (not torch.is_grad_enabled()))
            return score(model, prompts, *args, **kwargs)

        def generated(model, prompts, *args, **kwargs):
            sizes.append(prompts.batch_size)
            return generate(model, prompts, *args, **kwargs)

        vlm.score, vlm.generate = scored, generated
        return vlm, sizes

    return make


@pytest.fixture
def outcome(counted, make_data, make_trainer):
    """``outcome(stage, size)``: sizes of the forwards, metrics, and the predictions or temperature."""

    def run(stage, size):
        vlm, sizes = counted()
        module = STAGES[stage](vlm, eval=EvalOptions(size))
        found = []
        module.on_validation_batch_end = lambda outputs, *_: found.extend(outputs["predictions"])
        trainer = make_trainer(f"{stage}{size}", max_steps=1, val_check_interval=1, limit_val_batches=1)
        data = make_data(vlm, eval_batch_size=3)
        if stage in ("calibration", "caption"):
            trainer.fit(module, data)
        else:
            trainer.validate(module, data, verbose=False)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        return sizes, metrics, {p.video_id: (p.pred, p.answer, list(p.probs.values())) for p in found}

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_pieces_give_the_results_of_the_whole_batch(outcome, stage):
    whole, metrics, predictions = outcome(stage, None)
    assert max(whole) == 3
    sizes, cut_metrics, cut = outcome(stage, 2)
    assert set(sizes) == {1, 2}
    assert metrics
    assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert cut.keys() == predictions.keys()
    for name, (pred, answer, probs) in predictions.items():
        assert cut[name][:2] == (pred, answer)
        assert cut[name][2] == pytest.approx(probs, rel=1e-5)
    assert bool(predictions) == (stage != "caption")


def test_written_texts_do_not_depend_on_the_pieces(counted, make_data, make_trainer):
    texts = {}
    for size in (None, 1):
        vlm, sizes = counted()
        own = TraceOptions(kind="reason", samples=2, sampling=SAMPLED)
        module = VLMModule(vlm, traces=own, eval=EvalOptions(size))
        trainer = make_trainer(f"texts{size}", callbacks=[TraceWriter()])
        trainer.predict(module, make_data(vlm, eval_batch_size=4))
        lines = (run_dir(module) / "traces.jsonl").read_text().splitlines()[1:]
        texts[size] = {(row["video_id"], row["sample"]): row["text"] for row in map(json.loads, lines)}
        assert max(sizes) == (size or 4)
    assert texts[None] == texts[1]
    assert len(texts[1]) == 2 * 6


def test_less_than_one_clip_is_refused():
    with pytest.raises(ValueError, match=r"eval\.clips_per_forward must be at least 1 or null, got 0"):
        EvalOptions(0)
