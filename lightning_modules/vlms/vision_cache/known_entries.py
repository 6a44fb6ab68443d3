"""Stores the facts of a video that its prompt is made from as named tensors of a cache entry."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from vidreason.datamodules.types import FrameTiming, KnownVideo
from vidreason.lightning_modules.vlms.vision_cache.embedding_store import Entry

PROMPT = "prompt."
"""Beginning of the names of these tensors."""
_SETTINGS, _TOKEN, _OTHER = f"{PROMPT}settings", f"{PROMPT}token.", f"{PROMPT}other."


def to_tensors(known: KnownVideo | None) -> dict[str, Tensor]:
    """Returns the tensors to store; none if ``known`` is None."""
    if known is None:
        return {}
    timing = known.timing
    settings = {
        "video": known.video,
        "shape": known.shape,
        "timing": [timing.fps, timing.total_frames, timing.indices],
        "pixels": dict(known.pixels),
    }
    text = json.dumps(settings).encode()
    arrays = {_TOKEN + name: value for name, value in known.per_token.items()}
    arrays |= {_OTHER + name: value for name, value in known.others.items()}
    made = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return {_SETTINGS: torch.from_numpy(np.frombuffer(text, np.uint8).copy()), **made}


def from_tensors(entry: Entry) -> KnownVideo | None:
    """Returns what an entry says about prompts; None if it has embeddings only."""
    if _SETTINGS not in entry:
        return None
    settings = json.loads(entry[_SETTINGS].numpy().tobytes())
    fps, total, indices = settings["timing"]
    return KnownVideo(
        video=settings["video"],
        shape=tuple(settings["shape"]),
        timing=FrameTiming(fps, total, tuple(indices)),
        per_token={name[len(_TOKEN) :]: value.numpy() for name, value in entry.items() if name.startswith(_TOKEN)},
        others={name[len(_OTHER) :]: value.numpy() for name, value in entry.items() if name.startswith(_OTHER)},
        pixels={name: (dtype, tuple(shape)) for name, (dtype, shape) in settings["pixels"].items()},
    )
