"""The model of the service: together or alone, its answers are those of the deciders."""

import gc
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import served_model as world
from torch import Tensor

from vidreason.answering.deciding import ClipDecider
from vidreason.answering.loaded import LoadedModel
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.task import ClassSpec, Task
from vidreason.datamodules.types import Clip
from vidreason.inference import VideoClassifier
from vidreason.lightning_modules.decisions.deciders import AnswerDecider, LikelihoodDecider
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.lightning_modules.weights.answering import Answering
from vidreason.rewards.completion import CompletionForm
from vidreason.serving.engine import Answer, Engine, Job, Refused
from vidreason.serving.open_questions import Asked
from vidreason.serving.questions import Question

NOTHING = Asked(())
NIGHT = Question("Is it night?", ("yes", "no"))
WEATHER = Question("How is the weather?", ("sun", "light rain", "snow"), ("", "drops", ""))


def job(folder: Path, number: int, own: bool = True, asked: Asked = NOTHING, samples: int | None = None) -> Job:
    video = read_frames(folder / f"{number}.mp4", FrameOptions(num_frames=4, timeout=None))
    return Job(Clip(Path(f"{number}.mp4"), None, f"clip {number}"), video, own, asked, samples)


def test_answers_do_not_depend_on_the_other_requests(loaded: LoadedModel, clip_folder: Path):
    engine = Engine(loaded, 8)
    jobs = [
        job(clip_folder, 0),
        job(clip_folder, 1, asked=Asked((NIGHT, WEATHER), "From the north.")),
        job(clip_folder, 2, own=False, asked=Asked((WEATHER,))),
        job(clip_folder, 0, samples=3),
        job(clip_folder, 0, asked=Asked((NIGHT,))),
    ]
    together = engine.answer(jobs)
    alone = [engine.answer([one])[0] for one in jobs]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert (one.own is None) == (other.own is None)
        if one.own is not None and other.own is not None:
            assert one.own.traces == other.own.traces
            assert one.own.probs == pytest.approx(other.own.probs, abs=1e-5)
        for mine, theirs in zip(one.others, other.others, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert (one.input_tokens, one.output_tokens) == (other.input_tokens, other.output_tokens)
    assert [one.together for one in together if isinstance(one, Answer)] == [5] * 5
    assert len(alone[3].own.traces) == 3
    assert alone[0].own.traces == alone[4].own.traces


def test_the_frames_of_a_clip_are_released(loaded: LoadedModel, clip_folder: Path):
    """The vision cache knows the clip when the calibrator asks for it, and may not hold more than its embeddings."""
    engine, frames = Engine(loaded, 8), list[ref[Tensor]]()
    for number in range(3):
        asked = job(clip_folder, number)
        frames.append(ref(asked.video.frames))
        engine.answer([asked])
        del asked
    gc.collect()
    assert [one() is None for one in frames] == [True, True, False], "those of the last clip are there until the next"


def test_the_question_of_the_run_has_the_answer_of_the_classifier(loaded: LoadedModel, clip_folder: Path):
    known = replace(loaded, find_known=lambda path: Clip(path, None, f"clip {path.stem}"))
    decision = VideoClassifier(known)(clip_folder / "1.mp4")
    found = Engine(loaded, 8).answer([job(clip_folder, 1)])[0]
    assert found.own.probs == pytest.approx(decision.probs, abs=1e-6)
    assert tuple(trace.text for trace in found.own.traces) == decision.traces
    assert found.own.chosen == decision.label


def test_other_questions_are_answered_by_the_base_alone(loaded: LoadedModel, small_base: Path, clip_folder: Path):
    """The same words in a closed prompt, decided by a model that never had an adapter."""
    base = TinyVLM(path=str(small_base))
    asked = job(clip_folder, 1, own=False, asked=Asked((NIGHT, WEATHER)))
    found = Engine(loaded, 8).answer([asked])[0].others
    for question, probs in zip((NIGHT, WEATHER), found, strict=True):
        definitions = question.definitions or ("",) * len(question.names)
        classes = tuple(ClassSpec(*pair) for pair in zip(question.names, definitions, strict=True))
        task = Task("other", question.instructions, classes)
        answering = Answering(base, base.build().eval(), LikelihoodDecider(task))
        decider = ClipDecider(replace(loaded, answering=answering, task=task), 1)
        (decided,) = decider.decide([decider.data.hold(asked.clip, asked.video)])
        assert not isinstance(decided, str)
        assert probs == pytest.approx(decided.decisions.probs[0].tolist(), abs=1e-5)


def test_words_of_a_request_and_the_adapter_change_open_answers(loaded: LoadedModel, clip_folder: Path):
    engine = Engine(loaded, 8)
    plain = engine.answer([job(clip_folder, 1, own=False, asked=Asked((NIGHT,)))])[0].others[0]
    said = engine.answer([job(clip_folder, 1, own=False, asked=Asked((NIGHT,), "It is three in the morning."))])[0]
    assert max(abs(a - b) for a, b in zip(plain, said.others[0], strict=True)) > 1e-4
    mine = world.TASK.question
    question = Question(mine, world.TASK.label_names, tuple(spec.definition for spec in world.TASK.classes))
    base = engine.answer([job(clip_folder, 1, asked=Asked((question,)))])[0]
    tuned = [base.own.probs[name] for name in question.names]
    assert max(abs(a - b) for a, b in zip(tuned, base.others[0], strict=True)) > 1e-4


def test_a_request_that_the_model_does_not_take_fails_alone(loaded: LoadedModel, clip_folder: Path):
    long = Question("Is it night? " * 1500, ("yes", "no"))
    jobs = [job(clip_folder, 0), job(clip_folder, 1, asked=Asked((long,))), job(clip_folder, 2)]
    first, refused, last = Engine(loaded, 8).answer(jobs)
    assert isinstance(refused, Refused)
    assert refused.by_request
    assert "context" in refused.why
    assert refused.why.endswith("send less text, or fewer or shorter answers")
    assert isinstance(first, Answer)
    assert isinstance(last, Answer)


def test_a_threshold_holds_for_its_number_of_traces(loaded: LoadedModel, clip_folder: Path):
    engine = Engine(replace(loaded, threshold=world.threshold(0.9999)), 8)
    own = engine.answer([job(clip_folder, 1)])[0].own
    assert own.reason == "below_threshold"
    assert own.chosen == max(own.probs, key=own.probs.__getitem__)
    other = engine.answer([job(clip_folder, 1, samples=3)])[0].own
    assert (other.reason, other.threshold) == (None, None)


def test_sampled_answers_that_name_no_class_are_no_answer(loaded: LoadedModel, clip_folder: Path):
    decider = AnswerDecider(world.TASK, 2, Sampling(max_new_tokens=4), 0, CompletionForm())
    engine = Engine(replace(loaded, answering=replace(loaded.answering, decider=decider, generator=None)), 8)
    own = engine.answer([job(clip_folder, 1)])[0].own
    assert (own.chosen, own.reason) == (None, "no_answer")
    assert list(own.probs.values()) == pytest.approx([1 / 3] * 3)
    assert engine.temperature is None


def test_the_service_keeps_no_clips_on_disk_and_few_in_memory(loaded: LoadedModel):
    vlm = loaded.answering.vlm
    Engine(loaded, 8)
    assert vlm.vision_cache is not None
    assert vlm.vision_cache.store is None
    assert vlm.vision_cache.options.memory_gb < 1
