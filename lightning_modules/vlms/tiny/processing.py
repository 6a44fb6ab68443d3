"""TinyVLM's processor: frames of one size, one placeholder per visual token, and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import PILImageResampling
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_videos

PAD, END, USER, ASSISTANT, VIDEO = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|video|>")
VOCABULARY = 768
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TinyVLMVideoProcessor(BaseVideoProcessor):
    """Resizes every frame to 96 × 64 pixels and scales values to -1..1."""

    resample = PILImageResampling.BILINEAR
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = {"height": 64, "width": 96}
    rescale_factor = 1 / 255
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = False
    model_input_names = ["pixel_values_videos"]


class TinyVLMProcessor(ProcessorMixin):
    """Encodes texts and videos; each ``<|video|>`` of a text becomes ``tokens_per_frame`` placeholders per frame.

    Args:
        video_processor: Processor of the frames.
        tokenizer: The byte-level tokenizer.
        chat_template: Jinja template of a conversation.
        tokens_per_frame: Visual tokens of one frame.
    """

    def __init__(
        self,
        video_processor: TinyVLMVideoProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        tokens_per_frame: int = 6,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_frame = tokens_per_frame
        super().__init__(  # type: ignore[no-untyped-call]
            video_processor, tokenizer, chat_template=chat_template
        )

    def __call__(
        self,
        text: str | list[str],
        videos: list[Any] | None = None,
        padding: bool = True,
        return_tensors: str = "pt",
        add_special_tokens: bool = False,
        images: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encodes texts and the videos in them.

        Args:
            text: One or several texts with one ``<|video|>`` each, if there are videos.
            videos: Uint8 frames [T, 3, H, W] per video, all of the same T; also as one list of videos per text.
            padding: Whether to pad the token rows to one length, on the left.
            return_tensors: Type of the returned tensors, ``pt`` for torch.
            add_special_tokens: Passed to the tokenizer, which adds none.
            images: Not supported; ``apply_chat_template`` passes it.
            audio: Not supported; ``apply_chat_template`` passes it.
            **kwargs: Passed to the video processor (``video_metadata``, ``do_sample_frames``).

        Raises:
            ValueError: If the videos do not match the texts, or differ in their number of frames.
        """
        texts = [text] if isinstance(text, str) else list(text)
        data: dict[str, Any] = {}
        if videos is not None:
            videos = make_batched_videos(videos)
            counts = {len(video) for video in videos}
            if len(counts) > 1:
                raise ValueError(
                    f"TinyVLM needs clips of one length in a batch, got {sorted(counts)} frames; sample uniformly"
                )
            if [t.count(VIDEO) for t in texts] != [1] * len(videos):
                raise ValueError(f"{len(videos)} videos do not match the {VIDEO} marks in {len(texts)} texts")
            pixels = self.video_processor(videos, return_tensors=return_tensors, **kwargs)
            data["pixel_values_videos"] = pixels["pixel_values_videos"]
            texts = [
                t.replace(VIDEO, VIDEO * (self.tokens_per_frame * len(video)))
                for t, video in zip(texts, videos, strict=True)
            ]
        rows = self.tokenizer(
            texts, padding=padding, add_special_tokens=add_special_tokens, return_tensors=return_tensors
        )
        data.update(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        return BatchFeature(data)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer of TinyVLM on ``texts``; it can encode any other text too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, VIDEO],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(texts: Iterable[str]) -> TinyVLMProcessor:
    """Returns a processor whose tokenizer is trained on ``texts``."""
    return TinyVLMProcessor(TinyVLMVideoProcessor(), train_tokenizer(texts), chat_template=CHAT_TEMPLATE)
