"""The folder that the package ships, made from a training run's."""

import torch
from safetensors.torch import load_file

from tools.pretraining.shipping import ship
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM, embedded_folder


def test_what_is_shipped_is_the_model_in_bfloat16(tmp_path):
    model = TinyVLM("embedded").build()
    with torch.no_grad():
        model.lm_head.weight += 0.5
    model.save_pretrained(tmp_path / "trained")
    TinyVLM("embedded").processor.save_pretrained(tmp_path / "trained")
    ship(tmp_path / "trained", tmp_path / "shipped")
    assert {file.name for file in (tmp_path / "shipped").iterdir()} == {
        file.name for file in embedded_folder().iterdir()
    }
    tensors = load_file(tmp_path / "shipped" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    again = TinyVLM(str(tmp_path / "shipped")).build()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16().float())
