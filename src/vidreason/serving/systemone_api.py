"""The form of ``POST /v1/systemone`` (``transformers serve`` 5.24, client ``typesafe-sdk`` 0.7), its clip an asset.

Unknown keys are refused, except ``include_trace`` and ``samples``. Beside the keys of the form, an answer has
``calibration``, ``threshold``, ``abstain`` and, if ``include_trace`` is true, ``traces``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from vidreason.datamodules.task import Task
from vidreason.serving.bodies import Part, parse_multipart
from vidreason.serving.errors import ApiError
from vidreason.serving.limits import ServingOptions
from vidreason.serving.media import Media, decode_base64, one_clip, read_media
from vidreason.serving.questions import Question, above_chance, level_confidence, mean_level
from vidreason.serving.requests import (
    About,
    ModelRequest,
    Settled,
    Wanted,
    Where,
    build_question,
    check_size,
    compact_json,
    settle,
    threshold_keys,
    traces_of,
)
from vidreason.serving.service import Answered

BAD = 422
NOUL = ("yes", "no")
Content = str | dict[str, Any] | list[Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NoulCriteria(_Strict):
    """Definitions of the two answers of a ``noul`` question."""

    true: Content | None = None
    false: Content | None = None


class NoulQuestion(_Strict):
    """A question that is answered by yes or no."""

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: NoulCriteria | None = None


class ChoiceQuestion(_Strict):
    """A question for one of several options."""

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: Annotated[dict[str, Content | None], Field(min_length=2)]


class ScoreQuestion(_Strict):
    """A question for a level of a scale."""

    type: Literal["score"]
    instructions: Content | None = None
    criteria: Annotated[list[Content], Field(min_length=2)]


class Asset(_Strict):
    """A clip, or a picture that is one of its frames; its type is taken from its content."""

    type: Literal["image", "video"] | None = None
    format: str | None = None
    data_base64: str | None = None
    part: str | None = None


AnyQuestion = ChoiceQuestion | NoulQuestion | ScoreQuestion


class SystemOneRequest(_Strict, ModelRequest):
    """A request about one clip."""

    state: str | dict[str, Any] | list[Any]
    questions: Annotated[
        dict[str, Annotated[AnyQuestion, Field(discriminator="type")]], Field(min_length=1, max_length=64)
    ]
    assets: Annotated[dict[str, Asset], Field(max_length=4)] = Field(default_factory=dict)
    include_trace: bool = False
    samples: StrictInt | None = None


def parse_systemone(
    about: About, options: ServingOptions, body: bytes, headers: Mapping[str, str]
) -> tuple[Wanted, Media]:
    """Returns the questions and the clip of a request.

    Raises:
        ApiError: If the body does not fit the form.
    """
    parts: Mapping[str, Part] = {}
    content_type = headers.get("content-type", "application/json")
    if content_type.lower().startswith("multipart/form-data"):
        parts = parse_multipart(body, content_type, BAD)
        if "request" not in parts:
            raise ApiError(BAD, "the multipart body has no part 'request' with the JSON", ("request",), "missing")
        body = bytes(parts["request"].content)
    elif "json" not in content_type:
        raise ApiError(415, "the body must be JSON or multipart/form-data", code="unsupported_body")
    request = about.read(SystemOneRequest, body, BAD)
    names = sorted(request.assets, key=len, reverse=True)
    if "" in names:
        raise ApiError(BAD, "the placeholder of an asset is empty", ("assets",))
    media = [_media(request.assets[name], parts, ("assets", name)) for name in _by_place(request)]
    items = request.questions.items()
    questions = tuple(_question(item, about.task, names, ("questions", name)) for name, item in items)
    own = tuple(question.is_of(about.task) for question in questions)
    words = _without(_text(request.state), names)
    form = request.model_copy(update={"assets": {}, "state": ""})  # the clip need not stay in memory
    wanted = Wanted(questions, own, words, request.samples, request.include_trace, form=form)
    return check_size(wanted, options, BAD), one_clip(media, BAD)


def _media(asset: Asset, parts: Mapping[str, Part], where: Where) -> Media:
    if asset.part is not None:
        found = parts.get(asset.part)
        if found is None or asset.part == "request":
            raise ApiError(BAD, f"the body has no part {asset.part[:100]!r}", (*where, "part"), "missing")
        return read_media(bytes(found.content), (*where, "part"))
    if asset.data_base64 is None:
        raise ApiError(BAD, "an asset needs data_base64, or part in a multipart body", where, "missing")
    return read_media(decode_base64(asset.data_base64, (*where, "data_base64"), BAD), (*where, "data_base64"))


def _by_place(request: SystemOneRequest) -> list[str]:
    """Returns the placeholders in the order in which they stand in the state, then those that do not stand there."""
    text = _text(request.state)
    return sorted(request.assets, key=lambda name: text.find(name) if name in text else len(text))


def _question(asked: AnyQuestion, task: Task, placeholders: list[str], where: Where) -> Question:
    def text(content: Content | None) -> str:
        return _without(_text(content), placeholders)

    instructions = text(asked.instructions)
    if isinstance(asked, NoulQuestion):
        criteria = asked.criteria or NoulCriteria()
        return build_question(instructions, NOUL, (text(criteria.true), text(criteria.false)), where, BAD)
    if isinstance(asked, ChoiceQuestion):
        return build_question(instructions, list(asked.criteria), list(map(text, asked.criteria.values())), where, BAD)
    levels = [text(level) for level in asked.criteria]
    if set(levels) == set(task.label_names):
        return build_question(instructions, levels, (), where, BAD)
    # Levels are descriptions of any length; the model answers their numbers.
    return build_question(instructions, [str(number) for number in range(len(levels))], levels, where, BAD)


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return compact_json(content)


def _without(text: str, placeholders: list[str]) -> str:
    """Returns a text without the places of the clip, which stands in front of all words."""
    for name in placeholders:
        text = text.replace(name, "")
    return text.strip()


def answer_systemone(about: About, answered: Answered) -> dict[str, Any]:
    """Returns the answer to a request."""
    wanted, answer = answered.wanted, answered.answer
    assert isinstance(wanted.form, SystemOneRequest)
    answers: dict[str, dict[str, Any]] = {}
    items = wanted.form.questions.items()
    for (name, asked), settled in zip(items, settle(wanted, answer), strict=True):
        own = settled.own
        found = {**_answer(asked, settled), "calibration": about.calibration(own is not None), **threshold_keys(own)}
        if own is not None and own.reason is not None:
            found |= {"abstain": True, "reason": own.reason}
        if own is not None and wanted.include_trace:
            found["traces"] = traces_of(own)
        answers[name] = found
    usage = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
    return {"model": about.name, "answers": answers, "usage": usage}


def _answer(asked: AnyQuestion, settled: Settled) -> dict[str, Any]:
    names, probs, best, _ = settled
    if isinstance(asked, NoulQuestion):
        return {"type": "noul", "noul": probs[NOUL.index("yes")]}
    if isinstance(asked, ChoiceQuestion):
        return {
            "type": "choice",
            "choice": names[best],
            "confidence": above_chance(probs),
            "probabilities": dict(zip(names, probs, strict=True)),
        }
    levels = [str(number) for number in range(len(probs))]
    return {
        "type": "score",
        "score": mean_level(probs),
        "legend": dict(zip(levels, asked.criteria, strict=True)),
        "confidence": level_confidence(probs),
        "probabilities": dict(zip(levels, probs, strict=True)),
    }
