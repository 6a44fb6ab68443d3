"""The loss of texts, reasoning and answer apart, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from vidreason.lightning_modules.functional.losses import weighted_text_loss
from vidreason.lightning_modules.functional.reductions import count_tokens


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Two texts: 4 reasoning + 2 answer tokens, 1 + 3; one padded token, one context token that does not count."""
    logprobs = -torch.arange(1, 15, dtype=torch.float64).reshape(2, 7)
    loss_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]).bool()
    answer_mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    return logprobs, loss_mask, answer_mask


@pytest.mark.parametrize(
    ("answer_weight", "expected"),
    [(None, (10 + 11 + 11 + 39) / 10), (1.0, 21 / 5 + 50 / 5), (0.5, 21 / 5 + 0.5 * 50 / 5), (0.0, 21 / 5)],
)
def test_text_loss_by_hand(answer_weight: float | None, expected: float) -> None:
    logprobs, loss_mask, answer_mask = texts()
    counts = count_tokens(loss_mask, answer_mask)
    assert (int(counts.reasoning), int(counts.answer)) == (5, 5)
    for reasoning, answer in ((counts.reasoning, counts.answer), (5, 5.0)):
        loss = weighted_text_loss(
            logprobs,
            loss_mask,
            answer_mask,
            answer_weight=answer_weight,
            reasoning_count=reasoning,
            answer_count=answer,
        )
        assert loss.loss.item() == pytest.approx(expected)
        assert (loss.reasoning.item(), loss.answer.item()) == pytest.approx((21 / 5, 10.0))


@pytest.mark.parametrize("answer_weight", [None, 1.0, 3.0])
def test_text_loss_gradient_is_one_over_the_count(answer_weight: float | None) -> None:
    logprobs, loss_mask, answer_mask = texts()
    answer_mask = answer_mask & torch.tensor([[True], [False]])
    logprobs.requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return weighted_text_loss(
            values, loss_mask, answer_mask, answer_weight=answer_weight, reasoning_count=8, answer_count=2
        ).loss

    loss(logprobs).backward()
    share = (1 / 10, 1 / 10) if answer_weight is None else (1 / 8, answer_weight / 2)
    expected = -(loss_mask & ~answer_mask).double() * share[0] - (loss_mask & answer_mask).double() * share[1]
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected)
    assert torch.autograd.gradcheck(loss, (logprobs.detach().clone().requires_grad_(),))


@pytest.mark.parametrize("answer_weight", [None, 1.0, 7.0])
def test_texts_without_an_answer_have_the_first_mean_only(answer_weight: float | None) -> None:
    logprobs, loss_mask, answer_mask = texts()
    loss = weighted_text_loss(
        logprobs,
        loss_mask,
        torch.zeros_like(answer_mask),
        answer_weight=answer_weight,
        reasoning_count=10,
        answer_count=torch.tensor(0),
    )
    assert loss.loss.item() == pytest.approx(7.1)
    assert loss.answer.item() == 0.0


def test_text_loss_of_micro_batches_adds_up_and_ignores_padding() -> None:
    logprobs, loss_mask, answer_mask = texts()
    logprobs = logprobs.masked_fill(~loss_mask, -math.inf)
    counts = count_tokens(loss_mask, answer_mask)
    losses = [
        weighted_text_loss(
            logprobs[i : i + 1],
            loss_mask[i : i + 1],
            answer_mask[i : i + 1],
            answer_weight=1.0,
            reasoning_count=counts.reasoning,
            answer_count=counts.answer,
        )
        for i in range(2)
    ]
    assert sum(loss.loss.item() for loss in losses) == pytest.approx(21 / 5 + 10.0)
    with pytest.raises(ValueError, match="expected"):
        weighted_text_loss(
            logprobs, loss_mask, answer_mask[:, :2], answer_weight=1.0, reasoning_count=1, answer_count=1
        )
