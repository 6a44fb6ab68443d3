"""One optimizer step on numbers worked out by hand."""

import math
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from vidreason.lightning_modules.fit.optimizer_step import OptimizerStep


class OneProcess(SingleDeviceStrategy):
    """Runs the backward pass, and needs no trainer for it."""

    def backward(self, closure_loss, optimizer, *args, **kwargs):
        closure_loss.backward()
        return closure_loss


class TwoProcesses(DDPStrategy):
    """Notes which backward passes exchange no gradients."""

    def __init__(self):
        super().__init__()
        self.exchanged, self._blocked = [], False

    def backward(self, closure_loss, optimizer, *args, **kwargs):
        self.exchanged.append(not self._blocked)
        closure_loss.backward()
        return closure_loss

    @contextmanager
    def block_backward_sync(self):
        self._blocked = True
        yield
        self._blocked = False


def step_of(parameter, max_grad_norm=0.0, strategy=None, **options):
    optimizer = torch.optim.SGD([parameter], lr=1.0, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return OptimizerStep(strategy or OneProcess("cpu"), optimizer, scheduler, [parameter], max_grad_norm)


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(("max_grad_norm", "moved"), [(0.0, 3.0), (10.0, 3.0), (1.0, 1 / math.sqrt(2))])
def test_the_norm_before_clipping_is_returned_and_0_does_not_clip(weight, max_grad_norm, moved):
    made = step_of(weight, max_grad_norm)([3.0], lambda factor: factor * weight.sum())
    assert float(made.grad_norm) == pytest.approx(3 * math.sqrt(2))
    assert weight.tolist() == pytest.approx([-moved, -moved], rel=1e-5)


def test_micro_batches_add_up_and_steps_do_not(weight):
    step = step_of(weight)
    first, second = (step([1.0, 2.0], lambda factor: factor * weight.sum()) for _ in range(2))
    assert float(first.grad_norm) == float(second.grad_norm) == pytest.approx(3 * math.sqrt(2))
    assert (first.learning_rate, second.learning_rate) == (1.0, 0.5)
    assert weight.tolist() == pytest.approx([-4.5, -4.5])


def test_a_step_without_samples_moves_nothing_but_the_schedule(weight):
    step = step_of(weight, momentum=0.9, weight_decay=0.1)
    step([1.0], lambda factor: factor * weight.sum())
    before = weight.detach().clone()
    assert bool((before != 0).all())
    step([0.0], lambda factor: factor * weight.sum(), has_samples=False)
    assert torch.equal(weight, before)
    assert step([1.0], lambda factor: factor * weight.sum()).learning_rate == pytest.approx(1 / 3)


def test_ranks_exchange_gradients_in_the_last_backward_pass_only(weight):
    strategy = TwoProcesses()
    step_of(weight, strategy=strategy)([1.0, 1.0, 1.0], lambda factor: factor * weight.sum())
    assert strategy.exchanged == [False, False, True]
