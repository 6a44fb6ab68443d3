"""Exports in vLLM: with the processor's arguments that ``vidreason.json`` tells, the probabilities are the run's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import stage_world as world
import torch
import vlm_builders as builders
import yaml
from asking_vllm import NEEDS_VLLM, ask_vllm
from vllm_families import MROPE, SIZES

from vidreason import VideoClassifier
from vidreason.cli.main import main

pytestmark = NEEDS_VLLM
CLIP, FRAMES, RATE = "clips/9.mp4", 6, 8.0


def write_project(home: Path) -> None:
    """Clips of the grey values, a task, and a Qwen2.5-VL whose frames may have a quarter of its processor's pixels."""
    builders.write_qwen(home / "base", **SIZES, rope_parameters=MROPE)
    (home / "clips").mkdir()
    rows = ["path,label,split"]
    for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["cal"] * 2 + ["test"] * 2):
        world.write_solid(home / "clips" / f"{i}.mp4", 25 * i, frames=12)
        rows.append(f"{i}.mp4,{('dark', 'bright')[i % 2]},{split}")
    (home / "clips" / "manifest.csv").write_text("\n".join(rows))
    (home / "task.yaml").write_text("name: light\nquestion: How light is it?\nclasses: [dark, bright]\n")
    data = {"manifest": "clips/manifest.csv", "task": "task.yaml", "frames": {"num_frames": FRAMES}}
    vlm = {"path": str(home / "base"), "lora": {"r": 8, "alpha": 64}, "dtype": "float32", "max_pixels": 28 * 28 * 4}
    sections = {
        "data": ("vidreason.datamodules.manifest.ManifestDataModule", data),
        "vlm": ("vidreason.lightning_modules.vlms.qwen.QwenVL", vlm),
    }
    for name, (kind, arguments) in sections.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump({"class_path": kind, "init_args": arguments}))


def probabilities(home: Path, model: str, adapter: str | None, processor: Mapping[str, Any]) -> dict[str, float]:
    """The probabilities of the clip's classes by vLLM, whose processor gets arguments for all requests."""
    asked = json.loads((home / (adapter or model) / "vidreason.json").read_text())["inputs"]
    images = np.stack([image.to_ndarray(format="rgb24") for image in av.open(CLIP).decode(video=0)])
    taken = [(2 * i + 1) * len(images) // (2 * FRAMES) for i in range(FRAMES)]
    times = {"fps": RATE, "total_num_frames": len(images), "duration": len(images) / RATE, "frames_indices": taken}
    tokenizer = VideoClassifier.from_run("run")._loaded.answering.vlm.tokenizer
    shared = {
        "prompt": tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"],
        "frames": torch.from_numpy(images[taken]),
        "metadata": {**times, "video_backend": "opencv"},
        "options": {},
        "embedded": None,
        "adapter": adapter and str(home / adapter),
    }
    requests = [{**shared, "completion": ids} for ids in asked["answers"].values()]
    job = {"model": str(home / model), "dtype": "float32", "rank": 8, "requests": requests, "processor": processor}
    told = ask_vllm(home / f"job {adapter} {len(processor)}", job)
    scores = []
    for ids, answer in zip(asked["answers"].values(), told["answers"], strict=True):
        table = answer["logprobs"].clone()
        table[:, asked["suppressed_tokens"]] = -torch.inf
        scores.append(table.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    return dict(zip(asked["answers"], torch.stack(scores).softmax(0).tolist(), strict=True))


def test_vllm_gives_the_probabilities_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    fit = ["fit", "--config", "configs/sft_label.yaml", "--vlm", "vlm.yaml", "--data", "data.yaml", "--run_dir", "run"]
    learn = ["--trainer.max_steps", "2", "--model.init_args.optim.optimizer.init_args.lr", "0.01"]
    assert main([*fit, *learn]) == 0
    assert main(["export", "run", "--out", "adapter"]) == 0
    assert main(["export", "run", "--out", "merged", "--merge"]) == 0
    wanted = VideoClassifier.from_run("run")(CLIP).probs
    processor = json.loads(Path("adapter/vidreason.json").read_text())["inputs"]["processor"]
    found = {
        "adapter": probabilities(tmp_path, "base", "adapter", processor),
        "adapter, no arguments": probabilities(tmp_path, "base", "adapter", {}),
        "merged, no arguments": probabilities(tmp_path, "merged", None, {}),
    }
    apart = {name: max(abs(probs[c] - p) for c, p in wanted.items()) for name, probs in found.items()}
    print(apart)
    assert max(apart["adapter"], apart["merged, no arguments"]) < 1e-4, apart
    assert apart["adapter, no arguments"] > 1e-2, "vLLM takes the processor of the base, with four times the pixels"
