"""A map for tests whose pixels say where they are; apart from the tests, as workers of a cluster import it in threads."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from utils.errors import InputError
from utils.rasters import Grid, Layer, Output, windows_of, workers, write_map

GRID = Grid(CRS.from_epsg(32631), Affine(10, 0, 500000, 0, -10, 4900000), 150, 331)
OUTPUTS = (
    Output("sums.tif", (Layer("sum", "m", 0.1), Layer("row")), "int16", -10000, factor=2),
    Output("means.tif", (Layer("mean", "m"),), "float32", -1.0),
)
IDENTITY_OF_TEST = {"run": "abc", "weights_sha256": "00"}


def build(spec: tuple[str, float]) -> Callable[[Window], tuple[NDArray[Any], NDArray[Any]]]:
    """What a worker builds: it leaves a line a time that it does, and dawdles over each window for spec[1] seconds."""
    folder, seconds = spec
    with (Path(folder) / f"built_{os.getpid()}").open("a") as file:
        file.write("once\n")

    def compute(window: Window) -> tuple[NDArray[Any], NDArray[Any]]:
        time.sleep(seconds)
        if (window.row_off, window.col_off) == (64, 64) and (Path(folder) / "refuse").exists():
            raise InputError("window 64 64 cannot be read")
        row, column = np.indices((2 * window.height, 2 * window.width))
        row, column = row + 2 * window.row_off, column + 2 * window.col_off
        means = (row + column)[None, ::2, ::2] / 7
        return np.stack([row + column, row]).astype(np.int16), means.astype(np.float32)

    return compute


def make(folder: Path, size: int, count: int = 1, scheduler: str = "", seconds: float = 0.0) -> None:
    """Write the map of the test."""
    folder.mkdir(exist_ok=True)
    with workers(count, scheduler) as run:
        results = functools.partial(run, build, (str(folder), seconds))
        write_map(folder, GRID, OUTPUTS, windows_of(GRID, size), results, IDENTITY_OF_TEST, {"model": "test"})
