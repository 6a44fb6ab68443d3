"""Tokens and memory that are predicted without weights, against real processors and real models."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from vlm_builders import make_example

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.header import ClipHeader
from vidreason.datamodules.prompts import LabelView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip, Encoded, Example, FrameTiming, VideoSample
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.planning.live_bytes import LiveBytes
from vidreason.lightning_modules.vlms.planning.memory import MemoryEstimate, repeated
from vidreason.lightning_modules.vlms.planning.prompts import PlannedClips

TASK = Task.from_labels("doors", ("left", "right turn"))


def test_live_bytes_counts_every_storage_once_and_only_while_it_lives() -> None:
    known = torch.ones(10)
    with LiveBytes([known]) as live:
        a = torch.ones(100) + known[:1]  # 400 bytes twice, of which the first is freed
        view = a.view(10, 10)[2:].t()
        assert live.now == 400
        del a
        assert live.now == 400  # the view holds the storage
        del view
        assert live.now == 0
        known.mul_(2)
        assert live.now == 0
    assert live.peak == 800


def test_saved_tensors_are_counted_once() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    inputs = torch.ones(4, 8, requires_grad=True)
    with LiveBytes([weight, inputs]) as live, live.saving():
        hidden = (inputs @ weight).relu()  # relu saves its result
        (hidden * hidden).sum().backward()  # both factors are that result
    assert live.saved == 4 * 8 * 4


def made(name: str, folder: Path, **options: object) -> tuple[VLM, Encoded]:
    cls, write = FAMILIES[name]
    if not (folder / "config.json").exists():
        write(folder)
    vlm = cls(str(folder), dtype="float32", **options)  # type: ignore[arg-type]
    size = (64, 96) if name == "tiny" else (112, 140)
    return vlm, vlm.encode([make_example(("left", "right turn"), frames=4, size=size, identity="clip")])


def measured(vlm: VLM, batch: Encoded) -> int:
    """The peak of a real forward and backward pass, or that of the vision tower before it, whose results are kept."""
    model = vlm.build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = [*batch.prompts.inputs.values(), *vars(batch.texts).values()]
    known = [*model.parameters(), *model.buffers(), *grads, *tensors]
    with LiveBytes(known) as cold, torch.no_grad():
        vlm.score(model, batch.prompts, batch.texts)
    with LiveBytes(known) as live:
        vlm.score(model, batch.prompts, batch.texts).logprobs.sum().backward()
    return max(cold.peak, live.peak)


def check_update(name: str, folder: Path, lora: LoRAOptions | None, checkpointing: bool) -> None:
    vlm, encoded = made(name, folder, lora=lora, gradient_checkpointing=checkpointing)
    predicted = MemoryEstimate(vlm, torch.float32).update(encoded, 2, padded=True)
    assert predicted.total == pytest.approx(measured(vlm, repeated(vlm, encoded, 2, padded=True)), rel=0.15)


def test_the_memory_of_an_update_is_that_of_a_real_one(tmp_path: Path) -> None:
    check_update("qwen", tmp_path, LoRAOptions(r=4), checkpointing=False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LoRAOptions(r=4), None])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen"])
def test_the_memory_of_every_family(name: str, lora: LoRAOptions | None, checkpointing: bool, tmp_path: Path) -> None:
    check_update(name, tmp_path, lora, checkpointing)


@pytest.mark.slow
def test_memory_grows_with_layers_clips_and_completions(tmp_path: Path) -> None:
    cls, write = FAMILIES["qwen"]
    write(tmp_path, num_hidden_layers=6)  # type: ignore[call-arg]
    vlm, encoded = made("qwen", tmp_path, lora=LoRAOptions(r=4))
    estimate = MemoryEstimate(vlm, torch.float32)
    assert estimate.fake.depths == (1, 2)  # four layers are extrapolated
    one, three = (estimate.update(encoded, clips).total for clips in (1, 3))
    assert one == pytest.approx(measured(vlm, encoded), rel=0.15)
    assert three == pytest.approx(measured(vlm, repeated(vlm, encoded, 3, padded=False)), rel=0.15)
    short, long, wide = (
        estimate.generate(encoded, 1, group, Sampling(max_new_tokens=tokens))
        for group, tokens in ((2, 1100), (2, 2100), (8, 2100))
    )
    text = estimate.fake.model.config.get_text_config()  # type: ignore[operator, union-attr]
    key_values = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4 * 6
    assert long.cache - short.cache == pytest.approx(2 * 1000 * key_values)
    assert wide.cache == pytest.approx(4 * long.cache)


def clip_example(frames: int, size: tuple[int, int], seconds: float) -> tuple[Clip, ClipHeader, VideoSample]:
    """A clip of zeros, and the header that tells its length and size."""
    fps = 25.0
    total = round(seconds * fps)
    clip = Clip(Path("a.mp4"), "left", "a")
    header = ClipHeader(total, fps, size[1], size[0])
    timing = header.timing(FrameOptions(num_frames=frames))
    pixels = torch.zeros(frames, 3, *size, dtype=torch.uint8)
    return clip, header, VideoSample("a", pixels, "left", FrameTiming(fps, total, timing.indices), clip)


@pytest.mark.parametrize(
    "name",
    ["qwen", "qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in ("qwen", "qwen3"))],
)
def test_the_tokens_of_a_prompt_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    cls, write = FAMILIES[name]
    vlm = cls(str(write(tmp_path)))
    planned = PlannedClips(vlm, FrameOptions(num_frames=6))
    view = LabelView(TASK)
    longer = LabelView(replace(TASK, question="What does the person at the door do?"))
    size = (64, 96) if name == "tiny" else (84, 140)
    for seconds in (2.0, 700.0):
        clip, header, sample = clip_example(6, size, seconds)
        for shown in (view, longer):
            found = planned.tokens(clip, header, shown)
            ids = vlm.encode([Example(sample, shown.prompt(clip))]).prompts.inputs["input_ids"]
            assert found.total == ids.numel()
            assert found.visual == int(torch.isin(ids, torch.tensor(sorted(vlm.placeholder_ids))).sum())
            assert found.visual > 0


def test_a_model_without_weights_suffices(tmp_path: Path) -> None:
    vlm, encoded = made("qwen", tmp_path, lora=LoRAOptions(r=4))
    next(tmp_path.glob("*.safetensors")).unlink()
    usage = MemoryEstimate(vlm, torch.bfloat16).score(encoded, 1)
    assert usage.activations == 0 < usage.working


def test_what_is_held_in_four_bits_and_trained(tmp_path: Path) -> None:
    vlm, _ = made("qwen", tmp_path, lora=LoRAOptions(r=4))
    packed, _ = made("qwen", tmp_path, lora=LoRAOptions(r=4), quantize="nf4")
    plain, four = (MemoryEstimate(v, torch.bfloat16) for v in (vlm, packed))
    text = SimpleNamespace(hidden=64, inner=128, layers=2)
    linear = text.layers * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # q, k, v, o; gate, up, down
    saved = plain.fake.weights.base_bytes - four.fake.weights.base_bytes
    assert saved == pytest.approx(linear * (2 - 0.5 - 1 / 64), rel=1e-3)
    rank = text.layers * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert plain.fake.weights.trained == rank
    assert plain.optimizer_bytes(torch.optim.AdamW) == 2 * plain.fake.weights.trained_bytes
    assert plain.optimizer_bytes(torch.optim.SGD) == 0
