"""Two gloo ranks that train whole, are stopped by a signal to one of them, and go on from what one process wrote.

    python tests/support/resume_ranks.py BASE CLIPS OUT STRATEGY,STRATEGY PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``; checkpoints of one process are expected in ``OUT/one_STAGE_STRATEGY``.
With ``kill:STAGE:STRATEGY`` one of the ranks kills itself, with ``resume:STAGE:STRATEGY`` they go on from what is left;
with ``validation:STAGE:STRATEGY`` one of them is signalled while both write completions in a validation; with
``gone:STAGE:STRATEGY`` the disk goes away under both, and is there when they go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import small_grpo
import strategy_ranks as ranks
import torch

from vidreason.lightning_internals import batches_done, forward_sigterm
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable, TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.signals import handle_signals

world, grpo, processes = ranks.world, ranks.grpo, ranks.processes

STAGES = ("sft", "grpo")
CLIPS_PER_BATCH = 2
STOP_AT = 4
"""Batch in which a signal comes: the second one of the second epoch"""
GONE = 1 / 6
"""Share of the training clips that may be unreadable: one"""


class Prompts:
    """Notes what each batch shows, and sends a signal in one of them."""

    def __init__(self, stop_at: int | None, rank: int, number: signal.Signals) -> None:
        self.seen: list[tuple[int, str]] = []
        self.stop_at, self.rank, self.number = stop_at, rank, number

    def note(self, module: L.LightningModule, names: tuple[str, ...]) -> None:
        """Called when a batch is begun."""
        done = batches_done(module.trainer)
        self.seen += [(done, name) for name in names]
        if done == self.stop_at and module.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class WatchedSFT(RationaleSFTModule):
    prompts: Prompts

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.prompts.note(self, batch.video_ids)
        return super().training_step(batch, batch_idx)


class WatchedGRPO(grpo.Watched):
    prompts: Prompts
    tokens = 0
    """Of all completions that this rank has sampled"""

    def sample(self, batch: Any, clock: Any) -> Any:
        self.prompts.note(self, batch.video_ids)
        return super().sample(batch, clock)

    def sampled(self, scored: Any) -> None:
        self.tokens += sum(completion.n_tokens for group in scored.batch.completions for completion in group)
        super().sampled(scored)


class SignalledInUpdate(WatchedGRPO):
    """The signal comes in the first of the two optimizer steps on a rollout."""

    def sample(self, batch: Any, clock: Any) -> Any:
        self.prompts.stop_at, at = None, self.prompts.stop_at
        rollouts = super().sample(batch, clock)
        self.prompts.stop_at = at
        return rollouts

    def update(self, minibatch: Any) -> None:
        self.prompts.note(self, ())
        super().update(minibatch)


class SignalledInValidation(WatchedGRPO):
    """A signal comes to the second rank in the validation behind the first epoch."""

    def evaluate(self, batch: Any, split: str) -> Any:
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluate(batch, split)


def module_of(stage: str, base: Path) -> Any:
    """The stage with an optimizer that has a state."""
    lora = LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3, eps=1e-4)

    if stage == "sft":
        return WatchedSFT(ranks.TinyVLM(path=str(base), lora=lora), optim=OptimOptions(adam, "linear"))
    kind = {"grpo": WatchedGRPO, "half": SignalledInUpdate}.get(stage, SignalledInValidation)
    return small_grpo.make(
        grpo.Stopping(path=str(base), lora=lora),
        kind,
        rewards=[grpo.EvenLetters()],
        group_size=3,
        train_sampling=Sampling(max_new_tokens=8),
        optimizer=adam,
        kl_coef=0.1,
        inner_epochs=2,
    )


def fit(
    stage: str,
    strategy: str,
    base: Path,
    clips: Path,
    out: Path,
    number: int,
    stop: signal.Signals | None = None,
    signalled: int = 0,
    gone: bool = False,
) -> dict[str, Any]:
    """Trains two epochs of three batches, from ``out/last.ckpt`` where there is one.

    Args:
        stage: Of ``STAGES``.
        strategy: Of two processes.
        base: The base model.
        clips: Folder of clips.
        out: Run folder.
        number: Of processes.
        stop: This signal comes in batch ``STOP_AT``.
        signalled: The rank that it comes to.
        gone: Nothing can be read from batch ``STOP_AT`` on.
    """
    module = module_of(stage, base)
    watching = [SkipUnreadable(max_fraction=GONE)] if gone else []
    module.prompts = Prompts(STOP_AT if stop else None, signalled, stop or signal.SIGTERM)
    torch.manual_seed(0)  # LoRA's A
    trainer = L.Trainer(
        accelerator="cpu",
        devices=number,
        strategy=ranks.strategy_of(strategy) if number > 1 else "auto",
        max_epochs=2,
        limit_val_batches=2 if stage == "validation" else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[StopOnSignal(), RunCheckpoint(CheckpointOptions(99), dirpath=str(out)), *watching],
    )
    forward_sigterm(trainer)
    data = world.LostClips(clips, (), encoder=module.vlm, batch_size=CLIPS_PER_BATCH // number)
    if gone:
        everything = tuple(f"train_{i}" for i in range(world.SPLIT_SIZES["train"]))

        def vanish(*_: Any) -> None:
            lost = everything if batches_done(trainer) >= STOP_AT else ()
            trainer.train_dataloader.dataset.lost = lost  # type: ignore[union-attr]

        module.on_train_batch_end = vanish
    last = out / "last.ckpt"
    with handle_signals(), contextlib.suppress(SystemExit):
        trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    weights = {n: processes.gathered(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad}
    found = {"weights": weights, "seen": module.prompts.seen, "steps": trainer.global_step}
    if isinstance(module, WatchedGRPO):
        found |= {"tokens": module.tokens, "num_tokens": trainer.callback_metrics.get("train/num_tokens")}
    return found


def _rank(rank: int, base: Path, clips: Path, out: Path, chosen: str) -> None:
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    if ":" in chosen:
        what, stage, strategy = chosen.split(":")
        if what == "validation":
            left = fit(what, strategy, base, clips, out / "signalled", 2)
            torch.save({"steps": left["steps"]}, out / f"rank{rank}.pt")
            return
        if what == "gone":
            with pytest.raises(TooManyUnreadableError, match="2 of 6 training clips cannot be read"):
                fit(stage, strategy, base, clips, out / "gone", 2, gone=True)
            saved = torch.load(out / "gone" / "last.ckpt", weights_only=True)["vidreason"]["progress"]
            mended = fit(stage, strategy, base, clips, out / "gone", 2)
            torch.save({**mended, "saved": saved["batches"]}, out / f"rank{rank}.pt")
            return
        stop = signal.SIGKILL if what == "kill" else None
        found[stage, strategy] = fit(stage, strategy, base, clips, out / "killed", 2, stop, signalled=1)
        torch.save(found, out / f"rank{rank}.pt")
        return
    for strategy in chosen.split(","):
        for stage in STAGES:
            print(f"rank {rank}: {stage} under {strategy}", flush=True)
            given = (stage, strategy, base, clips)
            name = f"{stage}_{strategy}"
            found[stage, strategy, "whole"] = fit(*given, out / f"whole_{name}", 2)
            found[stage, strategy, "stopped"] = fit(*given, out / f"two_{name}", 2, stop=signal.SIGTERM, signalled=1)
            found[stage, strategy, "resumed"] = fit(*given, _copy(out / f"two_{name}", rank), 2)
            found[stage, strategy, "from one"] = fit(*given, out / f"one_{name}", 2)
        print(f"rank {rank}: in the midst of a rollout under {strategy}", flush=True)
        half = ("half", strategy, base, clips)
        found[*half[:2], "stopped"] = fit(*half, out / f"two_half_{strategy}", 2, stop=signal.SIGTERM, signalled=1)
        found[*half[:2], "from one"] = fit(*half, out / f"one_half_{strategy}", 2)
    torch.save(found, out / f"rank{rank}.pt")


def _copy(folder: Path, rank: int) -> Path:
    """The folder of the stopped run under another name, so that one process can go on from it, too."""
    target = folder.with_name("again_" + folder.name)
    if rank == 0:
        target.mkdir()
        (target / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    torch.distributed.barrier()
    return target


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.fork_two(_rank, (*map(Path, sys.argv[1:4]), sys.argv[4]), port=sys.argv[5])
