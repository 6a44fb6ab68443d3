"""One GRPO run on any number of ranks; as a script, the same runs on two gloo ranks.

    python tests/support/ddp_ranks.py BASE CLIPS OUT PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import rank_processes as processes
import stage_world as world
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.grpo_parts import Rolled
from vidreason.lightning_modules.rollout import CompletionBatch, RolloutGroup
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.base import RewardFn, RewardInput, RewardScore

CLIPS = world.SPLIT_SIZES["train"]
PENALTIES: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **PENALTIES},
    "dr_grpo": {"loss_type": "dr_grpo", **PENALTIES},
    "dapo": {"loss_type": "dapo", **PENALTIES},
    "cispo": {"loss_type": "cispo", **PENALTIES},
    "gspo": {"loss_type": "gspo", **PENALTIES},
    "batch": {"advantage_scale": "batch", "prompts_per_forward": 2},
    "minibatches": {"minibatches": 3, "inner_epochs": 2, "loss_type": "gspo"},
    "truncated": {"mask_truncated": True, "loss_type": "grpo"},
    "resampled": {"resample": 2},
    "dead": {},
    "dead_with_penalties": PENALTIES,
    "full": {"lora": False},
}


class Stopping(TinyVLM):
    """Ends its turn at every fourth token of the vocabulary, so that random completions differ in length."""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return super().stop_ids | frozenset(range(0, len(self.tokenizer), 4))


class EvenLetters(RewardFn):
    """Many values, a third of the groups dead: whether the number of characters is even, and a little more."""

    def __call__(self, item: RewardInput) -> float:
        return float(len(item.completion) % 2 == 0) + 0.01 * (item.n_tokens or 0)


class Watched(GRPOModule):
    """Writes down what it sampled and learnt from; the groups of some clips, or of a whole rank, are dead."""

    dead_rank: int | None = None
    dead_clips: tuple[str, ...] = ()

    def rewarded(self, batch: CompletionBatch) -> Rolled:
        rolled = super().rewarded(batch)
        self.seen: dict[str, list[str]] = getattr(self, "seen", {})
        for group in rolled.groups:
            self.seen[group.clip.video_id] = [r.completion.text for r in group.rollouts]
        return Rolled(batch, tuple(self._killed(group) for group in rolled.groups))

    def _killed(self, group: RolloutGroup) -> RolloutGroup:
        if self.global_rank != self.dead_rank and group.clip.video_id not in self.dead_clips:
            return group
        score = RewardScore(0.7, dict.fromkeys(group.rollouts[0].score.parts, 0.7))
        return RolloutGroup(group.clip, tuple(type(r)(r.completion, score) for r in group.rollouts))

    def clip_gradients_(self, max_norm: float) -> torch.Tensor:
        found = {n: p.grad for n, p in self.named_parameters() if p.requires_grad and p.grad is not None}
        gradients = {n: processes.gathered(g).clone() for n, g in found.items()}
        self.gradients: list[dict[str, torch.Tensor]] = [*getattr(self, "gradients", []), gradients]
        return super().clip_gradients_(max_norm)


def run(
    name: str,
    base: Path,
    clips: Path,
    out: Path,
    ranks: int,
    dead_clips: tuple[str, ...] = (),
    strategy: Strategy | None = None,
    family: type[TinyVLM] = Stopping,
    clips_of: Callable[..., Any] = world.GreyClips,
    **vlm_options: Any,
) -> dict[str, Any]:
    """Trains two batches of all clips and returns what this rank saw.

    Args:
        name: A key of ``CASES``.
        base: The base model.
        clips: Folder of clips.
        out: Run folder.
        ranks: Number of processes.
        dead_clips: Clips whose groups are dead, beside those of the second rank.
        strategy: Of two processes; None is DDP.
        family: Class of the model.
        clips_of: Class of the data.
        vlm_options: Of the model, beside LoRA.
    """
    options = dict(CASES[name])
    lora = LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    vlm = family(path=str(base), lora=lora if options.pop("lora", True) else None, **vlm_options)
    module = Watched(
        vlm,
        rewards=[EvenLetters()],
        group_size=3,
        train_sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        warmup=0,
        cold_steps=10**6,
        max_grad_norm=0.0,
        **options,
    )
    if name.startswith("dead"):
        module.dead_rank, module.dead_clips = (1 if ranks == 2 else None), dead_clips
    logged: list[dict[str, float]] = []
    module.on_train_batch_end = lambda *_: logged.append(
        {k: float(v) for k, v in module.trainer.callback_metrics.items()}
    )
    torch.manual_seed(0)  # LoRA's A
    trainer = L.Trainer(
        devices=ranks,
        strategy=(strategy or DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)))
        if ranks > 1
        else "auto",
        max_epochs=2,
        limit_val_batches=0,
        enable_checkpointing=False,
        default_root_dir=out,
        **world.QUIET,
    )
    trainer.fit(module, clips_of(clips, encoder=vlm, batch_size=CLIPS // ranks))
    return {
        "logged": logged,
        "seen": module.seen,
        "gradients": module.gradients,
        "weights": {n: processes.gathered(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad},
        "steps": trainer.global_step,
    }


def _rank(rank: int, base: Path, clips: Path, out: Path) -> None:
    folder = out / f"run{rank}"
    folder.mkdir()
    torch.save({name: run(name, base, clips, folder, 2) for name in CASES}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.fork_two(_rank, tuple(map(Path, sys.argv[1:4])), port=sys.argv[4])
