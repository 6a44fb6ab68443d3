"""Writes tiny checkpoints of real families to disk, in the hub's own format. Random weights, seconds to build."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vidreason.testing.samples import (
    FAN,
    PROMPTS,
    TREE,
    gradients,
    make_example,
    make_prompts,
    make_texts,
    randomise_lora,
    text_rows,
)

__all__ = [  # with what tests need besides a checkpoint
    "FAN",
    "PROMPTS",
    "TREE",
    "gradients",
    "make_example",
    "make_prompts",
    "make_texts",
    "randomise_lora",
    "text_rows",
]

CORPUS = [
    "<think>a person walks to the door and leaves a parcel</think><answer>delivery</answer>",
    "what happens at the door? describe the video, step by step, and say who arrives: visitor, cat, post, nobody.",
    "You are provided the following series of eight frames from a 0:00:02 [H:MM:SS] video. Frame from 00:01:",
    "User: Assistant: normal abnormal left right red blue two three stays goes system user assistant",
]

DECODER = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
}
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(specials: list[str], end: str, pad: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens; ``named`` become attributes such as ``image_token``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=pad, padding_side="left", extra_special_tokens=named or None
    )


def write_checkpoint(
    folder: Path,
    config: Any,
    processor: Any,
    seed: int,
    end: int,
    pad: int,
    gain: float = 1.0,
    head_std: float = 0.2,
) -> Path:
    """Writes a model with random weights, its generation config and its processor.

    ``gain`` scales normed queries, ``head_std`` is the standard deviation of the language-model head.
    """
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # far enough from uniform that a difference shows
            torch.nn.init.normal_(parameter, std=0.08 if "lm_head" not in name else head_std)
        elif name.endswith("q_norm.weight"):
            parameter.data *= gain
    model.generation_config.eos_token_id = [end]
    model.generation_config.pad_token_id = pad
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_qwen(
    folder: Path, seed: int = 0, two: bool = False, vision_sizes: Mapping[str, Any] | None = None, **sizes: Any
) -> Path:
    """A Qwen2.5-VL (or Qwen2-VL, with ``two``) of about 0.3 M parameters; ``sizes`` go into its text config."""
    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    specials = [f"<|{name}|>" for name in names]
    tokenizer = byte_tokenizer(
        specials, "<|im_end|>", "<|endoftext|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in specials}
    text = {
        **DECODER,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        **sizes,
    }
    width = int(text["hidden_size"])
    vision: dict[str, object] = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    if two:
        vision |= {"embed_dim": 64, "hidden_size": width, "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": width,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
    vision |= vision_sizes or {}
    config = (Qwen2VLConfig if two else Qwen2_5_VLConfig)(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    budget = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = (Qwen2VLProcessor if two else Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessor(size=budget),
        video_processor=Qwen2VLVideoProcessor(size=budget),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return write_checkpoint(folder, config, processor, seed, ids["<|im_end|>"], ids["<|endoftext|>"])


def write_smolvlm(folder: Path, seed: int = 0) -> Path:
    """A SmolVLM2 of about 0.2 M parameters; frames are squared to 28 pixels."""
    turns = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"]
    specials = [*turns, "<fake_token_around_image>", "<image>", "<global-img>", "<video>"]
    tokenizer = byte_tokenizer(
        specials,
        "<end_of_utterance>",
        "<|endoftext|>",
        image_token="<image>",
        video_token="<video>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<end_of_utterance>", "<|endoftext|>"))
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=pad,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            **DECODER,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
    )
    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**size),
        video_processor=SmolVLMVideoProcessor(
            **size, video_sampling={"max_frames": 8, "fps": 1, "video_size": {"longest_edge": 56}}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
    )
    return write_checkpoint(folder, config, processor, seed, end, pad)


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A TinyVLM of other sizes than the embedded one: two layers of width 64, half as many key heads, untied head."""
    from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
    from vidreason.lightning_modules.vlms.tiny.vlm import embedded_folder

    processor = AutoProcessor.from_pretrained(embedded_folder())
    tokenizer = processor.tokenizer
    config = TinyVLMConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        ),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return write_checkpoint(folder, config, processor, seed, tokenizer.eos_token_id, tokenizer.pad_token_id)
