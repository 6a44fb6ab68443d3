"""The service under load, from another process: speed against a naive loop, a soak, a fuzzer, and SIGTERM.

    python benchmarks/serving.py --run runs/demo/deepintuit --clips runs/demo/porch [--parts throughput,soak,fuzz,stop]

The naive loop takes one clip at a time and encodes it again for every trace, and for every class name behind every
trace; it gives the same probabilities, which the benchmark checks. Rounds of the loop and of 1, 4 and 16 clients take
turns, on the same clips. CPU-seconds of the service are those of its process and of the processes that decode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from figures import versions, write_json
from serving_load import fuzz, soak, stop
from serving_process import Served, post, start

from vidreason.answering.loaded import LoadedModel, OpenedRun
from vidreason.config.finished_stage import find_stage
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.prompts import ReviewView
from vidreason.datamodules.types import Clip, Example, Text, VideoSample
from vidreason.lightning_modules.decisions.deciders import ReviewDecider
from vidreason.lightning_modules.functional.calibration import apply_temperature
from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    label_log_probabilities,
    sequence_logprobs,
)
from vidreason.lightning_modules.vlms.completions import completion_seed

TRACES = 4
CLIENTS = (1, 4, 16)
SAME = 1e-4  # largest difference of probabilities


class Round(NamedTuple):
    """One pass over the clips."""

    clips_per_s: float
    cpu_s_per_clip: float
    latencies: list[float]
    """Seconds that each clip took."""
    probs: dict[str, dict[str, float]]
    """Class probabilities by name of the clip's file."""


class NaiveLoop:
    """Decides about one clip at a time, with a prefill for each trace and each class name behind each trace.

    Args:
        loaded: A run that ends with a calibrator.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        answering = loaded.answering
        assert isinstance(answering.decider, ReviewDecider), "the run has no calibrator"
        assert answering.generator is not None, "the calibrator reads no traces"
        self.loaded, self.decider, self.generator = loaded, answering.decider, answering.generator
        answering.vlm.vision_cache_options = None
        answering.vlm.__dict__.pop("vision_cache", None)

    def decide(self, path: Path) -> dict[str, float]:
        """Returns the probabilities of a clip."""
        loaded, answering = self.loaded, self.loaded.answering
        video = read_frames(path, loaded.frames)
        clip = loaded.find_known(path) or Clip(path, None, path.name)
        sample = VideoSample(clip.video_id, video.frames, None, video.timing, clip)
        with torch.inference_mode(), loaded.fabric.autocast(), quietly():
            texts = [self._trace(sample, clip, k) for k in range(TRACES)]
            view = ReviewView(loaded.task, {clip.video_id: tuple(texts)}, "all", self.decider.input)
            prompt, rows = view.prompt(clip), list[torch.Tensor]()
            for text in (text for text in view.texts(clip) if text.role == "context"):
                scores = []
                for name in loaded.task.label_names:
                    encoded = answering.vlm.encode([Example(sample, prompt, (text, Text(name, parent=0)))])
                    found = answering.vlm.score(answering.model, encoded.prompts, encoded.texts)
                    scores.append(sequence_logprobs(found.logprobs, encoded.texts.loss_mask)[1])
                rows.append(label_log_probabilities(torch.stack(scores)))
            logprobs = average_over_traces(torch.stack(rows), torch.zeros(len(rows), dtype=torch.int64), 1)
        probs = apply_temperature(logprobs, self.decider.temperature)[0]
        return dict(zip(loaded.task.label_names, probs.tolist(), strict=True))

    def _trace(self, sample: VideoSample, clip: Clip, k: int) -> str:
        vlm, generator = self.loaded.answering.vlm, self.generator
        encoded = vlm.encode([Example(sample, generator.view.prompt(clip))])
        seeds = [[completion_seed(generator.seed, 0, clip.video_id, k)]]
        model = self.loaded.answering.writer
        with generator.adapter_context(model):
            return vlm.generate(model, encoded.prompts, 1, generator.options.sampling, seeds).texts[0]

    def round(self, clips: Sequence[Path]) -> Round:
        """Decides about all clips."""
        return _timed(clips, time.process_time, lambda: [self._one(path) for path in clips])

    def _one(self, path: Path) -> tuple[float, str, dict[str, float]]:
        start = time.perf_counter()
        probs = self.decide(path)
        return time.perf_counter() - start, path.name, probs


def _timed(
    clips: Sequence[Path], cpu: Callable[[], float], run: Callable[[], Sequence[tuple[float, str, dict[str, float]]]]
) -> Round:
    before, start = cpu(), time.perf_counter()
    found = run()
    wall, used = time.perf_counter() - start, cpu() - before
    probs = {name: values for _, name, values in found}
    return Round(len(clips) / wall, used / len(clips), [seconds for seconds, _, _ in found], probs)


def serve_round(served: Served, clips: Sequence[Path], clients: int) -> Round:
    """Sends all clips to the service, from several clients at once."""
    waiting, lock = iter(clips), threading.Lock()

    def client(_: int) -> list[tuple[float, str, dict[str, float]]]:
        found = []
        while True:
            with lock:
                path = next(waiting, None)
            if path is None:
                return found
            start = time.perf_counter()
            reply = post(served.port, f"/v1/classify?samples={TRACES}", path.read_bytes())
            assert reply.status == 200, reply
            found.append((time.perf_counter() - start, path.name, json.loads(reply.body)["probabilities"]))

    def run() -> list[tuple[float, str, dict[str, float]]]:
        with ThreadPoolExecutor(clients) as threads:
            return list(itertools.chain.from_iterable(threads.map(client, range(clients))))

    return _timed(clips, served.cpu_s, run)


def throughput(served: Served, run: Path, clips: Sequence[Path], rounds: int) -> dict[str, object]:
    """Compares the service with the naive loop; returns ratios and medians over rounds."""
    loop = NaiveLoop(OpenedRun.of(find_stage(run)).load())
    taken: dict[str, list[Round]] = {"naive": [], **{f"{n} clients": [] for n in CLIENTS}}
    serve_round(served, clips[:2], 2)  # loads kernels and decoders
    loop.round(clips[:1])
    for _ in range(rounds):
        taken["naive"].append(loop.round(clips))
        for clients in CLIENTS:
            taken[f"{clients} clients"].append(serve_round(served, clips, clients))
    naive = taken["naive"][0].probs
    for name, found in taken.items():
        for one in found:
            worst = max(abs(one.probs[c][k] - p) for c, probs in naive.items() for k, p in probs.items())
            assert worst < SAME, f"{name} gives other probabilities than the loop, by {worst}"
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
    return {"clips": len(clips), "rounds": rounds, "traces": TRACES, "ratio_to_naive": ratios, "rows": rows}


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
