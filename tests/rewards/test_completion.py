"""The grammar: what is read from empty, malformed, nested, adversarial and perfect completions."""

import time

import pytest

from vidreason.rewards.completion import (
    CompletionForm,
    answer_start,
    find_markup,
    match_label,
    parse_completion,
    render_completion,
    same_label,
)

PERFECT = "<think>A man lifts a parcel.</think><answer>delivery</answer>"


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (PERFECT, "A man lifts a parcel.", "delivery"),
        ("", None, None),
        ("   \n", None, None),
        ("delivery", None, None),
        ("<think>a</think>", "a", None),
        ("<answer>b</answer>", None, "b"),
        ("<answer>b</answer><think>a</think>", "a", "b"),
        ("<think></think><answer></answer>", "", ""),
        ("<think>\n a \n</think>\n<answer>\tb \n</answer>", "a", "b"),
        ("<think>a<answer>b</answer>", None, "b"),
        ("<think>a</think><answer>b", "a", None),
        ("<think>a</think>answer>b</answer>", "a", None),
        ("<answer>b</answer><answer>c</answer>", None, "b"),
        ("<think>maybe <answer>b</answer></think><answer>c</answer>", "maybe <answer>b</answer>", "b"),
        ("<answer><answer>b</answer></answer>", None, "<answer>b"),
        ("<think><think>a</think></think><answer>b</answer>", "<think>a", "b"),
        ("</answer><answer>b</answer>", None, "b"),
        ("<Answer>b</Answer>", None, None),
        ("<answer>door left open</answer>", None, "door left open"),
        ("<answer>b<|im_end|></answer>", None, "b<|im_end|>"),
    ],
)
def test_first_blocks_are_read_from_any_text(text: str, reasoning: str | None, answer: str | None) -> None:
    parsed = parse_completion(text)
    assert (parsed.text, parsed.reasoning, parsed.answer) == (text, reasoning, answer)


@pytest.mark.parametrize(
    "text",
    [
        PERFECT,
        " \n" + PERFECT + "\n\n",
        PERFECT + "<|im_end|>",
        PERFECT + "<|im_end|>\n<|endoftext|>",
        PERFECT + " </s>",
        PERFECT + "<end_of_utterance>",
        "<think>a</think>\n\n<answer>b</answer>",
        "<think>\na\nb\n</think><answer> b </answer>",
        "<think></think><answer></answer>",
        "<think>1 < 2, and 3 > 2; x<y, y>z, <- ->, a <3 b</think><answer>b</answer>",
        "<think>Ein Käfer 🐞 läuft.</think><answer>normal</answer>",
    ],
)
def test_well_formed(text: str) -> None:
    assert parse_completion(text).well_formed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "delivery",
        "<think>a</think>",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "So: <think>a</think><answer>b</answer>",
        "<think>a</think>so <answer>b</answer>",
        "<think>a</think><answer>b</answer> is my answer",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think><think>a</think></think><answer>b</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<think>maybe <answer>b</answer></think><answer>b</answer>",
        "<think>a</think><answer><answer>b</answer></answer>",
        "<think>a</think><answer><think>b</think></answer>",
        "<think>a</think><answer>b</answer></answer>",
        "<think>a< Think ></think><answer>b</answer>",
        "<think>a< / answer ></think><answer>b</answer>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "<Think>a</Think><Answer>b</Answer>",
        "<think >a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><|im_start|>user",
        "<think>a</think><answer>b</answer><|video_pad|>",
        "<|im_start|><think>a</think><answer>b</answer>",
        "<think>a</think><|im_end|><answer>b</answer>",
        PERFECT + PERFECT,
    ],
)
def test_malformed(text: str) -> None:
    assert not parse_completion(text).well_formed


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|endoftext|>",
        "<image>",
        "<video>",
        "<IMG_CONTEXT>",
        "<row_1_col_2>",
        "<global-img>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        "<start_of_turn>",
        "</s>",
        "<｜end▁of▁sentence｜>",
    ],
)
def test_special_tokens_spoil_either_block(token: str) -> None:
    assert not parse_completion(f"<think>a {token} b</think><answer>c</answer>").well_formed
    assert not parse_completion(f"<think>a</think><answer>c{token}</answer>").well_formed
    assert find_markup(f"a {token} b") == token
    with pytest.raises(ValueError, match="tag or special token"):
        render_completion(f"a {token}", "b")


def test_render_and_parse_are_inverse() -> None:
    parsed = parse_completion(render_completion("  A dog, 1 < 2.\nIt leaves. ", " door left open "))
    assert parsed.well_formed
    assert (parsed.reasoning, parsed.answer) == ("A dog, 1 < 2.\nIt leaves.", "door left open")
    assert render_completion("", "b") == "<think></think><answer>b</answer>"


@pytest.mark.parametrize(
    ("reasoning", "answer"), [("a</think>", "b"), ("a", "<answer>b"), ("a", " "), ("< THINK >", "b")]
)
def test_render_refuses_what_could_not_be_read_back(reasoning: str, answer: str) -> None:
    with pytest.raises(ValueError, match="answer|reasoning"):
        render_completion(reasoning, answer)


def test_answer_start() -> None:
    assert answer_start("<think>a</think><answer>b</answer>") == len("<think>a</think>")
    assert answer_start("x<answer>") == 1
    assert answer_start("x</answer>") is None


def test_labels_match_by_stripped_case_folded_equality_only() -> None:
    names = ("normal", "Door left open", "Straße")
    assert match_label(" NORMAL\n", names) == "normal"
    assert match_label("door LEFT open", names) == "Door left open"
    assert match_label("STRASSE", names) == "Straße"
    for wrong in (None, "", "abnormal", "norm", "normal.", "door  left open", "normal normal"):
        assert match_label(wrong, names) is None
    assert not same_label(None, "")


@pytest.mark.parametrize(
    "unit", ["<think>", "<answer>", "<", "< ", "<think>a</think>", "<|im_end|>", " ", "</answer> "]
)
def test_reading_takes_linear_time(unit: str) -> None:
    start = time.perf_counter()
    for head in ("", PERFECT, "<think>a<", "<think>a</think><answer>b<"):
        parse_completion(head + unit * 50_000)
    assert time.perf_counter() - start < 2.0


FORMS = {
    "think": "<think>why</think><answer>b</answer>",
    "no_think": "<answer>b</answer>",
    "answer_first": "<answer>b</answer><think>why</think>",
}


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("mode", FORMS)
def test_a_form_accepts_its_own_blocks_and_no_others(mode: str, confidence: bool) -> None:
    form = CompletionForm(mode, confidence)  # type: ignore[arg-type]
    for other, text in FORMS.items():
        for stated in (False, True):
            whole = text + "<confidence>0.75</confidence>" * stated
            parsed = parse_completion(f" {whole}\n<|im_end|>", form)
            assert parsed.well_formed == (other == mode and stated == confidence)
            assert parsed.answer == "b"
            assert parsed.confidence == (0.75 if stated else None)
    rendered = render_completion("why", "b", form, 0.75 if confidence else None)
    assert rendered == FORMS[mode] + "<confidence>0.75</confidence>" * confidence


def test_a_confidence_is_a_number_between_0_and_1() -> None:
    form = CompletionForm("no_think", confidence=True)
    for text, value in [
        ("0", 0.0),
        ("1", 1.0),
        (" 0.5 ", 0.5),
        ("1.01", None),
        ("-0.1", None),
        ("80%", None),
        ("", None),
    ]:
        parsed = parse_completion(f"<answer>b</answer><confidence>{text}</confidence>", form)
        assert (parsed.confidence, parsed.well_formed) == (value, value is not None)
    for wrong in (None, 1.5, -0.1):
        with pytest.raises(ValueError, match="a confidence between 0 and 1"):
            render_completion("", "b", form, wrong)
    with pytest.raises(ValueError, match="no confidence"):
        render_completion("", "b", confidence=0.5)
