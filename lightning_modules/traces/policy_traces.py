"""The traces that a calibrator reads from files: those of its policy, or of policies that have not seen the clips."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore

Traces = dict[str, tuple[TraceRecord, ...]]


def policy_traces(path: str | None, header: TraceHeader, samples: int) -> Traces:
    """Returns the first ``samples`` traces of each clip by video id, of the clips that have so many.

    Args:
        path: A trace file; None has none.
        header: The header that the policy itself would write.
        samples: Traces per clip.

    Raises:
        ValueError: If the file belongs to another policy, task, prompt or sampling.
    """
    if path is None:
        return {}
    store = TraceStore.open(Path(path))
    store.check(header, allow_external=False)
    store.check_sampling(header)
    stored = {name: group[:samples] for name, group in store.by_video(kept_only=False).items()}
    return {name: group for name, group in stored.items() if len(group) == samples}


def cross_fitted_traces(
    known: Traces, files: Sequence[str], header: TraceHeader, samples: int, train: Set[str]
) -> Traces:
    """Returns traces in which those of training clips come from policies that were trained on other clips.

    A training clip that no file has, such as one that could not be read, has no traces.

    Args:
        known: Traces of the calibrator's own policy; those of training clips are left out.
        files: Trace files, one per fold.
        header: The header that the policy of the calibrator would write; only its weights differ.
        samples: Traces per clip.
        train: Video ids of the training clips.

    Raises:
        ValueError: If a file was written by the policy of the calibrator itself, which has trained on all clips, or
            belongs to another base, task, prompt or sampling; or if two files have a clip in common.
    """
    found: Traces = {}
    for path in files:
        writer = TraceStore.open(Path(path)).header.adapter_sha
        if writer == header.adapter_sha:
            raise ValueError(
                f"fold_traces: {path} was written by the calibrator's own policy, which has trained on these clips; "
                "name the files of policies that were trained without them (`vidreason pipeline --folds K`)"
            )
        traces = policy_traces(path, replace(header, adapter_sha=writer), samples)
        both = sorted(traces.keys() & found.keys())
        if both:
            raise ValueError(f"fold_traces: {path} has traces of {both[0]}, which an earlier file has, too")
        found |= traces
    own = {name: group for name, group in known.items() if name not in train}
    return own | {name: group for name, group in found.items() if name in train}
