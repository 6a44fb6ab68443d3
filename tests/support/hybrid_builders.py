"""Writes tiny checkpoints of families whose decoders mix full attention with sliding windows or linear attention.

``sizes`` go into the text config.
"""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from vlm_builders import DECODER, QWEN_TEMPLATE, byte_tokenizer, write_checkpoint

HEAD_STD = 0.05
"""Logits near 0: fp32 rounds the states of these decoders so coarsely that log-probs of -10 differ by 1e-5."""

GEMMA_TEMPLATE = (
    "{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}<|video|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def write_gemma4(folder: Path, seed: int = 0, gain: float = 1.0, **sizes: Any) -> Path:
    """A Gemma 4 of about 0.3 M parameters: windows of 8 tokens, and two layers that share the keys of two others.

    Products of queries and keys are not scaled, except by the weights of their norms (``gain``).
    """
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    turns = ["<pad>", "<eos>", "<|turn>", "<turn|>"]
    tokenizer = byte_tokenizer([*turns, *named.values(), "<|video|>"], "<turn|>", "<pad>", **named)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*turns, *named.values(), "<|video|>")}
    config = Gemma4Config(
        text_config={
            **DECODER,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": "vision",
            "eos_token_id": ids["<turn|>"],
            "pad_token_id": ids["<pad>"],
            "tie_word_embeddings": False,
            **sizes,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "default_output_length": 70,  # transformers does without; vLLM reads it
        },
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [4, 4],
            "output_proj_dims": 32,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        audio_token_id=ids["<|audio|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        tie_word_embeddings=False,
    )
    size = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**size),
        video_processor=Gemma4VideoProcessor(**size),
        tokenizer=tokenizer,
        chat_template=GEMMA_TEMPLATE,
    )
    return write_checkpoint(folder, config, processor, seed, ids["<turn|>"], ids["<pad>"], gain, HEAD_STD)


def write_qwen3_5(folder: Path, seed: int = 0, config_class: Any = Qwen3_5Config, **sizes: Any) -> Path:
    """A Qwen3.5 of about 0.3 M parameters: linear attention in every layer except the second of three."""
    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    named = {f"{name}_token": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    named |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    specials = [f"<|{name}|>" for name in names]
    named |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>", **named)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in specials}
    config = config_class(
        text_config={
            **DECODER,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **sizes,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "out_hidden_size": sizes.get("hidden_size", DECODER["hidden_size"]),
            "num_position_embeddings": 64,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    size = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}}
    halves = [0.5] * 3  # as on the hub: equal to those of videos, for which vLLM takes them too
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**size, image_mean=halves, image_std=halves),
        video_processor=Qwen3VLVideoProcessor(**size),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return write_checkpoint(folder, config, processor, seed, ids["<|im_end|>"], ids["<|endoftext|>"], head_std=HEAD_STD)
