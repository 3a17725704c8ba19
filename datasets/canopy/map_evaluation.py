"""A map of heights measured against reference rasters, and its spread calibrated by them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.windows import Window
from tqdm import tqdm

from datasets.canopy.catalogue import NODATA
from datasets.canopy.cell_dates import MapInputs
from datasets.canopy.image_series import day_of_year
from datasets.canopy.map_reference import MapReference, reference_windows
from utils import rasters
from utils.canopy import plots
from utils.canopy.evaluation import SCENES, Evaluation
from utils.canopy.map_scores import MapScores
from utils.canopy.metrics import REPORTED
from utils.canopy.plots import Scene
from utils.errors import InputError
from utils.plots import save_plot
from utils.rasters import Layer, Output
from utils.runs import say

SIDE_OF_TEST = 64  # image pixels of a window of metrics, as in a test of training


def score_map(inputs: MapInputs, day: int, reference: MapReference, tags: Mapping[str, str]) -> dict[str, Any]:
    """Measure the map of this folder, plot and print the metrics; calibrate its spread, if any, and write interval.tif.

    Args:
        inputs: what the map is made from.
        day: of the year, that it is of.
        reference: heights on its grid.
        tags: of the map.

    Returns:
        scores: by group as in training's metrics.json; reference: what was done to it; calibration.

    Raises:
        InputError: no tall vegetation of the reference is mapped.
    """
    scores, wooded = MapScores(), list[tuple[float, Window]]()
    with rasterio.open("height.tif") as heights, rasterio.open("vegetation.tif") as probabilities:
        side = SIDE_OF_TEST * heights.height // inputs.area[2]
        for window in tqdm(reference_windows(reference.grid, side), "Measuring...", unit="window"):
            observed, no_vegetation = reference.heights_and_mask(window)
            if np.isnan(observed).all():
                continue
            layers = metres(heights, window)
            vegetation = 0.01 * probabilities.read(1, window=window).astype(np.float32)
            scores.update(layers[0], vegetation, observed, no_vegetation)
            if heights.count > 1:
                half = (window.row_off + window.col_off) // side % 2  # as on a chessboard
                scores.update_spread(layers[0], layers[1], observed, no_vegetation, half)
            share = float((np.isfinite(layers[0]) & np.isfinite(observed) & ~no_vegetation).mean())
            wooded = sorted([*wooded, (share, window)], key=lambda one: -one[0])[:SCENES]
        result, calibration = scores.compute(), scores.calibration()
        if not result["all"]["pixels"]:
            raise InputError("the reference has no height of 1.5 m or more where the map has heights")
        scenes = [scene_of(inputs, day, reference, heights, window) for _, window in wooded]
        title = f"map, {heights.res[0]:g} m"
    note = f" ({tags['note']})" if "note" in tags else ""
    for label, name, unit in (*REPORTED, ("nMAE", "nmae", ""), ("Tree cover IoU", "tree_cover_iou", "")):
        say(f"{label}: {result['all'][name]:.4f}{unit}{note}")
    evaluation = Evaluation(math.nan, result, scores.histogram.numpy(), scenes)
    for name, figure in plots.of_test(evaluation, f"{title}{note}").items():
        save_plot(figure, Path(f"{name}.png"))
    if calibration:
        covered = f"{100 * calibration['coverage']:.1f} % of the errors of the others{note}"
        say(f"Spread: {calibration['factor']:.2f} times it, the 90 % interval by half of the windows, holds {covered}")
        write_interval(calibration["factor"], tags)
    return {"scores": result, "reference": list(reference.notes), "calibration": calibration}


def metres(raster: DatasetReader, window: Window) -> NDArray[np.float32]:
    """The layers of a window of heights, (layer, row, column), nan where nothing is mapped."""
    values = raster.read(window=window, masked=True).astype(np.float32).filled(np.nan)
    return np.asarray(raster.scales[0] * values, np.float32)


def scene_of(inputs: MapInputs, day: int, reference: MapReference, heights: DatasetReader, window: Window) -> Scene:
    """A window to plot, with the image whose day of the year is nearest."""
    observed, no_vegetation = reference.heights_and_mask(window)
    predicted = metres(heights, window)[0]
    mask = no_vegetation | np.isnan(predicted) | np.isnan(observed)
    factor = heights.height // inputs.area[2]
    part = inputs.in_images(Window(*(round(number / factor) for number in window.flatten())))
    nearest = min(inputs.series.images, key=lambda image: abs(day_of_year(image) - day))
    bands = nearest.read(part)
    image = np.where(bands == NODATA, np.nan, bands).astype(np.float32)
    name = f"row {window.row_off}/column {window.col_off}"
    return Scene(name, image, np.where(mask, 0, observed), np.nan_to_num(predicted), mask, heights.res[0])


def write_interval(factor: float, tags: Mapping[str, str]) -> None:
    """Write interval.tif: the half width of the 90 % interval, the calibrated spread."""
    path = Path("interval.tif")
    path.unlink(missing_ok=True)
    output = Output(path.name, (Layer("half width of the 90 % interval", "m", 0.1),), "int16", NODATA)
    with rasterio.open("height.tif") as heights:
        grid = rasters.Grid(heights.crs, heights.transform, heights.height, heights.width)

        def widths(windows: Iterable[Window]) -> Iterator[tuple[Window, list[NDArray[np.int16]]]]:
            for window in windows:
                spread = heights.read([2], window=window).astype(np.float64)
                width = np.minimum(np.rint(factor * np.maximum(spread, 0.5)), np.iinfo(np.int16).max)
                yield window, [np.where(spread == NODATA, NODATA, width).astype(np.int16)]

        identity = json.loads(Path(rasters.IDENTITY).read_text(encoding="utf-8"))
        windows = rasters.windows_of(grid, rasters.TILE)
        rasters.write_map(Path(), grid, [output], windows, widths, identity, tags, "Writing the interval...")
