import math
from types import SimpleNamespace

import pytest
import torch

from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip, FailedClip, TextBatch, VideoBatch
from vidreason.lightning_modules.decisions import deciders
from vidreason.lightning_modules.decisions.closed_set import closed_set
from vidreason.lightning_modules.decisions.deciders import AnswerDecider, decide_by_probs, vote
from vidreason.lightning_modules.decisions.evaluation import SplitMetrics
from vidreason.lightning_modules.decisions.predictions import BatchDecisions, failed_prediction
from vidreason.lightning_modules.vlms.completions import Completion
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import CompletionForm, parse_completion


def texts(loss_mask: list[list[bool]], owner: list[int]) -> TextBatch:
    mask = torch.tensor(loss_mask)
    n = len(owner)
    return TextBatch(
        torch.zeros_like(mask, dtype=torch.long),
        torch.ones_like(mask),
        mask,
        torch.zeros_like(mask),
        torch.tensor(owner),
        torch.full((n,), -1),
    )


def test_closed_set_adds_the_tokens_of_each_name_and_skips_context():
    logprobs = torch.tensor([[-9.0, -9.0], [-1.0, -2.0], [-3.0, -9.0], [-0.5, -0.25], [-4.0, -9.0]])
    batch = texts([[False, False], [True, True], [True, False], [True, True], [True, False]], [0, 0, 0, 1, 1])
    asked = closed_set(logprobs, batch, 2)
    assert asked.scores.tolist() == [[-3.0, -3.0], [-0.75, -4.0]]
    assert asked.owner.tolist() == [0, 1]


def test_closed_set_refuses_what_is_no_closed_set():
    with pytest.raises(ValueError, match="3 scored texts"):
        closed_set(torch.zeros(3, 1), texts([[True]] * 3, [0, 0, 0]), 2)
    with pytest.raises(ValueError, match="different clips"):
        closed_set(torch.zeros(2, 1), texts([[True]] * 2, [0, 1]), 2)


def test_votes():
    names = ["a", "b", "c"]
    assert vote(["b", "a", "b"], names).chosen == 1
    assert vote(["c", "a"], names).chosen == 2, "a tie goes to the first named"
    assert vote([None, None], names).chosen == -1
    probs = vote(["b", None], names).probs
    total = 2 + 3 * 0.01
    assert probs.tolist() == pytest.approx(
        [(0.5 / 1.5 + 0.01) / total, (1 + 1 / 3 + 0.01) / total, (1 / 3 + 0.01) / total]
    )


def test_a_single_parsed_answer_has_a_finite_nll_when_wrong():
    probs = vote(["a"], ["a", "b"]).probs
    assert 0 < -math.log(float(probs[1])) < 10


def test_unreadable_and_unlabelled_clips(tmp_path):
    names = ("a", "b")
    clips = tuple(Clip(tmp_path, label, f"v{i}", "test") for i, label in enumerate(["a", None, "b"]))
    lost = FailedClip(Clip(tmp_path, "b", "v3", "test"), "gone")
    batch = VideoBatch(None, torch.tensor([0, -1, 1]), torch.ones(3, dtype=torch.bool), clips, (lost,))
    decisions = decide_by_probs(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]), names)
    metrics = SplitMetrics(names)
    metrics.update(batch, decisions)
    values = metrics.plain.compute()
    assert float(values["acc"]) == pytest.approx(1 / 3), "right, wrong, unreadable; the unlabelled one is not counted"
    assert float(values["unparsed_rate"]) == pytest.approx(1 / 3)
    only_lost = VideoBatch(None, torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.bool), (), (lost,))
    metrics.update(only_lost, None)
    assert float(metrics.plain.compute()["acc"]) == pytest.approx(1 / 4)

    line = decisions.prediction(0, clips[0], "test", names)
    assert (line.pred, line.unparsed, line.failed, line.probs["a"]) == ("a", False, False, pytest.approx(0.9))
    line = failed_prediction(lost, "test", names)
    assert (line.pred, line.failed, line.unparsed, line.probs) == (None, True, False, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(("samples", "temperature", "known"), [(1, 1.0, False), (3, 0.0, False), (3, 1.0, True)])
def test_only_several_drawn_answers_have_probabilities(tmp_path, monkeypatch, samples, temperature, known):
    """A single or a greedy answer has none: its frequency under the model is not known."""
    names = ("a", "b")
    text = "<think>x</think><answer>a</answer>"
    said = Completion(text, parse_completion(text), torch.zeros(1), torch.zeros(1), "stop")
    clip = Clip(tmp_path, "a", "v", "test")
    batch = VideoBatch(None, torch.tensor([0]), torch.ones(1, dtype=torch.bool), (clip,), ())
    task = Task.from_labels("t", names)
    decider = AnswerDecider(task, samples, Sampling(temperature=temperature), 0, CompletionForm())
    sampled = SimpleNamespace(completions=[[said] * samples])
    monkeypatch.setattr(deciders, "generate_completions", lambda *args, **options: sampled)
    asked = SimpleNamespace(prompts=None, clips=(clip,))
    decisions = BatchDecisions.joined([decider.decide(None, None, asked)])
    line = decisions.prediction(0, clip, "test", names)
    assert line.pred == "a"
    assert line.probs == (pytest.approx({"a": 3.01 / 3.02, "b": 0.01 / 3.02}) if known else {})
    metrics = SplitMetrics(names, probabilities=decider.gives_probabilities)
    metrics.update(batch, decisions)
    values = metrics.compute("test")
    assert float(values["test/acc"]) == 1
    assert ({"test/nll", "test/brier", "test/ece"} <= values.keys()) == known
