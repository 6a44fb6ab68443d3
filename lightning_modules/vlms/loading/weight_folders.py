"""Folders of trained weights: an adapter, or a whole model after full fine-tuning.

An adapter folder is a PEFT folder with ``vidreason.json`` (stage and lineage); a folder of full weights is a model
folder with the same file. The name of the adapter in memory is not stored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from vidreason.datamodules.atomic_files import flush_to_disk, naming, replace_folder
from vidreason.datamodules.clips.time_limit import look_at
from vidreason.datamodules.file_hash import files_sha
from vidreason.lightning_modules.functional.finite import check_weights
from vidreason.lightning_modules.vlms.loading.master_weights import as_computed, in_compute_dtype
from vidreason.lightning_modules.vlms.loading.sharding import unsharded_state_dict
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded

INFO_FILE = "vidreason.json"
CONFIG_FILE = "adapter_config.json"


def is_adapter_folder(folder: str | Path) -> bool:
    """Returns whether ``folder`` holds a PEFT adapter and not full weights."""
    return (Path(folder) / CONFIG_FILE).is_file()


def read_info(folder: str | Path) -> dict[str, object]:
    """Returns the content of ``vidreason.json`` in an adapter or weights folder; empty if there is none.

    Raises:
        ReadTimeoutError: If the folder does not answer.
    """
    file = Path(folder) / INFO_FILE
    if look_at(file) != "file":
        return {}
    info: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return info


@contextmanager
def published(folder: Path, info: Mapping[str, object]) -> Iterator[Path]:
    """Yields a temporary folder, which then gets the info file and atomically replaces ``folder``.

    Raises:
        OSError: If ``folder`` cannot be written; the message names it.
    """
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with naming(folder), _system_errors():
            draft.mkdir(parents=True)
            yield draft
            (draft / INFO_FILE).write_text(json.dumps(dict(info), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _give_umask_modes(draft)
            flush_to_disk(draft)
            replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _give_umask_modes(folder: Path) -> None:
    """Gives every file the mode that the umask asks for; safetensors writes files that nobody else can read."""
    mode = (folder / INFO_FILE).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raises errors of safetensors that come from the operating system, such as a full disk, as OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_weights(model: PreTrainedModel, folder: str | Path, info: Mapping[str, object], processor: Any = None) -> None:
    """Writes a fully fine-tuned model as a model folder with ``info`` in ``vidreason.json``.

    Weights that are held in fp32 for the optimizer are written in the dtype in which forwards use them.

    Args:
        model: The model.
        folder: Folder to write.
        info: Content of ``vidreason.json``.
        processor: Processor of the model, written to the same folder.
    """
    sharded = is_sharded(model)
    with nullcontext() if sharded else in_compute_dtype(model):
        state = as_computed(model, unsharded_state_dict(model)) if sharded else None
        weights = model.state_dict() if state is None else state
        # Buffers may be infinite on purpose: the clipping bounds of Gemma 4's audio tower are.
        parameters = {name: weights[name] for name, _ in model.named_parameters() if name in weights}
        check_weights(parameters, str(folder), "no weights are written; lower the learning rate")
        with published(Path(folder), info) as draft:
            model.save_pretrained(draft, state_dict=state)
            if processor is not None:
                processor.save_pretrained(draft)


def adapter_sha(folder: str | Path) -> str:
    """Returns the SHA-256 of the weights and LoRA settings of an adapter, or of a folder of full weights."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors)")
    settings = ""
    if is_adapter_folder(folder):
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = f"{config['r']} {config['lora_alpha']}"
    return files_sha(files, settings)
