"""Plots of canopy height: images, reference, prediction and error."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.canopy.metrics import BIN, BINS, class_names
from utils.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils.canopy.evaluation import Evaluation

TRUE_COLOUR = (2, 1, 0)  # bands B4, B3, B2
TALLEST = 35.0  # metres, end of the colour scale
LARGEST_ERROR = 10.0  # metres
BESIDE = (1.03, 0, 0.05, 1)  # place of a colour bar, in parts of the axes
BARS = (1000.0, 500.0, 200.0, 100.0, 50.0)  # metres, of scale bars


class Scene(NamedTuple):
    """One window.

    Attributes:
        name: tile/patch.
        image: (band, row, column) reflectance x 10 000 of the date nearest to the LiDAR's, without margin.
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
    """(band, row, column) to (row, column, 3) in 0..1, stretched between the window's 2nd and 98th percentiles."""
    colours = np.moveaxis(image[list(TRUE_COLOUR)], 0, 2)
    low, high = np.percentile(colours, (2, 98))
    return np.clip((colours - low) / max(high - low, 1), 0, 1)


def scenes(windows: list[Scene], title: str) -> "Figure":
    """A row a window: image in true colour, reference, prediction and error, with colour bars and scale in metres."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import Normal, withStroke

    figure = Figure(figsize=(13, 3.1 * len(windows) + 0.5), dpi=100, layout="constrained")
    grid = figure.subplots(len(windows), 4, squeeze=False)
    for row, window in zip(grid, windows, strict=True):
        rows, columns = (size * window.resolution for size in window.reference.shape)
        extent = (0, columns, rows, 0)
        error = np.ma.masked_where(window.no_vegetation, window.prediction - window.reference)
        row[0].imshow(true_colour(window.image), extent=extent)
        row[0].set_ylabel(window.name, fontsize=9)
        bar = next((length for length in BARS if length < columns / 2), BARS[-1])
        start, low = 0.05 * columns, 0.95 * rows
        dark_rim = [withStroke(linewidth=2, foreground="black")]  # legible over bright ground
        row[0].plot([start, start + bar], [low, low], color="white", linewidth=3, path_effects=[*dark_rim, Normal()])
        label = {"color": "white", "ha": "center", "fontsize": 8, "path_effects": dark_rim}
        row[0].text(start + bar / 2, low - 0.03 * rows, f"{bar:g} m", **label)
        for axes, heights in ((row[1], window.reference), (row[2], window.prediction)):
            shown = axes.imshow(heights, extent=extent, cmap="viridis", vmin=0, vmax=TALLEST, interpolation="nearest")
        figure.colorbar(shown, cax=row[2].inset_axes(BESIDE), label="height (m)", extend="max")
        row[3].set_facecolor("0.85")
        shown = row[3].imshow(
            error, extent=extent, cmap="RdBu_r", vmin=-LARGEST_ERROR, vmax=LARGEST_ERROR, interpolation="nearest"
        )
        figure.colorbar(shown, cax=row[3].inset_axes(BESIDE), label="error (m)", extend="both")
        for axes in row:
            axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    names = (
        "Sentinel-2, true colour",
        "LiDAR reference (0: no tall vegetation)",
        "prediction",
        "error (grey: no tall vegetation)",
    )
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def density_scatter(counts: NDArray[np.int64], title: str) -> "Figure":
    """Pixels by observed (row) and predicted (column) height, `BIN` metres a bin, on a logarithmic colour scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 5.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    filled = np.flatnonzero(counts.sum(0) + counts.sum(1))
    end = BIN * (filled.max() + 1) if len(filled) else BIN
    shown = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        origin="lower",
        extent=(0, BIN * BINS, 0, BIN * BINS),
        norm=LogNorm(1, max(2, int(counts.max(initial=1)))),
        cmap="viridis",
    )
    axes.plot([0, end], [0, end], color="0.3", linewidth=1, linestyle="--", label="1:1")
    axes.set(xlim=(0, end), ylim=(0, end), xlabel="LiDAR height (m)", ylabel="predicted height (m)")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    figure.colorbar(shown, cax=axes.inset_axes(BESIDE), label="pixels")
    return figure


def error_by_class(scores: dict[str, dict[str, float]], classes: list[str], title: str) -> "Figure":
    """Mean absolute error and bias of each height class, with its number of pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(classes))
    for shift, colour, name in ((-0.2, COLOURS[0], "mae"), (0.2, COLOURS[1], "bias")):
        label = "mean absolute error" if name == "mae" else "bias (prediction - LiDAR)"
        axes.bar(places + shift, [scores[one][name] for one in classes], 0.38, color=colour, label=label)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(places, [f"{one}\n{scores[one]['pixels']:,.0f} px" for one in classes], fontsize=8)
    axes.set(xlabel="LiDAR height", ylabel="m")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def of_test(evaluation: "Evaluation", resolution: float, note: str) -> dict[str, "Figure"]:
    """The plots of a test by name, their titles with its metrics."""
    total = evaluation.scores["all"]
    metrics = f"MAE {total['mae']:.2f} m, bias {total['bias']:.2f} m, coefficient of determination {total['r2']:.2f}"
    title = f"test, {resolution:g} m{note}\n{metrics}"
    return {
        "scatter": density_scatter(evaluation.histogram, title),
        "height_classes": error_by_class(evaluation.scores, class_names(), title),
        "test": scenes(evaluation.scenes, title),
    }
