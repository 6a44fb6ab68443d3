"""Metrics against slow loops over clips; undecided clips count as wrong everywhere."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from vidreason.lightning_modules.decisions.metrics import UNDECIDED, ClassificationMetrics
from vidreason.lightning_modules.decisions.pictures import draw_confusion, draw_reliability

NAMES = ("calm", "loud", "riot", "never seen")


def split(seed: int = 0, clips: int = 60, undecided: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Clips of the first three classes; the fourth has no clip."""
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(clips, 4, generator=generator) * 2).softmax(-1)
    labels = torch.randint(0, 3, (clips,), generator=generator)
    drop = torch.rand(clips, generator=generator) < undecided
    return probs, labels, probs.argmax(-1).masked_fill(drop, UNDECIDED)


def slow(probs: Tensor, labels: Tensor, pred: Tensor, bins: int = 15) -> dict[str, float]:
    rows = list(zip(probs.tolist(), labels.tolist(), pred.tolist(), strict=True))
    n = len(rows)
    recalls, f1s, result = [], [], {}
    for c, name in enumerate(NAMES):
        hits = sum(y == c == d for _, y, d in rows)
        support, predicted = sum(y == c for _, y, _ in rows), sum(d == c for _, _, d in rows)
        if support:
            recalls.append(hits / support)
        f1 = 2 * hits / (support + predicted) if support + predicted else 0.0
        if support + predicted:
            f1s.append(f1)
        result[f"f1/{name}"] = f1
    ece = 0.0
    for b in range(bins):
        inside = []
        for p, y, d in rows:
            confidence = max(p) if d == UNDECIDED else p[d]
            if b / bins < confidence <= (b + 1) / bins:
                inside.append((confidence, d == y))
        ece += abs(sum(c for c, _ in inside) - sum(right for _, right in inside)) / n
    return result | {
        "acc": sum(y == d for _, y, d in rows) / n,
        "balanced_acc": sum(recalls) / len(recalls),
        "macro_f1": sum(f1s) / len(f1s),
        "unparsed_rate": sum(d == UNDECIDED for _, _, d in rows) / n,
        "nll": sum(-math.log(p[y]) for p, y, _ in rows) / n,
        "brier": sum(sum((q - (c == y)) ** 2 for c, q in enumerate(p)) for p, y, _ in rows) / n,
        "ece": ece,
    }


def measured(probs: Tensor, labels: Tensor, pred: Tensor, **options: int) -> dict[str, float]:
    metrics = ClassificationMetrics(NAMES, **options)
    for part in (slice(0, 7), slice(7, 7), slice(7, None)):
        metrics.update(probs[part], labels[part], pred[part])
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("undecided", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bins", [15, 4])
def test_against_a_slow_loop(seed: int, undecided: float, bins: int) -> None:
    clips = split(seed, undecided=undecided)
    assert measured(*clips, calibration_bins=bins) == pytest.approx(slow(*clips, bins), abs=1e-5)


def test_a_class_that_nobody_predicted_or_has_does_not_count() -> None:
    probs, labels, _ = split()
    pred = labels.clone()
    result = measured(probs, labels, pred)
    assert (result["acc"], result["balanced_acc"], result["macro_f1"], result["f1/never seen"]) == (1.0, 1.0, 1.0, 0.0)
    pred[0] = 3
    assert measured(probs, labels, pred)["macro_f1"] < 0.76, "predicted without clips: its F1 of 0 counts"


def test_an_undecided_clip_counts_like_a_wrong_one_in_accuracies() -> None:
    """Two clips per class, one right; the other once wrong, once undecided."""
    labels = torch.tensor([0, 0, 1, 1])
    probs = torch.full((4, 4), 0.25)
    wrong = measured(probs, labels, torch.tensor([0, 1, 1, 0]))
    undecided = measured(probs, labels, torch.tensor([0, UNDECIDED, 1, UNDECIDED]))
    for result in (wrong, undecided):
        assert (result["acc"], result["balanced_acc"]) == (0.5, 0.5)
    assert wrong["macro_f1"] == pytest.approx(0.5)
    assert undecided["macro_f1"] == pytest.approx(2 / 3), "wrong as a miss of its own class, a false alarm of none"
    assert (wrong["unparsed_rate"], undecided["unparsed_rate"]) == (0.0, 0.5)
    assert undecided["ece"] == pytest.approx(0.25)


def test_an_undecided_clip_is_wrong_in_ece_even_where_its_best_class_is_right() -> None:
    probs, labels = torch.tensor([[0.9, 0.1, 0.0, 0.0]] * 2), torch.tensor([0, 0])
    assert measured(probs, labels, torch.tensor([0, 0]))["ece"] == pytest.approx(0.1)
    assert measured(probs, labels, torch.tensor([0, UNDECIDED]))["ece"] == pytest.approx(0.4)


def test_ece_of_the_best_class_is_that_of_torchmetrics() -> None:
    probs, labels, pred = split(undecided=0.0)
    expected = MulticlassCalibrationError(4, n_bins=15, norm="l1")(probs, labels)
    assert measured(probs, labels, pred)["ece"] == pytest.approx(expected.item(), abs=1e-6)


def test_rounding_above_one_is_not_taken_for_logits() -> None:
    probs, labels = torch.tensor([[1.0 + 1e-6, 0.0, 0.0, 0.0]] * 3), torch.tensor([0, 0, 1])
    assert measured(probs, labels, torch.tensor([0, 0, 0]))["ece"] == pytest.approx(1 / 3, abs=1e-5)


def test_confusion_matrix_reset_and_picture() -> None:
    metrics = ClassificationMetrics(NAMES)
    labels, pred = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, UNDECIDED, 0])
    metrics.update(torch.full((5, 4), 0.25), labels, pred)
    assert metrics.confusion().tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    picture = draw_confusion(metrics.confusion(), NAMES, "val")
    assert picture.dtype == torch.uint8
    assert picture.ndim == 3
    assert picture.shape[0] == 3
    assert picture.float().std() > 1
    metrics.reset()
    metrics.update(torch.full((1, 4), 0.25), labels[:1], pred[:1])
    assert int(metrics.confusion().sum()) == 1
    assert not torch.equal(draw_confusion(metrics.confusion(), NAMES, "val"), picture)
    assert metrics.compute()["nll"].item() == pytest.approx(math.log(4))


def test_metrics_travel_with_their_module_and_stay_out_of_checkpoints() -> None:
    module = torch.nn.Module()
    module.metrics = ClassificationMetrics(NAMES)
    assert not module.state_dict()
    assert sum(1 for _ in module.parameters()) == 0
    assert str(module.to("meta").metrics.matrix.device) == "meta"


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_errors() -> None:
    metrics = ClassificationMetrics(NAMES)
    with pytest.raises(ValueError, match="no clips"):
        metrics.compute()
    uniform, zero = torch.full((1, 4), 0.25), torch.tensor([0])
    cases = [
        (uniform, torch.tensor([-1]), zero, "without label"),
        (uniform, torch.tensor([4]), zero, "labels must be"),
        (uniform, zero, torch.tensor([4]), "pred must be"),
        (uniform, zero, torch.tensor([-2]), "pred must be"),
        (uniform[:, :3], zero, zero, "expected probs"),
        (uniform * 2, zero, zero, "add up to 1"),
        (uniform * math.nan, zero, zero, "add up to 1"),
    ]
    for probs, labels, pred, message in cases:
        with pytest.raises(ValueError, match=message):
            metrics.update(probs, labels, pred)
    with pytest.raises(ValueError, match="two classes"):
        ClassificationMetrics(["only"])


def test_reliability_picture_changes_with_the_decisions() -> None:
    confidence = torch.tensor([0.55, 0.6, 0.9, 1.0])
    picture = draw_reliability(confidence, torch.tensor([True, False, True, True]), "val")
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert not torch.equal(draw_reliability(confidence, torch.tensor([True, False, False, True]), "val"), picture)
