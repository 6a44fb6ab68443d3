"""VLM, the interface of a model family: encode clips, build the model, score and generate texts.

Letters: B prompts, G completions of each, N texts, L tokens of the longest text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from vidreason.datamodules.types import EncodedPrompts, KnownVideo, Prompt, TextBatch, VideoSample
from vidreason.lightning_modules.vlms import generation
from vidreason.lightning_modules.vlms.encoder import ClipEncoder, placeholder_tokens
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.master_weights import in_compute_dtype
from vidreason.lightning_modules.vlms.loading.sharding import unsharded
from vidreason.lightning_modules.vlms.outputs import Generated, Scores
from vidreason.lightning_modules.vlms.prefix.head import Scoring
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded, unwrap
from vidreason.lightning_modules.vlms.prefix.shared_prefix import Choice, RouteOptions, choose_route, score_texts
from vidreason.lightning_modules.vlms.text import chat
from vidreason.lightning_modules.vlms.vision_cache.cache import IN_MEMORY, VisionCache, VisionCacheOptions

__all__ = ["VLM", "Generated", "Sampling", "Scores"]


class VLM(ClipEncoder, ABC):
    """A picklable description of a model and how to build it; it holds no weights.

    A subclass names its vision modules and overrides what differs from a decoder with one position per token.

    Args:
        path: Folder of a model in the hub's format, or a hub id.
        lora: LoRA adapter to train; null trains all weights (full fine-tuning).
        quantize: ``nf4`` holds the base in 4 bits (needs ``lora``).
        freeze_vision: Do not train the vision tower.
        dtype: Dtype of the base's weights; ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        attn_implementation: Name of the attention in transformers, for example ``sdpa``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more compute.
        route: ``expand`` runs each prompt once and shares its keys and values with the texts; ``packed`` runs prompts
            and texts in one row; ``naive`` repeats the prompt for each text. Where packing is exact, ``auto`` packs if
            layers are recomputed or sharded, long texts and texts that continue texts; otherwise it expands.
        completion_chunk: Texts per forward; null is all of them. With chunks, memory does not grow with the number of
            texts, but in training the texts are run twice.
        text_memory_gb: Memory limit in GB for the texts of a forward; if the estimate exceeds it, texts are run in
            chunks.
        vision_cache: Where embeddings of a frozen vision path are cached; null disables the cache.
        scale: Profile of ``configs/scale/`` with the settings of a stage on a model of this size; null is that of LoRA
            on 2 to 8 B parameters. The command line applies it, below all files and flags.
        kwargs: Options of :class:`ClipEncoder`.
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
        route: Literal["auto", "expand", "packed", "naive"] = "auto",
        completion_chunk: int | None = None,
        text_memory_gb: float | None = None,
        vision_cache: VisionCacheOptions | None = IN_MEMORY,
        scale: str | None = None,
        **kwargs: Any,
    ) -> None:
        if quantize != "none" and lora is None:
            raise ValueError("vlm.quantize: nf4 weights cannot be trained themselves; set vlm.lora")
        if completion_chunk is not None and completion_chunk < 1:
            raise ValueError(f"vlm.completion_chunk must be at least 1 or null, got {completion_chunk}")
        if text_memory_gb is not None and not text_memory_gb > 0:
            raise ValueError(f"vlm.text_memory_gb must be positive or null, got {text_memory_gb}")
        super().__init__(path, **kwargs)
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
        self.scale = scale
        self._announced: set[Choice] = set()
        self._logged_tokens = False

    casts_pixels: ClassVar[bool] = False
    """True if the vision path casts pixels to its dtype first; then data workers may cast them, with equal results."""

    # -- what a family defines ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vision_modules(self) -> tuple[str, ...]:
        """Dotted names of the modules that ``freeze_vision`` freezes and that get no adapter."""

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``."""
        return (*self.vision_modules, "lm_head")

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions of left-padded inputs, [B, P], or [A, B, P] for A rotary axes."""
        # Padding gets -1, which the clamp makes 0: any valid position will do, since the mask hides it.
        return (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns positions [n, L] of text tokens in the shape that the decoder expects."""
        return positions

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n], if the first axis of every input is the prompt."""
        return {name: value.index_select(0, index) for name, value in inputs.items()}

    # -- batches -----------------------------------------------------------------------------------------------------

    def texts_from(self, generated: Generated) -> TextBatch:
        """Returns completions as texts behind their prompts, made of exactly the sampled tokens."""
        # Never decode and encode again: another tokenisation of the same text has other log-probabilities.
        ids, lengths = generated.ids.tolist(), generated.mask.sum(1).tolist()
        answers = torch.zeros(generated.mask.shape, dtype=torch.bool)
        for row, length in enumerate(lengths):
            answers[row, :length] = chat.answer_tokens(self.processor, ids[row][:length])
        answers, parent = answers.to(generated.ids.device), torch.full_like(generated.owner, -1)
        return TextBatch(generated.ids, generated.mask, generated.mask, answers, generated.owner, parent)

    # -- model -------------------------------------------------------------------------------------------------------

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Loads the base, freezes and quantises it, and attaches the ``policy`` adapter.

        Args:
            adapter_path: Adapter folder to continue from, or a folder of full weights that replaces the base, on which
                ``lora`` (if set) starts a new adapter.

        Raises:
            ValueError: If the path has no model, or the adapter does not belong to this base or to ``lora``.
        """
        if self.lora is not None and self.lora.dropout > 0:
            rank_zero_warn(
                f"vlm.lora.dropout is {self.lora.dropout}: texts behind one prompt share one dropout mask over it"
            )
        model = building.build(
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
        self.expect(model)
        return model

    def expect(self, model: nn.Module) -> None:
        """Notes the model that prompts will be for: which clips its vision cache knows, and its dtype of pixels."""
        self.note_pixel_dtype(model)
        if self.vision_cache is not None:
            self.vision_cache.expect(model)

    def note_pixel_dtype(self, model: nn.Module) -> None:
        """Sets ``pixel_dtype``: bfloat16 where the vision tower is, if the family casts pixels; else None, as made."""
        dtypes = {p.dtype for p in unwrap(model).get_submodule(self.vision_modules[0]).parameters()}
        self.pixel_dtype = torch.bfloat16 if self.casts_pixels and dtypes == {torch.bfloat16} else None

    @property
    def knows_videos(self) -> bool:
        """Returns False if the vision cache is off or holds no clip, so that no clip needs to be looked up."""
        return self.vision_cache is not None and self.vision_cache.knows_videos

    def find_known(self, video: str, prompt: Prompt, read: Callable[[], VideoSample]) -> KnownVideo | None:
        """Returns what a prompt needs of a video whose embeddings the vision cache has (``KnowsVideos``)."""
        cache = self.vision_cache
        known = None if cache is None else cache.find_known(video, read)
        return known if known is not None and self.tokens_behind(prompt) is not None else None

    def score(
        self,
        model: nn.Module,
        prompts: EncodedPrompts,
        texts: TextBatch,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Scores:
        """Scores the tokens in ``texts.loss_mask``, with gradients.

        Args:
            model: The model that ``build`` returned.
            prompts: B prompts.
            texts: N texts behind them; each prompt, and each text that others continue, is forwarded once.
            temperature: Divisor of the logits.
            with_entropy: Whether to compute the entropies too.
        """
        banned = torch.tensor(sorted(self.suppressed_ids), dtype=torch.long, device=texts.ids.device)
        options = RouteOptions(self.route, self.completion_chunk, self.text_memory_gb)
        choice = choose_route(options, model, prompts.inputs, texts)
        if choice not in self._announced:
            self._announced.add(choice)
            rank_zero_info(f"texts are scored by route '{choice.route}': {choice.reason}")
        scoring = Scoring(temperature, banned, with_entropy)
        with self.fed_from_cache(model, prompts, choice.route) as prompts:
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
        """Samples completions with one prefill per prompt.

        Args:
            model: The model that ``build`` returned; it samples in eval mode, and its modes are restored.
            prompts: B closed prompts.
            group_size: G, completions per prompt.
            sampling: Sampling options.
            seeds: [B][G] ints; the noise of a completion depends only on its seed and the position of the token. None
                draws seeds from torch's global generator.

        Raises:
            ValueError: If the prompts are open, or ``seeds`` is not [B][G].
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
        fast = nullcontext() if is_sharded(model) else in_compute_dtype(model)
        with self.fed_from_cache(model, prompts, "expand") as prompts, unsharded(model), fast:
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
        ids, lengths, stopped = made.ids.tolist(), made.mask.sum(1).tolist(), made.stopped.tolist()
        texts = []
        for row, length, stop in zip(ids, lengths, stopped, strict=True):
            texts.append(self.chat_frame.reasoning_start + chat.decode(self.processor, row[: length - stop]))
        owner = torch.arange(prompts.batch_size, device=made.ids.device).repeat_interleave(group_size)
        reasons: tuple[Literal["stop", "length"], ...] = tuple("stop" if s else "length" for s in stopped)
        return Generated(made.ids, made.mask, made.logprobs, reasons, owner, tuple(texts))

    @cached_property
    def vision_cache(self) -> VisionCache | None:
        """The cache of vision embeddings; None if the option ``vision_cache`` is null."""
        options = self.vision_cache_options
        return None if options is None else VisionCache(options, lambda: self._vision_recipe, self.pixels)

    @cached_property
    def _vision_recipe(self) -> str:
        """The processing of frames, the tokens around them and the loading of weights; part of the cache key."""
        parts = [getattr(self.processor, name, None) for name in ("video_processor", "image_processor")]
        frames = [[type(part).__name__, part.to_dict()] for part in parts if part is not None]
        loading = [self.dtype, self.attn_implementation, self.quantize]
        return json.dumps([frames, self.video_options(), self.prompt_recipe(), loading], sort_keys=True, default=str)

    def fed_from_cache(
        self, model: nn.Module, prompts: EncodedPrompts, route: str = "expand"
    ) -> AbstractContextManager[EncodedPrompts]:
        """Makes forwards in the block use the vision cache; yields the prompts to run, with pixels where needed."""
        self._log_tokens(model, prompts)
        cache = self.vision_cache
        return nullcontext(prompts) if cache is None else cache.feeding(self, model, prompts, route)

    def _log_tokens(self, model: nn.Module, prompts: EncodedPrompts) -> None:
        """Logs once how many visual tokens a clip becomes."""
        placeholders = placeholder_tokens(unwrap(model).config)
        if self._logged_tokens or not placeholders:
            return
        self._logged_tokens = True
        visual = torch.isin(prompts.inputs["input_ids"].cpu(), torch.tensor(sorted(placeholders))).sum(1)
        low, high, longest = int(visual.min()), int(visual.max()), int(prompts.inputs["attention_mask"].sum(1).max())
        number = str(low) if low == high else f"{low} to {high}"
        rank_zero_info(
            f"a clip becomes {number} visual tokens in the first batch; its longest prompt has {longest} tokens"
        )

    def base_sha(self) -> str:
        """Returns the SHA-256 of the base checkpoint's files."""
        return self._base_sha

    @cached_property
    def _base_sha(self) -> str:
        return building.checkpoint_sha(self.path)
