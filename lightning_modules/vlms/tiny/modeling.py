"""TinyVLM: a convolutional tower, a projector and the Llama decoder of transformers.

Shape letters: B clips, T frames, H and W pixels, S tokens of a row, V visual tokens of a clip, D decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig


def _conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class TinyVisionTower(nn.Module):
    """Encodes frames as cells of 16 × 16 pixels by four stride-2 convolutions with batch normalisation."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        a, b, c, d = channels
        self.stages = nn.Sequential(
            _conv(3, a, stride=2),
            _conv(a, b, stride=2),
            _conv(b, b, groups=b),
            _conv(b, b, kernel=1),
            _conv(b, c, stride=2),
            _conv(c, c, groups=c),
            _conv(c, c, kernel=1),
            _conv(c, d, stride=2),
        )

    def train(self, mode: bool = True) -> TinyVisionTower:
        """Sets the mode; a frozen tower stays in eval mode, since its running statistics would drift otherwise."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, frames: Tensor) -> Tensor:
        """Encodes frames [N, 3, H, W] as cells [N, C, H/16, W/16]."""
        cells: Tensor = self.stages(frames)
        return cells


class TinyProjector(nn.Module):
    """Merges 2 × 2 cells into one visual token and adds embeddings of its place and its frame."""

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__()
        width, merged = config.text_config.hidden_size, 4 * config.tower_channels[-1]
        self.norm = nn.LayerNorm(merged)
        self.linear = nn.Linear(merged, width)
        self.cell_embedding = nn.Embedding(config.cells_per_frame, width)
        self.frame_embedding = nn.Embedding(config.max_frames, width)

    def forward(self, cells: Tensor) -> Tensor:
        """Maps cells [B, T, C, h, w] to visual tokens [B, T * h/2 * w/2, D]."""
        b, t, c, h, w = cells.shape
        merged = cells.view(b, t, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, t, -1, 4 * c)
        tokens: Tensor = self.linear(self.norm(merged))
        tokens = tokens + self.cell_embedding.weight + self.frame_embedding.weight[:t, None]
        return tokens.flatten(1, 2)


class TinyVLMPreTrainedModel(PreTrainedModel):
    """Base class of the models below, with their initialisation."""

    config_class = TinyVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class TinyVLMModel(TinyVLMPreTrainedModel):
    """The tower, the projector and the decoder, without the language-model head."""

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__(config)
        self.visual = TinyVisionTower(config.tower_channels)
        self.projector = TinyProjector(config)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embeddings of the decoder."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the decoder."""
        self.language_model.set_input_embeddings(value)

    def get_video_features(self, pixel_values_videos: Tensor) -> Tensor:
        """Encodes frames [B, T, 3, H, W] as visual tokens [B, V, D]."""
        b, t = pixel_values_videos.shape[:2]
        if t > self.config.max_frames:
            raise ValueError(
                f"TinyVLM sees at most {self.config.max_frames} frames, got {t}; "
                f"set data.init_args.frames.num_frames to {self.config.max_frames} or fewer"
            )
        frames = pixel_values_videos.flatten(0, 1).to(self.projector.norm.weight.dtype)  # its linear may be 4-bit
        cells = self.visual(frames.contiguous(memory_format=torch.channels_last))  # a third faster on a CPU
        tokens: Tensor = self.projector(cells.contiguous().unflatten(0, (b, t)))
        return tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Maps ids [B, S] and frames [B, T, 3, H, W] to hidden states [B, S, D]."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("TinyVLM needs input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            if input_ids is None:
                raise ValueError("TinyVLM needs input_ids to place pixel_values_videos")
            seen = self.get_video_features(pixel_values_videos)
            places = input_ids == self.config.video_token_id
            if int(places.sum()) != seen.shape[0] * seen.shape[1]:
                raise ValueError(
                    f"video features and video tokens do not match: {seen.shape[0] * seen.shape[1]} features, "
                    f"{int(places.sum())} tokens"
                )
            # Row by row, in the order of placeholders; the features of a batch have the same order.
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], seen.to(inputs_embeds.dtype))
        outputs: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        return outputs


class TinyVLMForConditionalGeneration(TinyVLMPreTrainedModel, GenerationMixin):
    """TinyVLM with its language-model head, which is tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__(config)
        self.model = TinyVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embeddings of the decoder."""
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the decoder."""
        self.model.set_input_embeddings(value)

    def get_video_features(self, pixel_values_videos: Tensor) -> Tensor:
        """Encodes frames [B, T, 3, H, W] as visual tokens [B, V, D]."""
        tokens: Tensor = self.model.get_video_features(pixel_values_videos)
        return tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Maps ids [B, S] and frames [B, T, 3, H, W] to logits [B, kept, vocabulary]; ``labels`` adds a loss."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        # slice(-0, None) keeps all positions, as transformers defines 0.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size)
        # Keys and values are called ``cache`` from transformers 5.24 on: they are passed through under either name.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the keywords between are passed on
        self, input_ids: torch.LongTensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Drops the frames after the prefill, since the cache holds their keys and values."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]  # a mixin's self
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values_videos"] = None
        return inputs


def scratch_config(vocab_size: int, video_token_id: int, pad: int, end: int) -> TinyVLMConfig:
    """Returns the configuration of the shipped base, about 1.7 M parameters."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
    )
    return TinyVLMConfig(
        text_config=text, video_token_id=video_token_id, tie_word_embeddings=True, pad_token_id=pad, eos_token_id=end
    )
