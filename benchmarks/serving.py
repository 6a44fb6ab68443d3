"""The service under load, from another process: speed against a naive loop, a soak, a fuzzer, and SIGTERM.

    python benchmarks/serving.py --run runs/demo/deepintuit --clips runs/demo/porch [--parts throughput,soak,fuzz,stop]

The naive loop takes one clip at a time and encodes it again for every trace, and for every class name behind every
trace. Rounds of the loop and of 1, 4 and 16 clients take turns, each on copies of the clips with content of their own,
so that nothing is known from before. Each round of the loop has the content of one of the others, whose probabilities
are compared with its own. CPU-seconds of the service are those of its process and of the processes that decode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from figures import versions, write_json
from marked_clips import with_mark
from naive_loop import NaiveLoop
from serving_load import fuzz, soak, stop
from serving_process import Served, post, start

from vidreason.answering.loaded import OpenedRun
from vidreason.config.finished_stage import find_stage
from vidreason.datamodules.file_hash import content_sha

TRACES = 4
CLIENTS = (1, 4, 16)
SAME = 1e-4  # largest difference of probabilities
Clips = Mapping[str, bytes]
"""Contents of clips by name."""


class Round(NamedTuple):
    """One pass over the clips."""

    clips_per_s: float
    cpu_s_per_clip: float
    latencies: list[float]
    """Seconds that each clip took."""
    probs: dict[str, dict[str, float]]
    """Class probabilities by name of the clip's file."""


class NaiveRounds:
    """Rounds of the naive loop on clips as the service names them: by their content.

    Args:
        run: The run.
        folder: Folder for the clips of a round.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.loop, self.folder = NaiveLoop(OpenedRun.of(find_stage(run)).load()), folder
        assert self.loop.generator is not None, "the run reads no traces"
        assert self.loop.generator.options.samples == TRACES, f"the run has not {TRACES} traces"

    def round(self, clips: Clips) -> Round:
        """Decides about all clips."""
        paths = {name: self.folder / f"{number}.mp4" for number, name in enumerate(clips)}
        for name, path in paths.items():
            path.write_bytes(clips[name])
        return _timed(clips, time.process_time, lambda: [self._one(name, path) for name, path in paths.items()])

    def _one(self, name: str, path: Path) -> tuple[float, str, dict[str, float]]:
        start = time.perf_counter()
        probs = self.loop.decide(path, f"sha256 {content_sha(path)}")
        return time.perf_counter() - start, name, probs


def _timed(
    clips: Clips, cpu: Callable[[], float], run: Callable[[], Sequence[tuple[float, str, dict[str, float]]]]
) -> Round:
    before, start = cpu(), time.perf_counter()
    found = run()
    wall, used = time.perf_counter() - start, cpu() - before
    probs = {name: values for _, name, values in found}
    return Round(len(clips) / wall, used / len(clips), [seconds for seconds, _, _ in found], probs)


def serve_round(served: Served, clips: Clips, clients: int) -> Round:
    """Sends all clips to the service, from several clients at once."""
    waiting, lock = iter(clips.items()), threading.Lock()

    def client(_: int) -> list[tuple[float, str, dict[str, float]]]:
        found = []
        while True:
            with lock:
                item = next(waiting, None)
            if item is None:
                return found
            start = time.perf_counter()
            reply = post(served.port, f"/v1/classify?samples={TRACES}", item[1])
            assert reply.status == 200, reply
            found.append((time.perf_counter() - start, item[0], json.loads(reply.body)["probabilities"]))

    def run() -> list[tuple[float, str, dict[str, float]]]:
        with ThreadPoolExecutor(clients) as threads:
            return list(itertools.chain.from_iterable(threads.map(client, range(clients))))

    return _timed(clips, served.cpu_s, run)


def throughput(served: Served, run: Path, paths: Sequence[Path], rounds: int) -> dict[str, object]:
    """Compares the service with the naive loop; returns ratios and medians over rounds."""
    contents = {path.name: path.read_bytes() for path in paths}

    def marked(mark: str) -> Clips:
        return {name: with_mark(content, f"{mark} {name}") for name, content in contents.items()}

    taken: dict[str, list[Round]] = {"naive": [], **{f"{n} clients": [] for n in CLIENTS}}
    with TemporaryDirectory() as folder:
        naive = NaiveRounds(run, Path(folder))
        first = dict(islice(marked("first").items(), 2))
        serve_round(served, first, 2)  # loads kernels and decoders
        naive.round(first)
        for number in range(rounds):
            compared = CLIENTS[number % len(CLIENTS)]
            taken["naive"].append(naive.round(marked(f"{number} {compared}")))
            for clients in CLIENTS:
                taken[f"{clients} clients"].append(serve_round(served, marked(f"{number} {clients}"), clients))
            _check_same(taken["naive"][-1], taken[f"{compared} clients"][-1])
    rows = {name: _row(found) for name, found in taken.items()}
    slow = rows["naive"]
    ratios = {
        name: {
            "clips_per_s": statistics.median(
                mine.clips_per_s / other.clips_per_s for mine, other in zip(found, taken["naive"], strict=True)
            ),
            "cpu": slow["cpu_s_per_clip"] / rows[name]["cpu_s_per_clip"],
        }
        for name, found in taken.items()
        if name != "naive"
    }
    return {"clips": len(paths), "rounds": rounds, "traces": TRACES, "ratio_to_naive": ratios, "rows": rows}


def _check_same(naive: Round, served: Round) -> None:
    worst = max(abs(served.probs[c][k] - p) for c, probs in naive.probs.items() for k, p in probs.items())
    assert worst < SAME, f"the service gives other probabilities than the loop, by {worst}"


def _row(rounds: Sequence[Round]) -> dict[str, float]:
    seconds = [value for one in rounds for value in one.latencies]
    cuts = statistics.quantiles(seconds, n=20)
    return {
        "clips_per_s": statistics.median(one.clips_per_s for one in rounds),
        "cpu_s_per_clip": statistics.median(one.cpu_s_per_clip for one in rounds),
        "p50_s": statistics.median(seconds),
        "p95_s": cuts[-1],
    }


def main() -> None:
    """Runs the parts and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True, help="folder with mp4 files, at any depth")
    parser.add_argument("--parts", default="throughput,soak,fuzz,stop")
    parser.add_argument("--number", type=int, default=16, help="clips of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="of the soak; a tenth of them is decided")
    parser.add_argument("--mutations", type=int, default=2_000, help="requests of the fuzzer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = sorted(options.clips.rglob("*.mp4"))
    clips = found[:: max(len(found) // options.number, 1)][: options.number]
    parts: dict[str, Callable[[Served], dict[str, object]]] = {
        "throughput": lambda served: throughput(served, options.run, clips, options.rounds),
        "soak": lambda served: soak(served, clips, options.requests),
        "fuzz": lambda served: fuzz(served, options.run.resolve().name, clips, options.mutations, options.seed),
        "stop": lambda served: stop(served, clips),
    }
    results: dict[str, object] = {}
    with start(["--run", str(options.run)]) as served:
        for name in (name for name in parts if name in options.parts.split(",")):  # stop is the last
            results[name] = parts[name](served)
            print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
            details = {"date": str(date.today()), "versions": versions(("torch", "transformers", "fastapi", "uvicorn"))}
            write_json(options.json, {**results, "details": details})


if __name__ == "__main__":
    main()
