"""The part of a model family that encodes clips, prompts and texts as token batches.

Letters: B clips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoProcessor, GenerationConfig
from transformers.utils.hub import cached_file

from vidreason.datamodules.types import Encoded, EncodedPrompts, Example
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.text import chat
from vidreason.lightning_modules.vlms.text.context import check_context_length, longest_texts, max_position_embeddings

VISUAL_TOKEN = re.compile(r"image|img|video|vision|audio|<row_\d+_col_\d+>", re.IGNORECASE)


class ClipEncoder:
    """The part of a model family that data workers use: the processor, without weights.

    Args:
        path: Folder of a model in the hub's format, or a hub id.
        max_pixels: Most pixels of a frame, for families whose processor takes a budget.
    """

    def __init__(self, path: str, max_pixels: int | None) -> None:
        self.path = path
        self.max_pixels = max_pixels
        self.video_options()  # a budget the family cannot keep is refused here
        self._processor: Any = None

    def video_options(self) -> dict[str, Any]:
        """Keyword arguments of the processor call that apply ``max_pixels``."""
        if self.max_pixels is not None:
            raise ValueError(
                f"vlm.max_pixels: the processor of {type(self).__name__} takes no pixel budget; "
                "set data.init_args.frames.max_pixels"
            )
        return {}

    @property
    def processor(self) -> Any:
        """The family's processor, loaded on first use in each process."""
        if self._processor is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # short texts; silences warnings after a fork
            with building.readable(self.path):
                self._processor = AutoProcessor.from_pretrained(self.path)
            self._processor.tokenizer.padding_side = "left"
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def __getstate__(self) -> dict[str, object]:
        """Drops the processor and what was derived from it, so that each worker loads its own."""
        cached = {"chat_frame", "stop_ids", "suppressed_ids", "vision_cache"}
        return {k: v for k, v in self.__dict__.items() if k not in cached} | {"_processor": None}

    @cached_property
    def chat_frame(self) -> chat.ChatFrame:
        """Tokens that the chat template puts around a user's and an assistant's words."""
        return chat.chat_frame(self.processor, self._model_stop_ids())

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
        """Visual special tokens, such as placeholders, which are never sampled and have probability 0 in scoring."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, t in added if t.special and VISUAL_TOKEN.search(t.content)) - self.stop_ids

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Encodes B clips with their prompts and texts as one batch; called in data workers.

        Raises:
            ValueError: Open and closed prompts are mixed, a text does not fit where it stands, or a clip's prompt and
                texts are longer than the model's context.
        """
        if len({example.prompt.open for example in examples}) != 1:
            raise ValueError(f"a batch needs prompts that are all open or all closed, got {len(examples)} examples")
        inputs = chat.encode_prompts(self.processor, examples, self.video_options())
        frame, is_open = self.chat_frame, examples[0].prompt.open
        turn_end = chat.tokens(self.processor, frame.turn_end) if is_open else []
        videos = tuple(example.sample.identity for example in examples)
        prompts = EncodedPrompts(inputs, len(examples), torch.tensor(turn_end, dtype=torch.long), videos)
        texts = chat.encode_texts(self.processor, frame, examples, self.suppressed_ids)
        names, behind = [example.sample.video_id for example in examples], longest_texts(texts, len(examples))
        check_context_length(names, prompts, behind, self.context_length, "the longest text behind it")
        return Encoded(prompts, texts)
