"""Every loss type learns: the mean reward of a tiny task rises from under 0.3 to over 0.8 within bounded steps."""

import pytest
import torch
from small_grpo import make

from vidreason.lightning_modules.functional.aggregation import LOSS_TYPES
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.rollouts import reward_tensor
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.base import RewardFn, RewardInput

STEPS, WINDOW = 120, 5


class Vowels(RewardFn):
    """The share of three vowels in the text: a random policy gets under 0.3."""

    def __call__(self, item: RewardInput) -> float:
        return sum(letter in "aei" for letter in item.completion) / max(len(item.completion), 1)


class Watched(GRPOModule):
    """Stops once the mean reward of some steps is over 0.8."""

    means: list[float]

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.means.append(float(reward_tensor(output["rollouts"].groups).mean()))
        if sum(self.means[-WINDOW:]) / WINDOW > 0.8:
            self.trainer.should_stop = True
        return output


@pytest.fixture
def learn(make_vlm, make_data, make_trainer):
    def run(**options):
        module = make(
            make_vlm(lora=False),
            Watched,
            rewards=[Vowels()],
            group_size=8,
            train_sampling=Sampling(max_new_tokens=6),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            **options,
        )
        module.means = []
        trainer = make_trainer(max_steps=STEPS, limit_val_batches=0)
        trainer.fit(module, make_data(module.vlm))
        first, last = (sum(means) / WINDOW for means in (module.means[:WINDOW], module.means[-WINDOW:]))
        assert first < 0.3
        assert last > 0.8, f"{last:.2f} after {trainer.global_step} steps"

    return run


def test_the_default_learns(learn):
    learn()


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_learns(learn, loss_type):
    learn(loss_type=loss_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"inner_epochs": 2, "minibatches": 3, "prompts_per_forward": 1},
        {"advantage_scale": "batch", "mask_truncated": False, "kl_coef": 0.001, "kl_bias_correction": True},
        {"resample": 1},
        {"balance_classes": True, "entropy_coef": 0.001},
    ],
    ids=["epochs", "kl", "resampled", "balanced"],
)
def test_other_options_learn(learn, options):
    learn(**options)
