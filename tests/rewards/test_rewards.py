"""Each reward on completions that must and must not earn it, and how they add up."""

import math
from dataclasses import replace

import pytest

from vidreason.rewards.accuracy import AccuracyReward
from vidreason.rewards.base import RewardFn, RewardInput, score_completion, score_group
from vidreason.rewards.brier import BrierReward
from vidreason.rewards.completion import parse_completion
from vidreason.rewards.format import FormatReward
from vidreason.rewards.length import LengthReward
from vidreason.rewards.ordinal import OrdinalReward
from vidreason.rewards.overlong import OverlongReward
from vidreason.rewards.reasoning import ReasoningReward

NAMES = ("calm", "door left open", "loud", "violent", "riot")


def item(completion: str, label: str = "door left open") -> RewardInput:
    return RewardInput(completion, parse_completion(completion), label, NAMES)


@pytest.mark.parametrize(
    ("completion", "accuracy", "form"),
    [
        ("<think>a</think><answer>door left open</answer>", 1, 1),
        ("<think>a</think><answer>\n Door LEFT open </answer><|im_end|>\n", 1, 1),
        ("<think>a</think><answer>calm</answer>", 0, 1),
        ("<think>a</think><answer></answer>", 0, 1),
        ("<think>a</think><answer>door left</answer>", 0, 1),
        ("<think>a</think><answer>door left open.</answer>", 0, 1),
        ("<think>a</think><answer>calm, door left open</answer>", 0, 1),
        ("<answer>door left open</answer>", 1, 0),
        ("well <answer>door left open</answer> I think", 1, 0),
        ("<think><think>a</think><answer>door left open</answer>", 1, 0),
        ("<think><|video_pad|></think><answer>door left open</answer>", 1, 0),
        ("<think>a</think><answer>door left open</answer><answer>calm</answer>", 1, 0),
        ("<think>a</think><answer>calm</answer><answer>door left open</answer>", 0, 0),
        ("<think>a</think><answer><answer>door left open</answer></answer>", 0, 0),
        ("<think>a</think><answer>door left open<|im_end|></answer>", 0, 0),
        ("<think>a</think><answer>door left open<image></answer>", 0, 0),
        ("<think>a</think><answer>door left open", 0, 0),
        ("<think>a</think><Answer>door left open</Answer>", 0, 0),
        ("door left open", 0, 0),
        ("", 0, 0),
    ],
)
def test_accuracy_and_format_are_independent(completion: str, accuracy: int, form: int) -> None:
    assert AccuracyReward()(item(completion)) == accuracy
    assert FormatReward()(item(completion)) == form


def test_a_cut_completion_is_scored_by_its_text() -> None:
    whole = "<think>a</think><answer>calm</answer>"
    cut = RewardInput(whole, parse_completion(whole), "calm", NAMES, "length")
    assert (AccuracyReward()(cut), FormatReward()(cut), cut.label_names) == (1.0, 1.0, NAMES)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("calm", 1.0),
        ("DOOR left open", 1 / 2),
        ("loud", 1 / 3),
        ("violent", 0.0),
        ("riot", 0.0),
        ("lou", 0.0),
        ("", 0.0),
    ],
)
def test_ordinal_by_gap(answer: str, reward: float) -> None:
    assert OrdinalReward()(item(f"<answer>{answer}</answer>", "Calm")) == pytest.approx(reward)


def test_ordinal_is_symmetric_and_needs_a_known_label() -> None:
    assert OrdinalReward()(item("<answer>loud</answer>", "riot")) == pytest.approx(1 / 3)
    assert OrdinalReward()(item("no answer", "riot")) == 0.0
    with pytest.raises(ValueError, match="'fire' is none of calm"):
        OrdinalReward()(item("<answer>loud</answer>", "fire"))


@pytest.mark.parametrize(
    ("reasoning", "reward"), [("", 0), ("one", 0), ("one two", 1), ("a\nb\t c  d", 1), ("a b c d e", 0), (" a  ", 0)]
)
def test_length_counts_words_of_the_reasoning(reasoning: str, reward: int) -> None:
    completion = f"<think>{reasoning}</think><answer>a much longer answer than that</answer>"
    assert LengthReward(2, 4)(item(completion)) == reward


def test_length_bounds() -> None:
    assert LengthReward(0, 0)(item("<think> </think>")) == 1.0
    assert LengthReward(0, 9)(item("no block at all")) == 0.0
    for bounds in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="min_words <= max_words"):
            LengthReward(*bounds)


@pytest.mark.parametrize(("completion", "reward"), [("<think>a</think>", 1), ("<think> \n</think>", 0), ("a", 0)])
def test_reasoning(completion: str, reward: int) -> None:
    assert ReasoningReward()(item(completion)) == reward


def test_names_come_from_the_class() -> None:
    class EvidenceOrder(RewardFn):
        def __call__(self, item: RewardInput) -> float:
            return 0.25

    rewards = [
        AccuracyReward(),
        FormatReward(),
        LengthReward(1, 2),
        OrdinalReward(),
        ReasoningReward(),
        EvidenceOrder(),
    ]
    assert [reward.name for reward in rewards] == [
        "accuracy",
        "format",
        "length",
        "ordinal",
        "reasoning",
        "evidence_order",
    ]


def test_score_weighs_parts() -> None:
    rewards = [AccuracyReward(), FormatReward(weight=0.5), ReasoningReward(weight=-0.2)]
    score = score_completion(rewards, item("<think>a</think><answer>calm</answer>"))
    assert score.parts == {"accuracy": 0.0, "format": 1.0, "reasoning": 1.0}
    assert score.total == pytest.approx(0.3)
    perfect = score_completion(
        [AccuracyReward(), FormatReward()], item("<think>a</think><answer>calm</answer>", "calm")
    )
    assert perfect.total == 2.0


def test_score_refuses_what_it_cannot_log_or_learn_from() -> None:
    class BrokenReward(RewardFn):
        def __call__(self, item: RewardInput) -> float:
            return float("-inf")

    with pytest.raises(ValueError, match="at least one"):
        score_completion([], item(""))
    with pytest.raises(ValueError, match="two rewards are named 'accuracy'"):
        score_completion([AccuracyReward(), AccuracyReward(2.0)], item(""))
    with pytest.raises(ValueError, match="BrokenReward returned -inf"):
        score_completion([BrokenReward()], item(""))
    with pytest.raises(ValueError, match="finite"):
        FormatReward(weight=float("inf"))


class Judge(RewardFn):
    """Knows nothing about completions that say so."""

    def __call__(self, item: RewardInput) -> float | None:
        return {"none": None, "nan": float("nan")}.get(item.completion, 0.5)


def test_what_a_reward_cannot_tell_is_named_and_never_a_number() -> None:
    for completion in ("none", "nan"):
        score = score_completion([AccuracyReward(), Judge()], item(completion))
        assert score.failed == ("judge",)
        assert math.isnan(score.total)
        assert score.parts["accuracy"] == 0.0
    assert score_completion([Judge()], item("well")).failed == ()


def test_a_group_is_compared_by_the_rewards_that_apply_to_it() -> None:
    right = "<answer>door left open</answer>"
    some = score_group([AccuracyReward(), Judge(weight=2.0)], [item(right), item("none")])
    assert some[0].total == 2.0
    assert math.isnan(some[1].total), "it cannot be compared with a sibling that has both"
    whole = score_group([FormatReward(), Judge()], [item("none"), item("nan")])
    assert [score.total for score in whole] == [0.0, 0.0], "a reward that tells nothing of the group is left out"
    assert [score.failed for score in whole] == [("judge",), ("judge",)]
    assert all(math.isnan(score.total) for score in score_group([Judge()], [item("none"), item("nan")]))


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (60, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (130, -1)]
)
def test_overlong_by_hand(tokens: int, penalty: float) -> None:
    reward = OverlongReward(max_tokens=100, buffer=20)
    assert reward(replace(item("any"), n_tokens=tokens)) == pytest.approx(penalty)


def test_overlong_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="counts tokens"):
        OverlongReward(100, 20)(item("any"))
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="0 < buffer <= max_tokens"):
            OverlongReward(100, buffer)


@pytest.mark.parametrize(
    ("confidence", "answer", "reward"),
    [
        ("0.8", "door left open", -0.04),
        ("0.8", "calm", -0.64),
        ("1", "Door left open", 0.0),
        ("0", "calm", 0.0),
        (" .5 ", "calm", -0.25),
        ("1.0", "calm", -1.0),
        ("1.2", "door left open", -1.0),
        ("-0.2", "door left open", -1.0),
        ("sure", "door left open", -1.0),
        ("nan", "door left open", -1.0),
        ("", "door left open", -1.0),
    ],
)
def test_brier_by_hand(confidence: str, answer: str, reward: float) -> None:
    text = f"<think>a</think><answer>{answer}</answer><confidence>{confidence}</confidence>"
    assert BrierReward()(item(text)) == pytest.approx(reward)


def test_brier_without_a_stated_confidence_is_the_worst() -> None:
    assert BrierReward()(item("<think>a</think><answer>door left open</answer>")) == -1.0
