"""Clips a second of ``vidreason classify`` against a naive loop, and the memory of many rows.

    python benchmarks/classify_scale.py --run RUN [RUN ...] [--json FILE] [--clips 48] [--repeats 3] [--rows 1000000]

The runs are finished ones, such as those of ``vidreason demo``. Clips are 10 s of 854 x 480 pixels, H.264. *naive*
reads a clip when the model waits for it, and encodes it again for every trace and every class name; *alone* decides
about the clip behind one prefill; *batches* reads eight clips one after the other and decides about them together;
*ahead* is what the command does: clips are read by helper processes while the model decides. Each variant and repeat
gets clips of its own content, so that nothing is known from before; variants take turns, and figures are medians. What
the variants say about the first clip is compared. The helper processes have sessions of their own: a machine that is
kept free for a session by its scheduler (Linux: autogroup) is not free for them.

Memory is the largest resident one of the command in a process of its own, with the first run. ``--rows``: a manifest
of so many rows, all of which but ten are in the file of results, against ten rows and an empty file. ``--decided``: so
many clips of content of their own that are decided, against a tenth of them. ``--repeats 0`` measures nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from decode import VIDEOS, make_video
from figures import versions, write_json
from marked_clips import with_mark
from naive_loop import NaiveLoop

from vidreason.answering.loaded import OpenedRun
from vidreason.config.finished_stage import find_stage
from vidreason.inference import VideoClassifier

NAIVE = "naive"
COMMANDS = {"alone": (1, 0), "batches": (8, 0), "ahead": (8, None)}
"""Clips per batch and readers by variant."""
VARIANTS = (NAIVE, *COMMANDS)
_COMMAND = """
import resource, sys
from vidreason.cli.main import main
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@dataclass(frozen=True)
class Row:
    """The figures of one run."""

    run: str
    answers: str
    clips_per_s: dict[str, float]
    """Median clips a second by variant."""
    model_cpu_s: dict[str, float]
    """Median CPU-seconds per clip by variant, of this process; those of the helpers that decode are not in it."""
    ratio: dict[str, float]
    """Clips a second to those of ``naive`` by variant: the median over repeats."""
    largest_difference: float
    """Largest difference between the variants in a probability of the first clip."""


def copies(video: Path, folder: Path, count: int, mark: str) -> list[Path]:
    """Writes copies of a video with content of their own."""
    folder.mkdir(parents=True)
    content, paths = video.read_bytes(), [folder / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(with_mark(content, f"{mark} {number}"))
    return paths


def decider_of(run: Path, variant: str) -> Callable[[Sequence[Path]], list[Mapping[str, float]]]:
    """Returns the function of a variant that returns the probabilities of clips."""
    if variant == NAIVE:
        loop = NaiveLoop(OpenedRun.of(find_stage(run)).load())
        return lambda clips: [loop.decide(clip, str(clip)) for clip in clips]
    batch_size, readers = COMMANDS[variant]
    classify = VideoClassifier.from_run(run, batch_size=batch_size, readers=readers)

    def decide(clips: Sequence[Path]) -> list[Mapping[str, float]]:
        decisions = list(classify.decide(clips))
        assert all(decision.error is None for decision in decisions)
        return [decision.probs for decision in decisions]

    return decide


def timed(run: Path, variant: str, clips: Sequence[Path]) -> tuple[float, float, Mapping[str, float]]:
    """Returns clips a second, CPU-seconds per clip of this process, and the probabilities of the first clip."""
    decide = decider_of(run, variant)
    decide(clips[:2])  # starts what has to be started
    start, used = time.perf_counter(), time.process_time()
    probs = decide(clips[2:])
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return len(probs) / seconds, used / len(probs), probs[0]


def measure(run: Path, video: Path, folder: Path, count: int, repeats: int) -> Row:
    """Measures each variant once per repeat, one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    used: dict[str, list[float]] = {name: [] for name in VARIANTS}
    apart = 0.0
    for repeat in range(repeats):
        first: list[Mapping[str, float]] = []
        for name in VARIANTS:
            # The noise of traces depends on the path: variants get the same one after the other.
            place = folder / run.name / str(repeat)
            clips = copies(video, place, count + 2, f"{name} {repeat}")
            rate, cpu, probs = timed(run, name, clips)
            rates[name].append(rate)
            used[name].append(cpu)
            first.append(probs)
            for clip in clips:
                clip.unlink()
            place.rmdir()
        apart = max([apart, *(abs(probs[c] - first[0][c]) for probs in first[1:] for c in first[0])])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Row(
        run.name,
        VideoClassifier.from_run(run).answers.partition(" (")[0],
        medians,
        {name: statistics.median(values) for name, values in used.items()},
        {name: statistics.median(map(truediv, values, rates[NAIVE])) for name, values in rates.items()},
        apart,
    )


class Peak(NamedTuple):
    """The memory of a command in a process of its own."""

    mb: float
    """Largest resident memory in MB."""
    seconds: float


def peak_of_rows(run: Path, folder: Path, rows: int) -> Peak:
    """Returns the memory of a command that goes on with all but ten rows of a manifest."""
    table, out = folder / f"{rows}.csv", folder / f"{rows}.jsonl"
    names = (f"clips/camera {number % 97}/{number:09d}.mp4" for number in range(rows))
    with table.open("w") as listed, out.open("w") as done:
        listed.write("path\n")
        for number, name in enumerate(names):
            listed.write(f"{name}\n")
            if number < rows - 10:
                done.write(json.dumps({"path": name, "label": None, "error": "not read"}) + "\n")
    settings = VideoClassifier.from_run(run).settings() | {"root": None}
    out.with_name(f"{out.name}.settings.json").write_text(json.dumps(settings))
    return _peak(run, table, out, f"{rows} clips, {min(rows, 10)} of them new")


def peak_of_clips(run: Path, video: Path, folder: Path, count: int) -> Peak:
    """Returns the memory of a command that decides about so many clips."""
    copies(video, folder / f"{count} clips", count, "decided")
    return _peak(
        run, folder / f"{count} clips", folder / f"{count}.jsonl", f"{count} clips, {count} of them new, 0 not"
    )


def _peak(run: Path, asked: Path, out: Path, told: str) -> Peak:
    start = time.perf_counter()
    command = [sys.executable, "-c", _COMMAND, "classify", str(asked), "--run", str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert told in done.stdout, done.stderr[-2000:]
    return Peak(int(done.stdout.split("peak")[1]) * 1024 / 1e6, seconds)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--decided", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    content: dict[str, Any] = {
        "date": str(date.today()),
        "versions": versions(("torch", "transformers", "av")),
        "machine": {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "clips": options.clips,
        "repeats": options.repeats,
        "runs": [],
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_video(folder / "video.mp4", VIDEOS["480p"])
        for run in options.run if options.repeats else ():
            row = measure(run, folder / "video.mp4", folder, options.clips, options.repeats)
            print(f"{row.run} ({row.answers}); probabilities differ by {row.largest_difference:.1e}", flush=True)
            for variant in VARIANTS:
                used = f"{row.model_cpu_s[variant]:.3f} CPU-s of the model"
                rate, ratio = row.clips_per_s[variant], row.ratio[variant]
                print(f"  {variant:8} {rate:6.2f} clips/s, {ratio:.2f} times the naive way, {used}", flush=True)
            content["runs"].append(asdict(row))
            write_json(options.json, content)
        if options.rows:
            few, many = (peak_of_rows(options.run[0], folder, rows) for rows in (10, options.rows))
            print(f"{options.rows} rows: {many.mb:.0f} MB (10 rows: {few.mb:.0f} MB) in {many.seconds:.0f} s")
            content["rows"] = {"rows": options.rows, **many._asdict(), "mb_of_10_rows": few.mb}
            write_json(options.json, content)
        if options.decided:
            video, less = folder / "video.mp4", options.decided // 10
            few, many = (peak_of_clips(options.run[0], video, folder, count) for count in (less, options.decided))
            print(f"{options.decided} clips: {many.mb:.0f} MB ({less} clips: {few.mb:.0f} MB) in {many.seconds:.0f} s")
            content["decided"] = {"clips": options.decided, **many._asdict(), "mb_of_a_tenth": few.mb}
            write_json(options.json, content)


if __name__ == "__main__":
    main()
