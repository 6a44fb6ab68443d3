"""Two gloo ranks made uneven on purpose, under ddp, fsdp and fsdp_qlora.

    python tests/support/uneven_ranks.py BASE CLIPS OUT WARM all|STRATEGY,STRATEGY PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``. WARM holds a vision cache for the first rank.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import strategy_ranks as strategies
import torch
from torch import nn

from vidreason.callbacks.trace_writer import TraceWriter
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.vlms.base import Scores
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.run_folder import TRACES_FILE

grpo, world, processes = strategies.grpo, strategies.world, strategies.processes

STRATEGIES = ("ddp", "fsdp", "fsdp_qlora")
LAST_BATCH = ("sft_label", "sft_trace", "calibration", "grpo")


class Counting(grpo.Stopping):  # type: ignore[misc, name-defined]
    """Its whole vision path is frozen; counts the forwards that score texts, and those of the tower."""

    vision_modules = ("model.visual", "model.projector")
    counts: ClassVar[dict[str, int]] = {}

    def build(self, adapter_path: str | None = None) -> nn.Module:
        model: nn.Module = super().build(adapter_path)
        unwrap(model).get_submodule("model.visual").register_forward_hook(lambda *_: self.count("tower"))
        return model

    def score(self, *args: Any, **kwargs: Any) -> Scores:
        self.count("score")
        scores: Scores = super().score(*args, **kwargs)
        return scores

    @classmethod
    def count(cls, what: str) -> None:
        cls.counts[what] = cls.counts.get(what, 0) + 1


class FiveClips(world.GreyClips):  # type: ignore[misc, name-defined]
    """Five training clips, which two ranks cannot divide."""

    def samples(self, split: str) -> Sequence[Clip]:
        clips: list[Clip] = super().samples(split)
        return clips[:5] if split == "train" else clips


class BrokenVal(world.GreyClips):  # type: ignore[misc, name-defined]
    """The only validation clip of the second rank cannot be read."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        super().__init__(folder, broken=("val_1",), **kwargs)


class OneVal(world.GreyClips):  # type: ignore[misc, name-defined]
    """The second rank has no validation clip."""

    def samples(self, split: str) -> Sequence[Clip]:
        clips: list[Clip] = super().samples(split)
        return clips[:1] if split == "val" else clips


SECOND = ("train_0", "train_4", "train_5")
"""The batches that the second of two ranks is given in the first epoch"""
ALL = tuple(f"train_{i}" for i in range(grpo.CLIPS))


ANSWERS = {"decide": DecideOptions("answer", samples=2, sampling=Sampling(max_new_tokens=8))}
"""Validation writes, so that ranks run unequal numbers of forwards in each batch"""
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "failed": (BrokenVal, {}),
    "no_val": (OneVal, {}),
    "answers": (world.GreyClips, ANSWERS),
}


def supervised(case: str, strategy: str, base: Path, clips: Path, out: Path, ranks: int) -> dict[str, Any]:
    """One of ``CASES``."""
    data, options = CASES[case]
    found: dict[str, Any] = strategies.run(
        "sft_label", strategy, base, clips, out, ranks, family=Counting, clips_of=data, test=False, **options
    )
    return found


def last_batch(stage: str, strategy: str, base: Path, clips: Path, out: Path, ranks: int) -> dict[str, Any]:
    """Five clips: in the last step of an epoch one rank has a clip fewer."""
    found: dict[str, Any] = strategies.run(
        stage, strategy, base, clips, out, ranks, family=Counting, clips_of=FiveClips, batch_size=4, test=False
    )
    return found


def lost(stage: str, strategy: str, base: Path, clips: Path, out: Path, ranks: int, gone: bool = False) -> Any:
    """``SECOND`` cannot be read when training begins, or (``gone``) was never there."""
    kind = functools.partial(world.FewerClips, gone=SECOND) if gone else functools.partial(world.LostClips, lost=SECOND)
    data = functools.partial(kind, seed=1)
    world.LostClips.unread.clear()
    found = strategies.run(stage, strategy, base, clips, out, ranks, family=Counting, clips_of=data, test=False)
    return {**found, "unread": [*world.LostClips.unread]}


def cached(stage: str, strategy: str, base: Path, clips: Path, out: Path, ranks: int, folder: Path | None) -> Any:
    """A run with the vision cache in ``folder``, or with none."""
    options = None if folder is None else VisionCacheOptions(folder=str(folder))
    Counting.counts.clear()
    more = {"vision_cache": options}
    found = strategies.run(stage, strategy, base, clips, out, ranks, family=Counting, test=False, vlm_more=more)
    return {**found, "counts": dict(Counting.counts)}


def written(strategy: str, base: Path, clips: Path, out: Path, ranks: int) -> Path:
    """Lets five clips be written about; returns the file of all ranks."""
    vlm = Counting(path=str(base), lora=LoRAOptions(r=4, alpha=8), **strategies.vlm_options(strategy))
    folder = out / f"written_{strategy}"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies.strategy_of(strategy) if ranks > 1 else "auto",
        callbacks=[TraceWriter()],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    data = FiveClips(clips, encoder=vlm, eval_batch_size=2)
    trainer.predict(VLMModule(vlm, traces=strategies.OWN), data)
    return folder / TRACES_FILE


def warm(base: Path, clips: Path, out: Path, strategy: str) -> Path:
    """A vision cache that holds all clips, of one process."""
    folder = out / strategies.vlm_options(strategy).get("quantize", "none")
    if not folder.exists():
        cached("sft_label", strategy, base, clips, out / "warming", 1, folder)
    return folder


def _rank(rank: int, base: Path, clips: Path, out: Path, warmed: Path, chosen: str) -> None:
    found: dict[tuple[str, ...], Any] = {}
    place = out / f"run{rank}"
    place.mkdir()
    for strategy in STRATEGIES if chosen == "all" else chosen.split(","):

        def say(*case: str) -> tuple[str, ...]:
            print(f"rank {rank}:", *case, strategy, flush=True)  # noqa: B023 - used at once
            return (*case, strategy)  # noqa: B023

        for case in CASES:
            found[say(case)] = supervised(case, strategy, base, clips, out, 2)
        say("written")
        written(strategy, base, clips, out, 2)
        for stage in LAST_BATCH:
            found[say("last", stage)] = last_batch(stage, strategy, base, clips, out, 2)
            found[say("lost", stage)] = lost(stage, strategy, base, clips, out / "lost", 2)
        for stage in ("sft_label", "grpo"):
            quantised = strategies.vlm_options(strategy).get("quantize", "none")
            folder = warmed / quantised if rank == 0 else place / f"{stage}_{strategy}"
            found[say("cache", stage)] = cached(stage, strategy, base, clips, place, 2, folder)
    torch.save(found, out / f"rank{rank}.pt")


def _failing_rank(rank: int, base: Path, clips: Path, out: Path, warmed: Path, chosen: str) -> None:
    data = functools.partial(world.LostClips, lost=ALL)
    strategies.run("sft_label", chosen, base, clips, out, 2, family=Counting, clips_of=data, test=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    failing = sys.argv[5].startswith("failing_")
    arguments = (*map(Path, sys.argv[1:5]), sys.argv[5].removeprefix("failing_"))
    processes.fork_two(_failing_rank if failing else _rank, arguments, port=sys.argv[6])
