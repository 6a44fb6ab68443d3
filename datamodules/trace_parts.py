"""Trace files written by several processes: each appends to a file of its own, and the first process joins them.

Several writers must not append to one file: on a network file system one may overwrite another, and a writer that
removes its partly written line from a full disk would remove later lines of other writers as well.
"""

from __future__ import annotations

from pathlib import Path

from vidreason.datamodules.traces import TraceHeader, TraceStore


def own_part(path: Path, header: TraceHeader, rank: int) -> TraceStore:
    """Returns the store that a process writes to: the file itself for rank 0, else ``traces.rank1.jsonl`` and so on.

    Raises:
        ValueError: If that file was written with other weights, prompt, task or sampling.
    """
    return TraceStore.create(path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}"), header)


def join_parts(path: Path) -> None:
    """Appends the parts beside a file to it, including those of an interrupted run; no process may write meanwhile.

    Raises:
        ValueError: If a part was written with other weights, prompt, task or sampling.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))
    for part in parts:
        store = TraceStore.open(path)
        have = {(record.video_id, record.sample) for record in store.records()}
        found = TraceStore.create(part, store.header).records()  # repairs a line that a kill cut off
        store.append([record for record in found if (record.video_id, record.sample) not in have])
        part.unlink()
