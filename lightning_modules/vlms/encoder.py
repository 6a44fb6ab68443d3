"""The part of a model family that encodes clips, prompts and texts as token batches; B stands for clips."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, GenerationConfig
from transformers.utils.hub import cached_file

from vidreason.datamodules.types import Encoded, EncodedPrompts, Example, KnownVideo, Prompt, VideoSample
from vidreason.datamodules.words import REMEDY, any_token
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.text import chat, known
from vidreason.lightning_modules.vlms.text.context import check_context_length, longest_texts, max_position_embeddings
from vidreason.lightning_modules.vlms.text.prompts import check_video_arrived, encode_prompt, extended, join_prompts

VISUAL_TOKEN = re.compile(r"image|img|video|vision|audio|<row_\d+_col_\d+>", re.IGNORECASE)
_MOST_PROMPTS = 256  # whose tokens are kept


class ClipEncoder:
    """The part of a model family that data workers use: the processor, without weights.

    Args:
        path: Folder of a model in the hub's format, or a hub id.
        max_pixels: Largest number of pixels of a frame, for families whose processor has such a limit.
        chat_template_kwargs: Arguments of the chat template, for example ``enable_thinking: false``.
    """

    end_of_turn: str | None = None
    """Text of the tokens that end an assistant's turn. A family sets it if the chat template of its models does not
    write them; None takes them from the template."""
    note: str | None = None
    """Settings that another program needs to run the trained weights; written to their ``vidreason.json``."""

    def __init__(
        self, path: str, max_pixels: int | None = None, chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.max_pixels = max_pixels
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.video_options()  # raises here, not in a worker, if the family does not support max_pixels
        self.pixel_dtype: torch.dtype | None = None
        """Dtype in which workers hand pixels over; None is that of the processor."""
        self._processor: Any = None
        self._behind: dict[Prompt, list[int] | None] = {}

    def frame_count(self, frames: int) -> int:
        """Returns how many frames of a clip the processor gets; the last one is repeated up to this number."""
        return frames

    def video_options(self, frames: int = 1) -> dict[str, Any]:
        """Returns the keyword arguments of the processor call that apply ``max_pixels`` to each frame of a clip.

        Args:
            frames: Number of frames of the clip.

        Raises:
            ValueError: If the processor of the family has no such limit.
        """
        if self.max_pixels is not None:
            raise ValueError(
                f"vlm.max_pixels: the processor of {type(self).__name__} takes no pixel budget; "
                "set data.init_args.frames.max_pixels"
            )
        return {}

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int | None:
        """Returns the number of visual tokens that the pixels of one prompt need; None if the inputs do not say."""
        grid = inputs.get("video_grid_thw")
        return None if grid is None else int(grid.prod(-1).sum()) // int(self.processor.video_processor.merge_size) ** 2

    def join_visual(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Joins an input that has no entry per token, such as pixels or grids.

        Args:
            name: Name of the input.
            values: Tensors of one prompt each.

        Raises:
            ValueError: If the tensors cannot be concatenated.
        """
        shapes = sorted({tuple(value.shape[1:]) for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"{type(self).__name__} needs clips of one length in a batch, got {name} of shapes "
                f"{' and '.join(map(str, shapes))}: set data.init_args.frames.sampling to uniform"
            )
        return torch.cat(list(values))

    @property
    def processor(self) -> Any:
        """The family's processor, loaded on first use in each process."""
        if self._processor is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # short texts; silences warnings after a fork
            with building.readable(self.path):
                self._processor = AutoProcessor.from_pretrained(self.path)
            self._processor.tokenizer.padding_side = "left"  # so that texts directly follow every prompt of a batch
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def __getstate__(self) -> dict[str, object]:
        """Drops the processor and what was derived from it, so that each worker loads its own."""
        cached = {"chat_frame", "opening", "stop_ids", "suppressed_ids", "special_tokens", "placeholder_ids"}
        cached |= {"_placeholders", "vision_cache"}
        return {k: v for k, v in self.__dict__.items() if k not in cached} | {"_processor": None}

    @cached_property
    def chat_frame(self) -> chat.ChatFrame:
        """The tokens of the chat template around the words of user and assistant."""
        return chat.chat_frame(self.processor, self._model_stop_ids(), self.end_of_turn, self.chat_template_kwargs)

    @cached_property
    def opening(self) -> str:
        """The chat template in front of the user's words; the video is in it."""
        return known.opening(self.processor, self.chat_template_kwargs)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion: the model's, the tokenizer's and the chat template's."""
        return frozenset({*self._model_stop_ids(), self.chat_frame.end_of_turn[-1]})

    @cached_property
    def context_length(self) -> int | None:
        """Context length in tokens, for a prompt and the texts behind it; None if the configuration does not say."""
        with building.readable(self.path):
            return max_position_embeddings(self.path)

    def _model_stop_ids(self) -> set[int]:
        ids = {self.tokenizer.eos_token_id}
        if cached_file(self.path, "generation_config.json", _raise_exceptions_for_missing_entries=False) is not None:
            eos = GenerationConfig.from_pretrained(self.path).eos_token_id
            ids |= set(eos) if isinstance(eos, list) else {eos}
        return ids - {None}

    @cached_property
    def suppressed_ids(self) -> frozenset[int]:
        """Placeholders and other visual special tokens; they are never sampled and have probability 0 in scoring."""
        added = self.tokenizer.added_tokens_decoder.items()
        visual = {i for i, t in added if t.special and VISUAL_TOKEN.search(t.content)}
        # A tokenizer may hold a placeholder as an ordinary token.
        return frozenset(visual | self._placeholders) - self.stop_ids

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens of tokenizer and processor; they must not occur in the words of a prompt."""
        marks = {v for k, v in vars(self.processor).items() if k.endswith("_token") and isinstance(v, str)}
        return frozenset(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special) | marks

    @cached_property
    def placeholder_ids(self) -> frozenset[int]:
        """The tokens that stand for parts of a video in a prompt."""
        return self._placeholders or self.suppressed_ids

    @cached_property
    def _placeholders(self) -> frozenset[int]:
        with building.readable(self.path):
            return placeholder_tokens(AutoConfig.from_pretrained(self.path))

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Encodes B clips with their prompts and texts as one batch; called in data workers.

        Raises:
            ValueError: If open and closed prompts are mixed, a prompt contains a special token, the model would not
                see a video, a text cannot follow its parent, or a clip's prompt and texts are longer than the model's
                context.
        """
        if len({example.prompt.open for example in examples}) != 1:
            raise ValueError(f"a batch needs prompts that are all open or all closed, got {len(examples)} examples")
        without = tuple(example.sample.known is not None for example in examples)
        alone, videos_known = zip(*(self._encode_one(example, all(without)) for example in examples), strict=True)
        inputs = join_prompts(alone, chat.pad_id(self.processor), self.join_visual)
        frame, is_open = self.chat_frame, examples[0].prompt.open
        turn_end = chat.tokens(self.processor, frame.turn_end) if is_open else []
        videos = tuple(example.sample.identity for example in examples)
        ends = torch.tensor(turn_end, dtype=torch.long)
        prompts = EncodedPrompts(inputs, len(examples), ends, videos, videos_known, without)
        texts = chat.encode_texts(self.processor, frame, examples, self.suppressed_ids)
        names, behind = [example.sample.video_id for example in examples], longest_texts(texts, len(examples))
        check_context_length(names, prompts, behind, self.context_length, "the longest text behind it")
        return Encoded(prompts, texts)

    def tokens_behind(self, prompt: Prompt) -> list[int] | None:
        """Returns the tokens of a prompt from the user's first word on; None if tokens do not part there."""
        if prompt not in self._behind:  # most clips of a stage have the same prompt
            if len(self._behind) == _MOST_PROMPTS:
                self._behind.clear()
            text = chat.prompt_text(self.processor, prompt, self.chat_template_kwargs)
            self._behind[prompt] = known.tokens_behind(self.processor, text, self.opening)
        return self._behind[prompt]

    def prompt_recipe(self) -> list[Any]:
        """Returns all that the tokens in front of the user's words depend on, besides the video."""
        plain = {k: v for k, v in vars(self.processor).items() if isinstance(v, str | int | float | list | None)}
        words = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return [type(self.processor).__name__, plain, self.opening, hashlib.sha256(words.encode()).hexdigest()]

    def _encode_one(self, example: Example, empty: bool) -> tuple[dict[str, Tensor], KnownVideo | None]:
        """Returns the inputs of a clip and its prompt, and what other prompts need of the video.

        Args:
            example: The clip, which may be one that was not decoded.
            empty: Whether the pixels of a clip that was not decoded take no memory.
        """
        behind, video = self.tokens_behind(example.prompt), example.sample.known
        if video is None:
            inputs = self.prompt_inputs(example)
            return inputs, known.known_video(example.sample, inputs, behind)
        self._check_words(example)
        assert behind is not None, "find_known has checked it"
        return known.prompt_of_known(video, behind, empty), video

    def pixels(self, sample: VideoSample) -> dict[str, Tensor]:
        """Returns the pixels of a decoded clip, and what else the processor makes of it."""
        return self.prompt_inputs(Example(sample, Prompt("")))

    def _check_words(self, example: Example) -> None:
        if found := any_token(self.special_tokens).search(example.prompt.text):
            raise ValueError(
                f"clip {example.sample.video_id}: the prompt contains {found[0]}, a special token of the model: "
                f"{REMEDY}, in the task file or in a column of metadata_fields"
            )

    def prompt_inputs(self, example: Example) -> dict[str, Tensor]:
        """Returns the inputs of one clip and its prompt, without texts.

        Raises:
            ValueError: If the prompt contains a special token, or the model would not see the video.
        """
        self._check_words(example)
        example = replace(example, sample=extended(example.sample, self.frame_count(len(example.sample.frames))))
        text = chat.prompt_text(self.processor, example.prompt, self.chat_template_kwargs)
        inputs = encode_prompt(self.processor, text, example.sample, self.video_options(len(example.sample.frames)))
        check_video_arrived(example.sample.video_id, inputs, self.placeholder_ids, self.visual_tokens)
        return {name: self._narrow(name, value) for name, value in inputs.items()}

    def _narrow(self, name: str, value: Tensor) -> Tensor:
        """Returns pixels in ``pixel_dtype``, which is that of the vision tower."""
        if self.pixel_dtype is None or not name.startswith("pixel") or not value.is_floating_point():
            return value
        return value.to(self.pixel_dtype)


def placeholder_tokens(config: Any) -> frozenset[int]:
    """Returns the tokens that a model's configuration names as placeholders of images and videos."""
    names = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")
    return frozenset(getattr(config, name) for name in names if hasattr(config, name))
