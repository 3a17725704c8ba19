"""Plots of a run, drawn at the width of a journal's column: of 88 mm, or of 180 mm over both columns."""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.metrics import Scores, score
from utils.runs import whole_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision; without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "^", "s", "D")
LINES = ("-", "--", "-.", ":")
GREY = "0.6"
MM = 1 / 25.4  # inches
COLUMN, BOTH_COLUMNS = 88 * MM, 180 * MM  # widths of a plot, inches
TABLE_ROW = 3.8 * MM  # height of a row of a table beneath a plot
PRINT_DPI = 300
SCREEN_DPI = 110  # of TensorBoard's copies
MAX_GROUPS = 12  # told apart in a scatter plot; the smaller ones are pooled
LOSS_RANGE = 30
MAX_VECTOR_POINTS = 20_000  # of a scatter plot; more become an image inside the PDF

STYLE: Any = {
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 8,
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.title_fontsize": 7,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # names of columns and regions may have dollar signs
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Text of 7 and 8 points and thin lines; for drawing and for saving, since Matplotlib draws ticks only then."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def wrapped(text: str, characters: int) -> str:
    """Text with its lines broken after so many characters at most."""
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines())


@paper_style()
def scatter(
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    groups: Sequence[str] | None,
    folds: Sequence[Scores],
    title: str,
    target: str,
) -> "Figure":
    """Predictions against observations with the 1:1 line and, beneath, n, r2 and RRMSE of each group, of all and of folds.

    Args:
        observed: (sample,).
        predicted: (sample,).
        groups: region of each sample, if there are regions.
        folds: metrics of each fold, of which mean and standard deviation are given.
        title: of the plot.
        target: name and unit of what is predicted.
    """
    from matplotlib.figure import Figure

    names = np.array(pooled_groups(groups) if groups is not None else ["all"] * len(observed))
    shown = sorted(set(names), key=lambda name: (name.startswith("other "), name))
    rows: list[tuple[Artist | None, Sequence[str]]] = []
    figure = Figure(figsize=(COLUMN, COLUMN + 2 * TABLE_ROW + TABLE_ROW * (len(shown) + 3)))
    axes = figure.add_subplot()
    for index, name in enumerate(shown):
        chosen = names == name
        style: dict[str, Any] = {
            "color": GREY if name.startswith("other ") else COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "rasterized": len(observed) > MAX_VECTOR_POINTS,
        }
        points = axes.scatter(observed[chosen], predicted[chosen], s=9, alpha=0.7, linewidths=0, **style)
        rows.append((points, table_row(name, observed[chosen], predicted[chosen])))
    if len(shown) > 1:
        rows.append((None, table_row("all, pooled", observed, predicted)))
    means = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in zip(*folds, strict=True)]
    rows.append((None, [f"mean ± sd of {len(folds)} folds", "", *means[:2]]))
    low, high = min(observed.min(), predicted.min()), max(observed.max(), predicted.max())
    margin = 0.04 * (high - low) or 1
    add_identity_line(axes, (low - margin, high + margin))
    axes.set(xlabel=wrapped(f"observed {target}", 44), ylabel=wrapped(f"predicted {target}", 44))
    figure.suptitle(wrapped(title, 52))
    add_table(figure, ["", "n", "r²", "RRMSE"], rows, "r²: squared correlation; RRMSE: RMSE over mean observation")
    return figure


def add_identity_line(axes: "Axes", limits: tuple[float, float]) -> None:
    """Give both axes the same limits, and draw the line on which predictions equal observations."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2, foreground="white")]  # legible over points
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.plot(limits, limits, color="0.3", linewidth=0.8, linestyle="--")
    end: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 7, "color": "0.3", "path_effects": rim}
    axes.annotate("1:1", (1, 1), (-12, -4), "axes fraction", "offset points", **end)


def pooled_groups(groups: Sequence[str]) -> list[str]:
    """Groups of samples, the smaller of more than `MAX_GROUPS` as one."""
    names, counts = np.unique(np.array(groups), return_counts=True)
    if len(names) <= MAX_GROUPS:
        return list(groups)
    kept = set(names[np.argsort(-counts, kind="stable")][: MAX_GROUPS - 1])
    return [name if name in kept else f"other {len(names) - len(kept)} regions" for name in groups]


def table_row(name: str, observed: NDArray[np.float64], predicted: NDArray[np.float64]) -> list[str]:
    """Name, number and metrics of samples (sample,), pooled over folds."""
    with np.errstate(divide="ignore", invalid="ignore"):  # observations whose mean is 0 have no relative error
        one = score(observed, predicted)
    return [wrapped(name, 24), f"{len(observed):,}", *(number_or_dash(value, ".3f") for value in (one.r2, one.rrmse))]


def number_or_dash(value: float, form: str) -> str:
    """A number of a table, or a dash where there is none."""
    return format(value, form).replace("-", "−") if np.isfinite(value) else "–"


def add_table(
    figure: "Figure", header: Sequence[str], rows: Sequence[tuple["Artist | None", Sequence[str]]], title: str
) -> None:
    """Add a table beneath a plot, which is its legend as well.

    Args:
        figure: to add to.
        header: of each column.
        rows: what marks the row in the plot, if anything, and the text of each column.
        title: a line above.
    """
    from matplotlib.lines import Line2D

    # A legend fills its columns one after the other, so that it is a table where each column is as long.
    blank = Line2D([], [], linestyle="none")
    first = [blank, *(mark or blank for mark, _ in rows)]
    handles = [*first, *[blank] * (len(header) - 1) * len(first)]
    labels = [text for column in zip(header, *(cells for _, cells in rows), strict=True) for text in column]
    options: dict[str, Any] = {
        "handlelength": 1,
        "handletextpad": 0.3,
        "columnspacing": 0.2,
        "labelspacing": 0.25,
        "borderaxespad": 0.2,
    }
    figure.legend(handles, labels, ncols=len(header), loc="outside lower center", title=title, **options)


@paper_style()
def losses(
    histories: Sequence[tuple[int, Sequence[Mapping[str, float]]]], warmup_epochs: int, title: str, target: str
) -> "Figure":
    """Training and validation loss of each fold by epoch, on a logarithmic axis, with each fold's best validation.

    Args:
        histories: fold number and its records with `epoch`, `loss_train` and, where validated, `loss_val`.
        warmup_epochs: of the records; the axis counts the epochs after them.
        title: of the plot.
        target: name and unit of what is predicted, and thus of the loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(BOTH_COLUMNS, 82 * MM))
    axes = figure.add_subplot()
    legend: list[Artist] = []
    for index, (number, history) in enumerate(histories):
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        }
        marker = "." if len(history) < 20 else None
        epochs = [r["epoch"] - warmup_epochs for r in history]
        axes.plot(epochs, [r["loss_train"] for r in history], **style, linewidth=0.5, alpha=0.6, marker=marker, markersize=2)
        validated = [(r["epoch"] - warmup_epochs, r["loss_val"]) for r in history if "loss_val" in r]
        if validated:
            axes.plot(*zip(*validated, strict=True), **style, linewidth=1.4, marker=".", markersize=3)
            best = min(validated, key=lambda record: record[1])
            axes.plot(*best, color=style["color"], marker="*", markersize=9, markeredgecolor="black", markeredgewidth=0.6)
        legend.append(Line2D([], [], **style, linewidth=1.4, label=f"fold {number}"))
    limits = loss_limits([history for _, history in histories])
    if limits:
        axes.set_yscale("log")
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.01)
    axes.set(xlabel="epoch", ylabel=wrapped(f"L1 loss: mean absolute error of {target}", 34))
    legend.append(Line2D([], [], color="black", linewidth=0.5, label="training"))
    legend.append(Line2D([], [], color="black", linewidth=1.4, marker=".", markersize=3, label="validation"))
    star: dict[str, Any] = {"marker": "*", "markersize": 9, "markeredgecolor": "black", "markeredgewidth": 0.6}
    legend.append(Line2D([], [], color="white", linestyle="none", **star, label="best validation"))
    if warmup_epochs > 0:
        axes.set_xlabel("epoch after warm-up")
        axes.axvspan(axes.get_xlim()[0], 0, color="0.93", linewidth=0, zorder=0)
        legend.append(Patch(color="0.93", label="warm-up"))
    figure.suptitle(wrapped(title, 110))
    figure.legend(handles=legend, loc="outside right upper", ncols=1 + len(legend) // 18)
    return figure


def loss_limits(histories: Sequence[Sequence[Mapping[str, float]]]) -> tuple[float, float] | None:
    """Limits of a logarithmic axis of losses, none if all are 0.

    Losses of the first epochs may be larger than all others by powers of ten, and those of training smaller than those of
    validation: what is more than `LOSS_RANGE` times beyond both medians is beyond the axis.
    """
    kinds = [
        [r[name] for history in histories for r in history if r.get(name, 0) > 0] for name in ("loss_train", "loss_val")
    ]
    medians = [float(np.median(losses)) for losses in kinds if losses]
    if not medians:
        return None
    lowest, highest = min(map(min, filter(None, kinds))), max(map(max, filter(None, kinds)))
    return 0.95 * max(lowest, min(medians) / LOSS_RANGE), 1.05 * min(highest, max(medians) * LOSS_RANGE)


@paper_style()
def save_plot(figure: "Figure", path: Path) -> None:
    """Write a plot whole as `path` with .png, for screens and slides, and with .pdf, in vectors."""
    with whole_file(path.with_suffix(".png")) as png, whole_file(path.with_suffix(".pdf")) as pdf:
        figure.savefig(png, format="png", dpi=PRINT_DPI)
        figure.savefig(pdf, format="pdf", dpi=PRINT_DPI, metadata={"CreationDate": None})


@paper_style()
def as_image(figure: "Figure") -> NDArray[Any]:
    """The plot as (row, column, channel) bytes, for TensorBoard."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=SCREEN_DPI)
    return np.asarray(Image.open(buffer).convert("RGB"))
