"""The model of the benchmarks: sizes of a small reference or of a published model, random weights, random prompts.

Nothing is read from disk, so a benchmark needs no tokenizer, processor or download. A grid of T x H x W patches makes
T·H·W / 4 visual tokens in every family.
"""

from __future__ import annotations

from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.smolvlm import SmolVLM
from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

Grid = tuple[int, int, int]
"""(Temporal patches, rows of patches, columns of patches)."""

FAMILIES = ("qwen", "smolvlm", "tiny")
WORDS_BEFORE, WORDS_BEHIND = 4, 31
"""Text tokens before and after the video of a prompt; with a mark at each end of the video, 37 in total."""
START, END, VIDEO, FIRST_WORD = 1, 2, 3, 10
"""Token ids; all ids from ``FIRST_WORD`` on are words."""
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 256, "intermediate_size": 704, "num_heads": 8, "depth": 4}
REAL_TEXT: dict[str, dict[str, int]] = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    },
}
"""Decoders of Qwen2.5-VL (arXiv 2502.13923 and the published configurations)."""


def qwen_config(size: str = "reference") -> PreTrainedConfig:
    """Returns a Qwen2.5-VL of the reference's sizes, or of those of ``3b`` or ``7b``."""
    text: dict[str, Any] = {**TEXT, **REAL_TEXT.get(size, {})}
    # M-RoPE divides half of a head's dimensions between time, height and width
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        "rope_theta": 1e6,
    }
    if size == "reference":
        vision: dict[str, Any] = {**VISION, "fullatt_block_indexes": [3]}
    else:
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        vision["fullatt_block_indexes"] = [7, 15, 23, 31]
        text["tie_word_embeddings"] = size == "3b"
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        image_token_id=4,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def smolvlm_config(grid: Grid) -> PreTrainedConfig:
    """Returns a SmolVLM2 with the reference's decoder, whose connector accepts square frames only.

    Raises:
        ValueError: If the grid is not square.
    """
    if grid[1] != grid[2]:
        raise ValueError(f"--grid: SmolVLM takes square frames, got {grid[1]} x {grid[2]} patches")
    vision = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_hidden_layers": 4}
    return SmolVLMConfig(
        image_token_id=VIDEO,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        vision_config={**vision, "image_size": 14 * grid[1], "patch_size": 14},
        text_config={"model_type": "llama", **TEXT},
    )


def tiny_config(grid: Grid) -> PreTrainedConfig:
    """Returns a TinyVLM with the reference's decoder."""
    return TinyVLMConfig(
        text_config=LlamaConfig(**TEXT),
        frame_height=16 * grid[1],
        frame_width=16 * grid[2],
        max_frames=grid[0],
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


class RandomWeights(VLM):
    """A model family without files: weights are random, and nothing is tokenised."""

    config: PreTrainedConfig
    seed: int
    device: str

    @cached_property
    def suppressed_ids(self) -> frozenset[int]:
        """The ids that are never sampled: placeholders and marks."""
        return frozenset(range(FIRST_WORD)) - {END}

    @cached_property
    def _vision_recipe(self) -> str:
        return "random pixels"

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Draws weights from ``seed`` on ``device``, then quantises, adds an adapter and freezes as configured."""
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            base = AutoModelForImageTextToText.from_config(
                self.config, dtype=building._dtype(self.dtype), attn_implementation=self.attn_implementation
            )
        assert isinstance(base, PreTrainedModel)
        if self.quantize == "nf4":
            base = self._in_4_bits(base)
        frozen = self.vision_modules if self.freeze_vision else ()
        model = building.equip(
            base, None, lora=self.lora, frozen=frozen, gradient_checkpointing=self.gradient_checkpointing
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # initialised to 0, which would make the gradient of A zero
                nn.init.normal_(parameter, std=0.02)
        return model.to(self.device)

    def _in_4_bits(self, base: PreTrainedModel) -> PreTrainedModel:
        """Returns the base in 4 bits; quantisation happens on loading, so it is saved and loaded."""
        with TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            return building.load_base(
                folder,
                nf4=True,
                unquantised=self.unquantised,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
            )


class RandomQwen(RandomWeights, QwenVL):
    """Qwen2.5-VL with random weights."""


class RandomSmolVLM(RandomWeights, SmolVLM):
    """SmolVLM2 with random weights."""


class RandomTiny(RandomWeights, TinyVLM):
    """TinyVLM with random weights; its projector is frozen with the vision tower, as in the other families."""

    vision_modules = ("model.visual", "model.projector")


def make_vlm(family: str, grid: Grid, seed: int, size: str = "reference", device: str = "cpu", **options: Any) -> VLM:
    """Returns a model family with random weights, before ``build``.

    Args:
        family: One of ``FAMILIES``.
        grid: The largest grid of its prompts.
        seed: Seed of the weights.
        size: ``reference``, or for Qwen also ``3b`` and ``7b``.
        device: Device of the weights.
        options: Further arguments of ``VLM``.
    """
    if grid[1] % 2 or grid[2] % 2 or min(grid) < 1:
        raise ValueError(f"--grid: rows and columns of patches must be even, got {grid}")
    kind = {"qwen": RandomQwen, "smolvlm": RandomSmolVLM, "tiny": RandomTiny}[family]
    vlm: RandomWeights = kind("random", **{"dtype": "float32", **options})
    made = {
        "qwen": lambda: qwen_config(size),
        "smolvlm": lambda: smolvlm_config(grid),
        "tiny": lambda: tiny_config(grid),
    }
    vlm.config, vlm.seed, vlm.device = made[family](), seed, device
    if family == "smolvlm":  # by default its connector is trained, like TinyVLM's projector
        vlm.vision_modules = ("model.vision_model", "model.connector")  # type: ignore[misc]
    return vlm


def visual_tokens(grid: Grid) -> int:
    """Returns the number of visual tokens of one video."""
    return grid[0] * grid[1] * grid[2] // 4


def make_prompts(
    family: str,
    grid: Grid,
    videos: int,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    words_behind: int = WORDS_BEHIND,
) -> EncodedPrompts:
    """Returns prompts of equal length, each with a video of noise, on ``device``."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_WORD, TEXT["vocab_size"], (videos, WORDS_BEFORE + words_behind), generator=generator)  # type: ignore[call-overload]

    def column(token: int, length: int = 1) -> Tensor:
        return torch.full((videos, length), token)

    places = column(VIDEO, visual_tokens(grid))
    ids = torch.cat([words[:, :WORDS_BEFORE], column(START), places, column(END), words[:, WORDS_BEFORE:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    t, h, w = grid
    if family == "qwen":
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
        inputs["video_grid_thw"] = torch.tensor([grid] * videos)
        inputs["second_per_grid_ts"] = torch.ones(videos)
        inputs["pixel_values_videos"] = torch.randn(videos * t * h * w, 3 * 2 * 14 * 14, generator=generator)
    elif family == "smolvlm":
        inputs["pixel_values"] = torch.randn(videos, t, 3, 14 * h, 14 * w, generator=generator)
    else:
        inputs["pixel_values_videos"] = torch.randn(videos, t, 3, 16 * h, 16 * w, generator=generator)
    moved = {k: v.to(device, dtype if k.startswith("pixel") else v.dtype) for k, v in inputs.items()}
    names = tuple(f"noise {seed} {i}" for i in range(videos))
    return EncodedPrompts(moved, videos, torch.zeros(0, dtype=torch.long, device=device), names)


def make_texts(lengths: list[int], owner: list[int], parent: list[int], seed: int, device: str = "cpu") -> TextBatch:
    """Returns random texts, right-padded; all their tokens count, except those of texts that others continue."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(FIRST_WORD, 8192, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    loss = mask.clone()
    loss[[row for row in parent if row >= 0]] = False  # a text that others continue is context
    batch = TextBatch(ids, mask, loss, torch.zeros_like(mask), torch.tensor(owner), torch.tensor(parent))
    return batch.to(device)


CALIBRATOR = LoRAOptions(r=16, alpha=32)
"""The default of the calibration stage."""
