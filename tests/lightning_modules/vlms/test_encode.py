"""Clips, prompts and texts as tensors: what the chat template puts where, masks, and use in data workers."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import vlm_builders as builders
from torch.utils.data import DataLoader

from vidreason.datamodules.types import Encoded, Example, Text, TextBatch
from vidreason.lightning_modules.vlms.base import VLM, Generated
from vidreason.lightning_modules.vlms.text.context import longest_texts

MakeVLM = Callable[..., VLM]
TRACE = "<think>a person leaves</think><answer>cat</answer>"
FRAMES = {  # what the two templates put around words
    "qwen": ("<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
    "smolvlm": ("<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>"),
}


def shown(vlm: VLM, ids: torch.Tensor, mask: torch.Tensor) -> str:
    text: str = vlm.tokenizer.decode(ids[mask].tolist())
    return text


def test_closed_prompts_and_assistant_texts(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    turn_end, lead, end = FRAMES[family]
    examples = [
        builders.make_example([TRACE, "no tags"]),
        builders.make_example(prompt="a longer question about it", seed=1),
        builders.make_example(["x"], seed=2),
    ]
    encoded = vlm.encode(examples)
    inputs, texts = encoded.prompts.inputs, encoded.texts
    mask = inputs["attention_mask"].bool()
    assert encoded.prompts.batch_size == 3
    assert encoded.prompts.turn_end.numel() == 0
    assert not mask[0, 0]
    assert mask[:, -1].all(), "padded on the left"
    for i, example in enumerate(examples):
        prompt = shown(vlm, inputs["input_ids"][i], mask[i])
        assert prompt.endswith(example.prompt.text + turn_end)
        assert prompt.count("<|video_pad|>" if family == "qwen" else "<image>") == (8 if family == "qwen" else 16)
    assert texts.owner.tolist() == [0, 0, 2]
    assert texts.parent.tolist() == [-1, -1, -1]
    assert texts.loss_mask.equal(texts.mask)
    assert [shown(vlm, texts.ids[i], texts.mask[i]) for i in range(3)] == [
        lead + TRACE + end,
        lead + "no tags" + end,
        lead + "x" + end,
    ]
    answer = shown(vlm, texts.ids[0], texts.answer_mask[0])
    assert answer.endswith("<answer>cat</answer>" + end)
    assert len(answer) <= len("><answer>cat</answer>" + end), "at most the token that holds the tag's first character"
    assert not texts.answer_mask[1:].any()
    assert int(texts.ids[1][texts.mask[1]][-1]) in vlm.stop_ids


def test_of_a_text_whose_answer_alone_is_learnt_only_the_answer_counts(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    example = builders.make_example()
    both = replace(example, texts=(Text(TRACE), Text(TRACE, learnt="answer")))
    texts = vlm.encode([both]).texts
    assert texts.ids[0].equal(texts.ids[1])
    assert texts.loss_mask[1].equal(texts.answer_mask[0])
    assert texts.answer_mask[1].equal(texts.answer_mask[0])
    assert texts.loss_mask[0].sum() > texts.loss_mask[1].sum() > 0


def test_open_prompts_and_trees(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    turn_end, lead, end = FRAMES[family]
    tree = [Text(" trace one.", "context"), Text("cat", parent=0), Text("post", parent=0), Text("direct")]
    more = [Text(" two", "context"), Text(" three", "context", parent=0), Text("visitor", parent=1)]
    encoded = vlm.encode(
        [
            builders.make_example(tree, open_prompt=True),
            builders.make_example(more, open_prompt=True, prompt="longer question", seed=1),
        ]
    )
    texts = encoded.texts
    assert texts.owner.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert texts.parent.tolist() == [-1, 0, 0, -1, -1, 4, 5]
    assert vlm.tokenizer.decode(encoded.prompts.turn_end.tolist()) == turn_end
    rows = [shown(vlm, texts.ids[i], texts.mask[i]) for i in range(7)]
    assert rows[0] == " trace one."
    assert rows[1] == turn_end + lead + "cat" + end
    assert rows[6] == turn_end + lead + "visitor" + end
    assert not texts.loss_mask[[0, 4, 5]].any()
    assert shown(vlm, texts.ids[1], texts.loss_mask[1]) == lead + "cat" + end

    inputs = encoded.prompts.inputs
    last = shown(vlm, inputs["input_ids"][0], inputs["attention_mask"][0].bool())
    assert last.endswith("what happens?")
    closed = vlm.encode([builders.make_example()]).prompts.inputs
    opened = vlm.encode([builders.make_example(open_prompt=True)]).prompts
    joined = torch.cat([opened.inputs["input_ids"][0], opened.turn_end])
    assert joined.equal(closed["input_ids"][0]), "an open prompt, closed, is the closed prompt"


def test_timing_and_pixels_reach_the_model(make_vlm: MakeVLM) -> None:
    qwen = make_vlm("qwen").encode([builders.make_example()]).prompts.inputs
    # 4 of 16 frames at 4 fps: one frame a second, 2 frames per temporal patch
    torch.testing.assert_close(qwen["second_per_grid_ts"].float(), torch.tensor([2.0]))
    small = make_vlm("qwen", max_pixels=28 * 28).encode([builders.make_example(size=(112, 112))]).prompts.inputs
    large = make_vlm("qwen", max_pixels=28 * 28 * 9).encode([builders.make_example(size=(112, 112))]).prompts.inputs
    assert small["video_grid_thw"].tolist() == [[2, 2, 2]]
    assert large["video_grid_thw"].tolist() == [[2, 6, 6]]
    smol = make_vlm("smolvlm")
    example = builders.make_example(frames=2)
    prompt = smol.tokenizer.decode(smol.encode([example]).prompts.inputs["input_ids"][0])
    assert "0:00:04 [H:MM:SS]" in prompt
    assert "Frame from 00:02:" in prompt, "the second frame is the file's ninth of 16, at 4 fps"
    with pytest.raises(ValueError, match="frames.max_pixels"):
        make_vlm("smolvlm", max_pixels=100)


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3", "glm"])
def test_max_pixels_is_the_limit_of_one_frame(make_vlm: MakeVLM, family: str) -> None:
    """480 x 640 divided by sqrt(480 * 640 / 200704), rounded down to multiples of 28: 364 x 504."""
    vlm = make_vlm(family, max_pixels=200704)
    inputs = vlm.encode([builders.make_example(frames=n, size=(480, 640), seed=n) for n in (1, 3, 16)]).prompts.inputs
    assert inputs["video_grid_thw"].tolist() == [[1, 26, 36], [2, 26, 36], [8, 26, 36]]
    visual = torch.isin(inputs["input_ids"], torch.tensor(sorted(vlm.placeholder_ids))).sum(1)
    assert visual.tolist() == [13 * 18 * steps for steps in (1, 2, 8)]


@pytest.mark.parametrize("family", ["qwen3", "glm"])
def test_without_max_pixels_an_odd_clip_is_shrunk_like_the_hub_does(make_vlm: MakeVLM, family: str) -> None:
    """With a twelfth frame, the limit of all frames together would leave 11 frames fewer pixels."""
    vlm, example = make_vlm(family), builders.make_example(frames=11, size=(140, 84))
    of_hub = vlm.processor.video_processor([example.sample.frames], do_sample_frames=False, return_tensors="pt")
    inputs = vlm.encode([example]).prompts.inputs
    assert inputs["video_grid_thw"].tolist() == of_hub["video_grid_thw"].tolist() == [[6, 6, 2]]
    torch.testing.assert_close(inputs["pixel_values_videos"], of_hub["pixel_values_videos"])


def test_clips_of_many_sizes_in_a_batch(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    examples = [
        builders.make_example(["cat"], frames=n, size=size, seed=n)
        for n, size in ((1, (40, 60)), (3, (80, 30)), (8, (56, 56)))
    ]
    model = vlm.build()
    together, texts = vlm.encode(examples).prompts, vlm.encode(examples).texts
    joint = vlm.score(model, together, texts).logprobs
    for i, example in enumerate(examples):
        alone = vlm.encode([example])
        torch.testing.assert_close(
            vlm.score(model, alone.prompts, alone.texts).logprobs[0], joint[i], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("texts", "is_open", "message"),
    [
        ([Text("review", "context")], False, "needs an open prompt"),
        ([Text("a"), Text("b", parent=0)], False, "turn has ended"),
        ([Text("a", parent=0)], False, "must be an earlier text"),
        ([Text("", "context")], True, "is empty"),
    ],
)
def test_refuses_texts_out_of_place(make_vlm: MakeVLM, texts: list[Text], is_open: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"clip0: text .*{message}"):
        make_vlm("qwen").encode([builders.make_example(texts, open_prompt=is_open)])


def test_what_looks_like_a_special_token_is_spelt(make_vlm: MakeVLM, family: str) -> None:
    """A model may write the characters of one in a trace; read back, they neither close a turn nor call for pixels."""
    vlm = make_vlm(family)
    odd = "".join(t.content for t in vlm.tokenizer.added_tokens_decoder.values() if t.special)
    for role in ("context", "assistant"):
        example = builders.make_example([Text(f"a {odd} b", role=role)], open_prompt=role == "context")
        texts = vlm.encode([example]).texts
        ids = texts.ids[0][texts.mask[0]].tolist()
        body = ids if role == "context" else ids[: -len(vlm.chat_frame.end_of_turn)]
        assert body
        assert not set(body) & set(vlm.tokenizer.all_special_ids)
        assert vlm.tokenizer.decode(body).strip() == f"a {odd} b"


def test_refuses_mixed_prompts(make_vlm: MakeVLM) -> None:
    with pytest.raises(ValueError, match="all open or all closed"):
        make_vlm("qwen").encode([builders.make_example(), builders.make_example(open_prompt=True)])


def test_refuses_a_template_that_opens_differently(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    vlm.processor.chat_template = vlm.processor.chat_template.replace("assistant\n{% endif", "helper\n{% endif")
    with pytest.raises(ValueError, match="chat template"):
        vlm.encode([builders.make_example()])


def test_sampled_tokens_as_texts(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    rows = [vlm.tokenizer(text)["input_ids"] for text in (TRACE, "no tags at all", "")]
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    made = Generated(ids, mask, torch.zeros(3, length), ("length",) * 3, torch.tensor([0, 0, 1]), (TRACE, "", ""))
    texts = vlm.texts_from(made)
    assert texts.owner.tolist() == [0, 0, 1]
    assert (texts.parent == -1).all()
    assert texts.loss_mask.equal(mask)
    answer = shown(vlm, ids[0], texts.answer_mask[0])
    assert answer in ("<answer>cat</answer>", "><answer>cat</answer>")
    assert not texts.answer_mask[1:].any()


def _encode(vlm: VLM, examples: list[Example]) -> Encoded:
    return vlm.encode(examples)


def _workers(vlm: VLM, example: Example, **options: Any) -> Encoded:
    loader = DataLoader([example] * 2, batch_size=2, num_workers=1, collate_fn=partial(_encode, vlm), **options)  # type: ignore[arg-type]
    encoded: Encoded = next(iter(loader))
    return encoded


def test_encodes_in_data_workers(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    example = builders.make_example(["cat"])
    here = vlm.encode([example] * 2)  # the processor is loaded before the fork
    there = _workers(vlm, example, multiprocessing_context="fork")
    assert here.prompts.inputs["input_ids"].equal(there.prompts.inputs["input_ids"])
    copy = pickle.loads(pickle.dumps(vlm))  # what a spawned worker gets
    assert len(pickle.dumps(vlm)) < 2000, "no processor, no weights"
    assert copy.encode([example] * 2).texts.ids.equal(here.texts.ids)
    assert vlm.encode([example]).texts.ids.equal(here.texts.ids[:1]), "pickling leaves the original as it was"


@pytest.mark.slow
def test_encodes_in_spawned_workers(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    example = builders.make_example(["cat"])
    loader = DataLoader(
        [example] * 2,  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        collate_fn=vlm.encode,
        multiprocessing_context="spawn",
    )
    there = next(iter(loader))
    assert there.texts.ids.equal(vlm.encode([example] * 2).texts.ids)


def test_what_is_longer_than_the_context_is_refused_by_name(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    examples = [builders.make_example([TRACE, "no tags"]), builders.make_example(["x"], prompt="longer " * 9, seed=1)]
    encoded = vlm.encode(examples)
    prompts, texts = encoded.prompts.inputs["attention_mask"].sum(1).tolist(), encoded.texts.mask.sum(1).tolist()
    needed = [prompts[0] + max(texts[:2]), prompts[1] + texts[2]]  # by hand: each prompt and its own longest text
    vlm.context_length = max(needed)  # type: ignore[misc]
    vlm.encode(examples)
    vlm.context_length = max(needed) - 1  # type: ignore[misc]
    name = examples[needed.index(max(needed))].sample.video_id
    with pytest.raises(ValueError, match=rf"clip {name}: its prompt has .* context is {max(needed) - 1} .*num_frames"):
        vlm.encode(examples)
    vlm.context_length = None  # type: ignore[misc]
    vlm.encode(examples)


def test_a_chain_of_texts_counts_as_a_whole() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    zeros = torch.zeros(4, 4)
    texts = TextBatch(zeros.long(), mask, mask, zeros.bool(), torch.tensor([0, 0, 0, 2]), torch.tensor([-1, 0, -1, -1]))
    assert longest_texts(texts, 3) == [5, 0, 4]  # 3 + 2 behind it, nothing, 4
