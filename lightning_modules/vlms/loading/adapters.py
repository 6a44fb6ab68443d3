"""Named LoRA adapters on one base: attach, save, load, copy and switch."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vidreason.lightning_modules.functional.finite import check_weights
from vidreason.lightning_modules.vlms.loading.master_weights import compute_in_input_dtype
from vidreason.lightning_modules.vlms.loading.sharding import unsharded_state_dict
from vidreason.lightning_modules.vlms.loading.weight_folders import CONFIG_FILE, is_adapter_folder, published
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded

WEIGHTS_FILE = "adapter_model.safetensors"
BAD_WEIGHTS = "the training that wrote them failed; give the weights of an earlier step or stage"


@dataclass(frozen=True)
class LoRAOptions:
    """Options of a LoRA adapter (arXiv 2106.09685).

    Args:
        r: Rank of the update.
        alpha: Scale of the update, which is multiplied by alpha / r.
        dropout: Dropout rate of the adapter's input in training.
        target_modules: Linear layers that get an adapter: last parts of their names, or a regular expression that
            matches whole names. Null is every linear layer of the decoder and, unless frozen, of the vision tower.
        use_rslora: Scale the update by alpha / sqrt(r) instead (rank-stabilised LoRA, arXiv 2312.03732).

    Raises:
        ValueError: If nothing could be learnt with these numbers.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"vlm.lora.r must be at least 1, got {self.r}; lora: null trains the model's own weights")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"vlm.lora.alpha must be a finite number other than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"vlm.lora.dropout must be in [0, 1), got {self.dropout}")


def attach_lora(
    model: PreTrainedModel, options: LoRAOptions, name: str = "policy", frozen: tuple[str, ...] = ()
) -> PeftModel:
    """Freezes ``model`` and attaches a new LoRA adapter.

    Args:
        model: The base.
        options: Options of the adapter.
        name: Name of the adapter.
        frozen: Dotted names of modules that get no adapter, such as a frozen vision tower.

    Raises:
        ValueError: If a target module is not there.
    """
    layers = _linear_layers(model, frozen)
    targets = options.target_modules
    chosen = sorted({_last_parts(name) for name in layers}) if targets is None else targets
    _check_reached(chosen, [name for name, _ in model.named_modules()], frozen)
    exclude = "|".join(rf"{re.escape(module)}\..*" for module in frozen)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r, so a float works
        lora_dropout=options.dropout,
        target_modules=chosen if isinstance(chosen, str) else list(chosen),
        exclude_modules=exclude or None,
        use_rslora=options.use_rslora,
    )
    wrapped = get_peft_model(model, config, adapter_name=name)
    assert isinstance(wrapped, PeftModel)
    reached = {key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if missed := sorted(key for key in layers if _is_target(chosen, key) and key not in reached):
        raise ValueError(
            f"vlm.lora: PEFT leaves out {len(missed)} of the layers that should get an adapter, for example "
            f"{missed[0]}: name others in vlm.lora.target_modules"
        )
    compute_in_input_dtype(wrapped)
    return wrapped


def reached_layers(model: PeftModel, name: str) -> str:
    """Returns how many layers adapter ``name`` changes, by the last part of their names: ``q_proj 28, v_proj 28``."""
    layers = [(key, module) for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    counts = Counter(
        # The experts of a layer are one parameter, which PEFT wraps by its name.
        getattr(module, "parameter_name", key.rpartition(".")[2])
        for key, module in layers
        if name in module.active_adapters
    )
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))


def _linear_layers(model: PreTrainedModel, frozen: tuple[str, ...]) -> list[str]:
    """Returns the names of the linear layers of decoder and, unless frozen, vision tower; the head is none of them."""
    apart = [*map(model.get_submodule, frozen), model.get_output_embeddings()]
    outside = {id(inner) for module in apart if module is not None for inner in module.modules()}
    if frozen:  # What lies between a frozen tower and the decoder is not trained either.
        inside = {id(inner) for inner in model.get_decoder().modules()}
        outside |= {id(module) for module in model.modules()} - inside
    return [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in outside]


def _last_parts(name: str) -> str:
    """Returns the last part of a module's name, with the one before it if it is a number: ``q_proj``, ``mlp.0``."""
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def _is_target(targets: Sequence[str] | str, name: str) -> bool:
    """Returns whether ``targets``, as in ``LoRAOptions.target_modules``, name a layer."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_reached(targets: Sequence[str] | str, names: Sequence[str], frozen: tuple[str, ...]) -> None:
    """Checks that every target names a layer outside the frozen modules.

    Raises:
        ValueError: If one does not; the adapter would leave that layer out without a word.
    """
    free = [name for name in names if not name.startswith(tuple(f"{module}." for module in frozen))]
    each = [targets] if isinstance(targets, str) else targets
    missing = [t for t in each if not any(_is_target(t if targets is t else [t], name) for name in free)]
    if missing:
        last = sorted({name.rpartition(".")[2] for name in free if name.endswith("proj")})
        raise ValueError(
            f"vlm.lora.target_modules: the model has no layer {', '.join(missing)} that is trained; among its layers "
            f"are {', '.join(last)}; null takes every linear layer"
        )


def _peft(model: nn.Module, name: str) -> PeftModel:
    if not isinstance(model, PeftModel) or name not in model.peft_config:
        have = sorted(model.peft_config) if isinstance(model, PeftModel) else "none"
        raise ValueError(f"the model has no adapter '{name}' (it has: {have}); set vlm.lora to train one")
    return model


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str,
    info: Mapping[str, object],
    beside: Mapping[str, Path] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes adapter ``name`` and ``info`` as a PEFT folder, which replaces an existing folder.

    Args:
        model: The model that has the adapter.
        folder: Folder to write.
        name: Name of the adapter.
        info: Content of ``vidreason.json``.
        beside: Adapter folders to copy into ``folder``, by their new names; they may be inside the replaced folder.
        state: Weights of the model or of the adapter by name. None: the current weights of the model.
    """
    peft_model, folder = _peft(model, name), Path(folder)
    state = unsharded_state_dict(peft_model) if state is None and is_sharded(peft_model) else state
    weights: dict[str, Tensor] = get_peft_model_state_dict(peft_model, state, adapter_name=name)
    check_weights(weights, str(folder), "no weights are written; lower the learning rate")
    config = deepcopy(peft_model.peft_config[name])
    config.inference_mode = True  # what PEFT itself writes; loading overrides it
    with published(folder, info) as draft:
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, draft / WEIGHTS_FILE)
        config.save_pretrained(str(draft))
        for inner, other in (beside or {}).items():
            shutil.copytree(other, draft / inner, ignore=shutil.ignore_patterns(inner))


def load_adapter(
    model: nn.Module, folder: str | Path, name: str, trainable: bool = True, options: LoRAOptions | None = None
) -> PeftModel:
    """Loads the adapter in ``folder`` under ``name``; an adapter of that name gets the new weights.

    Args:
        model: A base, or a base with adapters.
        folder: A PEFT folder.
        name: Name of the adapter in memory.
        trainable: Whether its weights require gradients.
        options: Options of the run, which the adapter must match; only their dropout replaces that of the folder.

    Raises:
        ValueError: If the folder is not an adapter, has other options, or does not fit this model.
    """
    folder = Path(folder)
    if not is_adapter_folder(folder) or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} is not an adapter folder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}")
    config, weights = LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_FILE)
    check_weights(weights, str(folder), BAD_WEIGHTS)
    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # a folder may have moved: PEFT would warn, and lineage compares hashes
    if options is not None:
        _check_options(folder, config, options)
        config.lora_dropout = options.dropout
    if isinstance(model, PeftModel):
        if name not in model.peft_config:
            with _same_trainable(model):
                model.add_adapter(name, config)
        peft_model = model
    else:
        wrapped = get_peft_model(model, config, adapter_name=name)
        assert isinstance(wrapped, PeftModel)
        peft_model = wrapped
    result: Any = set_peft_model_state_dict(peft_model, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if result.unexpected_keys or missing:
        odd = [*result.unexpected_keys, *missing][0]
        raise ValueError(
            f"the adapter in {folder} does not fit this base model (for example at {odd}): use its own base"
        )
    _set_trainable(peft_model, name, trainable)
    compute_in_input_dtype(peft_model)
    return peft_model


def _check_options(folder: Path, config: LoraConfig, options: LoRAOptions) -> None:
    found: dict[str, object] = {"r": config.r, "alpha": float(config.lora_alpha), "use_rslora": config.use_rslora}
    asked: dict[str, object] = {"r": options.r, "alpha": float(options.alpha), "use_rslora": options.use_rslora}
    if options.target_modules is not None:  # Null takes the layers of the adapter.
        found["target_modules"] = _sorted(config.target_modules)
        asked["target_modules"] = _sorted(options.target_modules)
    if differing := [key for key in found if asked[key] != found[key]]:
        values = "; ".join(f"{key} is {found[key]}, but vlm.lora has {asked[key]}" for key in differing)
        raise ValueError(f"the adapter in {folder} has other options: {values}: set vlm.lora as the adapter has it")


def _sorted(targets: Collection[str] | str | None) -> list[str] | str:
    return targets if isinstance(targets, str) else sorted(targets or ())


def copy_adapter(model: nn.Module, src: str, dst: str, trainable: bool = False) -> None:
    """Copies the weights of adapter ``src`` to ``dst``, which is added if it does not exist."""
    peft_model = _peft(model, src)
    if dst not in peft_model.peft_config:
        with _same_trainable(peft_model):
            peft_model.add_adapter(dst, deepcopy(peft_model.peft_config[src]))
    weights = get_peft_model_state_dict(peft_model, adapter_name=src)
    set_peft_model_state_dict(peft_model, {k: v.detach().clone() for k, v in weights.items()}, adapter_name=dst)
    _set_trainable(peft_model, dst, trainable)
    compute_in_input_dtype(peft_model)


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Activates adapter ``name`` in the block (None: no adapter) without changing which weights are trainable."""
    if name is None and not isinstance(model, PeftModel):
        yield
        return
    peft_model = model if name is None and isinstance(model, PeftModel) else _peft(model, name or "")
    before, flags = peft_model.active_adapter, _flags(peft_model)
    with ExitStack() as stack:
        stack.callback(_restore, flags)  # runs last: PEFT changes requires_grad whenever it switches adapters
        if name is None:
            stack.enter_context(peft_model.disable_adapter())
        else:
            stack.callback(peft_model.set_adapter, before)
            peft_model.set_adapter(name)
        _restore(flags)
        yield


def _set_trainable(model: PeftModel, name: str, trainable: bool) -> None:
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(trainable)


def _flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """Restores ``requires_grad`` of existing parameters, which PEFT changes."""
    flags = _flags(model)
    try:
        yield
    finally:
        _restore(flags)
