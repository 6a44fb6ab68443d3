"""``vidreason classify``: classifies clips with the model of a finished run."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidreason import exit_codes
from vidreason.config.options import CommandParser
from vidreason.datamodules.clips.time_limit import WALK_TIMEOUT, ReadTimeoutError, call_reader, look_at
from vidreason.datamodules.sources.folders import clips_below
from vidreason.pipelines.state import run_notes
from vidreason.pipelines.table import percent, render_table
from vidreason.spelling import printable

if TYPE_CHECKING:
    from vidreason.inference import Decision

_WIDTH = 100  # characters per line of a trace


def main(argv: Sequence[str]) -> int:
    """Classifies files and folders of clips.

    Args:
        argv: Options of ``vidreason classify``.

    Returns:
        Exit status: 0, or 1 if a clip could not be read.

    Raises:
        ValueError: If there is no such run or stage, or a folder has no clip.
    """
    parser = CommandParser(prog="vidreason classify", description="Ask the model of a finished run about clips.")
    parser.add_argument("clips", nargs="+", metavar="FILE|FOLDER", type=Path, help="clips, or folders of clips")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline to ask (default: what it tested last)")
    parser.add_argument("--traces", type=int, metavar="K", help="traces per clip (default: the run's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else, on stdout")
    options = parser.parse_options(argv)
    paths = list(find_clips(options.clips))

    from vidreason.inference import VideoClassifier  # imports torch: mistakes in the options are reported before

    classifier = VideoClassifier.from_run(options.run, options.stage)
    print(f"answers: {classifier.answers}", file=sys.stderr, flush=True)
    for note in run_notes(options.run):
        print(f"note: {printable(note)}", file=sys.stderr, flush=True)
    limit = classifier.threshold
    if limit is not None and options.traces in (None, limit.samples):
        print(
            f"abstains below a confidence of {limit.confidence:.3f}: on clips like those of split cal, at most "
            f"{limit.error:.0%} of the other decisions are wrong (with 95 % certainty; {limit.coverage:.0%} of cal)",
            file=sys.stderr,
        )
    elif limit is not None:
        print(f"no threshold: it was fitted with {limit.samples} traces per clip", file=sys.stderr)
    decided: list[Decision] = []
    bar = tqdm(total=len(paths), desc="classifying", unit="clip", disable=len(paths) < 2, leave=False)
    with bar:
        for decision in classifier.decide(paths, options.traces):
            decided.append(decision)
            bar.update()
            if options.json:
                tqdm.write(json_line(decision))  # to stdout, without breaking the bar on stderr
    if not options.json:
        print(printable(report(decided)))
    return exit_codes.ERROR if any(decision.error is not None for decision in decided) else exit_codes.OK


def find_clips(places: Sequence[Path]) -> Iterator[Path]:
    """Yields the given files, and for a folder the clips at any depth below it, sorted.

    What is passed over in a folder is printed to stderr.

    Raises:
        ValueError: If a folder has no clip. What is missing or does not answer is reported by its decision.
    """
    for place in places:
        try:
            kind = look_at(place)
        except ReadTimeoutError:
            kind = None
        if kind != "folder":
            yield place
            continue
        found, passed_over = call_reader(clips_below, place, timeout=WALK_TIMEOUT)
        if passed_over:
            print(printable(f"{place}: passed over, no clips: {', '.join(passed_over)}"), file=sys.stderr, flush=True)
        if not found:
            raise ValueError(f"{place}: no clip in this folder")
        yield from found


def json_line(decision: Decision) -> str:
    """Returns a decision as one line of JSON with the keys path, label, probs, traces, seconds and error."""
    values = asdict(decision)
    return json.dumps({"path": values.pop("video"), **values}, ensure_ascii=False)


def report(decisions: Sequence[Decision]) -> str:
    """Returns a table of decisions, then a trace of each clip, then the clips that could not be read."""
    read = [decision for decision in decisions if decision.error is None]
    rows = [
        [d.video, _answer(d), percent(max(d.probs.values(), default=None)), _runner_up(d), f"{d.seconds:.1f}"]
        for d in read
    ]
    parts = [render_table(["clip", "label", "probability %", "next", "seconds"], rows)] if rows else []
    for decision in read:
        if decision.traces:
            text = textwrap.fill(_telling_trace(decision), _WIDTH, initial_indent="  ", subsequent_indent="  ")
            parts.append(f"{decision.video}: {len(decision.traces)} traces, for example\n{text}")
    failed = [f"not read: {decision.error}" for decision in decisions if decision.error is not None]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _answer(decision: Decision) -> str:
    """Returns the label, or why there is none."""
    if decision.abstained:
        return f"abstains ({max(decision.probs, key=decision.probs.__getitem__)})"
    return decision.label or "-"


def _runner_up(decision: Decision) -> str:
    """Returns the second most probable class, with its probability in percent."""
    ranked = sorted(((p, name) for name, p in decision.probs.items()), reverse=True)
    return f"{ranked[1][1]} {percent(ranked[1][0])}" if len(ranked) > 1 else "-"


def _telling_trace(decision: Decision) -> str:
    """Returns the first trace that answers the decided label, or the first trace."""
    from vidreason.rewards.completion import match_label, parse_completion

    names = list(decision.probs) or [decision.label or ""]
    agree = (t for t in decision.traces if match_label(parse_completion(t).answer, names) == decision.label)
    return next(agree, decision.traces[0])
