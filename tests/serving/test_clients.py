"""The two interfaces, driven by the clients that people have: ``openai`` and ``typesafe-sdk``."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import served_model as world
import typesafe_sdk
from PIL import Image
from transformers.decision.configuration_utils import DecisionConfig
from transformers.decision.template_utils import Question as DecisionQuestion

from vidreason.answering.loaded import LoadedModel

OWN = {
    "type": "choice",
    "name": "light",
    "instructions": f"  {world.TASK.question}\n",
    "choices": [{"value": "grey"}, {"value": "dark", "description": "ignored"}, {"value": "bright"}],
}
NIGHT = {"type": "predicate", "name": "night", "instructions": [{"type": "input_text", "text": "It is night."}]}
MUCH = {
    "type": "score",
    "instructions": "How much moves?",
    "levels": [{"label": "nothing"}, {"label": "little", "description": "a leaf"}, {"label": "much"}],
}
TYPED = {"type": "choice", "instructions": "Is it day?", "choices": [{"value": True}, {"value": False}]}


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(clip: bytes) -> list:
    """An input with a clip whose declared type is wrong, text, JSON and items of tools."""
    parts = [
        {"type": "input_video", "video_url": data_url(clip, "image/png")},
        {"type": "input_text", "text": "The door of a house."},
        {"type": "input_json", "data": {"camera": 3}},
    ]
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    return [{"role": "user", "content": parts}, call, {"type": "function_call_output", "call_id": "1", "output": "no"}]


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def typesafe(port: int) -> Iterator[typesafe_sdk.TypeSafeClient]:
    with typesafe_sdk.TypeSafeClient(
        api_key="none", base_url=f"http://127.0.0.1:{port}", model=world.NAME, timeout=60.0
    ) as client:
        yield client


def test_openai_reads_all_kinds_of_answers(client: openai.OpenAI, clips: list[bytes]):
    made = client.decisions.create(
        model=world.NAME, input=about(clips[1]), questions=[OWN, NIGHT, MUCH, TYPED], extra_body={"include_trace": True}
    )
    own, night, much, typed = made.answers
    assert (made.model, own.type, own.name) == (world.NAME, "choice", "light")
    assert [entry.value for entry in own.probabilities] == ["grey", "dark", "bright"]
    best = max(own.probabilities, key=lambda entry: entry.probability)
    assert (own.choice, own.confidence) == (best.value, best.probability)
    assert own.calibration["applied"] is True
    assert own.calibration["temperature"] == 1.7
    assert "cal" in own.calibration["fitted_on"]
    assert len(own.traces) == 2
    assert (night.type, night.name) == ("predicate", "night")
    assert 0 < night.probability < 1
    assert [entry.value for entry in much.probabilities] == [0, 1, 2]
    assert much.score == pytest.approx(sum(entry.value * entry.probability for entry in much.probabilities))
    assert isinstance(typed.choice, bool)
    assert {entry.value for entry in typed.probabilities} == {True, False}
    for answer in (night, much, typed):
        assert answer.calibration == {"applied": False, "temperature": None, "fitted_on": None}
        assert not hasattr(answer, "traces")
    usage = made.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens == usage.output_tokens_details.reasoning_tokens
    assert sum(trace["n_tokens"] for trace in own.traces) == usage.output_tokens > 0
    assert (usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (0, 0)


def test_a_question_is_the_runs_own_by_its_values_and_its_words(client: openai.OpenAI, clips: list[bytes]):
    fewer = {**OWN, "choices": OWN["choices"][:2]}
    other = {**OWN, "instructions": "How light is it"}
    asked = [OWN, fewer, other]
    made = client.decisions.create(model=world.NAME, input=about(clips[1]), questions=asked)
    assert [answer.calibration["applied"] for answer in made.answers] == [True, False, False]
    assert not hasattr(made.answers[0], "traces"), "only on request"


@pytest.mark.slow
def test_pictures_are_the_frames_of_a_clip(client: openai.OpenAI):
    def picture(level: int) -> dict:
        file = io.BytesIO()
        Image.new("RGB", (96, 64), (level,) * 3).save(file, "PNG")
        return {"type": "input_image", "image_url": data_url(file.getvalue(), "image/jpeg"), "detail": "low"}

    frames = [picture(level) for level in (0, 80, 160, 240)]
    made = [
        client.decisions.create(model=world.NAME, input=[{"role": "user", "content": parts}], questions=[TYPED])
        for parts in (frames, frames[::-1], frames)
    ]
    probs = [answer.answers[0].probabilities[0].probability for answer in made]
    assert probs[0] == pytest.approx(probs[2], abs=1e-6)
    assert abs(probs[0] - probs[1]) > 1e-6, "their order counts"
    apart = [frames[0], {"type": "input_text", "text": "and"}, frames[1]]
    with pytest.raises(openai.BadRequestError, match="2 places"):
        client.decisions.create(model=world.NAME, input=[{"role": "user", "content": apart}], questions=[TYPED])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is no model 'gpt'"),
        ({"input": "no clip"}, openai.BadRequestError, "no clip"),
        ({"input": [{"role": "user", "content": [{"text": "?"}]}]}, openai.BadRequestError, "needs a type"),
        ({"questions": []}, openai.BadRequestError, "questions: List should have at least 1"),
        ({"questions": [{**OWN, "choices": OWN["choices"][:1]}]}, openai.BadRequestError, "at least 2"),
        ({"questions": [{"type": "box"}]}, openai.BadRequestError, "box"),
        ({"questions": [{**TYPED, "choices": [{"value": True}, {"value": "true"}]}]}, openai.BadRequestError, "twice"),
        ({"extra_body": {"samples": 0}}, openai.BadRequestError, "samples must be from 1"),
    ],
)
def test_openai_shows_what_is_wrong(client: openai.OpenAI, clips: list[bytes], change: dict, kind: type, message: str):
    given = {"model": world.NAME, "input": about(clips[1]), "questions": [OWN]}
    with pytest.raises(kind, match=message) as caught:
        client.decisions.create(**{**given, **change})
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_no_address_is_opened(client: openai.OpenAI, tmp_path: Path, clips: list[bytes]):
    (tmp_path / "clip.mp4").write_bytes(clips[0])
    for url in ("http://example.org/a.mp4", f"file://{tmp_path}/clip.mp4", str(tmp_path / "clip.mp4")):
        for kind, key in (("input_video", "video_url"), ("input_image", "image_url")):
            with pytest.raises(openai.BadRequestError, match="opens no address") as caught:
                client.decisions.create(
                    model=world.NAME, input=[{"role": "user", "content": [{"type": kind, key: url}]}], questions=[OWN]
                )
            assert caught.value.param == f"input[0].content[0].{key}"


@pytest.mark.slow
def test_below_the_threshold_there_is_no_decision(loaded: LoadedModel, clips: list[bytes]):
    service = world.make_service(replace(loaded, threshold=world.threshold(0.9999)))
    with world.running(service) as port:
        with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
            refused, typed = client.decisions.create(
                model=world.NAME, input=about(clips[1]), questions=[OWN, TYPED]
            ).answers
            assert (refused.type, refused.name, refused.reason) == ("refusal", "light", "below_threshold")
            best = max(refused.probabilities, key=lambda entry: entry["probability"])
            assert refused.choice == best["value"]
            assert refused.threshold == 0.9999
            assert refused.threshold_details["bound"] == 0.09
            assert typed.type == "choice", "a threshold is of the run's question"
            again = client.decisions.create(
                model=world.NAME, input=about(clips[1]), questions=[OWN], extra_body={"samples": 3}
            )
            assert (again.answers[0].type, again.answers[0].threshold) == ("choice", None)
        question = {
            "type": "choice",
            "instructions": world.TASK.question,
            "criteria": dict.fromkeys(world.TASK.label_names),
        }
        asset = {"type": "video", "format": "mp4", "data_base64": base64.b64encode(clips[1]).decode()}
        body = {"model": world.NAME, "state": "v", "assets": {"v": asset}, "questions": {"light": question}}
        answer = world.call(port, "/v1/systemone", body).body["answers"]["light"]
        assert (answer["abstain"], answer["reason"]) == (True, "below_threshold")
        assert answer["choice"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
        whole = world.call(port, "/v1/classify", clips[1]).body
        assert (whole["label"], whole["choice"], whole["abstain"]) == (None, answer["choice"], True)


def test_typesafe_reads_all_kinds_of_answers(typesafe: typesafe_sdk.TypeSafeClient, tmp_path: Path, clips: list[bytes]):
    """A clip as its image: the client sends it as a part of a multipart body, by the name ``image``, with zstd."""
    (tmp_path / "clip.mp4").write_bytes(clips[1])
    criteria = dict.fromkeys(world.TASK.label_names)
    questions = {
        "light": typesafe_sdk.Choice(instructions=world.TASK.question, criteria=criteria),
        "night": typesafe_sdk.Noul(instructions="Is it night?", criteria={"true": "dark sky", "false": None}),
        "much": typesafe_sdk.Score(instructions="How much?", criteria=["nothing at all", "a little", "a lot"]),
    }
    clip = typesafe_sdk.Image(tmp_path / "clip.mp4")
    found = typesafe.system_one(state={"clip": clip, "note": "north"}, questions=questions)
    light = found.choices["light"]
    assert found.raw_http_response.request.headers["content-encoding"] == "zstd"
    assert len(found.request_id) == 32
    assert found.model == world.NAME
    assert set(light.probabilities) == set(criteria)
    best = max(light.probabilities.values())
    assert light.confidence == pytest.approx((best - 1 / 3) / (1 - 1 / 3))
    assert 0 < found.nouls["night"].noul < 1
    assert found.scores["much"].legend == {0: "nothing at all", 1: "a little", 2: "a lot"}
    assert found.usage.input_tokens > 0
    raw = found.raw_http_response.json()["answers"]
    assert [raw[name]["calibration"]["applied"] for name in questions] == [True, False, False]
    assert "abstain" not in raw["light"]
    traced = typesafe.system_one(
        state=clip, questions=questions, extra_body={"include_trace": True, "samples": 3}
    ).raw_http_response.json()
    assert len(traced["answers"]["light"]["traces"]) == 3


def test_both_interfaces_give_one_answer(
    typesafe: typesafe_sdk.TypeSafeClient, client: openai.OpenAI, port: int, clips: list[bytes]
):
    """The same clip and question through three endpoints; the clip is one of the run's data set."""
    criteria = dict.fromkeys(world.TASK.label_names)
    question = typesafe_sdk.Choice(instructions=world.TASK.question, criteria=criteria)
    one = typesafe.system_one(state=typesafe_sdk.Image(clips[0]), questions={"light": question}).choices["light"]
    other = client.decisions.create(model=world.NAME, input=about(clips[0]), questions=[OWN]).answers[0]
    whole = world.call(port, "/v1/classify", clips[0]).body
    assert {entry.value: entry.probability for entry in other.probabilities} == pytest.approx(one.probabilities)
    assert whole["probabilities"] == pytest.approx(one.probabilities)
    assert one.choice == other.choice == whole["label"]


def test_answers_have_the_keys_of_the_decision_pipeline(port: int, clips: list[bytes]):
    """``transformers`` writes what its pipeline answers from the same question and probabilities."""
    questions = {
        "tone": {
            "type": "choice",
            "instructions": "How is it?",
            "criteria": {"calm": "slow", "wild": None, "odd": None},
        },
        "much": {"type": "score", "instructions": "How much?", "criteria": ["nothing", "little", "much"]},
        "night": {"type": "noul", "instructions": "Is it night?"},
    }
    asset = {"type": "video", "format": "mp4", "data_base64": base64.b64encode(clips[2]).decode()}
    body = {"model": world.NAME, "state": {"clip": "v"}, "assets": {"v": asset}, "questions": questions}
    answers = world.call(port, "/v1/systemone", body).body["answers"]
    for name, question in questions.items():
        ours = answers[name]
        given = ours.get("probabilities", {"true": ours.get("noul"), "false": 1 - ours.get("noul", 0.0)})
        theirs = DecisionQuestion.from_request(name, question, DecisionConfig()).answer(list(given.values()))
        assert set(ours) == {*theirs, "calibration", "threshold"}
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("change", "loc"),
    [
        ({"model": 1}, ["body", "model"]),
        ({"questions": {"a": {"type": "box"}}}, ["body", "questions", "a"]),
        ({"questions": {str(i): {"type": "noul"} for i in range(65)}}, ["body", "questions"]),
        ({"assets": {}}, []),
        ({"assets": {"v": {"data_base64": "?"}}}, ["body", "assets", "v", "data_base64"]),
        ({"assets": {str(i): {"data_base64": ""} for i in range(5)}}, ["body", "assets"]),
        ({"stream": True}, ["body", "stream"]),
    ],
)
def test_typesafe_form_of_what_is_wrong(port: int, clips: list[bytes], change: dict, loc: list):
    asset = {"type": "video", "format": "mp4", "data_base64": base64.b64encode(clips[0]).decode()}
    body = {"model": world.NAME, "state": "v", "assets": {"v": asset}, "questions": {"n": {"type": "noul"}}}
    reply = world.call(port, "/v1/systemone", {**body, **change})
    assert reply.status == 422
    assert reply.body["detail"][0]["loc"] == loc
    assert set(reply.body["detail"][0]) == {"loc", "msg", "type"}


def test_models_are_listed_for_both_clients(client: openai.OpenAI, typesafe: typesafe_sdk.TypeSafeClient):
    assert [model.id for model in client.models.list()] == [world.NAME]
    assert [(model.name, model.release_date) for model in typesafe.models.list().models] == [(world.NAME, "2026-09-21")]
