"""Sampled completions: their seeds, their order, their tokens."""

import pytest
import torch

from vidreason.datamodules.prompts import ReasonView
from vidreason.lightning_modules.vlms.completions import (
    CompletionBatch,
    completion_seed,
    generate_completions,
    take_prompts,
)
from vidreason.lightning_modules.vlms.generation import Sampling

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture
def sampled(make_vlm, make_data):
    vlm = make_vlm("tiny")
    data = make_data(vlm)
    data.connect(train_view=ReasonView(data.task))
    batch = next(iter(data.loader("val", ReasonView(data.task), batch_size=3)))
    model = vlm.build()

    def sample(seed: int = 0, step: int = 0, rows: tuple[int, ...] = (0, 1, 2)) -> CompletionBatch:
        prompts = take_prompts(vlm, batch.prompts, torch.tensor(rows))
        return generate_completions(vlm, model, prompts, [batch.clips[r] for r in rows], 2, SHORT, seed, step)

    return vlm, sample


def test_seeds_depend_on_everything_that_names_a_completion():
    seed = completion_seed(0, 0, "clip", 0)
    assert seed == completion_seed(0, 0, "clip", 0)
    others = {completion_seed(1, 0, "clip", 0), completion_seed(0, 1, "clip", 0), completion_seed(0, 0, "clop", 0)}
    assert len(others | {seed, completion_seed(0, 0, "clip", 1)}) == 5
    assert 0 <= seed < 2**63
    assert seed == 1577910116778885603, "a changed hash would silently change every sampled text"


def test_completions_stand_in_order_and_do_not_depend_on_their_batch(sampled):
    _, sample = sampled
    whole = sample()
    assert whole.texts.owner.tolist() == [0, 0, 1, 1, 2, 2]
    alone = sample(rows=(2,))
    for a, b in zip(whole.completions[2], alone.completions[0], strict=True):
        assert a.text == b.text
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)
    assert [c.text for c in whole.completions[0]] != [c.text for c in sample(seed=1).completions[0]]
    assert [c.text for c in whole.completions[0]] != [c.text for c in sample(step=1).completions[0]]


def test_completions_carry_their_tokens(sampled):
    _, sample = sampled
    whole = sample()
    rows = [completion for group in whole.completions for completion in group]
    for n, completion in enumerate(rows):
        assert completion.ids.tolist() == whole.texts.ids[n][whole.texts.mask[n]].tolist()
        assert completion.n_tokens == int(whole.texts.loss_mask[n].sum())
        assert (completion.finish_reason == "length") == (completion.n_tokens == 5)


def test_take_keeps_prompts_and_completions_together(sampled):
    vlm, sample = sampled
    whole = sample()
    part = whole.take(vlm, [2, 0])
    assert [clip.video_id for clip in part.clips] == ["val_2", "val_0"]
    assert part.completions == (whole.completions[2], whole.completions[0])
    assert part.texts.owner.tolist() == [0, 0, 1, 1]
    assert torch.equal(part.texts.ids, whole.texts.ids[[4, 5, 0, 1]])
    assert torch.equal(part.logprobs, whole.logprobs[[4, 5, 0, 1]])
    assert torch.equal(part.prompts.inputs["input_ids"], whole.prompts.inputs["input_ids"][[2, 0]])
