import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from stage_world import run_dir

from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.callbacks.result_table import ResultTable, result_table
from vidreason.callbacks.trace_writer import TraceWriter
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.decisions.predictions import read_predictions
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.vlms.generation import Sampling

SHORT = Sampling(max_new_tokens=4)
KEYS = ["video_id", "split", "group", "label", "pred", "probs", "answer", "unparsed", "failed", "traces"]


def test_one_line_for_every_clip_in_the_documented_form(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    data = make_data(vlm, broken=("test_b_2",), eval_batch_size=2)
    trainer = make_trainer(callbacks=[PredictionWriter()])
    module = VLMModule(vlm, decide=DecideOptions(by="answer", sampling=SHORT))
    trainer.test(module, data, verbose=False)
    path = run_dir(module) / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(line) == KEYS for line in lines)
    assert sorted(line["video_id"] for line in lines) == sorted(f"test_{s}_{i}" for s in "ab" for i in range(3))
    assert [line["video_id"] for line in lines if line["failed"]] == ["test_b_2"]
    assert set(lines[0]["traces"][0]) == {"text", "answer", "n_tokens"}
    assert not list(path.parent.glob("*.part*"))


def test_a_trace_may_hold_any_character(make_vlm, make_data, make_trainer):
    """Line separators of Unicode among them, which are no ends of lines in a JSONL file."""

    class Odd(VLMModule):
        def evaluate(self, batch, split):
            made = super().evaluate(batch, split)["predictions"]
            return {"predictions": tuple(replace(p, answer="a\u2028b\u0085c") for p in made)}

    module = Odd(make_vlm())
    trainer = make_trainer(callbacks=[PredictionWriter()])
    trainer.test(module, make_data(module.vlm), verbose=False)
    predictions = read_predictions(run_dir(module) / "predictions.jsonl")
    assert len(predictions) == 6


def test_an_interrupted_test_leaves_the_last_file(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    trainer = make_trainer(callbacks=[PredictionWriter()])
    trainer.test(VLMModule(vlm), make_data(vlm), verbose=False)
    path = run_dir(trainer.lightning_module) / "predictions.jsonl"
    before = path.read_text()

    class Broken(VLMModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx:
                raise RuntimeError("stop")
            return super().test_step(batch, batch_idx, dataloader_idx)

    vlm = make_vlm()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callbacks=[PredictionWriter()]).test(
            Broken(vlm, decide=DecideOptions(by="answer")), make_data(vlm), verbose=False
        )
    assert path.read_text() == before


def test_traces_of_another_author_in_the_folder_are_refused(make_vlm, make_data, make_trainer):
    for prompt, error in (("describe", None), ("reason", "prompt_sha")):
        vlm = make_vlm()
        module = VLMModule(vlm, traces=TraceOptions(kind=prompt, samples=1, sampling=SHORT))
        trainer = make_trainer(callbacks=[TraceWriter()])
        if error is None:
            trainer.predict(module, make_data(vlm))
        else:
            with pytest.raises(ValueError, match=error):
                trainer.predict(module, make_data(vlm))


def test_texts_that_another_rank_wrote_before_an_interruption_are_not_written_again(make_vlm, make_data, make_trainer):
    """A run of two ranks was killed: half of its texts are still in the file of the second."""
    generated = []

    class Counting(VLMModule):
        def trace_generator(self, task, kind=None):
            generator = super().trace_generator(task, kind)
            return replace(generator, adapter_context=lambda model: nullcontext(generated.append(1)))

    def predict():
        vlm = make_vlm()
        module = Counting(vlm, traces=TraceOptions("describe", samples=1, sampling=SHORT))
        trainer = make_trainer(callbacks=[TraceWriter()])
        trainer.predict(module, make_data(vlm))
        return Path(trainer.default_root_dir) / "traces.jsonl"

    path = predict()
    header, *lines = whole = path.read_text().splitlines()
    assert generated
    path.write_text("\n".join([header, *lines[::2]]) + "\n")
    path.with_name("traces.rank1.jsonl").write_text("\n".join([header, *lines[1::2]]) + "\n")
    generated.clear()
    assert predict() == path
    assert not generated
    assert sorted(path.read_text().splitlines()) == sorted(whole)


def test_result_table(make_vlm, make_data, make_trainer):
    vlm = make_vlm()
    module = VLMModule(vlm)
    said = []
    module.print = said.append
    make_trainer(callbacks=[ResultTable()]).test(module, make_data(vlm))
    header, a, b = said[0].splitlines()
    assert header.split()[:2] == ["split", "acc"]
    assert (a.split()[0], b.split()[0]) == ("test_a", "test_b")
    assert result_table({"x/acc": 1.0}, ("x", "y")).splitlines()[2].split() == ["y", "-"]
