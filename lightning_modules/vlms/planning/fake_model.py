"""A model of a checkpoint's configuration on fake tensors: shapes and dtypes of device cpu, without memory.

Operations between fake tensors return fake tensors and run no kernel. Tokens, masks and positions stay real, so that
the code of scoring and sampling, which reads them, runs as it is. Fake tensors of device cpu save for the backward pass
what real ones save. On devices meta and cuda they would not: attention there saves all products of queries and keys.

Letter: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading import building
from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a parameter in 4 bits: a half, a byte of scale for 64 of them, and four bytes for 256 scales."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's parameters."""

    parameters: int
    trained: int
    base_bytes: int
    """Bytes of what is not trained, or of all weights where these are trained themselves."""
    adapter_bytes: int
    """Bytes of the adapter; 0 if the weights themselves are trained."""
    trained_bytes: int
    largest_bytes: int
    """Bytes of the largest quantised layer in the dtype of the base, which a forward pass unpacks; 0 if none is."""


class FakeModel:
    """The model that ``VLM.build`` would return, on fake tensors.

    Args:
        vlm: The model family and checkpoint; its folder needs no weights.
        dtype: Dtype of the base's weights.
        converted: Dtype that the trainer converts everything to (precision ``bf16-true``); None leaves it.

    Attributes:
        mode: The mode that makes fake tensors.
        model: The model, in train mode.
        layers: Decoder layers of the checkpoint.
        period: Number of layers after which the kinds of layers repeat.
        weights: Sizes of the parameters.
    """

    def __init__(self, vlm: VLM, dtype: torch.dtype, converted: torch.dtype | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with building.readable(vlm.path):
            config = AutoConfig.from_pretrained(vlm.path)
        attention = dict.fromkeys(building.ATTENDING, vlm.attn_implementation) | {"audio_config": "eager"}
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
            base.tie_weights()
            frozen = vlm.vision_modules if vlm.freeze_vision else ()
            checkpointing = vlm.gradient_checkpointing
            self.model = building.equip(base, None, lora=vlm.lora, frozen=frozen, gradient_checkpointing=checkpointing)
        if converted is not None:
            self.model.to(converted)
        self.weights = _weights(self.model, vlm)
        text = text_config(self.model)
        self._text, self._decoder = text, unwrap(self.model).get_decoder()
        self._all_layers = self._decoder.layers
        self._kinds: list[str] | None = getattr(text, "layer_types", None)
        self.layers = len(self._all_layers)
        self.period = _period(self._kinds or [])
        self.vocabulary = int(text.vocab_size)
        self.dtype = dtype if converted is None else converted
        if vlm.freeze_vision:
            self._cut_towers(vlm)
        self._materialise()

    def _cut_towers(self, vlm: VLM) -> None:
        """Removes blocks of frozen towers: their activations are freed one after another, so that few blocks tell all.

        Blocks whose features go to the decoder (DeepStack) stay, and as many as a family counts back from the last one.
        """
        config = unwrap(self.model).config
        taps = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
        taken = getattr(config, "vision_feature_layer", None)  # an index, or several, into the states between blocks
        counted = [abs(index) for index in ([taken] if isinstance(taken, int) else taken or [])]
        most = max(1 + max(taps or [1]), *counted, 0)
        for name in vlm.vision_modules:
            tower = unwrap(self.model).get_submodule(name)
            for module in list(tower.modules()):
                for key, child in list(module.named_children()):
                    if isinstance(child, nn.ModuleList) and len(child) > most:
                        setattr(module, key, child[:most])
                        if getattr(getattr(module, "config", None), "num_hidden_layers", None) == len(child):
                            module.config.num_hidden_layers = most

    def _materialise(self) -> None:
        """Replaces tensors of device meta by fake ones of device cpu; tied weights stay tied."""
        made: dict[int, nn.Parameter] = {}
        originals = list(self.model.parameters())  # held, so that no id is used twice

        def fake(tensor: Tensor) -> Tensor:
            with self.mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = fake(buffer)
        assert len(made) == len(originals)

    @property
    def depths(self) -> tuple[int, int]:
        """Two numbers of layers of which the second has one period more, behind those that get extra features."""
        vision = getattr(unwrap(self.model).config, "vision_config", None)
        special = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        first = self.period * (1 + -(-special // self.period))
        return (first, first + self.period) if first + self.period <= self.layers else (self.layers, self.layers)

    @contextmanager
    def depth(self, layers: int) -> Iterator[nn.Module]:
        """Returns the model with its first ``layers`` decoder layers only."""
        text, before = self._text, self._text.num_hidden_layers
        with ExitStack() as stack:
            stack.callback(setattr, self._decoder, "layers", self._all_layers)
            stack.callback(setattr, text, "num_hidden_layers", before)
            if self._kinds is not None:
                stack.callback(setattr, text, "layer_types", self._kinds)
                text.layer_types = self._kinds[:layers]
            self._decoder.layers = self._all_layers[:layers]
            # Gemma 4 embeds a token once for all layers, and takes their number from its configuration.
            if not getattr(text, "hidden_size_per_layer_input", None):
                text.num_hidden_layers = layers
            stack.enter_context(devices_known())
            yield self.model

    def known(self) -> list[Tensor]:
        """Returns parameters, buffers and gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [*self.model.parameters(), *self.model.buffers(), *grads]


def _weights(model: nn.Module, vlm: VLM) -> Weights:
    """Returns the sizes of the parameters of a whole model."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    base = [p for p in parameters if vlm.lora is None or not p.requires_grad]
    packed = _packed(unwrap(model), vlm) if vlm.quantize == "nf4" else []
    whole = sum(map(_bytes, base)) - sum(map(_bytes, packed))
    return Weights(
        parameters=sum(p.numel() for p in base),
        trained=sum(p.numel() for p in trained),
        base_bytes=whole + round(sum(p.numel() for p in packed) * NF4_BYTES),
        adapter_bytes=0 if vlm.lora is None else sum(map(_bytes, trained)),
        trained_bytes=sum(map(_bytes, trained)),
        largest_bytes=max(map(_bytes, packed), default=0),
    )


def _packed(base: nn.Module, vlm: VLM) -> list[Tensor]:
    """Returns the weights that ``quantize`` holds in 4 bits."""
    skipped = tuple(f"{name}." for name in vlm.unquantised)
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    return [
        module.weight
        for name, module in layers
        if not f"{name}.".startswith(skipped) and "lora_" not in name and module.weight.dtype.is_floating_point
    ]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _period(kinds: list[str]) -> int:
    """Returns after how many layers their kinds repeat.

    >>> _period(["full"] * 4), _period(["linear", "linear", "full"] * 3), _period(["sliding", "full", "full"])
    (1, 3, 3)
    """
    lengths = (n for n in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    return next(lengths, max(len(kinds), 1))


@contextmanager
def devices_known() -> Iterator[None]:
    """Asks the driver once whether there is a GPU, which fake tensors do before every operation for milliseconds."""
    answer: Any = torch.cuda.is_available()
    with patch.object(torch.cuda, "is_available", return_value=answer):
        yield
