"""Tests which modules train, and which stay as they are."""

import torch

from vidreason.lightning_modules.weights.parameters import set_train_mode


def test_frozen_modules_stay_in_eval_mode():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    set_train_mode(model)
    assert [model.training, *(m.training for m in model), model[2][0].training] == [True, True, False, False, False]
