"""One file of traces that several processes write: each appends to a file of its own, and the first joins them.

Appends of several writers to one file are not safe everywhere: on a network file system one may overwrite another, and
who takes back a line that no longer fits on the disk takes back what others have written behind it.
"""

from __future__ import annotations

from pathlib import Path

from vidreason.datamodules.traces import TraceHeader, TraceStore


def own_part(path: Path, header: TraceHeader, rank: int) -> TraceStore:
    """Returns where a process writes: the first in the file itself, another one beside it (``traces.rank1.jsonl``).

    Raises:
        ValueError: What lies there was begun by other weights, prompt, task or sampling.
    """
    return TraceStore.create(path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}"), header)


def join_parts(path: Path) -> None:
    """Moves into the file what lies beside it, also what an interrupted run left there; nobody else may write.

    Raises:
        ValueError: A part was begun by other weights, prompt, task or sampling.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))
    for part in parts:
        store = TraceStore.open(path)
        have = {(record.video_id, record.sample) for record in store.records()}
        found = TraceStore.create(part, store.header).records()  # which mends a line that a kill cut off
        store.append([record for record in found if (record.video_id, record.sample) not in have])
        part.unlink()
