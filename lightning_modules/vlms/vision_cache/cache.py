"""Caches the embeddings of videos that a frozen vision path computes, in memory within a run or on disk across runs.

The key of an entry contains everything that it depends on: the content of the file and the frames that were taken
(``EncodedPrompts.videos``), the processor, precision, attention and quantisation, and every parameter and buffer
between pixels and embeddings. If one of these is trained or has an adapter, or frames are sampled randomly, nothing
is cached, and the reason is logged.

Entries replace the results of the family's ``get_video_features`` and ``get_image_features``, so that its forward still
handles masks, positions and DeepStack. Videos that are not cached are encoded one by one, so that an entry does not
depend on the batch.

Letters: B prompts, one video each; V visual tokens of a video, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vidreason.datamodules.types import EncodedPrompts
from vidreason.lightning_modules.vlms.prefix.layout import PromptLayout, unwrap
from vidreason.lightning_modules.vlms.vision_cache.embedding_store import GB, EmbeddingStore, Entry, entry_bytes
from vidreason.lightning_modules.vlms.vision_cache.vision_path import Part, marks, path_parts, path_sha, why_not_fixed

FORMAT = 1
"""Version of the files; part of the key."""
FEATURES = ("get_video_features", "get_image_features")
BARE, POOLED, LAYERS = "features", "pooler_output", "deepstack_features"
"""Names in an entry: of a bare tensor, and of the two fields of a tower's output that forwards use."""


@dataclass(frozen=True)
class VisionCacheOptions:
    """Options of the cache of vision embeddings.

    Args:
        folder: Folder that several runs and stages may share, also at the same time; null keeps none on disk.
        max_gb: Size limit of the folder in GB of 1e9 bytes; the least recently used embeddings are removed first.
        memory_gb: Memory limit in GB in each process that has the model; 0 keeps none in memory.
    """

    folder: str | None = None
    max_gb: float = 20.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if not self.max_gb > 0 or not self.memory_gb >= 0:
            raise ValueError(
                "vlm.vision_cache: max_gb must be positive and memory_gb not negative, got "
                f"{self.max_gb} and {self.memory_gb}"
            )


IN_MEMORY = VisionCacheOptions()


@dataclass
class VisionFeatures(ModelOutput):
    """The fields of a vision path's output that forwards use."""

    pooler_output: Any = None
    """A tensor, or a tuple of [V, H] for each video."""
    deepstack_features: Any = None
    """For each layer a tensor, or a tuple of [V, H] for each video; None in families without DeepStack."""


class CacheStatistics(NamedTuple):
    """Statistics of the cache since the last reading."""

    hits: int
    lookups: int
    gb: float
    """Size in GB of the folder; without a folder, of the entries in memory."""


class _Known(NamedTuple):
    marks: tuple[tuple[int, int], ...]
    sha: str


class VisionCache:
    """A cache of vision embeddings by video.

    Args:
        options: Options of the cache.
        recipe: Returns the processing of frames and the loading of the model as text; part of the key.
    """

    def __init__(self, options: VisionCacheOptions, recipe: Callable[[], str]) -> None:
        self.options = options
        self.recipe = recipe
        self.store = EmbeddingStore(Path(options.folder).expanduser(), options.max_gb) if options.folder else None
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._memory_bytes = 0
        self._shas: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
        self._said: set[str] = set()
        self._hits = self._lookups = 0

    @contextmanager
    def feeding(self, layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, route: str) -> Iterator[None]:
        """Makes forwards of ``model`` on ``prompts`` use cached embeddings in the block.

        Args:
            layout: The model family.
            model: The model, with or without PEFT around it.
            prompts: B prompts.
            route: Route of the texts; ``naive`` encodes every repetition of a video and is not cached.
        """
        if not any(name.startswith("pixel") for name in prompts.inputs):
            yield
            return
        parts = path_parts(model)
        reason = why_not_fixed(parts) or _why_not_known(prompts, route)
        if reason is not None:
            self._say(f"vision embeddings are not cached: {reason}")
            yield
            return
        keys = self._keys(model, parts, prompts)
        base = unwrap(model).base_model
        with ExitStack() as stack:
            for name in FEATURES:
                if hasattr(base, name):  # an attribute of the instance hides the method until it is deleted
                    setattr(base, name, self._fed(getattr(base, name), layout, prompts, keys))
                    stack.callback(delattr, base, name)
            yield

    def take_statistics(self) -> CacheStatistics:
        """Returns the statistics since the last call and resets them."""
        taken = CacheStatistics(
            self._hits, self._lookups, (self.store.bytes if self.store is not None else self._memory_bytes) / GB
        )
        self._hits = self._lookups = 0
        return taken

    def _keys(self, model: nn.Module, parts: list[Part], prompts: EncodedPrompts) -> list[str]:
        """Returns one key per video, [B]."""
        # Hashing all weights takes seconds: the hash is kept until a tensor of the path is written to.
        now = marks(parts)
        known = self._shas.get(model)
        if known is None or known.marks != now:
            known = self._shas[model] = _Known(now, path_sha(model, parts))
        device = prompts.inputs["input_ids"].device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
        vision = getattr(unwrap(model).config, "vision_config", None)
        attention = getattr(vision, "_attn_implementation", None)
        common = [FORMAT, transformers.__version__, self.recipe(), known.sha, device, autocast, attention]
        return [hashlib.sha256(json.dumps([*common, video]).encode()).hexdigest()[:40] for video in prompts.videos]

    def _fed(
        self, compute: Callable[..., Any], layout: PromptLayout, prompts: EncodedPrompts, keys: Sequence[str]
    ) -> Callable[..., Any]:
        """Returns the family's function ``compute`` with a look-up in the cache before it."""
        names = list(signature(compute).parameters)
        place = prompts.inputs["input_ids"].device

        def features(*args: Any, **kwargs: Any) -> Any:
            call = dict(zip(names, args, strict=False)) | kwargs
            given = {name: call[name] for name in prompts.inputs if isinstance(call.get(name), Tensor)}
            if not any(name.startswith("pixel") for name in given):
                return compute(*args, **kwargs)  # one of the two functions calls the other
            entries: dict[str, Entry] = {}
            for i, key in enumerate(keys):
                self._lookups += 1
                entry = entries.get(key) or self._find(key)
                if entry is None:
                    # All inputs of the prompt: pixels alone may not tell how many frames belong to which prompt.
                    one = layout.repeat_prompts(prompts.inputs, torch.tensor([i], device=place))
                    # By name, since decorators of transformers add keywords. One video at a time, since kernels may
                    # round differently in another batch.
                    with torch.no_grad():
                        entry = flatten(compute(**{**call, **{name: one[name] for name in given}}))
                    self._keep(key, entry)
                else:
                    self._hits += 1
                entries[key] = entry
            device = next(iter(given.values())).device
            return join([{name: value.to(device) for name, value in entries[key].items()} for key in keys])

        return features

    def _find(self, key: str) -> Entry | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        with torch.inference_mode(False):
            entry = self.store.read(key) if self.store is not None else None
        if entry is not None:
            self._remember(key, entry)
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        if self.store is not None:
            self.store.write(key, entry)
        elif not self._memory:
            fit = int(self.options.memory_gb * GB // max(entry_bytes(entry), 1))
            self._say(
                f"vision embeddings take {entry_bytes(entry) / 1e6:.3g} MB a clip and stay in memory for this run, at "
                f"most {self.options.memory_gb:.3g} GB, about {fit} clips; vlm.vision_cache.folder keeps them on disk"
            )
        self._remember(key, entry)

    def _remember(self, key: str, entry: Entry) -> None:
        most = int(self.options.memory_gb * GB)
        # An entry above the limit would evict all others and then itself.
        if entry_bytes(entry) > most:
            return
        self._memory[key] = entry
        self._memory_bytes += entry_bytes(entry)
        while self._memory_bytes > most:
            self._memory_bytes -= entry_bytes(self._memory.popitem(last=False)[1])

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_info(message)


def _why_not_known(prompts: EncodedPrompts, route: str) -> str | None:
    if route == "naive":
        return "route 'naive' encodes the video once for every text"
    if len(prompts.videos) != prompts.batch_size or not all(prompts.videos):
        return "the frames are jittered (data.init_args.frames.sampling: segment), or nothing says which ones they are"
    return None


def flatten(features: Any) -> Entry:
    """Converts a vision path's output for one video to named tensors on the CPU that autograd may use.

    Raises:
        ValueError: If the output is neither a tensor nor has pooled features.
    """
    pooled = getattr(features, POOLED, None)
    if isinstance(features, Tensor):
        named: dict[str, Any] = {BARE: features}
    elif pooled is not None:
        named = {POOLED: pooled}
        for layer, value in enumerate(getattr(features, LAYERS, None) or ()):
            named[f"{LAYERS}.{layer}"] = value
    else:
        raise ValueError(
            f"vision embeddings cannot be cached: the vision path returned a {type(features).__name__} without "
            f"{POOLED}; set vlm.vision_cache to null"
        )
    entry: dict[str, Tensor] = {}
    with torch.inference_mode(False):  # autograd, which may read the entry later, rejects inference tensors
        for name, value in named.items():
            items = {name: value} if isinstance(value, Tensor) else {f"{name}/{i}": v for i, v in enumerate(value)}
            entry |= {key: tensor.detach().clone().cpu().contiguous() for key, tensor in items.items()}
    return entry


def join(entries: Sequence[Mapping[str, Tensor]]) -> Any:
    """Joins the entries of B videos to the output that the family's function returns for a batch."""
    if BARE in entries[0]:
        return torch.cat([entry[BARE] for entry in entries])
    names = sorted({name.partition("/")[0] for name in entries[0]})
    layers = sorted((name for name in names if name != POOLED), key=lambda name: int(name.rpartition(".")[2]))

    def field(name: str) -> Tensor | tuple[Tensor, ...]:
        if name in entries[0]:
            return torch.cat([entry[name] for entry in entries])
        numbers = sorted(int(key.partition("/")[2]) for key in entries[0] if key.partition("/")[0] == name)
        return tuple(entry[f"{name}/{i}"] for entry in entries for i in numbers)

    return VisionFeatures(field(POOLED), [field(name) for name in layers] or None)
