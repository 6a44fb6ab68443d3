"""Tiny checkpoints of families that are not built in ``vlm_builders``, in the hub's format, with its chat templates.

``sizes`` go into the text config.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from vlm_builders import DECODER, QWEN_TEMPLATE, byte_tokenizer, write_checkpoint

QWEN_TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _named_as_on_the_hub(folder: Path) -> Path:
    """Gives the vision tower of a LLaVA the names that it has on the hub; transformers reads both, vLLM only these."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.startswith("vision_tower.")]:
        weights[name.replace("vision_tower.", "vision_tower.vision_model.", 1)] = weights.pop(name)
    save_file(weights, path, {"format": "pt"})
    return folder


def _frames_template(video: str) -> str:
    return QWEN_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", video)


def write_qwen3(folder: Path, seed: int = 0, config_class: Any = Qwen3VLConfig, **sizes: Any) -> Path:
    """A Qwen3-VL with DeepStack; its processor writes the times of the frames."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(
        [*QWEN_TURNS, *marks], "<|im_end|>", "<|endoftext|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )
    start, stop, image, video = _ids(tokenizer, *marks)
    end, pad = _ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    text = {**DECODER, "head_dim": 16, "rope_parameters": rope, "eos_token_id": end, "pad_token_id": pad, **sizes}
    config = config_class(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
            "patch_size": 14,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=stop,
        tie_word_embeddings=False,
    )
    sizes: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    halves = [0.5] * 3  # as on the hub: equal to those of videos, for which vLLM takes them too
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, image_mean=halves, image_std=halves),
        video_processor=Qwen3VLVideoProcessor(
            **sizes, size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}, cap_pixels_per_frame=False
        ),
        tokenizer=tokenizer,
        chat_template=_frames_template("<|video_pad|>"),
    )
    return write_checkpoint(folder, config, processor, seed, end, pad)


def write_glm(
    folder: Path, seed: int = 0, newer: bool = False, flash: bool = False, config_class: Any = None, **sizes: Any
) -> Path:
    """A GLM-4.1V, or a GLM-4.6V if ``newer``; its template does not end turns.

    GLM-4.6V-Flash (``flash``) is the older model with the newer processor.
    """
    config_class = config_class or (Glm46VConfig if newer and not flash else Glm4vConfig)
    processors: tuple[Any, Any, Any] = (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor)
    if newer:
        processors = (Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor)
    processor_class, image_processor, video_processor = processors
    turns = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
    marks = [
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|image|>",
        "<|video|>",
    ]
    tokenizer = byte_tokenizer(
        [*turns, *marks], "<|endoftext|>", "<|endoftext|>", image_token="<|image|>", video_token="<|video|>"
    )
    pad, end = _ids(tokenizer, "<|endoftext|>", "<|user|>")
    image_start, image_end, video_start, video_end, image, video = _ids(tokenizer, *marks)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    text = {**DECODER, "rope_parameters": rope, "eos_token_id": [pad, end], "pad_token_id": pad, **sizes}
    config = config_class(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "image_size": 112,
            "patch_size": 14,
        },
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=image_start,
        image_end_token_id=image_end,
        video_start_token_id=video_start,
        video_end_token_id=video_end,
        tie_word_embeddings=False,
    )
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<|begin_of_video|><|video|><|end_of_video|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    processor = processor_class(
        image_processor=image_processor(size=size),
        video_processor=video_processor(size=size),
        tokenizer=tokenizer,
        chat_template=template,
    )
    return write_checkpoint(folder, config, processor, seed, end, pad)


def write_internvl(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """An InternVL whose frames are squared to 56 pixels, 4 tokens each."""
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer([*QWEN_TURNS, *marks.values()], "<|im_end|>", "<|endoftext|>", **marks)
    end, pad, image = _ids(tokenizer, "<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **DECODER, "eos_token_id": end, "pad_token_id": pad, **sizes},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=image,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_frames_template("<video>\n"),
    )
    return write_checkpoint(folder, config, processor, seed, end, pad)


def write_llava_onevision(folder: Path, seed: int = 0, image: int = 56, **sizes: Any) -> Path:
    """A LLaVA-OneVision whose frames are squared, a token for 4 patches, with the hub's chat template."""
    tokenizer = byte_tokenizer(
        [*QWEN_TURNS, "<image>", "<video>"],
        "<|im_end|>",
        "<|endoftext|>",
        image_token="<image>",
        video_token="<video>",
    )
    end, pad, *visual = _ids(tokenizer, "<|im_end|>", "<|endoftext|>", "<image>", "<video>")
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **DECODER, "eos_token_id": end, "pad_token_id": pad, **sizes},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": image,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_id=visual[0],
        video_token_id=visual[1],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<video>{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}\n{{ c['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    size = {"height": image, "width": image}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(image // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return _named_as_on_the_hub(write_checkpoint(folder, config, processor, seed, end, pad))


def write_llava_next_video(folder: Path, seed: int = 0, image: int = 56, patch: int = 14, **sizes: Any) -> Path:
    """A LLaVA-NeXT-Video whose frames are cropped to squares, 4 patches a token; its template does not end turns."""
    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>", "<image>", "<video>"], "</s>", "<unk>", image_token="<image>", video_token="<video>"
    )
    end, pad, *visual = _ids(tokenizer, "</s>", "<unk>", "<image>", "<video>")
    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", **DECODER, "eos_token_id": end, "pad_token_id": pad, **sizes},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": image,
            "patch_size": patch,
            "projection_dim": 32,
        },
        image_token_index=visual[0],
        video_token_index=visual[1],
        tie_word_embeddings=False,
    )
    template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<video>\n{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} "
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    size = {"crop_size": {"height": image, "width": image}, "size": {"shortest_edge": image}}
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**size),
        video_processor=LlavaNextVideoVideoProcessor(**size),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _named_as_on_the_hub(write_checkpoint(folder, config, processor, seed, end, pad))
