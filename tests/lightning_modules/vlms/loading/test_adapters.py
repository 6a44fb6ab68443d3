"""Building, adapters and folders: what is trained, what is saved, and what comes back."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_builders
import pytest
import torch
import vlm_builders as builders
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Glm4vMoeConfig

from vidreason.datamodules.types import Encoded
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import (
    LoRAOptions,
    copy_adapter,
    load_adapter,
    save_adapter,
    use_adapter,
)
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha, read_info, save_weights
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import GLM4V

MakeVLM = Callable[..., VLM]
LORA = LoRAOptions(r=4, alpha=8)


def trainable_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def encode(vlm: VLM) -> Encoded:
    return vlm.encode([builders.make_example(["<think>a person</think><answer>cat</answer>"])])


@torch.no_grad()
def logprobs(vlm: VLM, model: nn.Module, encoded: Encoded) -> Tensor:
    return vlm.score(model, encoded.prompts, encoded.texts).logprobs


def test_what_is_trained(make_vlm: MakeVLM, family: str) -> None:
    tower = "model.visual." if family == "qwen" else "model.vision_model."
    names = trainable_names(make_vlm(family).build())
    assert names
    assert not any(name.startswith(tower) for name in names)
    assert any(name.startswith(tower) for name in trainable_names(make_vlm(family, freeze_vision=False).build()))
    names = trainable_names(make_vlm(family, lora=LORA).build())
    assert len(names) == 2 * 7 * 2, "A and B of seven matrices in two layers"
    assert all(".policy." in name and tower not in name for name in names)
    names = trainable_names(make_vlm(family, lora=LORA, freeze_vision=False).build())
    assert any(tower in name for name in names)


def test_adapter_folder_round_trip(make_vlm: MakeVLM, family: str, tmp_path: Path) -> None:
    vlm = make_vlm(family, lora=LORA)
    encoded, folder = encode(vlm), tmp_path / "run" / "adapter"
    model = vlm.build()
    base = logprobs(vlm, model, encoded)
    builders.randomise_lora(model)
    trained = logprobs(vlm, model, encoded)
    assert (trained - base).abs().max() > 1e-2
    save_adapter(model, folder, "policy", {"stage": "sft", "base_sha": vlm.base_sha()})
    assert sorted(f.name for f in folder.iterdir() if f.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "vidreason.json",
    ]
    assert [f.name for f in folder.parent.iterdir()] == ["adapter"]
    assert read_info(folder)["stage"] == "sft"

    again = vlm.build(str(folder))
    assert trainable_names(again) == trainable_names(model)
    torch.testing.assert_close(logprobs(vlm, again, encoded), trained, rtol=0, atol=0)
    first = adapter_sha(folder)
    save_adapter(again, folder, "policy", {"stage": "grpo"})  # a second run into the same folder
    assert adapter_sha(folder) == first
    builders.randomise_lora(again, seed=5)
    save_adapter(again, folder, "policy", {})
    assert adapter_sha(folder) != first


def test_adapters_side_by_side(make_vlm: MakeVLM, tmp_path: Path) -> None:
    vlm = make_vlm("qwen", lora=LORA)
    encoded, model = encode(vlm), vlm.build()
    base = logprobs(vlm, model, encoded)
    builders.randomise_lora(model)
    policy, trained = logprobs(vlm, model, encoded), trainable_names(model)

    copy_adapter(model, "policy", "reference")
    assert trainable_names(model) == trained, "a copy is frozen, and copying freezes nothing else"
    builders.randomise_lora(model, seed=9)  # both; then the reference goes back
    copy_adapter(model, "policy", "calibrator", trainable=True)
    assert len(trainable_names(model)) == 2 * len(trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".policy." in name:
                parameter.mul_(0.5)
    flags = trainable_names(model)
    moved = logprobs(vlm, model, encoded)
    with use_adapter(model, "reference"):
        assert trainable_names(model) == flags
        reference = logprobs(vlm, model, encoded)
        with use_adapter(model, None):
            assert trainable_names(model) == flags
            torch.testing.assert_close(logprobs(vlm, model, encoded), base, rtol=0, atol=1e-6)
        torch.testing.assert_close(logprobs(vlm, model, encoded), reference, rtol=0, atol=0)
    assert trainable_names(model) == flags
    torch.testing.assert_close(logprobs(vlm, model, encoded), moved, rtol=0, atol=0)
    assert min((a - b).abs().max() for a, b in ((policy, moved), (moved, reference), (base, moved))) > 1e-3

    with use_adapter(model, "calibrator"):
        vlm.score(model, encoded.prompts, encoded.texts).logprobs.sum().backward()
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None} == {"calibrator"}

    save_adapter(model, tmp_path / "c", "calibrator", {})
    with use_adapter(model, "calibrator"):
        expected = logprobs(vlm, model, encoded)
    fresh = vlm.build()
    load_adapter(fresh, tmp_path / "c", "judge", trainable=False)
    assert trainable_names(fresh) == trained
    with use_adapter(fresh, "judge"):
        torch.testing.assert_close(logprobs(vlm, fresh, encoded), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no adapter 'other'"), use_adapter(fresh, "other"):
        pass


def test_full_weights_round_trip(make_vlm: MakeVLM, tmp_path: Path) -> None:
    vlm = make_vlm("qwen", freeze_vision=False)
    encoded, model = encode(vlm), vlm.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_weights(model, tmp_path / "weights", {"stage": "sft"})  # type: ignore[arg-type]
    again = vlm.build(str(tmp_path / "weights"))
    torch.testing.assert_close(logprobs(vlm, again, encoded), logprobs(vlm, model, encoded), rtol=0, atol=0)
    fresh = make_vlm("qwen", lora=LORA).build(str(tmp_path / "weights"))
    torch.testing.assert_close(logprobs(vlm, fresh, encoded), logprobs(vlm, model, encoded), rtol=0, atol=1e-5)
    assert read_info(tmp_path / "weights") == {"stage": "sft"}
    assert adapter_sha(tmp_path / "weights")


def test_base_sha_follows_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        QwenVL(str(builders.write_qwen(tmp_path / name, seed))) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.base_sha() == same.base_sha() != other.base_sha()


def test_refusals_name_the_remedy(make_vlm: MakeVLM, tmp_path: Path) -> None:
    vlm = make_vlm("qwen", lora=LORA)
    folder = tmp_path / "adapter"
    save_adapter(vlm.build(), folder, "policy", {"base_sha": vlm.base_sha()})
    with pytest.raises(ValueError, match="set vlm.lora as the adapter has it"):
        make_vlm("qwen", lora=LoRAOptions(r=8, alpha=8)).build(str(folder))
    with pytest.raises(ValueError, match="vlm.lora is null"):
        make_vlm("qwen").build(str(folder))
    with pytest.raises(ValueError, match="trained on another base"):
        make_vlm("smolvlm", lora=LORA).build(str(folder))
    (folder / "vidreason.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="neither an adapter folder"):
        vlm.build(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="not an adapter folder"):
        load_adapter(vlm.build(), tmp_path, "policy")
    with pytest.raises(ValueError, match=r"no config\.json"):
        QwenVL(str(tmp_path / "missing")).build()
    with pytest.raises(ValueError, match="hf download no-such-owner/no-such-model"):
        QwenVL("no-such-owner/no-such-model").build()
    with pytest.raises(ValueError, match="hf download no-such-owner/no-such-model"):
        QwenVL("no-such-owner/no-such-model").encode([builders.make_example()])
    with pytest.raises(ValueError, match=r"set vlm\.lora"):
        QwenVL("anything", quantize="nf4")


PATTERN = r".*self_attn\.(q|v)_proj"


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(None, 2 * 7), (("v_proj", "self_attn.q_proj"), 2 * 2), (PATTERN, 2 * 2)],
    ids=["all", "names", "pattern"],
)
def test_target_modules_are_names_or_a_pattern(
    make_vlm: MakeVLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, targets: Any, layers: int
) -> None:
    caplog.set_level("INFO")
    vlm = make_vlm("qwen", lora=LoRAOptions(r=4, alpha=8, target_modules=targets))
    model = vlm.build()
    assert len(trainable_names(model)) == 2 * layers
    (said,) = [record.message for record in caplog.records if "LoRA changes" in record.message]
    assert "q_proj 2" in said
    assert ("down_proj 2" in said) == (targets is None)
    save_adapter(model, tmp_path / "a", "policy", {})
    assert trainable_names(vlm.build(str(tmp_path / "a"))) == trainable_names(model)
    other = make_vlm("qwen", lora=LoRAOptions(r=4, alpha=8, target_modules=("o_proj",)))
    with pytest.raises(ValueError, match=r"target_modules is .*_proj.*, but vlm.lora has \['o_proj'\]"):
        other.build(str(tmp_path / "a"))


def test_a_target_that_the_model_lacks_is_refused(make_vlm: MakeVLM) -> None:
    for targets in (("q_proj", "gate_up_proj"), r".*gate_up_proj", ("qkv",)):  # the last one is in the frozen tower
        with pytest.raises(ValueError, match=r"no layer \S*(gate_up_proj|qkv) that is trained; .*down_proj"):
            make_vlm("qwen", lora=LoRAOptions(target_modules=targets)).build()


def test_a_layer_that_peft_leaves_out_is_an_error(make_vlm: MakeVLM, tmp_path: Path) -> None:
    """For GLM-4.5V, PEFT takes names of linear layers for those of experts, and leaves the layers out."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"moe_intermediate_size": 32, "first_k_dense_replace": 1, **experts}
    path = str(family_builders.write_glm(tmp_path / "glm", config_class=Glm4vMoeConfig, **sizes))
    with pytest.raises(ValueError, match=r"PEFT leaves out 6 of the layers .*layers.0.mlp.down_proj: name others"):
        GLM4V(path, lora=LORA).build()
    GLM4V(path, lora=LoRAOptions(target_modules=("q_proj", "v_proj"))).build()


@pytest.mark.filterwarnings("default")
def test_nf4_says_that_experts_are_left(make_vlm: MakeVLM, recwarn: pytest.WarningsRecorder) -> None:
    make_vlm("qwen3_moe", lora=LORA, quantize="nf4", dtype="float32").build()
    (said,) = [str(warning.message) for warning in recwarn if "vlm.quantize" in str(warning.message)]
    # Two layers of four experts of 64 x 64 and 64 x 32.
    assert said.startswith("vlm.quantize: nf4 leaves the experts in float32: 0.0492 M parameters, for example model.")


def test_fused_projections_are_reached(make_vlm: MakeVLM) -> None:
    names = trainable_names(make_vlm("glm", lora=LORA).build())
    assert any("gate_up_proj" in name for name in names)
    assert not any("visual" in name for name in names)


def test_an_adapter_of_another_trainer_is_taken_as_it_is(make_vlm: MakeVLM, tmp_path: Path) -> None:
    """Written by PEFT alone, with a pattern and a rank-stabilised scale, as ms-swift and others do."""
    vlm = make_vlm("qwen")
    encoded = encode(vlm)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=PATTERN, use_rslora=True)
    theirs = get_peft_model(vlm.build(), config)
    builders.randomise_lora(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    wanted = logprobs(vlm, theirs, encoded)
    options = LoRAOptions(r=4, alpha=8, use_rslora=True)
    ours = make_vlm("qwen", lora=options)
    torch.testing.assert_close(logprobs(ours, ours.build(str(tmp_path / "theirs")), encoded), wanted, rtol=0, atol=1e-6)
    named = replace(options, target_modules=("q_proj",))
    message = f"target_modules is {PATTERN}, but vlm.lora has ['q_proj']: set vlm.lora as the adapter has it"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_vlm("qwen", lora=named).build(str(tmp_path / "theirs"))
    make_vlm("qwen", lora=replace(options, target_modules=PATTERN)).build(str(tmp_path / "theirs"))  # as it advises
    with pytest.raises(ValueError, match="use_rslora is True, but vlm.lora has False"):
        make_vlm("qwen", lora=LORA).build(str(tmp_path / "theirs"))
    fresh = ours.build()
    scales = {layer.scaling["policy"] for layer in fresh.modules() if isinstance(layer, LoraLayer)}
    assert scales == {8 / 4**0.5}


def test_nf4_trains_after_an_eval_forward(make_vlm: MakeVLM, family: str) -> None:
    pytest.importorskip("bitsandbytes")
    vlm = make_vlm(family, lora=LORA, quantize="nf4")
    model = vlm.build()
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert "Linear4bit" in kinds.values()
    left = [name for name, kind in kinds.items() if kind == "Linear4bit" and ("visual" in name or "vision" in name)]
    assert not left, "the tower stays in full precision"
    encoded = encode(vlm)
    vlm.generate(model, encoded.prompts, 2, Sampling(3), [[1, 2]])
    builders.randomise_lora(model)
    losses = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = -vlm.score(model, encoded.prompts, encoded.texts).logprobs.sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
