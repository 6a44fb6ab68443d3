"""Pictures of decisions for TensorBoard, [3, H, W] uint8: the confusion matrix, and how far to trust a confidence.

Drawn by matplotlib, which is imported when it is needed (drawing is rare, the import slow), and without pyplot, which
keeps global state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15


def draw_confusion(counts: Tensor, label_names: Sequence[str], title: str = "") -> Tensor:
    """Draws a confusion matrix, coloured by shares of rows and labelled with counts.

    Args:
        counts: [C, C + 1] by label (row) and decision (column; the last is "undecided").
        label_names: The C class names.
        title: Title of the figure.
    """
    counts = counts.cpu()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)

    def fill(axes: Axes) -> None:
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(label_names) + 1), [*label_names, "undecided"], rotation=45, ha="right")
        axes.set_yticks(range(len(label_names)), label_names)
        axes.set_xlabel("decision")
        axes.set_ylabel("label")
        axes.set_title(title)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour)

    return _drawn(2.5 + 0.6 * len(label_names), fill)


def draw_reliability(confidence: Tensor, right: Tensor, title: str = "") -> Tensor:
    """Draws how often decisions of a confidence are right, in 15 equally wide bins.

    Args:
        confidence: [N] of each decision, 0 to 1.
        right: [N] bool.
        title: Title of the figure.
    """
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    clips = torch.bincount(place, minlength=BINS)
    used = clips > 0
    mean = torch.bincount(place, confidence.double(), BINS)[used] / clips[used]
    share = torch.bincount(place, right.double(), BINS)[used] / clips[used]

    def fill(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
        axes.plot(mean.tolist(), share.tolist(), linewidth=1, color="tab:blue")
        axes.scatter(mean.tolist(), share.tolist(), s=(12 + 500 * clips[used] / len(place)).tolist(), color="tab:blue")
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share right", title=title)
        axes.grid(alpha=0.3)

    return _drawn(4.5, fill)


def _drawn(size: float, fill: Callable[[Axes], None]) -> Tensor:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size + 0.6, size), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    fill(figure.subplots())
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels).permute(2, 0, 1)
