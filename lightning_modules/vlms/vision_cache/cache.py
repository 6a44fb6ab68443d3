"""Caches the embeddings of videos that a frozen vision path computes, in memory within a run or on disk across runs.

The key of an entry contains everything that it depends on: the content of the file and the frames that were taken
(``EncodedPrompts.videos``), the processor, precision, attention and quantisation, and every parameter and buffer
between pixels and embeddings. If one of these is trained or has an adapter, or frames are sampled randomly, nothing
is cached, and the reason is logged.

Entries replace the results of the family's ``get_video_features`` and ``get_image_features``, so that its forward still
handles masks, positions and DeepStack. Videos that are not cached are encoded one by one, so that an entry does not
depend on the batch.

An entry also holds what a prompt needs of its video, so that a loader need not decode it (``find_known``). If such a
video has no entry any more when it is needed, it is decoded then, in the main process.

Letters: B prompts, one video each.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from vidreason.datamodules.types import EncodedPrompts, KnownVideo, VideoSample
from vidreason.lightning_modules.vlms.prefix.layout import PromptLayout, unwrap
from vidreason.lightning_modules.vlms.vision_cache.embedding_store import GB, EmbeddingStore, Entry, entry_bytes
from vidreason.lightning_modules.vlms.vision_cache.features import flatten, join
from vidreason.lightning_modules.vlms.vision_cache.known_entries import PROMPT, from_tensors, to_tensors
from vidreason.lightning_modules.vlms.vision_cache.vision_path import (
    Part,
    PathHashes,
    path_parts,
    path_tensors,
    why_not_fixed,
)

FORMAT = 2
"""Version of the files; part of the key."""
FEATURES = ("get_video_features", "get_image_features")
AUTOCAST = ("off", "torch.bfloat16", "torch.float16")
MOST_READS = 4096  # known videos that may be between a loader and the model
NAIVE = "route 'naive' encodes the video once for every text"


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


class CacheStatistics(NamedTuple):
    """Statistics of the cache since the last reading."""

    hits: int
    lookups: int
    gb: float
    """Size in GB of the folder; without a folder, of the entries in memory."""


class VisionCache:
    """A cache of vision embeddings by video.

    Args:
        options: Options of the cache.
        recipe: Returns the processing of frames and the loading of the model as text; part of the key.
        process: Returns the processor's inputs for a decoded video, pixels among them.
    """

    def __init__(
        self,
        options: VisionCacheOptions,
        recipe: Callable[[], str],
        process: Callable[[VideoSample], Mapping[str, Tensor]],
    ) -> None:
        self.options = options
        self.recipe = recipe
        self.process = process
        self.store = EmbeddingStore(Path(options.folder).expanduser(), options.max_gb) if options.folder else None
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._memory_bytes = 0
        self._hashes = PathHashes()
        self._said: set[str] = set()
        self._contexts: list[str] = []  # A video is known if there is an entry for it in one of them.
        self._expected: Callable[[], nn.Module | None] | None = None
        self._reads = OrderedDict[str, Callable[[], VideoSample]]()  # By identity: decodes a known video; the latest.
        self._hits = self._lookups = 0

    def expect(self, model: nn.Module) -> None:
        """Notes the model whose embeddings will be asked for, so that videos are known before its first forward.

        Whether that runs under autocast is not known yet; entries from earlier runs with or without it count.
        """
        self._expected = ref(model)

    @property
    def knows_videos(self) -> bool:
        """Returns False if the cache certainly holds no video, so that none needs to be looked up."""
        if self._expected is not None:
            model, self._expected = self._expected(), None
            self._contexts = [] if model is None else self._guessed(model)
        return bool(self._contexts) and (bool(self._memory) or (self.store is not None and self.store.bytes > 0))

    def find_known(self, video: str, read: Callable[[], VideoSample]) -> KnownVideo | None:
        """Returns what a prompt needs of a video that has an entry; ``KnowsVideos.find_known`` has the arguments."""
        for context in self._contexts if self.knows_videos else ():
            key = _key(context, video)
            entry = self._memory.get(key) or (self.store.read(key, PROMPT) if self.store is not None else None)
            if entry is not None and (known := from_tensors(entry)) is not None:
                if key in self._memory:
                    self._memory.move_to_end(key)  # it has to stay until its batch is used
                self._reads[video] = read
                self._reads.move_to_end(video)
                if len(self._reads) > MOST_READS:
                    self._reads.popitem(last=False)
                return known
        return None

    @contextmanager
    def feeding(
        self, layout: PromptLayout, model: nn.Module, prompts: EncodedPrompts, route: str
    ) -> Iterator[EncodedPrompts]:
        """Makes forwards of ``model`` on the prompts that it yields use cached embeddings in the block.

        Args:
            layout: The model family.
            model: The model, with or without PEFT around it.
            prompts: B prompts.
            route: Route of the texts; ``naive`` encodes every repetition of a video and is not cached.
        """
        if not any(name.startswith("pixel") for name in prompts.inputs):
            yield prompts
            return
        parts = path_parts(model)
        off = why_not_fixed(parts) or (NAIVE if route == "naive" else None)
        if off is not None:
            self._contexts, self._expected = [], None
        reason = off or _why_not_known(prompts)
        if reason is not None:
            self._say(f"vision embeddings are not cached: {reason}; every clip is decoded in every epoch")
            yield self._decoded(layout, prompts)
            return
        keys = self._keys(model, parts, prompts)
        base = unwrap(model).base_model
        with ExitStack() as stack:
            for name in FEATURES:
                if hasattr(base, name):  # an attribute of the instance hides the method until it is deleted
                    setattr(base, name, self._fed(getattr(base, name), layout, prompts, keys))
                    stack.callback(delattr, base, name)
            yield prompts

    def take_statistics(self) -> CacheStatistics:
        """Returns the statistics since the last call and resets them."""
        taken = CacheStatistics(
            self._hits, self._lookups, (self.store.bytes if self.store is not None else self._memory_bytes) / GB
        )
        self._hits = self._lookups = 0
        return taken

    def _keys(self, model: nn.Module, parts: list[Part], prompts: EncodedPrompts) -> list[str]:
        """Returns one key per video, [B]."""
        device = prompts.inputs["input_ids"].device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
        context = self._context(model, parts, device, autocast)
        self._contexts, self._expected = [context], None
        return [_key(context, video) for video in prompts.videos]

    def _context(self, model: nn.Module, parts: list[Part], device: str, autocast: str) -> str:
        """Returns everything that an entry depends on besides the video."""
        sha = self._hashes.of(model, parts)
        vision = getattr(unwrap(model).config, "vision_config", None)
        attention = getattr(vision, "_attn_implementation", None)
        return json.dumps([FORMAT, transformers.__version__, self.recipe(), sha, device, autocast, attention])

    def _guessed(self, model: nn.Module) -> list[str]:
        """Returns the contexts that the first forward of a model may have."""
        parts = path_parts(model)
        if why_not_fixed(parts) is not None:
            return []
        device = next(tensor.device.type for _, tensor in path_tensors(parts))
        return [self._context(model, parts, device, autocast) for autocast in AUTOCAST]

    def _decoded(self, layout: PromptLayout, prompts: EncodedPrompts) -> EncodedPrompts:
        """Returns the prompts with the pixels of all videos."""
        if not any(prompts.without_pixels):
            return prompts
        each = [self._one(layout, prompts, i) for i in range(prompts.batch_size)]
        names = [name for name in prompts.inputs if name.startswith("pixel")]
        pixels = {name: layout.join_visual(name, [one[name] for one in each]) for name in names}
        return replace(prompts, inputs={**prompts.inputs, **pixels}, without_pixels=())

    def _one(self, layout: PromptLayout, prompts: EncodedPrompts, i: int) -> dict[str, Tensor]:
        """Returns all inputs of a prompt, whose video is decoded if it was not.

        Raises:
            ValueError: If it cannot be decoded.
        """
        place = prompts.inputs["input_ids"].device
        one = layout.repeat_prompts(prompts.inputs, torch.tensor([i], device=place))
        if not prompts.without_pixels or not prompts.without_pixels[i]:
            return one
        try:
            made = self.process(self._reads[prompts.videos[i]]())
        except (ValueError, OSError) as error:
            raise ValueError(f"a clip whose vision embeddings were removed cannot be decoded again: {error}") from error
        return one | {name: value.to(place) for name, value in made.items() if name.startswith("pixel")}

    def _fed(
        self, compute: Callable[..., Any], layout: PromptLayout, prompts: EncodedPrompts, keys: Sequence[str]
    ) -> Callable[..., Any]:
        """Returns the family's function ``compute`` with a look-up in the cache before it."""
        names = list(signature(compute).parameters)

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
                    one = self._one(layout, prompts, i)
                    # By name, since decorators of transformers add keywords. One video at a time, since kernels may
                    # round differently in another batch.
                    with torch.no_grad():
                        entry = flatten(compute(**{**call, **{name: one[name] for name in given}}))
                    known = prompts.known[i] if prompts.known else None
                    entry = {**entry, **to_tensors(known)}
                    self._keep(key, entry)
                else:
                    self._hits += 1
                entries[key] = entry
            device = next(iter(given.values())).device
            return join([_embeddings(entries[key], device) for key in keys])

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


def _why_not_known(prompts: EncodedPrompts) -> str | None:
    if len(prompts.videos) != prompts.batch_size or not all(prompts.videos):
        return "the frames are jittered (data.init_args.frames.sampling: segment), or nothing says which ones they are"
    return None


def _key(context: str, video: str) -> str:
    return hashlib.sha256(f"{context} {video}".encode()).hexdigest()[:40]


def _embeddings(entry: Entry, device: torch.device) -> Entry:
    """Returns the embeddings of an entry on a device, without what a prompt needs."""
    return {name: value.to(device) for name, value in entry.items() if not name.startswith(PROMPT)}
