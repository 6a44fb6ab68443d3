"""``clips.json`` of an exported folder: ids of the run's clips by their content."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidreason.answering.loaded import OpenedRun
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.mounts import Lookout
from vidreason.datamodules.clips.time_limit import LOOK_TIMEOUT, ReadTimeoutError, call_for_files, call_reader
from vidreason.datamodules.file_hash import content_sha, file_size

HASHED_BYTES = 4 * 10**9
"""Clips of the data set are hashed up to this many bytes, test splits first."""
HASHING_S = 600.0
"""Seconds after which no further clip is hashed."""


def write_clips(opened: OpenedRun, file: Path) -> tuple[int, int]:
    """Writes the ids of the data set's clips by their content; returns how many were hashed and how many were left."""
    tests = opened.data.test_split_names if opened.clips else ()
    fields, timeout = opened.task.metadata_fields, opened.data.frames.timeout or LOOK_TIMEOUT
    try:
        sizes = list(call_for_files(file_size, [clip.path for clip in opened.clips], timeout)) if opened.clips else []
    except (ReadTimeoutError, OSError):
        sizes = [None] * len(opened.clips)
    hashes, budget, lookout = dict[int, str](), HASHED_BYTES, Lookout()
    end = time.monotonic() + HASHING_S
    for place in sorted(range(len(sizes)), key=lambda place: opened.clips[place].split not in tests):
        clip, size = opened.clips[place], sizes[place]
        if size is not None and size <= budget and clip.stretch is None and time.monotonic() < end:
            with suppress(DecodeError, OSError):  # a mount may have gone since the sizes were read
                lookout.look(clip.path)
                hashes[place] = call_reader(content_sha, clip.path, timeout=timeout)
                budget -= size
    found: dict[str, Any] = {}
    for place in sorted(hashes):  # of clips with the same content the first one counts, as in the run
        clip = opened.clips[place]
        shown = {name: value for name, value in clip.fields.items() if name in fields}
        found.setdefault(hashes[place], {"id": clip.video_id, "fields": shown})
    file.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    return len(hashes), len(sizes) - len(hashes)
