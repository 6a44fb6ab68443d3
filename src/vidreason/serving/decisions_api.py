"""The form of ``POST /v1/decisions`` (types of the client ``openai`` 3.57), with a part ``input_video``.

Keys that are not known are ignored. Beside the keys of the form, an answer has ``calibration``, ``threshold`` and, if
``include_trace`` is true, ``traces``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from vidreason.serving.engine import OwnAnswer
from vidreason.serving.errors import ApiError
from vidreason.serving.limits import ServingOptions
from vidreason.serving.media import Media, from_data_url, one_clip, read_media
from vidreason.serving.questions import Question, mean_level, text_of
from vidreason.serving.requests import (
    About,
    ModelRequest,
    Settled,
    Wanted,
    Where,
    build_question,
    check_size,
    settle,
    text_content,
    threshold_keys,
    traces_of,
)
from vidreason.serving.service import Answered

BAD = 400
PREDICATE = ("yes", "no")
Content = str | list[dict[str, Any]]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Choice(_Lenient):
    """A possible answer."""

    value: StrictStr | StrictBool
    description: str | None = None


class ChoiceQuestion(_Lenient):
    """A question for one of several choices."""

    type: Literal["choice"]
    name: str | None = None
    instructions: Content
    choices: Annotated[list[Choice], Field(min_length=2, max_length=255)]


class PredicateQuestion(_Lenient):
    """A question whether a statement is true."""

    type: Literal["predicate"]
    name: str | None = None
    instructions: Content


class Level(_Lenient):
    """A level of a scale."""

    label: str
    description: str | None = None


class ScoreQuestion(_Lenient):
    """A question for a level of a scale."""

    type: Literal["score"]
    name: str | None = None
    instructions: Content
    levels: Annotated[list[Level], Field(min_length=2, max_length=255)]


AnyQuestion = ChoiceQuestion | PredicateQuestion | ScoreQuestion


class DecisionRequest(_Lenient, ModelRequest):
    """A request about one clip."""

    input: str | list[dict[str, Any]]
    questions: Annotated[list[Annotated[AnyQuestion, Field(discriminator="type")]], Field(min_length=1, max_length=400)]
    include_trace: bool = False
    samples: StrictInt | None = None


def parse_decisions(
    about: About, options: ServingOptions, body: bytes, headers: Mapping[str, str]
) -> tuple[Wanted, Media]:
    """Returns the questions and the clip of a request.

    Raises:
        ApiError: If the body does not fit the form.
    """
    if "json" not in headers.get("content-type", "json"):
        raise ApiError(415, "the body must be JSON (Content-Type: application/json)", code="unsupported_body")
    request = about.read(DecisionRequest, body, BAD)
    words, media = _read_input(request.input)
    questions = tuple(_question(item, ("questions", i)) for i, item in enumerate(request.questions))
    own = tuple(question.is_of(about.task) for question in questions)
    form = request.model_copy(update={"input": ""})  # the clip need not stay in memory
    wanted = Wanted(questions, own, words, request.samples, request.include_trace, form=form)
    return check_size(wanted, options, BAD), media


def _question(asked: AnyQuestion, where: Where) -> Question:
    instructions = text_content(asked.instructions, (*where, "instructions"), BAD)
    if isinstance(asked, PredicateQuestion):
        return build_question(instructions, PREDICATE, ("", ""), where, BAD)
    options: list[tuple[str, str | None]] = (
        [(text_of(choice.value), choice.description) for choice in asked.choices]
        if isinstance(asked, ChoiceQuestion)
        else [(level.label, level.description) for level in asked.levels]
    )
    names, definitions = zip(*options, strict=True)
    return build_question(instructions, names, [text or "" for text in definitions], where, BAD)


def _read_input(given: str | list[dict[str, Any]]) -> tuple[str, Media]:
    """Returns the words and the clip of an input."""
    words, media, runs = list[str](), list[Media](), 0
    before: Where = ()
    for part, where in _parts([{"content": given}] if isinstance(given, str) else given):
        if isinstance(part, str):
            words.append(part)
            continue
        kind = part.get("type")
        if not isinstance(kind, str):
            raise ApiError(BAD, "a part needs a type, such as input_video or input_text", where, "missing")
        key = {"input_image": "image_url", "image_url": "image_url"}.get(kind, "video_url")
        if kind not in ("input_image", "image_url", "input_video", "video", "video_url"):
            words.append(text_content([part], where[:-1], BAD))
            continue
        url = part.get(key)
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise ApiError(BAD, f"a part of type {kind!r} needs {key!r}, a data URL", (*where, key), "missing")
        found = read_media(from_data_url(url, (*where, key), BAD), (*where, key))
        runs += found.kind == "picture" and not (before[:-1] == where[:-1] and before[-1:] == (where[-1] - 1,))  # type: ignore[operator]
        before = where if found.kind == "picture" else ()
        media.append(found)
    if runs > 1:
        raise ApiError(BAD, f"the pictures stand in {runs} places; the frames of a clip follow each other", ("input",))
    return "\n".join(filter(str.strip, words)), one_clip(media, BAD)


def _parts(items: list[dict[str, Any]]) -> Iterator[tuple[str | dict[str, Any], Where]]:
    """Yields the texts and parts of all items in order, each with its place."""
    for number, item in enumerate(items):
        for key in ("content", "output", "arguments", "input"):
            content = item.get(key)
            where: Where = ("input", number, key)
            if isinstance(content, str):
                yield content, (*where, 0)
            elif isinstance(content, list):
                for place, part in enumerate(content):
                    if not isinstance(part, dict | str):
                        raise ApiError(BAD, "a part must be an object with a type", (*where, place))
                    yield part, (*where, place)
            elif content is not None:
                raise ApiError(BAD, f"{key} must be text or a list of parts", where)


def answer_decisions(about: About, answered: Answered) -> dict[str, Any]:
    """Returns the answer to a request."""
    wanted, answer = answered.wanted, answered.answer
    assert isinstance(wanted.form, DecisionRequest)
    answers = []
    for asked, settled in zip(wanted.form.questions, settle(wanted, answer), strict=True):
        found, own = _answer(asked, settled), settled.own
        extra: dict[str, Any] = {"calibration": about.calibration(own is not None), **threshold_keys(own)}
        if own is not None and own.reason is not None:
            found = _refusal(found, settled, own)
        if own is not None and wanted.include_trace:
            extra["traces"] = traces_of(own)
        answers.append({**found, "name": asked.name, **extra})
    read, written = answer.input_tokens, answer.output_tokens
    return {
        "object": "decision",
        "answers": answers,
        "model": about.name,
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": written},
            "total_tokens": read + written,
        },
    }


def _refusal(found: dict[str, Any], settled: Settled, own: OwnAnswer) -> dict[str, Any]:
    """Returns the answer of a run that abstains, with what it would have answered."""
    pairs = zip(settled.names, settled.probs, strict=True)
    listed = [{"value": name, "probability": p} for name, p in pairs]
    choice = None if own.chosen is None else found.get("choice", own.chosen)
    kept = {"choice": choice, "probabilities": found.get("probabilities", listed)}
    return {"type": "refusal", "reason": own.reason, **kept}


def _answer(asked: AnyQuestion, settled: Settled) -> dict[str, Any]:
    names, probs, best, _ = settled
    if isinstance(asked, PredicateQuestion):
        return {"type": "predicate", "probability": probs[PREDICATE.index("yes")]}
    if isinstance(asked, ChoiceQuestion):
        pairs = zip(asked.choices, probs, strict=True)
        return {
            "type": "choice",
            "choice": asked.choices[best].value,
            "confidence": probs[best],
            "probabilities": [{"value": choice.value, "probability": p} for choice, p in pairs],
        }
    levels = enumerate(zip(names, probs, strict=True))
    return {
        "type": "score",
        "score": mean_level(probs),
        "confidence": probs[best],
        "probabilities": [{"label": name, "value": value, "probability": p} for value, (name, p) in levels],
    }
