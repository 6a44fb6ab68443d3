"""Micro-batches: which completions count, and how a step is cut."""

from dataclasses import replace

import torch

from vidreason.lightning_modules.rl.microbatch import count_step, finished_mask, make_micro_batches, split_evenly
from vidreason.lightning_modules.rl.objective import LossInputs, PolicyLoss
from vidreason.lightning_modules.rl.reference import score_rollouts

ALL = torch.ones(3, dtype=torch.bool)


def test_truncated_completions_may_be_left_out(rolled):
    module, item = rolled
    groups = [[replace(c, finish_reason="length") for c in group] for group in item.batch.completions]
    for b, g in ((0, 1), (2, 3)):
        groups[b][g] = replace(groups[b][g], finish_reason="stop")
    batch = replace(item.batch, completions=tuple(map(tuple, groups)))
    finished, tokens = finished_mask(batch), batch.texts.loss_mask
    assert finished.nonzero().flatten().tolist() == [1, 11]
    advantages, scored = torch.ones(3, 4, dtype=torch.float64), [replace(item, batch=batch)]
    kept, cut = (make_micro_batches(scored, advantages, ALL, masked) for masked in (False, True))
    mask = cut[0].completion_mask
    assert [n for n, length in enumerate(mask.sum(1).tolist()) if length] == [1, 11]
    assert torch.equal(mask[1], tokens[1])
    assert torch.equal(kept[0].completion_mask, tokens)
    assert int(count_step(kept).tokens) == int(tokens.sum())
    assert int(count_step(cut).tokens) == int(mask.sum())
    assert float(count_step(cut).completions) == 12, "what is masked is still a completion of the step"
    scores = score_rollouts(module.vlm, module.policy, cut[0], 1.0)
    inputs = LossInputs(scores.logprobs, cut[0].advantages, mask, count_step(cut), 6, batch.logprobs)
    (gradient,) = torch.autograd.grad(PolicyLoss()(inputs).loss, scores.logprobs)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_a_clip_that_does_not_count_is_in_no_mask_and_no_count(rolled):
    _, item = rolled
    (micro_batch,) = make_micro_batches([item], torch.ones(3, 4), torch.tensor([True, False, True]))
    rows = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    assert torch.equal(micro_batch.sample_mask, rows)
    assert torch.equal(micro_batch.completion_mask, item.batch.texts.loss_mask & rows[:, None])
    counts = count_step([micro_batch])
    assert (float(counts.completions), float(counts.tokens)) == (8, float(micro_batch.completion_mask.sum()))
    (nothing,) = make_micro_batches([item], torch.ones(3, 4), ~ALL)
    assert [float(count) for count in count_step([nothing])] == [0, 0, 0]


def test_minibatches_are_even_and_never_empty():
    sizes = [[len(m) for m in split_evenly(range(n), k)] for n, k in [(4, 2), (5, 2), (1, 3), (3, 3)]]
    assert sizes == [[2, 2], [2, 3], [1], [1, 1, 1]]
