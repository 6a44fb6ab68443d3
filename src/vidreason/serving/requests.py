"""Reads requests into one form for all endpoints, with the checks that they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from vidreason.datamodules.task import Task
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.serving.bodies import parse_json
from vidreason.serving.engine import Answer, Engine, OwnAnswer
from vidreason.serving.errors import ApiError, invalid
from vidreason.serving.limits import ServingOptions
from vidreason.serving.open_questions import Asked, Probabilities
from vidreason.serving.questions import Question

Where = tuple[str | int, ...]


class ModelRequest(BaseModel):
    """A request that names the model that it is for."""

    model: str


R = TypeVar("R", bound=ModelRequest)


@dataclass(frozen=True)
class Wanted:
    """The questions of a request, and what the answer should hold."""

    questions: tuple[Question, ...]
    own: tuple[bool, ...]
    """[Q] True for a question that the run was trained on."""
    words: str = ""
    """Words beside the clip; the question of the run is asked without them, as it was in training."""
    samples: int | None = None
    include_trace: bool = False
    include_frames: bool = False
    form: object = None
    """The request as its endpoint reads it, without the clip."""

    @property
    def others(self) -> Asked:
        """The questions that the run was not trained on."""
        pairs = zip(self.questions, self.own, strict=True)
        return Asked(tuple(question for question, own in pairs if not own), self.words)


class Timing(NamedTuple):
    """Wall time of the parts of a request in seconds."""

    upload: float
    decode: float
    wait: float
    model: float


@dataclass(frozen=True)
class About:
    """The description of the model that clients get."""

    name: str
    description: str
    released: float
    """Time at which the weights were written, in seconds since 1970."""
    task: Task
    samples: int
    """Traces per clip; 0 if the model decides without traces."""
    by_answers: bool
    temperature: float | None
    threshold: Threshold | None

    @classmethod
    def of(cls, engine: Engine, name: str, released: float) -> About:
        """Returns what there is to tell about an engine."""
        return cls(
            name=name,
            description=f"{engine.task.name}: {engine.task.question}",
            released=released,
            task=engine.task,
            samples=engine.samples,
            by_answers=engine.by_answers,
            temperature=engine.temperature,
            threshold=engine.threshold,
        )

    def read(self, form: type[R], body: bytes, status: int) -> R:
        """Returns the JSON of a body as a request to this model.

        Args:
            form: The form of the endpoint.
            body: The JSON.
            status: HTTP status for a body of another form.

        Raises:
            ApiError: If the body does not fit the form, or names another model (404).
        """
        try:
            request = form.model_validate(parse_json(body, status))
        except ValidationError as error:
            raise invalid(error, status) from error
        if request.model != self.name:
            message = f"there is no model {request.model[:200]!r}; this service has {self.name!r}"
            raise ApiError(404, message, ("model",), "model_not_found")
        return request

    def calibration(self, own: bool) -> dict[str, object]:
        """Returns whether probabilities are temperature-scaled, and what the temperature was fitted on."""
        applied = own and self.temperature is not None
        fitted_on = f"split cal of the data of {self.name}" if applied else None
        return {"applied": applied, "temperature": self.temperature if applied else None, "fitted_on": fitted_on}


def threshold_keys(own: OwnAnswer | None) -> dict[str, object]:
    """Returns the keys that tell the threshold that was applied to an answer, and how well it is known."""
    found = None if own is None else own.threshold
    if found is None:
        return {"threshold": None}
    details = {
        "error": found.error,
        "bound": found.bound,
        "coverage": found.coverage,
        "accepted": found.accepted,
        "wrong": found.wrong,
        "samples": found.samples,
    }
    return {"threshold": found.confidence, "threshold_details": details}


def traces_of(own: OwnAnswer) -> list[dict[str, object]]:
    """Returns the traces of an answer."""
    return [{"text": trace.text, "answer": trace.answer, "n_tokens": trace.n_tokens} for trace in own.traces]


class Settled(NamedTuple):
    """The answer to one question."""

    names: tuple[str, ...]
    """[C]"""
    probs: Probabilities
    """[C]"""
    best: int
    """Index of the answer that was chosen."""
    own: OwnAnswer | None
    """The answer of the run, if it is the run's question."""


def settle(wanted: Wanted, answer: Answer) -> list[Settled]:
    """Returns the answers to the questions of a request, in its order of questions and of their answers."""
    others, found = iter(answer.others), list[Settled]()
    for question, own in zip(wanted.questions, wanted.own, strict=True):
        names, mine = question.names, answer.own if own else None
        probs = next(others) if mine is None else tuple(mine.probs[name] for name in names)
        likeliest = max(range(len(probs)), key=probs.__getitem__)
        # of sampled answers with equal shares the first one counts
        best = likeliest if mine is None or mine.chosen is None else names.index(mine.chosen)
        found.append(Settled(names, probs, best, mine))
    return found


def build_question(
    instructions: str, names: Sequence[str], definitions: Sequence[str], where: Where, status: int
) -> Question:
    """Returns a question.

    Raises:
        ApiError: If the model cannot be asked it.
    """
    try:
        return Question(instructions, tuple(names), tuple(definitions))
    except ValueError as error:
        raise ApiError(status, str(error).replace("class name", "the answer"), where) from error


def check_size(wanted: Wanted, options: ServingOptions, status: int) -> Wanted:
    """Checks the amount of words and the number of answers and traces of a request.

    Raises:
        ApiError: If there are too many, or a text is not Unicode.
    """
    texts = [wanted.words]
    for question in wanted.questions:
        texts += [question.instructions, *question.names, *question.definitions]
    if (length := sum(map(len, texts))) > options.max_text:
        raise ApiError(413, f"the request has {length} characters of text, more than {options.max_text}")
    if (names := sum(len(question.names) for question in wanted.questions)) > options.max_names:
        raise ApiError(413, f"the questions have {names} answers together, more than {options.max_names}")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(status, "a text holds half of a surrogate pair, which is no character") from error
    if wanted.samples is not None and not 1 <= wanted.samples <= options.max_samples:
        message = f"samples must be from 1 to {options.max_samples}, got {wanted.samples}"
        raise ApiError(status, message, ("samples",))
    return wanted


def text_content(content: Any, where: Where, status: int) -> str:
    """Returns content that is text, a list of parts or any JSON value, as text.

    Raises:
        ApiError: If a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        return "\n".join(_part_text(part, (*where, number), status) for number, part in enumerate(content))
    return compact_json(content)


def _part_text(part: dict[str, Any], where: Where, status: int) -> str:
    kind = part["type"]
    if kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind == "input_json" and "data" in part:
        return compact_json(part["data"])
    raise ApiError(status, f"a part of type {str(kind)[:40]!r} cannot stand here; only text and JSON can", where)


def compact_json(value: Any) -> str:
    """Returns a JSON value as text on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
