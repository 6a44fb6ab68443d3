"""A file of decisions, one JSON object a line, which a killed command goes on with.

Each decision is appended as it is made. Beside it, ``FILE.settings.json`` tells what its decisions depend on; a file
of other settings is refused. Of the rows that are there, 8 bytes each are kept in memory.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vidreason.datamodules.atomic_files import naming, write_text
from vidreason.datamodules.clips.time_limit import NO_FILE
from vidreason.datamodules.key_set import KeySet, key_of

_OTHER = "give another --out"


class ResultsFile:
    """An open file of decisions; use :func:`open_results`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.failed = 0
        """Rows about clips that could not be read."""
        self._file = file
        self._done = KeySet()
        self._read()

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, name: str) -> bool:
        return key_of(name) in self._done

    def add(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes rows with the keys ``path`` and ``error``, and hands them to the system before it returns.

        Raises:
            OSError: If they cannot be written; the message names the file.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with naming(self.path):
            self._file.write(lines.encode(errors="surrogatepass"))
            self._file.flush()
        for row in rows:
            self._done.add(key_of(str(row["path"])))
            self.failed += row["error"] is not None

    def _read(self) -> None:
        """Notes the rows that are there, and cuts off a last line that was not written to its end.

        Raises:
            ValueError: If a line is no row of such a file; the message names it.
        """
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line.decode(errors="surrogatepass"))
                name, error = row["path"], row["error"]
            except (ValueError, KeyError, TypeError) as wrong:
                raise ValueError(
                    f"{self.path}, line {number}: no row of vidreason classify; remove the line, or {_OTHER}"
                ) from wrong
            self._done.add(key_of(str(name)))
            self.failed += error is not None
        self._file.truncate(whole)
        self._file.seek(whole)


@contextmanager
def open_results(path: Path, settings: Mapping[str, object]) -> Iterator[ResultsFile]:
    """Opens a file of decisions to go on with it; it is made if there is none.

    Args:
        path: The file.
        settings: What the decisions depend on, JSON values by name.

    Raises:
        ValueError: If the file holds something else or decisions of other settings, or another process writes it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--out {path}: {'a folder' if path.is_dir() else NO_FILE}; {_OTHER}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _lock(file, path)
        _check_settings(path, settings, empty=os.fstat(file.fileno()).st_size == 0)
        yield ResultsFile(path, file)


def _lock(file: BinaryIO, path: Path) -> None:
    """Locks the file for this process; the system releases the lock when the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"--out {path}: another process is writing there; wait until it has ended") from error
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be locked ({error.strerror}); name a file on another disk") from error


def _check_settings(path: Path, settings: Mapping[str, object], empty: bool) -> None:
    file = path.with_name(f"{path.name}.settings.json")
    if empty:
        write_text(file, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        return
    if not file.is_file():
        raise ValueError(f"--out {path}: holds something, and no {file.name} beside it tells what; {_OTHER}")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); {_OTHER}") from error
    if not isinstance(before, dict):
        raise ValueError(f"{file}: damaged (no object); {_OTHER}")
    missing = object()
    names = [n for n in {**before, **settings} if before.get(n, missing) != settings.get(n, missing)]
    if names:
        told = [f"{name} was {_short(before, name)}, is {_short(settings, name)}" for name in names[:3]]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"--out {path}: holds decisions of other settings: {'; '.join(told)}{more}; {_OTHER}")


def _short(settings: Mapping[str, object], name: str) -> str:
    if name not in settings:
        return "absent"
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:16]}…{text[-4:]}"
