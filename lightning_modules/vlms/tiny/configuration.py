"""The configuration of TinyVLM in the hub's format."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PretrainedConfig


class TinyVLMConfig(PretrainedConfig):
    """Sizes of the vision tower and of the Llama decoder behind it.

    Args:
        text_config: Configuration of the decoder, or its fields.
        frame_height: Height of a frame in pixels; a multiple of 32.
        frame_width: Width of a frame in pixels; a multiple of 32.
        max_frames: Largest number of frames of a clip.
        tower_channels: Channels of the four stride-2 convolutions.
        video_token_id: Token id of the placeholder of one visual token.
    """

    model_type = "vidreason_tiny_vlm"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        frame_height: int = 64,
        frame_width: int = 96,
        max_frames: int = 12,
        tower_channels: tuple[int, int, int, int] = (24, 48, 96, 128),
        video_token_id: int = 4,
        **kwargs: Any,
    ) -> None:
        if frame_height % 32 or frame_width % 32:
            raise ValueError(f"frames must be multiples of 32 pixels, got {frame_width}x{frame_height}")
        self.text_config = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**(text_config or {}))
        self.frame_height = frame_height
        self.frame_width = frame_width
        self.max_frames = max_frames
        self.tower_channels = tuple(tower_channels)
        self.video_token_id = video_token_id
        super().__init__(**kwargs)

    @property
    def cells_per_frame(self) -> int:
        """Visual tokens of one frame: cells of 16 x 16 pixels, merged 2 x 2."""
        return (self.frame_height // 32) * (self.frame_width // 32)
