"""VLM, the interface of a model family: encode clips, build the model, score and generate texts.

Letters: B prompts, G completions of each, N texts, L tokens of the longest text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from vidreason.datamodules.types import EncodedPrompts, TextBatch
from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.encoder import ClipEncoder
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.sharding import unsharded
from vidreason.lightning_modules.vlms.prefix.head import Scoring
from vidreason.lightning_modules.vlms.prefix.shared_prefix import Choice, RouteOptions, choose_route, score_texts
from vidreason.lightning_modules.vlms.text import chat
from vidreason.lightning_modules.vlms.vision_cache.cache import IN_MEMORY, VisionCache, VisionCacheOptions

__all__ = ["VLM", "Generated", "Sampling", "Scores"]


class Scores(NamedTuple):
    """Scores of the tokens of N texts."""

    logprobs: Tensor
    """[N, L] fp32, 0 outside ``texts.loss_mask``"""
    greedy: Tensor
    """[N, L] fp32, 1 where the token is the likeliest, else 0; no gradient"""
    entropy: Tensor | None
    """[N, L] fp32 of the distribution that predicts each token, 0 outside ``texts.loss_mask``; None unless asked"""


class Generated(NamedTuple):
    """N = B·G completions in the order b0g0, b0g1 and so on."""

    ids: Tensor
    """[N, L] int64, right-padded, end of turn included"""
    mask: Tensor
    """[N, L] bool"""
    logprobs: Tensor
    """[N, L] fp32 of the sampler under its temperature, before top-p and top-k (greedy: at temperature 1)"""
    finish_reason: tuple[Literal["stop", "length"], ...]
    """[N] ``length``: cut at max_new_tokens"""
    owner: Tensor
    """[N] int64, index of the prompt"""
    texts: tuple[str, ...]
    """[N] decoded without the end-of-turn token; other special tokens stay visible"""


class VLM(ClipEncoder, ABC):
    """A picklable description of a model and how to build it; it holds no weights.

    A family names its vision modules, and overrides what differs from a decoder with one position per token.

    Args:
        path: Folder of a model in the hub's format, or a hub id.
        lora: LoRA adapter to train; null trains the weights themselves.
        quantize: ``nf4`` holds the base in 4 bits (needs ``lora``).
        freeze_vision: Keep the vision tower as it is.
        dtype: Of the base's weights; ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        attn_implementation: As transformers names it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more work.
        max_pixels: Most pixels of a frame, for families whose processor takes a budget.
        route: ``expand`` runs each prompt once and hands its keys and values to the texts; ``packed`` runs prompts and
            texts in one row; ``naive`` repeats the prompt for each text. ``auto`` packs where layers are recomputed or
            sharded and, where it can, long texts and texts that continue texts; else it expands.
        completion_chunk: Texts that go through the model at once; null is all of them. Memory no longer grows with
            their number, but in training they are run twice.
        text_memory_gb: Most memory, in GB, that the texts may take in a forward; where they are estimated to need more
            they go through in chunks.
        vision_cache: Where embeddings of a frozen vision path are kept; null keeps none.
    """

    def __init__(
        self,
        path: str,
        lora: LoRAOptions | None = None,
        quantize: Literal["none", "nf4"] = "none",
        freeze_vision: bool = True,
        dtype: Literal["float32", "bfloat16", "auto"] = "auto",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        max_pixels: int | None = None,
        route: Literal["auto", "expand", "packed", "naive"] = "auto",
        completion_chunk: int | None = None,
        text_memory_gb: float | None = None,
        vision_cache: VisionCacheOptions | None = IN_MEMORY,
    ) -> None:
        if quantize != "none" and lora is None:
            raise ValueError("vlm.quantize: nf4 weights cannot be trained themselves; set vlm.lora")
        if completion_chunk is not None and completion_chunk < 1:
            raise ValueError(f"vlm.completion_chunk must be at least 1 or null, got {completion_chunk}")
        if text_memory_gb is not None and not text_memory_gb > 0:
            raise ValueError(f"vlm.text_memory_gb must be positive or null, got {text_memory_gb}")
        super().__init__(path, max_pixels)
        self.lora = lora
        self.quantize = quantize
        self.freeze_vision = freeze_vision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.route = route
        self.completion_chunk = completion_chunk
        self.text_memory_gb = text_memory_gb
        self.vision_cache_options = vision_cache
        self._announced: set[Choice] = set()

    # -- what a family says ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vision_modules(self) -> tuple[str, ...]:
        """Dotted names of the modules that ``freeze_vision`` freezes and leaves without adapters."""

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``."""
        return (*self.vision_modules, "lm_head")

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions of left-padded inputs, [B, P], or [A, B, P] for A rotary axes."""
        return (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns positions [n, L] of text tokens in the form that the decoder takes."""
        return positions

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n]; the first axis of each input is the prompts."""
        return {name: value.index_select(0, index) for name, value in inputs.items()}

    # -- batches -----------------------------------------------------------------------------------------------------

    def texts_from(self, generated: Generated) -> TextBatch:
        """Returns completions as texts behind their prompts, with exactly the sampled tokens."""
        answers = torch.zeros_like(generated.mask)
        for row, length in enumerate(generated.mask.sum(1).tolist()):
            answers[row, :length] = chat.answer_tokens(self.processor, generated.ids[row, :length].tolist())
        parent = torch.full_like(generated.owner, -1)
        return TextBatch(generated.ids, generated.mask, generated.mask, answers, generated.owner, parent)

    # -- model -------------------------------------------------------------------------------------------------------

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Loads the base, freezes, quantises and attaches the ``policy`` adapter.

        Args:
            adapter_path: An adapter folder to go on from, or a folder of full weights that replaces the base (on which
                ``lora``, where set, starts afresh).

        Raises:
            ValueError: The path holds no model, or the adapter does not belong to this base or to ``lora``.
        """
        if self.lora is not None and self.lora.dropout > 0:
            rank_zero_warn(
                f"vlm.lora.dropout is {self.lora.dropout}: texts behind one prompt share one dropout mask over it"
            )
        return building.build(
            self.path,
            adapter_path,
            lora=self.lora,
            nf4=self.quantize == "nf4",
            frozen=self.vision_modules if self.freeze_vision else (),
            unquantised=self.unquantised,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing,
            base_sha=self.base_sha,
        )

    def score(
        self,
        model: nn.Module,
        prompts: EncodedPrompts,
        texts: TextBatch,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Scores:
        """Returns the log-probs of the tokens in ``texts.loss_mask``, with gradients.

        Args:
            model: What ``build`` returned.
            prompts: B prompts.
            texts: N texts behind them; each prompt, and each text that others continue, is forwarded once.
            temperature: Divides the logits.
            with_entropy: Also the entropy of the predicting distributions.
        """
        banned = torch.tensor(sorted(self.suppressed_ids), dtype=torch.long, device=texts.ids.device)
        options = RouteOptions(self.route, self.completion_chunk, self.text_memory_gb)
        choice = choose_route(options, model, prompts.inputs, texts)
        if choice not in self._announced:
            self._announced.add(choice)
            rank_zero_info(f"texts are scored by route '{choice.route}': {choice.reason}")
        scoring = Scoring(temperature, banned, with_entropy)
        with self._vision_fed(model, prompts, choice.route):
            found = score_texts(self, model, prompts, texts, scoring, choice.route, options)
        blank = torch.zeros(texts.ids.shape, dtype=torch.float32, device=texts.ids.device)
        if not found:
            return Scores(blank, blank, blank if with_entropy else None)
        index = (torch.cat([x.text_rows for x in found]), torch.cat([x.text_cols for x in found]))
        values = torch.cat([x.scores for x in found], dim=1).float()
        logprobs, greedy, *entropy = (blank.index_put(index, row) for row in values)
        return Scores(logprobs, greedy.detach(), entropy[0] if with_entropy else None)

    def generate(
        self,
        model: nn.Module,
        prompts: EncodedPrompts,
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> Generated:
        """Samples completions; each prompt is prefilled once.

        Args:
            model: What ``build`` returned; sampled in eval mode, its modes come back.
            prompts: B closed prompts.
            group_size: G.
            sampling: How to draw.
            seeds: [B][G] ints; a row's noise depends on its seed and the token's position only. None draws them from
                torch's global generator.

        Raises:
            ValueError: The prompts are open, or ``seeds`` is not [B][G].
        """
        if prompts.turn_end.numel():
            raise ValueError("cannot generate behind an open prompt: the assistant's turn has not begun")
        noise = None
        if sampling.temperature > 0:
            if seeds is None:
                seeds = torch.randint(2**62, (prompts.batch_size, group_size)).tolist()
            if [len(row) for row in seeds] != [group_size] * prompts.batch_size:
                raise ValueError(f"seeds must be [{prompts.batch_size}][{group_size}], got {[len(r) for r in seeds]}")
            noise = generation.draw_noise([seed for row in seeds for seed in row], sampling.max_new_tokens)
        with self._vision_fed(model, prompts, "expand"), unsharded(model):
            made = generation.sample(
                self,
                model,
                prompts,
                group_size,
                sampling,
                noise,
                sorted(self.stop_ids),
                sorted(self.suppressed_ids),
                chat.pad_id(self.processor),
            )
        texts = []
        stopped = made.stopped.tolist()
        for row, length in enumerate(made.mask.sum(1).tolist()):
            texts.append(chat.decode(self.processor, made.ids[row, : length - stopped[row]].tolist()))
        owner = torch.arange(prompts.batch_size, device=made.ids.device).repeat_interleave(group_size)
        reasons: tuple[Literal["stop", "length"], ...] = tuple("stop" if s else "length" for s in stopped)
        return Generated(made.ids, made.mask, made.logprobs, reasons, owner, tuple(texts))

    @cached_property
    def vision_cache(self) -> VisionCache | None:
        """The cache of vision embeddings; None if the argument ``vision_cache`` is None."""
        options = self.vision_cache_options
        return None if options is None else VisionCache(options, lambda: self._vision_recipe)

    @cached_property
    def _vision_recipe(self) -> str:
        """Returns how frames are processed and weights are loaded; part of the cache key."""
        parts = [getattr(self.processor, name, None) for name in ("video_processor", "image_processor")]
        frames = [[type(part).__name__, part.to_dict()] for part in parts if part is not None]
        loading = [self.dtype, self.attn_implementation, self.quantize]
        return json.dumps([frames, self.video_options(), loading], sort_keys=True, default=str)

    def _vision_fed(self, model: nn.Module, prompts: EncodedPrompts, route: str) -> AbstractContextManager[None]:
        cache = self.vision_cache
        return nullcontext() if cache is None else cache.feeding(self, model, prompts, route)

    def base_sha(self) -> str:
        """SHA-256 of the base checkpoint's files."""
        return self._base_sha

    @cached_property
    def _base_sha(self) -> str:
        return building.checkpoint_sha(self.path)
