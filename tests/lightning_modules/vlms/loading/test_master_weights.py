"""Weights held in fp32 and used in bfloat16: what moves, what autograd keeps, and what is written."""

import json

import pytest
import torch
import vlm_builders as builders
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions, copy_adapter
from vidreason.lightning_modules.vlms.loading.master_weights import (
    as_computed,
    compute_dtypes,
    compute_in_input_dtype,
    in_compute_dtype,
    keep_master_weights,
)
from vidreason.lightning_modules.vlms.loading.weight_folders import save_weights
from vidreason.testing.samples import relative_gap

LORA = LoRAOptions(r=4, alpha=8)
BF16 = torch.bfloat16


def saved_bytes(work):
    """Storage to dtype of every floating tensor that autograd keeps for the backward pass of ``work``."""
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = work()
    return out, kept


def lora_layer(hooked=True):
    """A bfloat16 layer with an adapter of the project, or of PEFT alone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, dtype=BF16))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    if hooked:
        compute_in_input_dtype(model)
    return model


def test_the_input_of_an_adapter_is_not_copied_to_fp32():
    x = torch.randn(16, 64, dtype=BF16, requires_grad=True)
    outs, sizes, grads = [], [], []
    for hooked in (False, True):
        model = lora_layer(hooked)
        out, kept = saved_bytes(lambda model=model: model(x))
        fp32 = [shape for dtype, shape, t in kept.values() if dtype == torch.float32 and t.shape[:1] == (16,)]
        sizes.append(sum(fp32))
        assert out.dtype == BF16
        out.float().pow(2).sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.dtype == torch.float32 for g in named.values())
        outs.append(out.float())
        grads.append(named)
    assert sizes[0] >= 16 * 64 * 4, "PEFT alone keeps a copy"
    assert sizes[1] == 0
    assert torch.allclose(outs[0], outs[1], rtol=0.05, atol=0.05)
    assert relative_gap(grads[1], grads[0]) < 0.02


def test_an_fp32_base_is_computed_as_before():
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    found = [lora_layer(hooked).float()(x) for hooked in (False, True)]
    assert torch.equal(*found)


@pytest.fixture
def qwen(make_vlm):
    return lambda **options: make_vlm("qwen", dtype="bfloat16", **options)


def encoded(vlm):
    return vlm.encode([builders.make_example(["<think>a person</think><answer>cat</answer>"])])


def step(vlm, model, batch, optimizer):
    scores = vlm.score(model, batch.prompts, batch.texts)
    optimizer.zero_grad()
    (-scores.logprobs.sum()).backward()
    optimizer.step()


def test_small_steps_move_the_weights(qwen):
    """At lr 1e-6, below half the spacing of bfloat16 around most weights, rounding would undo them."""
    vlm = qwen()
    batch, moved = encoded(vlm), {}
    for masters in (False, True):
        model = vlm.build()
        if masters:
            keep_master_weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32 if masters else BF16}
        assert all(p.dtype == BF16 for p in model.parameters() if not p.requires_grad), "the tower is as it was"
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        for _ in range(4):
            step(vlm, model, batch, optimizer)
        touched = [(p != b)[p.grad != 0] for p, b in zip(trained, before, strict=True) if p.grad is not None]
        moved[masters] = float(torch.cat(touched).float().mean())
    assert moved[False] < 0.2
    assert moved[True] > 0.99


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"route": "packed"}, {"completion_chunk": 1}]
)
def test_masters_compute_what_bfloat16_weights_compute(qwen, options):
    vlm = qwen(**options)
    batch = encoded(vlm)
    plain, masters = vlm.build(), vlm.build()
    keep_master_weights(masters)
    found, grads = [], []
    for model in (plain, masters):
        scores = vlm.score(model, batch.prompts, batch.texts).logprobs
        scores.sum().backward()
        found.append(scores.detach())
        grads.append({n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*found)
    assert grads[0].keys() == grads[1].keys()
    assert relative_gap(grads[1], grads[0]) < 0.02
    assert not any(p.dtype == BF16 for p in masters.parameters() if p.requires_grad), "restored after the forward"


def test_an_exception_in_a_forward_leaves_the_masters(qwen):
    model = qwen().build()
    keep_master_weights(model)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert layer.weight.dtype == torch.float32
    assert isinstance(layer.weight, nn.Parameter)


def test_sampling_is_that_of_the_bfloat16_weights(qwen):
    vlm = qwen()
    batch = encoded(vlm)
    plain, masters = vlm.build(), vlm.build()
    keep_master_weights(masters)
    made = [
        vlm.generate(model, batch.prompts, 2, Sampling(max_new_tokens=5), seeds=[[1, 2]]) for model in (plain, masters)
    ]
    assert torch.equal(made[0].ids, made[1].ids)
    assert torch.equal(made[0].logprobs, made[1].logprobs)
    assert all(p.dtype == torch.float32 for p in masters.parameters() if p.requires_grad)


def test_what_is_written_is_in_bfloat16(qwen, tmp_path):
    vlm = qwen()
    model = vlm.build()
    keep_master_weights(model)
    save_weights(model, tmp_path / "weights", {}, vlm.processor)
    state = load_file(next((tmp_path / "weights").glob("*.safetensors")))
    assert {value.dtype for value in state.values()} == {BF16}
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    again = as_computed(model, dict(model.state_dict()))
    assert all(torch.equal(again[name], value) for name, value in state.items() if name in again)
    assert set(compute_dtypes(model).values()) == {BF16}
    with in_compute_dtype(model):
        assert {p.dtype for p in model.parameters()} == {BF16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_every_adapter_of_a_model_computes_in_the_dtype_of_its_input(qwen):
    model = qwen(lora=LORA).build()
    copy_adapter(model, "policy", "other", trainable=True)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert layers
    assert all(not layer.cast_input_dtype_enabled for layer in layers)
    linears = [linear for layer in layers for part in (layer.lora_A, layer.lora_B) for linear in part.values()]
    assert len(linears) == 4 * len(layers)
    assert all(len(linear._forward_pre_hooks) == 1 for linear in linears), "hooked once"
