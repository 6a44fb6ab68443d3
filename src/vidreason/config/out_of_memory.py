"""Out of memory in one line: which setting bounds the memory, its value, and the command that plans it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb

import torch

from vidreason.lightning_modules.base import VLMModule

_PLANNED = ("--config", "--vlm", "--data")
# The allocator of the CPU raises a plain RuntimeError.
_CPU_MESSAGE = re.compile(r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMG]iB|\d+ bytes)")


class OutOfMemoryError(ValueError):
    """A forward or backward pass that did not fit into memory."""


@contextmanager
def explain_out_of_memory(module: object, argv: Sequence[str]) -> Iterator[None]:
    """Raises what an allocator says in the block as one line.

    Args:
        module: The stage.
        argv: Options of the command, for the command that plans it.

    Raises:
        OutOfMemoryError: If memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(describe(error, module, argv)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that a GPU or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_MESSAGE.search(str(error)) is not None


def describe(error: BaseException, module: object, argv: Sequence[str]) -> str:
    """Returns the message: what was asked for, the setting that bounds it and its value, and what plans it."""
    asked = _ASKED.search(str(error))
    what = f"out of memory{f', {asked[1]} more were asked for' if asked else ''}"
    if not isinstance(module, VLMModule):
        return what
    # Texts that a fit writes before its first step are bounded like an evaluation.
    trains = any(frame.f_code.co_name == "training_step" for frame, _ in walk_tb(error.__traceback__))
    group, size = ("updates", module.updates) if trains else ("eval", module.evaluation)
    key = f"model.init_args.{group}.clips_per_forward"
    value = size.clips_per_forward
    if value == 1:
        smaller = "which is the smallest; fewer data.init_args.frames.num_frames, a smaller frames.max_pixels, "
        smaller += "or --config configs/strategy/qlora.yaml take less"
    else:
        smaller = f"smaller values take less: --{key} 1"
    fragmented = isinstance(error, torch.OutOfMemoryError) and "expandable_segments" not in _allocator()
    wasted = " (PYTORCH_ALLOC_CONF=expandable_segments:True leaves fewer gaps between tensors)" if fragmented else ""
    return (
        f"{what}{wasted}: {key} is {'null (the whole batch)' if value is None else value}, {smaller}; what fits says "
        f"{plan_command(argv)}"
    )


def _allocator() -> str:
    return " ".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))


def plan_command(argv: Sequence[str]) -> str:
    """Returns the command that plans a stage on this machine's GPU.

    Args:
        argv: Options of the command that ran out of memory.
    """
    words = ["vidreason", "plan"]
    for index, word in enumerate(argv):
        option, equals, _ = word.partition("=")
        if option in _PLANNED:
            words += [word] if equals else list(argv[index : index + 2])
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        words += ["--memory", f"{total / 1e9:.0f}GB"]
    return f"`{shlex.join(words)}`"
