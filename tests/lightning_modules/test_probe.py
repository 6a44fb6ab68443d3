"""The linear probe: its fit against scikit-learn, its features against the model's vision path, and its decisions."""

import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from stage_world import run_dir

from vidreason.callbacks.prediction_writer import PredictionWriter
from vidreason.datamodules.prompts import LabelScoringView
from vidreason.lightning_modules.probe import PARTS, LinearProbeModule, clip_features, fit_probe
from vidreason.lightning_modules.vlms.prefix.layout import unwrap


def clips(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 0.0, 5.0], [1.0, 0.0, 5.0], [0.0, 2.0, 5.0]], dtype=torch.float64)
    return centres[labels] + torch.randn(n, 3, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_fit_is_that_of_scikit_learn(penalty: float) -> None:
    features, labels = clips(60, 0)
    probe = fit_probe(features, labels, None, 3, [penalty])
    inputs = (features - features.mean(0)) / features.std(0)
    # it minimises the sum of the losses x C + half the squared norm
    other = LogisticRegression(C=1 / (2 * penalty * len(labels)), tol=1e-10, max_iter=10_000).fit(inputs, labels)
    assert torch.allclose(probe(features), torch.from_numpy(other.predict_proba(inputs)), atol=1e-5)


def test_val_chooses_the_penalty() -> None:
    (features, labels), val = clips(12, 0), clips(300, 1)
    penalties = [1e-6, 1e-2, 100.0]
    loss = {
        p: torch.nn.functional.nll_loss(fit_probe(features, labels, None, 3, [p])(val[0]).log(), val[1])
        for p in penalties
    }
    chosen = fit_probe(features, labels, val, 3, penalties).penalty
    assert chosen == min(penalties, key=lambda p: float(loss[p])) == 1e-2


def test_features_are_the_embeddings_that_the_decoder_gets(make_vlm, make_data, make_trainer, tmp_path) -> None:
    vlm = make_vlm(lora=False)
    data, module = make_data(vlm), LinearProbeModule(vlm)
    trainer = make_trainer(callbacks=[PredictionWriter()])
    trainer.test(module, data, verbose=False)
    batch = next(iter(data.loader("val", LabelScoringView(data.task))))
    base = unwrap(module.policy)
    with torch.no_grad():
        found = clip_features(vlm, module.policy, batch.prompts)
        pixels = {name: value for name, value in batch.prompts.inputs.items() if name.startswith("pixel")}
        visual = base.get_video_features(**pixels)
    tokens = getattr(visual, "pooler_output", visual)
    each = torch.stack([*tokens]) if isinstance(tokens, tuple) else tokens
    each = each.reshape(len(batch.prompts.videos), -1, each.shape[-1]).double()
    means = [part.mean(1) for part in each.tensor_split(PARTS, dim=1)]
    assert torch.allclose(found, torch.cat(means, dim=-1), atol=1e-6)

    lines = [json.loads(line) for line in (run_dir(module) / "predictions.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"test_a", "test_b"}
    assert all(sum(line["probs"].values()) == pytest.approx(1) for line in lines)
    assert module.probe is not None
