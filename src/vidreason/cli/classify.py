"""``vidreason classify``: classifies clips with the model of a finished run, a few or a million of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidreason import exit_codes
from vidreason.answering.results import ResultsFile, open_results
from vidreason.answering.shard import Shard
from vidreason.config.options import CommandParser
from vidreason.datamodules.sources.listing import ListedClip, Listing
from vidreason.pipelines.state import run_notes
from vidreason.pipelines.table import percent, render_table
from vidreason.signals import handle_signals
from vidreason.spelling import printable

if TYPE_CHECKING:
    from vidreason.inference import Decision, VideoClassifier

_WIDTH = 100  # characters per line of a trace


def main(argv: Sequence[str]) -> int:
    """Classifies files, folders of clips and the rows of manifests.

    Args:
        argv: Options of ``vidreason classify``.

    Returns:
        Exit status: 0, or 1 if a clip could not be read.

    Raises:
        ValueError: If there is no such run or stage, a folder has no clip, a manifest is malformed, or the file of
            results holds something else.
    """
    options = _parse(argv)
    shard = Shard.of_environment() if options.shard is None else Shard.parse(options.shard)
    with handle_signals():
        listing = Listing(options.clips, options.root)
        clips = (clip for clip in listing.clips() if shard.owns(clip.name))
        if listing.total is not None:
            listing.total = round(listing.total / shard.of)  # for the progress bar
        classifier = _load(options)
        _tell(classifier, options)
        if options.out is None:
            return _show(classifier, listing, clips, options)
        settings = classifier.settings(options.traces) | {"root": options.root and os.fspath(options.root)}
        with open_results(shard.file(options.out), settings) as results:
            return _write(classifier, listing, clips, results, options.traces)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="vidreason classify", description="Ask the model of a finished run about clips.")
    parser.add_argument(
        "clips", nargs="+", metavar="FILE|FOLDER|MANIFEST", type=Path, help="clips, folders, or .csv and .jsonl files"
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    model.add_argument("--export", type=Path, metavar="DIR", help="folder of vidreason export")
    parser.add_argument("--base", metavar="FOLDER", help="base of an exported adapter (default: as the folder says)")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline to ask (default: what it tested last)")
    parser.add_argument("--traces", type=int, metavar="K", help="traces per clip (default: the run's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else, on stdout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to a file, and go on where it ends")
    parser.add_argument("--shard", metavar="I/N", help="decide about one of N parts (default: RANK of torchrun)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of a manifest's paths (default: its own)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="clips per batch (default: 8)")
    parser.add_argument("--readers", type=int, metavar="R", help="clips read at once (default: CPUs, at most 8)")
    options = parser.parse_options(argv)
    for name, least in (("batch_size", 1), ("readers", 0), ("traces", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    for name, needed in (("stage", "run"), ("base", "export")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise ValueError(f"--{name}: belongs to --{needed}; leave it out")
    return options


def _load(options: argparse.Namespace) -> VideoClassifier:
    from vidreason.inference import VideoClassifier  # imports torch: mistakes in the options are reported before

    if options.run is not None:
        return VideoClassifier.from_run(options.run, options.stage, options.batch_size, options.readers)
    return VideoClassifier.from_export(options.export, options.base, options.batch_size, options.readers)


def _tell(classifier: VideoClassifier, options: argparse.Namespace) -> None:
    """Prints to stderr which model answers, and what is known about it."""
    print(f"answers: {classifier.answers}", file=sys.stderr, flush=True)
    for note in run_notes(options.run) if options.run is not None else ():
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


def _show(
    classifier: VideoClassifier, listing: Listing, clips: Iterator[ListedClip], options: argparse.Namespace
) -> int:
    """Prints decisions as a table, or as JSON lines as they are made."""
    decided, failed = list["Decision"](), False
    with _bar(listing.total) as bar:
        for decision in classifier.decide(clips, options.traces):
            failed |= decision.error is not None
            bar.update()
            if options.json:
                tqdm.write(json_line(decision))  # to stdout, without breaking the bar on stderr
            else:
                decided.append(decision)
    _tell_passed_over(listing)
    if not options.json:
        print(printable(report(decided)))
    return _status(failed)


def _write(
    classifier: VideoClassifier,
    listing: Listing,
    clips: Iterable[ListedClip],
    results: ResultsFile,
    traces: int | None,
) -> int:
    """Appends the decisions about clips that are not in the file yet."""
    before, unanswered, first = len(results), 0, ""
    left = None if listing.total is None else max(listing.total - before, 0)
    try:
        with _bar(left) as bar:
            for decision in classifier.decide((clip for clip in clips if clip.name not in results), traces):
                bar.update()
                if decision.unanswered:
                    unanswered, first = unanswered + 1, first or str(decision.error)
                elif decision.video not in results:  # it may be listed twice
                    results.add([row_of(decision)])
        _tell_passed_over(listing)
    except KeyboardInterrupt:
        print(f"{results.path}: {len(results)} clips are in it; the same command goes on", file=sys.stderr, flush=True)
        raise
    print(f"{results.path}: {len(results)} clips, {len(results) - before} of them new, {results.failed} not read")
    if unanswered:
        print(
            printable(f"{unanswered} clips are not in it, and the same command asks about them again: {first}"),
            file=sys.stderr,
        )
    return _status(results.failed > 0 or unanswered > 0)


def _bar(total: int | None) -> tqdm[None]:
    hidden = total is not None and total < 2
    return tqdm(total=total, desc="classifying", unit="clip", disable=hidden, leave=False)


def _tell_passed_over(listing: Listing) -> None:
    if told := listing.passed_over():
        print(printable(f"passed over, no clips: {told}"), file=sys.stderr, flush=True)


def _status(failed: bool) -> int:
    # torchrun ends all processes if one of them has another status than 0
    return exit_codes.ERROR if failed and int(os.environ.get("WORLD_SIZE") or 1) == 1 else exit_codes.OK


def row_of(decision: Decision) -> dict[str, object]:
    """Returns a decision as a row with the keys path, label, probs, traces, seconds, error and abstained."""
    values = asdict(decision)
    del values["unanswered"]
    return {"path": values.pop("video"), **values}


def json_line(decision: Decision) -> str:
    """Returns a decision as one line of JSON."""
    return json.dumps(row_of(decision), ensure_ascii=False)


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
