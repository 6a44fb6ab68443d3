"""Every stage under ddp, fsdp and fsdp_qlora on two gloo ranks, or in one process on the same global batch.

    python tests/support/strategy_ranks.py BASE CLIPS OUT all|STRATEGY,STRATEGY PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ddp_ranks as grpo
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vidreason.callbacks.adapter_checkpoint import AdapterCheckpoint
from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.fsdp import FSDP2
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

world, processes = grpo.world, grpo.processes

SHORT = Sampling(max_new_tokens=6)
OWN = TraceOptions("reason", samples=2, sampling=SHORT, filter=RationaleFilter(complete=False))
STAGES = ("sft_label", "sft_trace", "calibration", "grpo")
STRATEGIES = ("ddp", "ddp_full", "fsdp", "fsdp_full", "fsdp_qlora")
GRPO_CASES = {"grpo": "grpo", "grpo_dead": "dead", "grpo_resampled": "resampled"}
TIMEOUT_S = 120
MACHINES = "machines"
"""In place of a strategy: two machines of one process each"""


def strategy_of(name: str) -> Strategy:
    """The strategy of two processes."""
    if name.startswith("fsdp"):
        return FSDP2(timeout_s=TIMEOUT_S)
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))


def vlm_options(name: str) -> dict[str, Any]:
    """Returns what the overlay of that name says of the model."""
    return {"quantize": "nf4"} if name.endswith("qlora") else {}


def module_of(stage: str, vlm: TinyVLM, **more: Any) -> VLMModule:
    """The stage with an optimizer whose step shows the gradient."""
    options: dict[str, Any] = {"optim": OptimOptions(lambda parameters: torch.optim.SGD(parameters, lr=0.1))}
    options |= {"updates": UpdateOptions(max_grad_norm=1e3), "traces": OWN, **more}
    if stage == "calibration":
        return CalibrationModule(vlm, lora=LoRAOptions(r=4, alpha=8), **options)
    kind: Any = stage.removeprefix("sft_")
    return RationaleSFTModule(vlm, **{"targets": TargetOptions(kind), **options})


class Watch(L.Callback):
    """Keeps the gradients of every step and what was logged at its end."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Gathers the gradients."""
        found = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({n: processes.gathered(g).clone() for n, g in found.items()})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stores loss and gradient norm, which are those of the step on all ranks."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def run(
    stage: str,
    strategy: str,
    base: Path,
    clips: Path,
    out: Path,
    ranks: int,
    dead: tuple[str, ...] = (),
    machines: int = 1,
    family: type[TinyVLM] = TinyVLM,
    clips_of: Callable[..., Any] = world.GreyClips,
    batch_size: int = grpo.CLIPS,
    test: bool = True,
    vlm_more: Mapping[str, Any] | None = None,
    **module_options: Any,
) -> dict[str, Any]:
    """Trains two epochs, validates, tests, exports; returns what this rank saw.

    Args:
        stage: One of ``STAGES``, or a GRPO case.
        strategy: One of ``STRATEGIES``.
        base: The base model.
        clips: Folder of clips.
        out: Run folders lie in it.
        ranks: Number of processes.
        dead: Clips whose groups are dead, in GRPO in one process.
        machines: Number of machines.
        family: Class of the model.
        clips_of: Class of the data.
        batch_size: Clips per step, of all ranks; GRPO takes all there are.
        test: Whether ``sft_label`` is tested, too.
        vlm_more: Further options of the model.
        module_options: Further options of a supervised stage.
    """
    options = {**vlm_options(strategy), **(vlm_more or {})}
    if stage.startswith("grpo"):
        full = strategy.endswith("full")
        case = {**grpo.CASES[GRPO_CASES[stage]], **({"lora": False} if full else {})}
        grpo.CASES["chosen"] = case
        name = "dead_chosen" if stage == "grpo_dead" else "chosen"
        grpo.CASES[name] = case
        given = strategy_of(strategy) if ranks > 1 else None
        kind = grpo.Stopping if family is TinyVLM else family
        found: dict[str, Any] = grpo.run(name, base, clips, out, ranks, dead, given, kind, clips_of, **options)
        return found
    lora = None if strategy.endswith("full") else LoRAOptions(r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    vlm = family(path=str(base), lora=lora, **options)
    module, watch = module_of(stage, vlm, **module_options), Watch()
    torch.manual_seed(0)  # LoRA's A
    folder = out / f"{stage}_{strategy}"

    def trainer(**kwargs: Any) -> L.Trainer:
        return L.Trainer(
            devices=ranks // machines,
            num_nodes=machines,
            strategy=strategy_of(strategy) if ranks > 1 else "auto",
            enable_checkpointing=False,
            default_root_dir=folder,
            **world.QUIET,
            **kwargs,
        )

    data = clips_of(clips, encoder=vlm, batch_size=batch_size // ranks, eval_batch_size=1)
    fit = trainer(max_epochs=2, callbacks=[watch, AdapterCheckpoint()])
    fit.fit(module, data)
    compared = ("val/", "train/mean_token_accuracy")
    metrics = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith(compared)}
    weights = {n: processes.gathered(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad}
    if stage == "sft_label" and test:
        fit.save_checkpoint(folder / "last.ckpt")
        tester = trainer(callbacks=[PredictionWriter()])
        tester.test(module, world.GreyClips(clips, encoder=vlm, eval_batch_size=1), verbose=False)
        metrics |= {k: float(v) for k, v in tester.callback_metrics.items()}
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "gradients": watch.gradients,
        "weights": weights,
        "metrics": metrics,
        "steps": fit.global_step,
    }


def _rank(rank: int, base: Path, clips: Path, out: Path, chosen: str) -> None:
    found = {}
    if chosen == MACHINES:
        found["sft_label", "ddp"] = run("sft_label", "ddp", base, clips, out, 2, machines=2)
        torch.save(found, out / f"rank{rank}.pt")
        return
    for strategy in STRATEGIES if chosen == "all" else chosen.split(","):
        for stage in (*STAGES, "grpo_dead", "grpo_resampled"):
            print(f"rank {rank}: {stage} under {strategy}", flush=True)
            folder = out / (f"grpo{rank}" if stage.startswith("grpo") else "run")
            folder.mkdir(exist_ok=True)
            found[stage, strategy] = run(stage, strategy, base, clips, folder, 2)
    torch.save(found, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    machines = 2 if sys.argv[4] == MACHINES else 1
    processes.fork_two(_rank, (*map(Path, sys.argv[1:4]), sys.argv[4]), port=sys.argv[5], machines=machines)
