"""The part of a model family that encodes clips, prompts and texts as token batches; B stands for clips."""

from __future__ import annotations

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

from vidreason.datamodules.types import Encoded, EncodedPrompts, Example
from vidreason.datamodules.words import REMEDY, any_token
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.text import chat
from vidreason.lightning_modules.vlms.text.context import check_context_length, longest_texts, max_position_embeddings
from vidreason.lightning_modules.vlms.text.prompts import check_video_arrived, encode_prompt, extended, join_prompts

VISUAL_TOKEN = re.compile(r"image|img|video|vision|audio|<row_\d+_col_\d+>", re.IGNORECASE)


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
    """What another program has to know to run the trained weights; written to their ``vidreason.json``."""

    def __init__(
        self, path: str, max_pixels: int | None = None, chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.max_pixels = max_pixels
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.video_options()  # raises here, not in a worker, if the family does not support max_pixels
        self._processor: Any = None

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
        cached = {"chat_frame", "stop_ids", "suppressed_ids", "special_tokens", "placeholder_ids", "_placeholders"}
        cached |= {"vision_cache"}
        return {k: v for k, v in self.__dict__.items() if k not in cached} | {"_processor": None}

    @cached_property
    def chat_frame(self) -> chat.ChatFrame:
        """The tokens of the chat template around the words of user and assistant."""
        return chat.chat_frame(self.processor, self._model_stop_ids(), self.end_of_turn, self.chat_template_kwargs)

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
        alone = [self.prompt_inputs(example) for example in examples]
        inputs = join_prompts(alone, chat.pad_id(self.processor), self.join_visual)
        frame, is_open = self.chat_frame, examples[0].prompt.open
        turn_end = chat.tokens(self.processor, frame.turn_end) if is_open else []
        videos = tuple(example.sample.identity for example in examples)
        prompts = EncodedPrompts(inputs, len(examples), torch.tensor(turn_end, dtype=torch.long), videos)
        texts = chat.encode_texts(self.processor, frame, examples, self.suppressed_ids)
        names, behind = [example.sample.video_id for example in examples], longest_texts(texts, len(examples))
        check_context_length(names, prompts, behind, self.context_length, "the longest text behind it")
        return Encoded(prompts, texts)

    def prompt_inputs(self, example: Example) -> dict[str, Tensor]:
        """Returns the inputs of one clip and its prompt, without texts.

        Raises:
            ValueError: If the prompt contains a special token, or the model would not see the video.
        """
        clip = example.sample.video_id
        if found := any_token(self.special_tokens).search(example.prompt.text):
            raise ValueError(
                f"clip {clip}: the prompt contains {found[0]}, a special token of the model: {REMEDY}, in the task "
                "file or in a column of metadata_fields"
            )
        example = replace(example, sample=extended(example.sample, self.frame_count(len(example.sample.frames))))
        text = chat.prompt_text(self.processor, example.prompt, self.chat_template_kwargs)
        inputs = encode_prompt(self.processor, text, example.sample, self.video_options(len(example.sample.frames)))
        check_video_arrived(clip, inputs, self.placeholder_ids, self.visual_tokens)
        return inputs


def placeholder_tokens(config: Any) -> frozenset[int]:
    """Returns the tokens that a model's configuration names as placeholders of images and videos."""
    names = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")
    return frozenset(getattr(config, name) for name in names if hasattr(config, name))
