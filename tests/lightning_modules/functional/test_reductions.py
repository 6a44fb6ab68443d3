"""Sums, counts and averages against plain Python."""

import math

import pytest
import torch

from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    count_tokens,
    label_log_probabilities,
    masked_sum,
    sequence_logprobs,
)


def test_tokens_are_counted_inside_and_outside_the_answer() -> None:
    loss_mask = torch.tensor([[True, True, True, False], [False, True, False, False]])
    answer_mask = torch.tensor([[False, False, True, True], [False, False, False, False]])
    counts = count_tokens(loss_mask, answer_mask)
    assert (int(counts.reasoning), int(counts.answer), int(counts.total)) == (3, 1, 4)


def test_masked_sum_ignores_what_does_not_count() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values, mask).item() == 7.0
    assert masked_sum(values, torch.zeros_like(mask)).item() == 0.0
    masked_sum(values, mask).backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, mask.float())


def test_sequence_logprobs() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -math.inf, math.nan], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert sequence_logprobs(logprobs, mask).tolist() == [-7.0, -1.0, 0.0]


def test_label_log_probabilities() -> None:
    scores = torch.tensor([[math.log(0.02), math.log(0.06)], [-2000.0, -2000.0]])
    torch.testing.assert_close(label_log_probabilities(scores).exp(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    far = torch.tensor([[-1024.0, -3072.0]], dtype=torch.bfloat16)
    assert label_log_probabilities(far).tolist() == [[0.0, -2048.0]]
    assert label_log_probabilities(far).dtype == torch.float32


def test_traces_are_averaged_as_probabilities_whatever_their_order_and_number() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]], dtype=torch.float64)
    owner = torch.tensor([1, 0, 1, 1])
    averaged = average_over_traces(probs.log(), owner, 2).exp()
    torch.testing.assert_close(averaged, torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64))
    log_mean = torch.stack([probs.log()[[0, 2, 3]].mean(0)]).softmax(-1)
    assert (averaged[1] - log_mean[0]).abs().max() > 0.01, "averaging logarithms would be another number"


def test_averaging_survives_tiny_and_zero_probabilities_and_has_a_gradient() -> None:
    logs = torch.tensor([[-5000.0, 0.0], [-5001.0, 0.0]], dtype=torch.float64)
    averaged = average_over_traces(logs, torch.tensor([0, 0]), 1)
    assert averaged[0, 0].item() == pytest.approx(-5000 + math.log((1 + math.exp(-1)) / 2))
    impossible = torch.tensor([[-math.inf, 0.0], [-math.inf, 0.0]])
    assert average_over_traces(impossible, torch.tensor([0, 0]), 1).tolist() == [[-math.inf, 0.0]]
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([0, 2, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: average_over_traces(x.log_softmax(-1), owner, 3), (scores,))


def test_a_clip_without_traces_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"clips \[1\]"):
        average_over_traces(torch.zeros(2, 3), torch.tensor([0, 2]), 3)
