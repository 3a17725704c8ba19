"""Pictures of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.metrics import Scores
from utils.runs import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "^", "s", "D")


def scatter(
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    groups: Sequence[str] | None,
    scores: Scores,
    title: str,
    target: str,
) -> "Figure":
    """Predictions against observations (sample,), coloured by group, with the 1:1 line; r2 and RRMSE in the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    names = np.array(groups if groups is not None else ["plots"] * len(observed))
    for index, group in enumerate(sorted(set(names))):
        chosen = names == group
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
        style: dict[str, Any] = {"s": 14, "alpha": 0.7, "linewidths": 0, "color": colour, "marker": marker}
        axes.scatter(observed[chosen], predicted[chosen], label=group, **style)
    low = min(observed.min(), predicted.min())
    high = max(observed.max(), predicted.max())
    margin = 0.04 * (high - low) or 1
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color="0.4", linewidth=1, linestyle="--", label="1:1")
    axes.set(xlim=limits, ylim=limits, xlabel=f"observed {target}", ylabel=f"predicted {target}", aspect="equal")
    axes.set_title(f"{title}\nr² {scores.r2:.3f}, RRMSE {scores.rrmse:.3f} (mean of folds)", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def losses(
    histories: Sequence[tuple[int, Sequence[dict[str, float]]]], warmup_epochs: int, title: str, target: str
) -> "Figure":
    """Training and validation loss of each fold by epoch after warm-up, whose losses would flatten all others.

    Args:
        histories: fold number and its records with `epoch`, `loss_train` and, where validated, `loss_val`.
        warmup_epochs: records that are not shown.
        title: of the picture.
        target: what the loss is of, with its unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (number, history) in enumerate(histories):
        colour = COLOURS[index % len(COLOURS)]
        shown = [{**r, "epoch": r["epoch"] - warmup_epochs} for r in history if r["epoch"] > warmup_epochs]
        axes.plot([r["epoch"] for r in shown], [r["loss_train"] for r in shown], color=colour, linewidth=0.8, alpha=0.6)
        checked = [r for r in shown if "loss_val" in r]
        axes.plot(
            [r["epoch"] for r in checked],
            [r["loss_val"] for r in checked],
            color=colour,
            linewidth=1.8,
            label=f"fold {number}",
        )
    axes.set(xlabel="epoch after warm-up", ylabel=f"L1 loss of {target}", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, title="thin: training, thick: validation", title_fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Write a picture whole."""
    with whole_file(path) as beside:
        figure.savefig(beside, format="png")


def as_image(figure: "Figure") -> NDArray[Any]:
    """The picture as (row, column, channel) bytes, for TensorBoard."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))
