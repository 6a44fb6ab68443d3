"""Files of generated rationales and traces, with hashes of the weights, prompt and task that produced them.

A file has one JSON object per line: a header, then one completion per line. Lines are only appended, so that an
interrupted generation can continue; a last line that a crash has truncated is dropped.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import RawIOBase
from pathlib import Path
from typing import Any, Literal

from vidreason.datamodules.atomic_files import naming

_LOG = logging.getLogger(__name__)

_VERSION_KEY = "vidreason_traces"
_VERSION = 1


@dataclass(frozen=True)
class TraceHeader:
    """Hashes of the weights, prompt and task that produced a trace file, and its sampling options."""

    external: bool
    """True if another model (a teacher) wrote the file; its weights are not compared with ours."""
    base_sha: str
    adapter_sha: str
    prompt_sha: str
    task_sha: str
    sampling: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceRecord:
    """One completion for one clip."""

    video_id: str
    sample: int
    """Number of the completion of the clip, 0 to K - 1."""
    text: str
    reasoning: str | None
    answer: str | None
    finish_reason: Literal["stop", "length"]
    logprob_sum: float
    n_tokens: int
    kept: bool = True
    reject_reason: str | None = None


class TraceStore:
    """A trace file; use ``create`` to write one and ``open`` to read one.

    Args:
        path: The file.
        header: The header in its first line.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.header = header

    @classmethod
    def create(cls, path: str | Path, header: TraceHeader) -> TraceStore:
        """Creates a file, or continues one with the same weights, prompt, task and sampling.

        Raises:
            ValueError: If the file has another header.
        """
        path = Path(path)
        header = _header_from(_header_line(header), path)
        lines = _complete_lines(path, repair=True) if path.exists() else []
        if lines:
            found = _header_from(lines[0], path)
            differing = [f.name for f in fields(TraceHeader) if getattr(found, f.name) != getattr(header, f.name)]
            if differing:
                raise ValueError(
                    f"{path}: was begun with another {', '.join(differing)}; remove it or choose another run folder"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, [_header_line(header)])
        return cls(path, header)

    @classmethod
    def open(cls, path: str | Path) -> TraceStore:
        """Opens a file for reading.

        Raises:
            ValueError: If there is no such file, or its first line is not a header.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file of traces; write it with `vidreason predict`")
        lines = _complete_lines(path, repair=False)
        if not lines:
            raise ValueError(f"{path}: missing header: not a trace file")
        return cls(path, _header_from(lines[0], path))

    def append(self, records: Iterable[TraceRecord]) -> None:
        """Appends completions, each line in one write, and flushes them to the disk."""
        _append(self.path, [json.dumps(asdict(record), ensure_ascii=False) for record in records])

    def records(self, kept_only: bool = False) -> list[TraceRecord]:
        """Returns all completions in file order; of two with the same clip and sample only the later one.

        Raises:
            ValueError: If a line is malformed; the message names file and line.
        """
        found: dict[tuple[str, int], TraceRecord] = {}
        for number, line in enumerate(_complete_lines(self.path, repair=False), start=1):
            if number > 1:
                record = _record_from(line, f"{self.path}, line {number}")
                found[record.video_id, record.sample] = record
        return [record for record in found.values() if record.kept or not kept_only]

    def by_video(self, kept_only: bool = True) -> dict[str, tuple[TraceRecord, ...]]:
        """Returns completions by video id in the order of sample numbers; clips without completions are left out."""
        grouped: dict[str, list[TraceRecord]] = {}
        for record in self.records(kept_only):
            grouped.setdefault(record.video_id, []).append(record)
        return {name: tuple(sorted(group, key=lambda record: record.sample)) for name, group in grouped.items()}

    def missing(self, video_ids: Sequence[str], samples: int) -> dict[str, tuple[int, ...]]:
        """Returns the missing sample numbers below ``samples`` by video id; complete clips are left out."""
        written = {(record.video_id, record.sample) for record in self.records()}
        gaps = {name: tuple(k for k in range(samples) if (name, k) not in written) for name in video_ids}
        return {name: numbers for name, numbers in gaps.items() if numbers}

    def check(self, expected: TraceHeader, allow_external: bool = True) -> None:
        """Checks that the traces were written with the expected weights, prompt and task.

        Args:
            expected: The header that the stage itself would write.
            allow_external: Accept a teacher's traces, of which only task and prompt are compared.

        Raises:
            ValueError: If they differ; the message names the differences and the remedy.
        """
        if self.header.external and not allow_external:
            raise ValueError(
                f'{self.path}: holds a teacher\'s traces ("external": true), which only cold start takes; '
                "write traces with the model that this stage starts from"
            )
        named = {
            "base_sha": "weights (base)",
            "adapter_sha": "weights (adapter)",
            "prompt_sha": "prompt",
            "task_sha": "task",
        }
        differing = []
        for key, name in named.items():
            if self.header.external and key in ("base_sha", "adapter_sha"):
                continue
            found, wanted = getattr(self.header, key), getattr(expected, key)
            if found != wanted:
                differing.append(f"{name}: {key} is {found or 'empty'}, expected {wanted or 'empty'}")
        if differing:
            raise ValueError(
                f"{self.path}: was written by something else: {'; '.join(differing)}. Write the traces again with "
                '`vidreason predict`, or, if a teacher wrote them for this task and prompt, set "external": true in '
                "the file's first line (cold start alone takes such traces)"
            )

    def check_sampling(self, expected: TraceHeader) -> None:
        """Checks that traces were sampled with the options of the stage, which also apply at test; numbers may differ.

        A header without sampling options is accepted.

        Raises:
            ValueError: If they differ; the message names the difference and the remedy.
        """
        found, wanted = _without_count(self.header.sampling), _without_count(expected.sampling)
        if found and found != wanted:
            raise ValueError(
                f"{self.path}: was sampled with {found}, but the stage samples with {wanted}, at test too: set "
                "model.init_args.traces.sampling as the file has it, or write the traces again"
            )


def _without_count(sampling: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in sampling.items() if name not in ("samples", "seed")}


def _header_line(header: TraceHeader) -> str:
    return json.dumps({_VERSION_KEY: _VERSION, **asdict(header), "sampling": dict(header.sampling)}, ensure_ascii=False)


def _header_from(line: str, path: Path) -> TraceHeader:
    content = _object(line, f"{path}, line 1")
    if content.pop(_VERSION_KEY, None) != _VERSION:
        raise ValueError(
            f'{path}, line 1: not the header of a trace file, which begins {{"{_VERSION_KEY}": {_VERSION}, ...}}'
        )
    return TraceHeader(**_known(content, TraceHeader, f"{path}, line 1", optional=("sampling",)))


def _record_from(line: str, where: str) -> TraceRecord:
    content = _known(_object(line, where), TraceRecord, where, optional=("kept", "reject_reason"))
    record = TraceRecord(**content)
    if not math.isfinite(record.logprob_sum):
        raise ValueError(
            f"{where}: logprob_sum is {record.logprob_sum}: the weights that wrote this text were not finite; write "
            "the file again with those of a stage that trained well"
        )
    return record


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


def _known(content: dict[str, Any], record: type, where: str, optional: Sequence[str]) -> dict[str, Any]:
    names = [f.name for f in fields(record)]
    missing = [name for name in names if name not in content and name not in optional]
    unknown = [name for name in content if name not in names]
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise ValueError(f"{where}: {problem}; the keys are {', '.join(names)}")
    return content


def _complete_lines(path: Path, repair: bool) -> list[str]:
    """Returns the complete lines of a file; ``repair`` also removes a truncated last line from the disk."""
    content = path.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    try:
        lines = whole.decode("utf-8").split("\n") if whole else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    # A last line without a newline: complete if an editor removed the newline, else truncated by a crash.
    if rest:
        if _is_json(rest):
            lines.append(rest.decode("utf-8"))
            if repair:
                _append(path, [""])
        else:
            _LOG.warning("%s: the last line was cut in half and is dropped", path)
            if repair:
                os.truncate(path, len(content) - len(rest))
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _append(path: Path, lines: Sequence[str]) -> None:
    before = path.stat().st_size if path.exists() else None
    try:
        with naming(path), path.open("ab", buffering=0) as file:
            for line in lines:
                _write_all(file, line.encode("utf-8") + b"\n")
            os.fsync(file.fileno())
    except OSError:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            # A full disk must not leave half a line, to which a later run would append.
            os.truncate(path, before)
        raise


def _write_all(file: RawIOBase, content: bytes) -> None:
    """Writes all bytes; a single ``write`` to a raw file may write only a part of them."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
