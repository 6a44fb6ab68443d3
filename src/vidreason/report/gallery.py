"""Clips of the report: which are shown, their frames, and the rewards of their traces."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from vidreason.callbacks.film_strip import film_strip
from vidreason.config.built_stage import build_stage
from vidreason.config.quiet import quietly
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.datamodules.types import Clip
from vidreason.evaluation.plan import EVALUATION_FOLDER
from vidreason.evaluation.rows import Evaluated
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.report.runs import ReportRun
from vidreason.report.verdict import Headline
from vidreason.rewards.base import RewardFn, RewardInput, score_completion
from vidreason.rewards.completion import CompletionForm, parse_completion
from vidreason.run_folder import CONFIG_FILE, RunState, artefact_path

MOST_CLIPS = 200
WRONG_AND_SURE = 100
"""Clips that are wrong, the surest first; random ones follow."""
_SEED = 0
_QUALITY = 70
"""WebP quality of a film strip."""

_NOT_LOADED = (
    ArgumentError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Exceptions of importing or building a user's reward class. The report may be made on another machine than the run,
where the class's module or its packages are missing; rewards are left out then."""


@dataclass(frozen=True)
class ShownTrace:
    """A trace with its answer and rewards."""

    text: str
    answer: str | None
    rewards: Mapping[str, float]
    """Unweighted parts by name and ``total``; empty without rewards."""


@dataclass(frozen=True)
class ShownClip:
    """A clip of the gallery."""

    name: str
    split: str
    label: str
    decision: str | None
    """None for a clip without a decision."""
    confidence: float | None
    probs: tuple[tuple[str, float], ...]
    """Temperature-scaled probabilities, the largest first; empty if the method gives none."""
    other: str | None
    """Decision of the method that is compared with; None without one."""
    picture: str
    """Data URL of the film strip; empty if the clip cannot be read."""
    traces: tuple[ShownTrace, ...]

    @property
    def right(self) -> bool:
        """True if the decision is the label."""
        return self.decision == self.label

    @property
    def reward(self) -> float | None:
        """Mean total reward of the traces; None without rewards."""
        totals = [trace.rewards["total"] for trace in self.traces if "total" in trace.rewards]
        return sum(totals) / len(totals) if totals else None


@dataclass(frozen=True)
class Gallery:
    """The clips that are shown, and what is missing."""

    clips: tuple[ShownClip, ...]
    of: int
    """Clips that the method decided about."""
    note: str
    """The reasons why clips have no picture or no rewards, or are left out; empty if nothing is missing."""

    def first(self, kept: int) -> Gallery:
        """Returns the gallery with its first clips only, and says so."""
        gone = f"{len(self.clips) - kept} clips are left out to keep the file small."
        return replace(self, clips=self.clips[:kept], note=f"{self.note} {gone}".strip())


def show_clips(headline: Headline, runs: Sequence[ReportRun]) -> Gallery:
    """Chooses clips of the headline's method, the wrong and sure ones first, and draws them."""
    one, run = headline.method, headline.run
    known = {(p.split, p.video_id): p for p in _predictions(run, one)}
    other = _decisions_of(headline.reference, runs)
    paths, note = _clips_of(run)
    rewards, unrewarded = _rewards(run)
    shown = list[ShownClip]()
    for split, row in choose(one):
        prediction = known[split, one.decisions[split].ids[row]]
        shown.append(_shown(one, split, row, prediction, other, paths.get((split, prediction.video_id)), rewards))
    if not note and any(not clip.picture for clip in shown):
        note = "Clips without a picture cannot be read."
    decided = sum(len(d) for split, d in one.decisions.items() if split != CALIBRATION_SPLIT)
    return Gallery(tuple(shown), decided, " ".join(filter(None, (note, unrewarded))))


def choose(one: Evaluated) -> list[tuple[str, int]]:
    """Returns at most 200 places (split, row): at most 100 wrong ones, the surest first, then others at random."""
    places = [(s, row) for s, d in one.decisions.items() if s != CALIBRATION_SPLIT for row in range(len(d))]

    sure = {split: one.scaled(split).confidence for split in one.decisions}

    def confidence(place: tuple[str, int]) -> float:
        found = sure[place[0]]
        return 0.0 if found is None else float(found[place[1]])

    wrong = [(split, row) for split, row in places if not one.decisions[split].right[row]]
    first = sorted(wrong, key=confidence, reverse=True)[:WRONG_AND_SURE]
    others = sorted(set(places) - set(first))
    random.Random(_SEED).shuffle(others)
    return [*first, *others][:MOST_CLIPS]


def picture_url(clip: Clip | None) -> str:
    """Returns the film strip of a clip as a data URL; empty if there is no clip, or it cannot be read."""
    strip = None if clip is None else film_strip(clip.path, clip.stretch)
    if strip is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(strip.permute(1, 2, 0))).save(buffer, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown(
    one: Evaluated,
    split: str,
    row: int,
    prediction: Prediction,
    other: Mapping[tuple[str, str], str | None],
    clip: Clip | None,
    rewards: tuple[Sequence[RewardFn], CompletionForm],
) -> ShownClip:
    own, scaled = one.decisions[split], one.scaled(split)
    names = own.label_names
    probs = [] if scaled.probs is None else zip(names, scaled.probs[row].tolist(), strict=True)
    pred = int(own.pred[row])
    label = names[int(own.labels[row])]
    texts = prediction.traces[: one.method.samples] if one.method.samples else ()
    return ShownClip(
        name=prediction.video_id,
        split=split,
        label=label,
        decision=names[pred] if pred >= 0 else None,
        confidence=None if scaled.confidence is None else float(scaled.confidence[row]),
        probs=tuple(sorted(probs, key=lambda pair: -pair[1])),
        other=other.get((split, prediction.video_id)),
        picture=picture_url(clip),
        traces=tuple(ShownTrace(t.text, t.answer, _scores(t.text, t.n_tokens, label, names, rewards)) for t in texts),
    )


def _scores(
    text: str,
    n_tokens: int | None,
    label: str,
    label_names: tuple[str, ...],
    rewards: tuple[Sequence[RewardFn], CompletionForm],
) -> dict[str, float]:
    functions, form = rewards
    if not functions:
        return {}
    item = RewardInput(text, parse_completion(text, form), label, label_names, n_tokens=n_tokens)
    score = score_completion(functions, item)
    return {"total": score.total, **score.parts}


def _predictions(run: ReportRun, one: Evaluated) -> list[Prediction]:
    state = RunState.load(run.folder / EVALUATION_FOLDER)
    assert state is not None, "its decisions were read there"
    path = artefact_path(run.folder / EVALUATION_FOLDER / state.stages[one.method.test].folder, "predictions")
    assert path is not None, "its decisions were read there"
    return read_predictions(path)


def _decisions_of(name: str | None, runs: Sequence[ReportRun]) -> dict[tuple[str, str], str | None]:
    """Returns the decisions by (split, video id) of the first run of a method."""
    for run in runs:
        for one in run.methods():
            if f"{run.evaluated.pipeline}: {one.method.name}" == name:
                return {
                    (split, clip): own.label_names[pred] if pred >= 0 else None
                    for split, own in one.decisions.items()
                    for clip, pred in zip(own.ids, own.pred.tolist(), strict=True)
                }
    return {}


def _clips_of(run: ReportRun) -> tuple[dict[tuple[str, str], Clip], str]:
    """Returns the clips of a run by (split, video id), and why there are none; nothing is rendered or fetched."""
    config = next(stage.folder / CONFIG_FILE for stage in reversed(run.stages) if stage.folder.is_dir())
    try:
        with quietly():
            data = build_stage("test", ["--config", str(config)]).data
            assert isinstance(data, VideoDataModule)
            data.setup("test")
            splits = data.test_split_names
            return {(split, clip.video_id): clip for split in splits for clip in data.clips(split)}, ""
    except (ValueError, OSError, ArgumentError) as error:
        return {}, f"The clips were not found where the run had them ({error}), so that there are no pictures."


def _rewards(run: ReportRun) -> tuple[tuple[Sequence[RewardFn], CompletionForm], str]:
    """Returns the reward functions and the form of completions of the stage that trained on rewards, none without.

    With them comes why there are none, if the user's own class cannot be loaded here; else an empty text.
    """
    for stage in run.stages:
        file = Path(stage.folder / CONFIG_FILE)
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        init = content.get("model", {}).get("init_args") or {}
        if "rewards" in init:
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--rewards", type=list[RewardFn])
            parser.add_argument("--completion", type=CompletionForm, default=CompletionForm())
            given = {key: init[key] for key in ("rewards", "completion") if init.get(key) is not None}
            try:
                built = parser.instantiate(parser.parse_object(given))
            except _NOT_LOADED as error:
                why = str(error).strip().splitlines() or [repr(error)]
                listed = ", ".join(str(each.get("class_path")) for each in init["rewards"] or ())
                return ((), CompletionForm()), (
                    f"Traces have no rewards: those of stage {stage.name} ({listed}) cannot be loaded here ({why[0]})."
                )
            return (built.rewards or (), built.completion), ""
    return ((), CompletionForm()), ""
