"""The verdict on texts that the embedded base writes about clips that it was made for, about noise and real clips.

Texts of known kinds are references of the compressed size.

    VIDREASON_TEST_DATA=... python benchmarks/text_quality.py [--clips 64] [--json FILE]

Texts are sampled as stage ``generate`` of the pipelines does: two per clip at temperature 0.5. Real clips are left out
where ``VIDREASON_TEST_DATA`` is not set.
"""

from __future__ import annotations

import argparse
import os
import random
import string
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from figures import write_json

import vidreason
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.porch.data import PorchDataModule
from vidreason.datamodules.porch.render import write_mp4
from vidreason.datamodules.prompts import DescribeView
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.traces.text_quality import TextQuality, compressed_share, judge_texts
from vidreason.lightning_modules.vlms.completions import generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

SAMPLING = Sampling(max_new_tokens=128, temperature=0.5)
REAL = ("surveillance_fight", "utd_mhad_depth", "weizmann_silhouettes")


class NoiseClips(VideoDataModule):
    """Clips of uniform noise in two classes."""

    def __init__(self, folder: Path, clips: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.folder, self.number = folder, clips

    @property
    def label_names(self) -> tuple[str, ...]:
        """The two classes."""
        return ("a", "b")

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns the clips of split train, written on first use."""
        rng = np.random.default_rng(0)
        clips = []
        for place in range(self.number if split == "train" else 0):
            path = self.folder / f"{place}.mp4"
            if not path.exists():
                write_mp4(path, rng.integers(0, 256, (12, 96, 96, 3), dtype=np.uint8))
            clips.append(Clip(path, "ab"[place % 2], str(place), "train"))
        return clips


def sources(folder: Path, vlm: TinyVLM, clips: int) -> Iterator[tuple[str, VideoDataModule]]:
    """Yields data modules with their names."""
    shared = {"encoder": vlm, "eval_batch_size": 32, "seed": 0}
    frames = FrameOptions(num_frames=12, max_pixels=76800)
    for camera in ("colour", "mono"):
        yield (
            f"porch, {camera}",
            PorchDataModule(str(folder / "porch"), train_clips=clips, camera=camera, frames=frames, **shared),
        )
    (folder / "noise").mkdir()
    yield "noise", NoiseClips(folder / "noise", clips, frames=frames, **shared)
    real = os.environ.get("VIDREASON_TEST_DATA")
    for subset in REAL if real else ():
        manifest = f"{real}/real_clips/manifest.csv"
        yield (
            subset,
            ManifestDataModule(manifest, where={"subset": subset}, limit={"train": clips}, frames=frames, **shared),
        )


def measure(vlm: TinyVLM, model: torch.nn.Module, data: VideoDataModule) -> tuple[TextQuality, list[str]]:
    """Returns the verdict on two texts about each training clip, and the texts."""
    data.prepare_data()
    data.setup("fit")
    view, texts = DescribeView(data.task), dict[str, tuple[str, ...]]()
    loader = data.loader("train", view)
    for batch in loader:
        made = generate_completions(vlm, model, batch.prompts, batch.clips, 2, SAMPLING, 0)
        told = [tuple(completion.text for completion in group) for group in made.completions]
        texts |= dict(zip(batch.video_ids, told, strict=True))
    quality = judge_texts(vlm, model, data, view, ("train",), texts, torch.device("cpu"))
    return quality, [text for told in texts.values() for text in told]


def references() -> dict[str, float | None]:
    """Returns the compressed share of texts of known kinds."""
    rng = random.Random(0)
    root = Path(__file__).parent.parent
    pages = "\n\n".join((root / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("method", "porch", "grpo"))
    prose = "\n".join(b for b in pages.split("\n\n") if 30 <= len(b.split()) <= 80 and b[0].isalpha())
    letters = "".join(rng.choices(string.ascii_lowercase + " ", k=6000))
    shares = {}
    for size in (3000, 4500, 6000):
        shares[f"{size} characters of the docs"] = compressed_share([prose[:size]])
        shares[f"{size} random letters"] = compressed_share([letters[:size]])
    return {**shares, "one sentence 200 times": compressed_share(["A man walks to the door."] * 200)}


def main() -> None:
    """Prints one line per source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    vlm = TinyVLM("embedded")
    model = vlm.build().eval()
    print(f"vidreason {vidreason.__version__}, torch {torch.__version__}: {options.clips} clips a source")
    known = references()
    for name, share in known.items():
        print(f"{name:36s} compressed {share or 0:.3f}")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in sources(Path(folder), vlm, options.clips):
            quality, texts = measure(vlm, model, data)
            size, share = sum(map(len, texts)), compressed_share(texts, fewest=1)
            rows[name] = {
                **asdict(quality),
                "characters": size,
                "compressed_at_any_size": share,
                "faults": quality.faults,
                "examples": texts[:4],
            }
            print(
                f"{name:36s} compressed {share or 0:.3f} ({size} characters), "
                f"own minus other {quality.difference or 0:+.3f} ({quality.low or 0:+.3f} to "
                f"{quality.high or 0:+.3f}), {quality.pairs} pairs: "
                f"{'language' if not quality.faults else 'no language'}\n    {texts[0][:160]!r}",
                flush=True,
            )
    write_json(options.json, {"clips": options.clips, "references": known, "sources": rows})


if __name__ == "__main__":
    main()
