"""One GRPO run on any number of ranks; as a script, the same runs on two gloo ranks.

    python tests/support/ddp_ranks.py BASE CLIPS OUT PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import rank_processes as processes
import small_grpo
import stage_world as world
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vidreason.lightning_modules.fit.optimizer_step import StepResult
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.microbatch import ScoredRollouts
from vidreason.lightning_modules.rl.rollouts import RolloutGroup
from vidreason.lightning_modules.rl.sampler import RolloutSampler
from vidreason.lightning_modules.vlms.completions import CompletionBatch
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


class WatchedSampler(RolloutSampler):
    """Writes down what it sampled; the groups of some clips are dead."""

    module: Watched

    def _score(self, batch: CompletionBatch) -> ScoredRollouts:
        scored = super()._score(batch)
        self.module.sampled(scored)
        return ScoredRollouts(batch, tuple(self._killed(group) for group in scored.groups))

    def _killed(self, group: RolloutGroup) -> RolloutGroup:
        if not self.module.kills(group):
            return group
        score = RewardScore(0.7, dict.fromkeys(group.rollouts[0].score.parts, 0.7))
        return RolloutGroup(group.clip, tuple(type(r)(r.completion, score) for r in group.rollouts))


class Watched(GRPOModule):
    """Writes down what it sampled and learnt from; the groups of some clips, or of a whole rank, are dead."""

    dead_rank: int | None = None
    dead_clips: tuple[str, ...] = ()

    def __init__(self, vlm: TinyVLM, **kwargs: Any) -> None:
        super().__init__(vlm, **kwargs)
        self.seen: dict[str, list[str]] = {}
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []

    def setup(self, stage: str) -> None:
        """Puts the watched sampler in the place of its own."""
        super().setup(stage)
        own = self._sampler
        assert own is not None
        self._sampler = WatchedSampler(**{field.name: getattr(own, field.name) for field in fields(own)})
        self._sampler.module = self

    def sampled(self, scored: ScoredRollouts) -> None:
        """Called with all that is sampled."""
        for group in scored.groups:
            self.seen[group.clip.video_id] = [r.completion.text for r in group.rollouts]

    def kills(self, group: RolloutGroup) -> bool:
        """Returns whether all completions of a group get the same reward."""
        return self.global_rank == self.dead_rank or group.clip.video_id in self.dead_clips

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gathers the gradients; a step on nothing has none."""
        found = {n: p.grad for n, p in self.named_parameters() if p.requires_grad and p.grad is not None}
        self.gradients.append({n: processes.gathered(g).clone() for n, g in found.items()})

    def optimizer_step_on(self, *args: Any, **kwargs: Any) -> StepResult:
        """Notes the norm of the gradient, also of one that is dropped."""
        made = super().optimizer_step_on(*args, **kwargs)
        self.norms.append(float(made.grad_norm))
        return made


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
    module = small_grpo.make(
        vlm,
        Watched,
        rewards=[EvenLetters()],
        group_size=3,
        train_sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        max_grad_norm=0.0,
        **options,
    )
    assert isinstance(module, Watched)
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
        "norms": module.norms,
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
