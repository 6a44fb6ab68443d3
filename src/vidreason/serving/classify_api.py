"""The form of ``POST /v1/classify``: one clip, and everything that the run has to say about it.

The body is the clip itself, or a multipart form with the clip as one part (or the pictures that are its frames). The
options ``samples`` (a number) and ``frames`` (true: the frames that the model saw, as JPEG) stand in the query.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vidreason.serving.bodies import parse_multipart
from vidreason.serving.errors import ApiError
from vidreason.serving.limits import ServingOptions
from vidreason.serving.media import Media, one_clip, read_media
from vidreason.serving.questions import Question
from vidreason.serving.requests import About, Wanted, check_size, threshold_keys, traces_of
from vidreason.serving.service import Answered

BAD = 400
_LONGEST_SIDE = 320  # pixels of a frame for a page
_QUALITY = 85
_TRUE, _FALSE = ("1", "true"), ("0", "false", "")


def parse_classify(
    about: About, options: ServingOptions, query: Mapping[str, str], body: bytes, headers: Mapping[str, str]
) -> tuple[Wanted, Media]:
    """Returns what is asked about the clip in a body.

    Raises:
        ApiError: If there is no clip, or an option is wrong.
    """
    content_type = headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        parts = parse_multipart(body, content_type, BAD)
        media = [read_media(bytes(part.content), (name,)) for name, part in parts.items()]
    elif body:
        media = [read_media(body)]
    else:
        raise ApiError(BAD, "the body is empty: send the clip itself, or a multipart form with it", code="missing_clip")
    task, samples, frames = about.task, query.get("samples"), query.get("frames", "false").lower()
    if samples is not None and not (samples.isascii() and samples.isdecimal() and len(samples) < 10):
        raise ApiError(BAD, f"samples must be a whole number, got {samples[:40]!r}", ("samples",))
    if frames not in (*_TRUE, *_FALSE):
        raise ApiError(BAD, f"frames must be true or false, got {frames[:40]!r}", ("frames",))
    question = Question(task.question, task.label_names, tuple(spec.definition for spec in task.classes))
    wanted = Wanted(
        (question,), (True,), samples=None if samples is None else int(samples), include_frames=frames in _TRUE
    )
    return check_size(wanted, options, BAD), one_clip(media, BAD)


def answer_classify(about: About, answered: Answered) -> dict[str, Any]:
    """Returns everything that is known about a clip."""
    own, video, timing = answered.answer.own, answered.video, answered.timing
    assert own is not None, "the question of the run is asked"
    found = {
        "model": about.name,
        "question": about.task.question,
        "choice": own.chosen,
        "label": own.chosen if own.reason is None else None,
        "abstain": own.reason is not None,
        "reason": own.reason,
        "probabilities": dict(own.probs),
        "probabilities_from": "shares of sampled answers" if about.by_answers else "likelihoods of the class names",
        "calibration": about.calibration(True),
        **threshold_keys(own),
        "traces": traces_of(own),
        "clip": {
            "frames": len(video.frames),
            "height": video.frames.shape[2],
            "width": video.frames.shape[3],
            "times": [index / video.timing.fps for index in video.timing.indices] if video.timing.fps > 0 else None,
            "seconds": video.timing.duration,
            "partial": video.partial,
        },
        "usage": {"input_tokens": answered.answer.input_tokens, "output_tokens": answered.answer.output_tokens},
        "timing": {**timing._asdict(), "requests_together": answered.answer.together},
    }
    if answered.wanted.include_frames:
        found["frames"] = [_data_url(frame) for frame in video.frames.permute(0, 2, 3, 1).numpy()]
    return found


def _data_url(frame: np.ndarray) -> str:
    """Returns a frame [H, W, 3] uint8 as a JPEG data URL."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
