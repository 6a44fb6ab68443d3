"""The reference policy, and log-probabilities of policies that are not trained."""

import torch
from small_grpo import make

from vidreason.lightning_modules.rl.microbatch import make_micro_batches
from vidreason.lightning_modules.rl.reference import REFERENCE, policy_logprobs, reference_logprobs
from vidreason.lightning_modules.vlms.loading.adapters import use_adapter


def micro_batch_of(scored):
    return make_micro_batches([scored], torch.ones(3, 4), torch.ones(3, dtype=torch.bool))[0]


def test_sampler_and_trainer_agree(rolled):
    module, scored = rolled
    again = policy_logprobs(module.vlm, module.policy, micro_batch_of(scored), 1.0)
    torch.testing.assert_close(again, scored.batch.logprobs, rtol=1e-4, atol=1e-4)


def test_reference_is_the_policy_at_the_start(rolled):
    module, scored = rolled
    micro_batch = micro_batch_of(scored)

    def policy():
        return policy_logprobs(module.vlm, module.policy, micro_batch, 1.0)

    def reference():
        return reference_logprobs(module.vlm, module.policy, module.reference, micro_batch, 1.0)

    at_start = policy()
    torch.testing.assert_close(reference(), at_start)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    torch.testing.assert_close(reference(), at_start)
    assert not torch.allclose(policy(), at_start, atol=1e-3)
    with use_adapter(module.policy, "policy"):
        pass
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert names
    assert not [n for n in names if REFERENCE in n]


def test_reference_after_full_fine_tuning_is_a_copy(make_vlm, ready):
    module = ready(make(make_vlm(lora=False), kl_coef=0.1))
    assert module.reference is not None
    assert not [p for p in module.reference.parameters() if p.requires_grad]
    assert module.reference is not module.policy
    assert not any("reference" in n for n, p in module.named_parameters() if p.requires_grad)
