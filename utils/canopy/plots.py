"""Plots of canopy height: windows with image, reference, prediction and error; scatter by density; error by height."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.canopy.metrics import BIN, BINS, class_names
from utils.plots import (
    BOTH_COLUMNS,
    COLOURS,
    COLUMN,
    MAX_GROUPS,
    MM,
    TABLE_ROW,
    add_identity_line,
    add_table,
    number_or_dash,
    paper_style,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils.canopy.evaluation import Evaluation

TRUE_COLOUR = (2, 1, 0)  # bands B4, B3, B2
STRETCH = (2, 98)  # percentiles of reflectance shown as black and white
HEIGHT_STEP = 5.0  # metres; the colour scale of heights ends at a multiple
SCALE_BARS = (1000.0, 500.0, 200.0, 100.0, 50.0)  # metres
MISSING: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.5", "hatch": "/////", "linewidth": 0}
NO_VEGETATION = "0.8"


class Scene(NamedTuple):
    """One window.

    Attributes:
        name: tile/patch.
        image: (band, row, column) reflectance x 10 000 of the date nearest to the LiDAR's, no margin, nan where missing.
        reference: (row, column) m, 0 where there is no tall vegetation.
        prediction: (row, column) m.
        no_vegetation: (row, column) bool.
        resolution: m.
    """

    name: str
    image: NDArray[np.float32]
    reference: NDArray[np.float32]
    prediction: NDArray[np.float32]
    no_vegetation: NDArray[np.bool_]
    resolution: float


def true_colour(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Red, green, blue and opacity (row, column, 4), from 0 to 1, of an image (band, row, column).

    One stretch from the 2nd to the 98th percentile of the valid pixels of all three bands, which preserves hues. A pixel
    that lacks any of the three is transparent.
    """
    colours = np.moveaxis(image[list(TRUE_COLOUR)], 0, 2)
    valid: NDArray[np.bool_] = np.asarray(np.isfinite(colours).all(2))
    if not valid.any():
        return np.zeros((*valid.shape, 4), np.float32)
    low, high = np.percentile(colours[valid], STRETCH)
    stretched = np.clip((np.where(valid[..., None], colours, low) - low) / max(high - low, 1), 0, 1)
    return np.concatenate([stretched, valid[..., None]], 2, dtype=np.float32)


def height_limit(windows: list[Scene]) -> float:
    """Upper limit (m) of the colour scale of heights: the largest 99th percentile of a reference, rounded up."""
    tallest = max(float(np.percentile(window.reference, 99)) for window in windows)
    return HEIGHT_STEP * max(1, math.ceil(tallest / HEIGHT_STEP))


@paper_style()
def scenes(windows: list[Scene], title: str) -> "Figure":
    """True-colour image, reference, prediction and error, one window a row.

    References and predictions share one colour scale. The scale of errors is centred at 0 and reaches a third as far.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(BOTH_COLUMNS, (43 * len(windows) + 27) * MM))
    cells = figure.add_gridspec(len(windows) + 1, 4, height_ratios=[*[1.0] * len(windows), 0.04])
    grid = [[figure.add_subplot(cells[row, column]) for column in range(4)] for row in range(len(windows))]
    tallest = height_limit(windows)
    for (image, reference, predicted, errors), window in zip(grid, windows, strict=True):
        rows, columns = (size * window.resolution for size in window.reference.shape)
        place: dict[str, Any] = {"extent": (0, columns, rows, 0), "interpolation": "nearest"}
        image.patch.set(**MISSING)
        image.imshow(true_colour(window.image), **place)
        image.set_ylabel(window.name.replace("/", "\n"))
        add_scale_bar(image, columns, rows)
        for axes, heights in ((reference, window.reference), (predicted, window.prediction)):
            heights_shown = axes.imshow(heights, cmap="viridis", vmin=0, vmax=tallest, **place)
        error = np.ma.masked_where(window.no_vegetation, window.prediction - window.reference)
        errors.set_facecolor(NO_VEGETATION)
        errors_shown = errors.imshow(error, cmap="RdBu_r", vmin=-tallest / 3, vmax=tallest / 3, **place)
        for axes in (image, reference, predicted, errors):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
    names = ("Sentinel-2, true colour", "LiDAR height", "predicted height", "error (predicted − LiDAR)")
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=8)
    bar: dict[str, Any] = {"orientation": "horizontal"}
    label = "height (m); LiDAR: 0 where there is no tall vegetation"
    figure.colorbar(heights_shown, cax=figure.add_subplot(cells[-1, 1:3]), label=label, extend="max", **bar)
    figure.colorbar(errors_shown, cax=figure.add_subplot(cells[-1, 3]), label="error (m)", extend="both", **bar)
    legend = [Patch(facecolor=NO_VEGETATION, label="no tall vegetation")]
    if any(np.isnan(window.image[list(TRUE_COLOUR)]).any() for window in windows):
        legend.append(Patch(**MISSING, label="no image data"))
    figure.legend(handles=legend, loc="lower left", ncols=1, borderaxespad=1)
    figure.suptitle(wrapped(title, 110))
    return figure


def add_scale_bar(axes: "Axes", columns: float, rows: float) -> None:
    """Draw the longest of `SCALE_BARS` that is shorter than half the width of a window, whose sides are in metres."""
    from matplotlib.patheffects import Normal, withStroke

    bar = next((length for length in SCALE_BARS if length < columns / 2), SCALE_BARS[-1])
    start, low = 0.05 * columns, 0.95 * rows
    rim = withStroke(linewidth=1.5, foreground="black")  # legible over bright ground
    axes.plot([start, start + bar], [low, low], color="white", linewidth=2, path_effects=[withStroke(linewidth=3), Normal()])
    text: dict[str, Any] = {"color": "white", "ha": "center", "fontsize": 7, "path_effects": [rim]}
    axes.text(start + bar / 2, low - 0.03 * rows, f"{bar:g} m", **text)


@paper_style()
def density_scatter(counts: NDArray[np.int64], scores: dict[str, dict[str, float]], title: str) -> "Figure":
    """Density of pixels by LiDAR and predicted height, above a table of metrics of all pixels and of the largest tiles.

    Args:
        counts: (bin, bin) number of pixels by LiDAR (row) and predicted (column) height, in bins of `BIN` metres.
        scores: metrics of `all` and of each `tile ...`.
        title: title of the plot.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    tiles = sorted((name for name in scores if name.startswith("tile ")), key=lambda name: -scores[name]["pixels"])
    shown = ["all", *(tiles[:MAX_GROUPS] if len(tiles) > 1 else [])]
    figure = Figure(figsize=(COLUMN, 82 * MM + TABLE_ROW * (len(shown) + 3)))
    axes = figure.add_subplot()
    filled = np.flatnonzero(counts.sum(0) + counts.sum(1))
    end = BIN * (filled.max() + 1) if len(filled) else BIN
    image = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        origin="lower",
        extent=(0, BIN * BINS, 0, BIN * BINS),
        norm=LogNorm(1, max(2, int(counts.max(initial=1)))),
        cmap="viridis",
        interpolation="nearest",
    )
    add_identity_line(axes, (0, end))
    axes.set(xlabel="LiDAR height (m)", ylabel="predicted height (m)")
    beside, label = axes.inset_axes((1.03, 0, 0.04, 1)), f"pixels per {BIN:g} m × {BIN:g} m"
    figure.colorbar(image, cax=beside, label=label, format="{x:,.0f}").minorticks_off()
    figure.suptitle(wrapped(title, 52))
    header = ["", "pixels", "R²", "MAE (m)", "RMSE (m)", "bias (m)"]
    rows = []
    for name in shown:
        metrics = [number_or_dash(scores[name][metric], ".2f") for metric in ("r2", "mae", "rmse", "bias")]
        rows.append((None, [name.removeprefix("tile "), f"{scores[name]['pixels']:,.0f}", *metrics]))
    if len(tiles) > MAX_GROUPS:
        rows.append((None, [f"and {len(tiles) - MAX_GROUPS} more tiles", *[""] * (len(header) - 1)]))
    add_table(figure, header, rows, "R²: coefficient of determination; bias: predicted − LiDAR")
    return figure


@paper_style()
def error_by_class(scores: dict[str, dict[str, float]], classes: list[str], title: str) -> "Figure":
    """Mean absolute error, bias and number of pixels of each height class."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(COLUMN, 75 * MM))
    axes = figure.add_subplot()
    places = np.arange(len(classes))
    for shift, colour, name, label in (
        (-0.2, COLOURS[0], "mae", "mean absolute error"),
        (0.2, COLOURS[1], "bias", "bias (predicted − LiDAR)"),
    ):
        axes.bar(places + shift, [scores[one][name] for one in classes], 0.38, color=colour, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlim(-0.5, len(classes) - 0.5)
    pixels = EngFormatter(places=0, sep="")
    labels = [f"{one.removesuffix(' m').replace('-', '–')}\n{pixels(scores[one]['pixels'])}" for one in classes]
    axes.set_xticks(places, labels)
    axes.set(xlabel="LiDAR height (m), and number of pixels", ylabel="error of height (m)")
    figure.suptitle(wrapped(title, 52))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def of_test(evaluation: "Evaluation", title: str) -> dict[str, "Figure"]:
    """The plots of a test by file name."""
    return {
        "scatter": density_scatter(evaluation.histogram, evaluation.scores, title),
        "height_classes": error_by_class(evaluation.scores, class_names(), title),
        "test": scenes(evaluation.scenes, title),
    }
