"""Cost of an update by number of completions G, prompt length P and completion length C: a table and a figure.

    python benchmarks/scaling.py [--json FILE] [--figure FILE.png] [--quick]

FLOPs of one GRPO update on the reference model (forward and backward, attention counted), naive and ours with the
vision cache filled, and ours in CPU-seconds. Naive repeats everything for each completion, so its FLOPs are those of
one completion times G, and are counted for one. ``own`` is the cost of a completion alone: a forward and backward of
its tokens without a prompt. ``marginal`` is the cost that one more completion adds to an update of ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from figures import write_json
from harness import Make, Setting, Work, circumstances, count, in_a_process, run
from reference_model import WORDS_BEFORE, WORDS_BEHIND, Grid, visual_tokens
from variants import cross_entropy, fan, naive, shared

DEFAULT = Setting("qwen", (8, 16, 16), 8, 64, 0, repeats=1)
GROUPS = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256, 512)
GRIDS: tuple[Grid, ...] = ((4, 16, 16), (8, 16, 16), (16, 16, 16), (32, 16, 16), (64, 16, 16), (128, 16, 16))
NAIVE, OURS = naive(cross_entropy), shared(cross_entropy, cached=True, filled=True)


class Point(NamedTuple):
    """Results of one setting."""

    group_size: int
    prompt: int
    text_tokens: int
    naive_gflop: float
    ours_gflop: float
    ours_cpu_s: float

    @property
    def ratio(self) -> float:
        """GFLOP of naive over ours."""
        return self.naive_gflop / self.ours_gflop


def gflop(make: Make, setting: Setting) -> float:
    """Returns the GFLOP of one update."""
    found: float = in_a_process(count, make, setting).gflop
    return found


def point(setting: Setting) -> Point:
    """Measures one setting."""
    prompt = visual_tokens(setting.grid) + WORDS_BEFORE + WORDS_BEHIND + 2
    single = gflop(NAIVE, replace(setting, group_size=1)) * setting.group_size
    cpu: float = in_a_process(run, OURS, setting).cpu_s
    return Point(setting.group_size, prompt, setting.text_tokens, single, gflop(OURS, setting), cpu)


def tokens_alone(setting: Setting) -> Work:
    """Returns a forward and backward over the tokens of one completion, except its last, without a prompt."""
    work = OURS(setting)
    ids = fan(setting).ids
    behind = ids[:, 1:, None]

    def step() -> None:
        logits = work.model(input_ids=ids[:, :-1], use_cache=False).logits
        logits.log_softmax(-1).gather(-1, behind).sum().backward()

    return replace(work, step=step, fill=None)


def print_table(name: str, points: list[Point]) -> None:
    """Prints one line per point."""
    print(f"\nagainst {name}")
    print(f"{'G':>5s}{'P':>7s}{'C':>6s}{'naive GFLOP':>13s}{'ours GFLOP':>12s}{'ratio':>7s}{'ours CPU-s':>12s}")
    for p in points:
        head = f"{p.group_size:5d}{p.prompt:7d}{p.text_tokens:6d}"
        print(f"{head}{p.naive_gflop:13.1f}{p.ours_gflop:12.1f}{p.ratio:7.2f}{p.ours_cpu_s:12.2f}")


def draw(sweeps: dict[str, list[Point]], file: Path) -> None:
    """Draws the GFLOP of both sides against G, P and C."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    columns = {"G": "group_size", "P": "prompt", "C": "text_tokens"}
    names = {"G": "completions G", "P": "prompt tokens P", "C": "tokens of a completion C"}
    for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
        x = [getattr(p, columns[name]) for p in points]
        axis.plot(x, [p.naive_gflop for p in points], "o-", color="#b5533c", label="prompt and video repeated")
        axis.plot(x, [p.ours_gflop for p in points], "o-", color="#2f6f8f", label="shared prefix, vision cached")
        axis.set(xscale="log", yscale="log", xlabel=names[name])
        axis.set_xticks(x, [str(value) for value in x], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GFLOP of one update")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the three sweeps; returns the content of the result file."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first two points of each sweep, on a small video")
    options = parser.parse_args(arguments)
    start = replace(DEFAULT, grid=(1, 4, 4), group_size=2, text_tokens=8) if options.quick else DEFAULT
    grids = ((1, 4, 4), (2, 4, 4)) if options.quick else GRIDS
    few = slice(2 if options.quick else None)
    sweeps = {
        "G": [point(replace(start, group_size=g)) for g in GROUPS[few]],
        "P": [point(replace(start, grid=grid)) for grid in grids],
        "C": [point(replace(start, text_tokens=c)) for c in LENGTHS[few]],
    }
    where = circumstances(start)
    print(f"{where['date']}, {where['device']}, {where['versions']}, load average {where['load_average']}")
    for name, points in sweeps.items():
        print_table(name, points)
    groups = sweeps["G"]
    marginal = (groups[-1].ours_gflop - groups[0].ours_gflop) / (groups[-1].group_size - groups[0].group_size)
    alone = gflop(tokens_alone, replace(start, group_size=1))
    print(f"\none more completion: {marginal:.3f} GFLOP; its tokens alone, behind no video: {alone:.3f}")
    found = {**where, "marginal_gflop": marginal, "own_gflop": alone}
    found |= {name: [p._asdict() | {"ratio": p.ratio} for p in points] for name, points in sweeps.items()}
    write_json(options.json, found)
    if options.figure is not None:
        draw(sweeps, options.figure)
    return found


if __name__ == "__main__":
    main()
