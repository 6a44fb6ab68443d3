"""``vidreason classify``: asks a finished run about clips."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidreason import exit_codes
from vidreason.config.options import CommandParser
from vidreason.datamodules.sources.folders import clips_below
from vidreason.pipelines.table import percent, render_table

if TYPE_CHECKING:
    from vidreason.inference import Decision

_WIDTH = 100


def main(argv: Sequence[str]) -> int:
    """Classifies files and folders of clips.

    Args:
        argv: Options of ``vidreason classify``.

    Returns:
        Exit status: 0, or 1 where a clip could not be read.

    Raises:
        ValueError: There is no such run, stage or file.
    """
    parser = CommandParser(prog="vidreason classify", description="Ask the model of a finished run about clips.")
    parser.add_argument("clips", nargs="+", metavar="FILE|FOLDER", type=Path, help="clips, or folders of clips")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline to ask (default: what it tested last)")
    parser.add_argument("--traces", type=int, metavar="K", help="traces per clip (default: the run's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else, on stdout")
    options = parser.parse_options(argv)
    paths = list(find_clips(options.clips))

    from vidreason.inference import VideoClassifier

    classifier = VideoClassifier.from_run(options.run, options.stage)
    decided: list[Decision] = []
    bar = tqdm(total=len(paths), desc="classifying", unit="clip", disable=len(paths) < 2, leave=False)
    with bar:
        for decision in classifier.decide(paths, options.traces):
            decided.append(decision)
            bar.update()
            if options.json:
                tqdm.write(json_line(decision))
    if not options.json:
        print(report(decided))
    return exit_codes.ERROR if any(decision.error is not None for decision in decided) else exit_codes.OK


def find_clips(places: Sequence[Path]) -> Iterator[Path]:
    """Yields the files as they are given, and the clips of folders, sorted, of any depth.

    Raises:
        ValueError: A folder holds no clip. (A file that is missing is reported with the decisions.)
    """
    for place in places:
        if not place.is_dir():
            yield place
            continue
        found = clips_below(place)
        if not found:
            raise ValueError(f"{place}: no clip in this folder")
        yield from found


def json_line(decision: Decision) -> str:
    """One line: path, label, probs, traces, seconds, error."""
    values = asdict(decision)
    return json.dumps({"path": values.pop("video"), **values}, ensure_ascii=False)


def report(decisions: Sequence[Decision]) -> str:
    """A table of decisions, and behind it the trace of each that agrees with it; clips that could not be read last."""
    read = [decision for decision in decisions if decision.error is None]
    rows = [
        [d.video, d.label or "-", percent(d.probs[d.label] if d.label else None), _runner_up(d), f"{d.seconds:.1f}"]
        for d in read
    ]
    parts = [render_table(["clip", "label", "probability %", "next", "seconds"], rows)] if rows else []
    for decision in read:
        if decision.traces:
            text = textwrap.fill(_telling_trace(decision), _WIDTH, initial_indent="  ", subsequent_indent="  ")
            parts.append(f"{decision.video}: {len(decision.traces)} traces, for example\n{text}")
    failed = [f"not read: {decision.error}" for decision in decisions if decision.error is not None]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _runner_up(decision: Decision) -> str:
    others = [(p, name) for name, p in decision.probs.items() if name != decision.label]
    share, name = max(others)
    return f"{name} {percent(share)}"


def _telling_trace(decision: Decision) -> str:
    """The first trace that names the label decided on, else the first."""
    from vidreason.rewards.completion import match_label, parse_completion

    names = list(decision.probs)
    agree = (t for t in decision.traces if match_label(parse_completion(t).answer, names) == decision.label)
    return next(agree, decision.traces[0])
