"""Balanced accuracy of the embedded base's descriptions of unseen clips, per fact and level.

Clips with independently drawn facts are rendered at each level's looks, written as mp4, read back and described
(greedy, generated). A fact that the text does not state, or states in two ways, counts as wrong. The first
row is the balanced accuracy of always naming the most frequent value.

    python benchmarks/base_descriptions.py [--path embedded] [--clips 400] [--levels 0 1] [--camera mono] [--json F]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from figures import write_json

import vidreason
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.porch.render import render, to_mono, write_mp4
from vidreason.datamodules.porch.scene import draw_scene
from vidreason.datamodules.porch.texts import DESCRIBE_QUESTION, read_facts
from vidreason.datamodules.porch.world import FACT_VALUES, draw_any_facts, stream
from vidreason.datamodules.types import Clip, Example, Prompt, VideoSample
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

SEED = 20_011
"""Seed of the clips, which no pretraining, demo or test uses."""
BATCH = 50


def describe_level(
    vlm: TinyVLM, model: torch.nn.Module, level: int, clips: int, camera: str
) -> list[tuple[dict[str, str], str]]:
    """Returns (true facts, description by the base) of ``clips`` clips at ``level``."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, clips, BATCH):
            examples, facts = [], []
            for index in range(start, min(start + BATCH, clips)):
                truth = draw_any_facts(stream(SEED, "test", level, index, "facts"))
                scene = draw_scene(SEED, "test", level, index, truth)
                frames = render(
                    scene, stream(SEED, "test", level, index, "grain"), stream(SEED, "test", level, index, "clutter")
                )
                path = Path(folder) / f"{index}.mp4"
                write_mp4(path, to_mono(frames) if camera == "mono" else frames)
                video = read_frames(path, FrameOptions(num_frames=12))
                clip = Clip(path, None, str(index))
                sample = VideoSample(str(index), video.frames, None, video.timing, clip)
                examples.append(Example(sample, Prompt(DESCRIBE_QUESTION)))
                facts.append(truth.as_dict())
            encoded = vlm.encode(examples)
            made = vlm.generate(model, encoded.prompts, 1, Sampling(max_new_tokens=96, temperature=0.0))
            told += list(zip(facts, made.texts, strict=True))
    return told


def balanced(told: list[tuple[dict[str, str], str]], fact: str) -> tuple[float, float]:
    """Returns the balanced accuracy of one fact, and that of always naming the most frequent value."""
    hits, seen = Counter[str](), Counter[str]()
    for truth, text in told:
        seen[truth[fact]] += 1
        hits[truth[fact]] += read_facts(text)[fact] == truth[fact]
    return sum(hits[value] / seen[value] for value in seen) / len(seen), 1 / len(seen)


def main() -> None:
    """Prints a table of balanced accuracy in percent, a row per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="embedded")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--camera", choices=["colour", "mono"], default="colour")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    vlm = TinyVLM(options.path)
    model = vlm.build().eval()
    scores: dict[str, dict[str, float]] = {}
    versions = f"vidreason {vidreason.__version__}, torch {torch.__version__}"
    print(f"{versions}: {options.clips} clips a level, {options.camera}")
    for level in options.levels:
        told = describe_level(vlm, model, level, options.clips, options.camera)
        row = {fact: balanced(told, fact)[0] for fact in FACT_VALUES}
        row["mean"] = sum(row.values()) / len(FACT_VALUES)
        scores[f"L{level}"] = row
        if level == options.levels[0]:
            print(f"{'level':9s}" + "".join(f"{name:>13s}" for name in row))
            majority = [balanced(told, fact)[1] for fact in FACT_VALUES]
            majority.append(sum(majority) / len(majority))
            print(f"{'majority':9s}" + "".join(f"{100 * m:13.1f}" for m in majority))
        print(f"{f'L{level}':9s}" + "".join(f"{100 * value:13.1f}" for value in row.values()), flush=True)
    write_json(options.json, {"clips": options.clips, "camera": options.camera, "scores": scores})


if __name__ == "__main__":
    main()
