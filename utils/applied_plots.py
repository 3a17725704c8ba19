"""Plots of an applied run: predictions with their intervals against observations, and the quick-look of a map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import rasterio
from rasterio.crs import CRS

from utils.plots import (
    BOTH_COLUMNS,
    COLOURS,
    COLUMN,
    GREY,
    MAX_VECTOR_POINTS,
    TABLE_ROW,
    add_identity_line,
    add_table,
    paper_style,
    table_row,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_SIDE = 1200  # pixels of a quick-look
PALETTES = ("viridis", "magma_r", "cividis")


@paper_style()
def intervals(predictions: pd.DataFrame, level: float, summary: Mapping[str, float], title: str, target: str) -> "Figure":
    """Predictions with their intervals against observations, the 1:1 line, and how well both agree.

    Args:
        predictions: columns observed, mean, lower, upper and inside (the area of applicability: 1, else 0).
        level: of the intervals.
        summary: coverage of the intervals.
        title: of the plot.
        target: name and unit of what is predicted.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, COLUMN + 6 * TABLE_ROW))
    axes = figure.add_subplot()
    table: list[tuple[Artist | None, Sequence[str]]] = []
    observed, mean = predictions["observed"].to_numpy(), predictions["mean"].to_numpy()
    ends = np.stack([mean - predictions["lower"].to_numpy(), predictions["upper"].to_numpy() - mean])
    for value, label, colour, marker in ((1, "area of applicability", 0, "o"), (0, "outside of it", 5, "^")):
        chosen = predictions["inside"].to_numpy() == value
        if not chosen.any():
            continue
        style: dict[str, Any] = {"color": COLOURS[colour], "alpha": 0.7, "rasterized": len(predictions) > MAX_VECTOR_POINTS}
        if np.isfinite(ends).all():
            axes.errorbar(observed[chosen], mean[chosen], ends[:, chosen], fmt="none", elinewidth=0.4, **style)
        points = axes.scatter(observed[chosen], mean[chosen], s=9, linewidths=0, marker=marker, **style)
        table.append((points, table_row(label, observed[chosen], mean[chosen])))
    if len(table) > 1:
        table.append((None, table_row("all", observed, mean)))
    low, high = min(observed.min(), mean.min()), max(observed.max(), mean.max())
    margin = 0.04 * (high - low) or 1
    add_identity_line(axes, (low - margin, high + margin))
    axes.set(xlabel=wrapped(f"observed {target}", 44), ylabel=wrapped(f"predicted {target}", 44))
    figure.suptitle(wrapped(title, 52))
    caption = f"bars: {level:.0%} intervals, which cover {summary['coverage']:.0%} of the observations"
    add_table(figure, ["", "n", "r²", "RRMSE"], table, caption)
    return figure


@paper_style()
def quick_look(path: Path, title: str, target: str, threshold: float, level: float) -> "Figure":
    """A map's mean, the width of its intervals and its dissimilarity, with colour bars and a scale bar.

    Colours range from the 2nd to the 98th percentile within the area of applicability, those of the dissimilarity from 0 to
    twice the threshold.

    Args:
        path: a GeoTIFF with the layers mean, spread, lower, upper, dissimilarity and inside.
        title: of the plot.
        target: name and unit of what is predicted.
        threshold: of the area of applicability, whose edge is drawn.
        level: of the intervals.
    """
    from matplotlib.figure import Figure

    with rasterio.open(path) as raster:
        factor = max(1.0, max(raster.shape) / LARGEST_SIDE)
        shape = (raster.count, max(1, round(raster.height / factor)), max(1, round(raster.width / factor)))
        layers = dict(zip(raster.descriptions, raster.read(out_shape=shape), strict=True))
        pixel = raster.transform.a * raster.width / shape[2]
        unit = length_unit(raster.crs)
    with np.errstate(invalid="ignore"):  # infinite ends
        panels = {
            target: layers["mean"],
            f"width of {level:.0%} intervals{unit_of(target)}": layers["upper"] - layers["lower"],
            f"dissimilarity (line: {threshold:.2f})": layers["dissimilarity"],
        }
    ratio = shape[1] / shape[2]
    figure = Figure(figsize=(BOTH_COLUMNS, min(BOTH_COLUMNS, BOTH_COLUMNS / 3 * ratio + 0.7)))
    for axes, (name, layer), colours in zip(figure.subplots(1, 3), panels.items(), PALETTES, strict=True):
        known = layer[np.isfinite(layer) & (layers["inside"] > 0)]  # what lies outside may be anything
        low, high = np.percentile(known, (2, 98)) if known.size else (0, 1)
        if layer is layers["dissimilarity"]:
            low, high = 0, 2 * threshold
        image = axes.imshow(layer, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axes, orientation="horizontal", label=wrapped(name, 36), extend="both")
        inside = np.where(np.isnan(layers["inside"]), 1, layers["inside"])
        if min(shape[1:]) > 1 and inside.min() < 0.5 < inside.max():
            axes.contour(inside, levels=[0.5], colors="black", linewidths=0.5)
        axes.set_facecolor(GREY)
        axes.set(xticks=[], yticks=[])
    add_scale_bar(figure.axes[0], shape[2], pixel, unit)
    figure.suptitle(wrapped(f"{title}; line: edge of the area of applicability; grey: no data", 110))
    return figure


def unit_of(target: str) -> str:
    """The unit in the name of what is predicted, " (species)" of "species richness (species)"; empty without one."""
    start = target.rfind(" (")
    return target[start:] if start >= 0 and target.endswith(")") else ""


def length_unit(crs: CRS) -> tuple[str, float]:
    """Name of the unit of a scale bar, and how many of it are one unit of the coordinates."""
    if not crs.is_projected:
        return "°", 1.0
    return "m", crs.linear_units_factor[1]


def add_scale_bar(axes: "Axes", width: int, pixel: float, unit: tuple[str, float]) -> None:
    """A bar of a round length of about a quarter of the map's width (pixels of the given size in the coordinates' unit)."""
    name, factor = unit
    total = width * pixel * factor
    length = 10 ** np.floor(np.log10(total / 4))
    length *= max(step for step in (1, 2, 5) if step * length <= total / 4)
    label = f"{length / 1000:g} km" if name == "m" and length >= 1000 else f"{length:g} {name}"
    drawn = length / (pixel * factor)
    start = 0.04 * width
    axes.annotate(
        label,
        (start + drawn / 2, 0.05),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )
    axes.plot([start, start + drawn], [0.05, 0.05], transform=axes.get_xaxis_transform(), color="black", linewidth=2)
