"""Chat templates with the traits of current families: what they put around the words of user and assistant.

Each is a short template of our own with one trait of a family's: a blank behind the assistant's name
(LLaVA-OneVision), no end of turn (LLaVA-NeXT-Video, GLM-4.1V), an opened reasoning block (Qwen3-VL-Thinking,
Qwen3.5), or an empty one in the generation prompt (Qwen3.5, GLM and Gemma 4 without thinking).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vlm_builders as builders

from vidreason.config.trainer_cli import build
from vidreason.datamodules.types import Clip, Text
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import completions_of, generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import CompletionForm, parse_completion

MakeVLM = Callable[..., VLM]
TRACE = "<think>a person leaves</think><answer>cat</answer>"
USER = (
    "<|im_start|>user\n{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
END = "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"


def template(turn: str, prompt: str, user_end: str = "<|im_end|>\n") -> str:
    """Returns a template whose assistant turn is ``turn``, with TEXT for its words, and its generation prompt."""
    words = "{{ m['content'][0]['text'] }}".join(turn.split("TEXT"))
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        f"{USER}{user_end}"
        "{% else %}"
        f"{words}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        f"{prompt}"
        "{% endif %}"
    )


OPENED = "<|im_start|>assistant\n"
TEMPLATES = {  # template; what stands between the prompt's words and a label or a trace; what ends a turn
    "blank": (template(f"<|im_start|>assistant \nTEXT{END}\n", OPENED), OPENED, "cat", TRACE, END),
    "no_end": (
        template("<|im_start|>assistant\nTEXT", OPENED, user_end=""),
        OPENED,
        "cat",
        TRACE,
        END,
    ),
    "no_end_but_a_blank": (
        template("assistant: TEXT ", "assistant:", user_end=""),
        "assistant:",
        " cat",
        f" {TRACE}",
        END,
    ),
    "think_opened": (
        template(f"{OPENED}{EMPTY}TEXT{END}\n", f"{OPENED}<think>\n"),
        f"{OPENED}<think>\n",
        "\n</think>\n\ncat",
        "a person leaves</think><answer>cat</answer>",
        END,
    ),
    "think_opened_but_not_in_a_turn": (
        template(f"{OPENED}TEXT{END}\n", f"{OPENED}<think>\n"),
        f"{OPENED}<think>\n",
        "\n</think>\n\ncat",
        "a person leaves</think><answer>cat</answer>",
        END,
    ),
    "empty_think": (
        template(f"{OPENED}{EMPTY}TEXT{END}\n", f"{OPENED}{EMPTY}"),
        f"{OPENED}{EMPTY}",
        "cat",
        TRACE,
        END,
    ),
    "empty_think_but_not_in_a_turn": (
        template(f"{OPENED}TEXT{END}\n", f"{OPENED}<|channel>thought\n<channel|>"),
        f"{OPENED}<|channel>thought\n<channel|>",
        "cat",
        TRACE,
        END,
    ),
}


@pytest.fixture(params=TEMPLATES)
def trait(request: pytest.FixtureRequest, make_vlm: MakeVLM) -> tuple[VLM, str, str, str, str]:
    """A family with one of the templates, and what is expected around its words."""
    text, *expected = TEMPLATES[request.param]
    vlm = make_vlm("qwen")
    vlm.processor.chat_template = text
    return (vlm, *expected)


def test_texts_follow_the_generation_prompt(trait: tuple[VLM, str, str, str, str]) -> None:
    vlm, opening, label, trace, end = trait
    encoded = vlm.encode([builders.make_example(["cat", TRACE])])
    inputs, texts = encoded.prompts.inputs, encoded.texts
    prompt = vlm.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist())
    assert prompt.endswith(opening)
    rows = [vlm.tokenizer.decode(texts.ids[i][texts.mask[i]].tolist()) for i in range(2)]
    assert rows == [label + end, trace + end]
    answer = vlm.tokenizer.decode(texts.ids[1][texts.answer_mask[1]].tolist())
    assert answer.lstrip(">") == f"<answer>cat</answer>{end}"
    assert not texts.answer_mask[0].any()
    assert int(texts.ids[0][texts.mask[0]][-1]) in vlm.stop_ids


def test_an_open_prompt_closed_is_the_closed_prompt(trait: tuple[VLM, str, str, str, str]) -> None:
    vlm = trait[0]
    closed = vlm.encode([builders.make_example()]).prompts.inputs["input_ids"][0].tolist()
    opened = vlm.encode([builders.make_example([Text(" more", "context")], open_prompt=True)]).prompts
    assert [*opened.inputs["input_ids"][0].tolist(), *opened.turn_end.tolist()] == closed


@pytest.mark.parametrize("name", ["think_opened", "think_opened_but_not_in_a_turn"])
def test_completions_behind_an_opened_reasoning_are_well_formed(make_vlm: MakeVLM, name: str) -> None:
    vlm = make_vlm("qwen")
    vlm.processor.chat_template = TEMPLATES[name][0]
    prompts = vlm.encode([builders.make_example()]).prompts
    generated = vlm.generate(vlm.build(), prompts, 1, Sampling(max_new_tokens=4, temperature=0))
    sampled = vlm.tokenizer.decode(generated.ids[0][generated.mask[0]].tolist())
    assert generated.texts[0].startswith("<think>\n")
    assert f"<think>\n{sampled}".startswith(generated.texts[0]), "the tag is part of the text, not of the tokens"
    finished = generated._replace(texts=("<think>\na person leaves</think><answer>cat</answer>",))
    (completion,) = completions_of(finished)
    assert completion.parsed.well_formed
    assert completion.parsed.reasoning == "a person leaves"
    # What was sampled, learnt as a target, gives the same tokens.
    again = vlm.encode([builders.make_example([finished.texts[0]])]).texts
    assert vlm.tokenizer.decode(again.ids[0].tolist()) == f"a person leaves</think><answer>cat</answer>{END}"
    assert parse_completion(TRACE).reasoning == completion.parsed.reasoning


def switchable(vlm: VLM) -> VLM:
    """Returns the family with a template that opens the reasoning unless ``enable_thinking`` is false."""
    off = "enable_thinking is defined and not enable_thinking"
    prompt = f"{OPENED}{{% if {off} %}}{EMPTY}{{% else %}}<think>\n{{% endif %}}"
    vlm.processor.chat_template = template(f"{OPENED}TEXT{END}\n", prompt)
    return vlm


def test_arguments_of_the_template_reach_it(make_vlm: MakeVLM) -> None:
    starts = {}
    for arguments in (None, {"enable_thinking": True}, {"enable_thinking": False}):
        vlm = switchable(make_vlm("qwen", chat_template_kwargs=arguments))
        ids = vlm.encode([builders.make_example()]).prompts.inputs["input_ids"][0].tolist()
        starts[str(arguments)] = vlm.tokenizer.decode(ids).partition(OPENED)[2], vlm.chat_frame.reasoning_start
    assert list(starts.values()) == [("<think>\n", "<think>\n"), ("<think>\n", "<think>\n"), (EMPTY, "")]


@pytest.mark.parametrize("mode", ["no_think", "answer_first"])
def test_an_opened_reasoning_contradicts_other_forms(make_vlm: MakeVLM, mode: Any) -> None:
    vlm = switchable(make_vlm("qwen"))
    clip, form = Clip(Path("a.mp4"), "cat", "a"), CompletionForm(mode)
    prompts = vlm.encode([builders.make_example()]).prompts
    with pytest.raises(ValueError, match=f"completion.mode is {mode}, but .*opens <think>.*enable_thinking: false"):
        generate_completions(vlm, vlm.build(), prompts, [clip], 1, Sampling(max_new_tokens=2), 0, form=form)
    vlm = switchable(make_vlm("qwen", chat_template_kwargs={"enable_thinking": False}))
    prompts = vlm.encode([builders.make_example()]).prompts
    made = generate_completions(vlm, vlm.build(), prompts, [clip], 1, Sampling(max_new_tokens=2), 0, form=form)
    assert not made.completions[0][0].text.startswith("<think>\n")


def test_the_command_line_takes_arguments_of_the_template() -> None:
    cli = build(
        "fit", ["--config", "configs/sft_label.yaml", "--vlm.init_args.chat_template_kwargs.enable_thinking=false"]
    )
    assert cli.model.vlm.chat_template_kwargs == {"enable_thinking": False}


def test_a_turn_without_any_end_is_refused(make_vlm: MakeVLM) -> None:
    vlm = make_vlm("qwen")
    vlm.processor.chat_template = TEMPLATES["no_end"][0]
    vlm.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token, and the tokenizer has no eos_token"):
        vlm.encode([builders.make_example()])
