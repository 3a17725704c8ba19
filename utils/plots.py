"""Plots of a run at the size of print: as wide as a journal's column (88 mm) or as both columns (180 mm)."""

import contextlib
import io
import logging
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

# Okabe and Ito's colour-blind-safe palette without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "^", "s", "D")
LINES = ("-", "--", "-.", ":")
GREY = "0.6"
MM = 1 / 25.4  # inches
COLUMN, BOTH_COLUMNS = 88 * MM, 180 * MM  # widths of plots
TABLE_ROW = 3.8 * MM  # height of a row of the table beneath a plot
PRINT_DPI = 300
SCREEN_DPI = 110  # of the copies in TensorBoard
MAX_GROUPS = 12  # shown separately
MAX_NAME = 24  # characters of a group's name
MAX_VECTOR_POINTS = 20_000  # points of a scatter plot; more are rasterised in the PDF
LOSS_RANGE = 30  # the axis of losses extends at most this factor beyond their medians

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
    """Text of 7 and 8 points and thin lines. Needed for saving too, since Matplotlib creates ticks only then."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def wrapped(text: str, characters: int) -> str:
    """Text with lines of at most so many characters."""
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines())


@paper_style()
def scatter(
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    regions: Sequence[str] | None,
    folds: Sequence[Scores],
    title: str,
    target: str,
) -> "Figure":
    """Predicted against observed values and the 1:1 line, above a table of metrics by region, of all rows and over folds.

    Args:
        observed: (sample,).
        predicted: (sample,).
        regions: of each sample; None if the table has none.
        folds: metrics of each fold; the table shows their mean and standard deviation.
        title: title of the plot.
        target: name and unit of the target.
    """
    from matplotlib.figure import Figure

    names, others = pool_small_groups(regions) if regions is not None else (["all"] * len(observed), "")
    shown = sorted(set(names), key=lambda name: (name == others, name))
    rows: list[tuple[Artist | None, Sequence[str]]] = []
    figure = Figure(figsize=(COLUMN, COLUMN + TABLE_ROW * (len(shown) + 5)))
    axes = figure.add_subplot()
    for index, name in enumerate(shown):
        chosen = np.array(names) == name
        style: dict[str, Any] = {
            "color": GREY if name == others else COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "rasterized": len(observed) > MAX_VECTOR_POINTS,
        }
        points = axes.scatter(observed[chosen], predicted[chosen], s=9, alpha=0.7, linewidths=0, **style)
        rows.append((points, table_row(name, observed[chosen], predicted[chosen])))
    if len(shown) > 1:
        rows.append((None, table_row("all, pooled", observed, predicted)))
    over_folds = [[one.r2 for one in folds], [one.rrmse for one in folds]]
    means = [
        f"{number_or_dash(float(np.mean(one)), '.3f')} ± {number_or_dash(float(np.std(one)), '.3f')}" for one in over_folds
    ]
    rows.append((None, [f"mean ± sd of {len(folds)} folds", "", *means]))
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


def pool_small_groups(groups: Sequence[str]) -> tuple[list[str], str]:
    """Groups of samples, the smallest of more than `MAX_GROUPS` pooled, and the name of the pool, if any."""
    names, counts = np.unique(np.array(groups), return_counts=True)
    if len(names) <= MAX_GROUPS:
        return list(groups), ""
    kept = set(names[np.argsort(-counts, kind="stable")][: MAX_GROUPS - 1])
    others = f"{len(names) - len(kept)} other regions"
    return [name if name in kept else others for name in groups], others


def table_row(name: str, observed: NDArray[np.float64], predicted: NDArray[np.float64]) -> list[str]:
    """Name, number and metrics of samples (sample,), pooled over folds."""
    with np.errstate(divide="ignore", invalid="ignore"):  # observations with a mean of 0 have no relative error
        one = score(observed, predicted)
    short = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
    return [short, f"{len(observed):,}", *(number_or_dash(value, ".3f") for value in (one.r2, one.rrmse))]


def number_or_dash(value: float, form: str) -> str:
    """A formatted number, or a dash if it is not finite."""
    return format(value, form).replace("-", "−") if np.isfinite(value) else "–"


def add_table(
    figure: "Figure", header: Sequence[str], rows: Sequence[tuple["Artist | None", Sequence[str]]], title: str
) -> None:
    """Add a table beneath a plot that is also its legend.

    Args:
        figure: the plot.
        header: heading of each column.
        rows: for each row, its mark in the plot, if any, and the text of each column.
        title: line above the table.
    """
    from matplotlib.lines import Line2D

    # A legend is filled column by column, so with equally many entries in each it is a table.
    blank = Line2D([], [], linestyle="none")
    first = [blank, *(mark or blank for mark, _ in rows)]
    handles = [*first, *[blank] * (len(header) - 1) * len(first)]
    labels = [text for column in zip(header, *(cells for _, cells in rows), strict=True) for text in column]
    options: dict[str, Any] = {
        "handlelength": 1,
        "handletextpad": 0.3,
        "columnspacing": 0.2,
        "labelspacing": 0.25,
        "borderaxespad": 0,
        "borderpad": 0.8,
    }
    figure.legend(handles, labels, ncols=len(header), loc="outside lower center", title=title, **options)


@paper_style()
def losses(
    histories: Sequence[tuple[int, Sequence[Mapping[str, float]]]], warmup_epochs: int, title: str, target: str
) -> "Figure":
    """Training and validation losses of each fold on a logarithmic axis, with the best validation of each marked.

    Args:
        histories: number of each fold and its records, one an epoch: `epoch`, `loss_train` and, if validated, `loss_val`.
        warmup_epochs: number of warm-up epochs; the axis counts from their end.
        title: title of the plot.
        target: name and unit of the target.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(BOTH_COLUMNS, 82 * MM))
    axes = figure.add_subplot()
    legend: list[Artist] = []
    validation: dict[str, Any] = {"linewidth": 1.2, "marker": ".", "markersize": 3}
    star: dict[str, Any] = {"marker": "*", "markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.6}
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
            axes.plot(*zip(*validated, strict=True), **style, **validation)
            best = min(validated, key=lambda record: record[1])
            axes.plot(*best, color=style["color"], zorder=3, **star)  # above the lines of all folds
        legend.append(Line2D([], [], **style, linewidth=1.2, label=f"fold {number}"))
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
    legend.append(Line2D([], [], color="black", **validation, label="validation"))
    legend.append(Line2D([], [], color="white", linestyle="none", **star, label="best validation"))
    if warmup_epochs > 0:
        axes.set_xlabel("epoch after warm-up")
        axes.axvspan(axes.get_xlim()[0], 0, color="0.93", linewidth=0, zorder=0)
        legend.append(Patch(color="0.93", label="warm-up"))
    figure.suptitle(wrapped(title, 110))
    figure.legend(handles=legend, loc="outside right upper", ncols=1 + len(legend) // 18)
    return figure


TERMS = {
    "plot_mean": "mean series of the plot",
    "series": "series of the year",
    "deviation": "deviation from the plot's mean",
    "plot": "plot, beyond its series",
    "region": "region",
    "year": "year",
    "region_year": "region in a year",
    "noise": "not explained",
}
"""Names of an additive model's terms in a picture, from top to bottom."""


@paper_style()
def terms(folds: Sequence[Mapping[str, float]], title: str) -> "Figure":
    """What explains the plots: the share of each term of an additive model in the variance, mean and folds.

    Args:
        folds: for each, the variance by term.
        title: title of the plot.
    """
    from matplotlib.figure import Figure

    names = [term for term in TERMS if any(term in fold for fold in folds)]
    shares = np.array([[100 * fold.get(term, 0.0) / sum(fold.values()) for term in names] for fold in folds])
    figure = Figure(figsize=(COLUMN, (22 + 7 * len(names)) * MM))
    axes = figure.add_subplot()
    places = np.arange(len(names))
    axes.barh(
        places, shares.mean(0), height=0.6, color=[GREY if term == "noise" else COLOURS[0] for term in names], alpha=0.5
    )
    for index, fold in enumerate(shares):
        axes.plot(fold, places, "o", color="black", markersize=2.5, label="a fold" if index == 0 else None)
    for place, share in zip(places, shares.mean(0), strict=True):
        axes.annotate(
            f"{share:.0f} %", (shares[:, place].max(), place), (4, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_yticks(places, [TERMS[term] for term in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * shares.max())
    axes.set_xlabel("% of the variance")
    axes.legend(loc="lower right", handletextpad=0)
    figure.suptitle(wrapped(f"What explains the plots\n{title}", 52))
    return figure


def loss_limits(histories: Sequence[Sequence[Mapping[str, float]]]) -> tuple[float, float] | None:
    """Limits of a logarithmic axis of losses; None if all losses are 0.

    The first epochs may be worse than all others by orders of magnitude, and training losses may vanish. So that neither
    compresses the rest, the axis spans no more than from the smaller median / `LOSS_RANGE` to the larger x `LOSS_RANGE`.
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
    """Write a plot as `path`.png and as vector graphics to `path`.pdf, both whole or not at all."""
    # Under Guild, which logs all information, embedding a font would print 30 lines.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    with whole_file(path.with_suffix(".png")) as png, whole_file(path.with_suffix(".pdf")) as pdf:
        figure.savefig(png, format="png", dpi=PRINT_DPI)
        figure.savefig(pdf, format="pdf", dpi=PRINT_DPI, metadata={"CreationDate": None})


@paper_style()
def as_image(figure: "Figure") -> NDArray[Any]:
    """A plot as (row, column, channel) uint8 for TensorBoard."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=SCREEN_DPI)
    return np.asarray(Image.open(buffer).convert("RGB"))
