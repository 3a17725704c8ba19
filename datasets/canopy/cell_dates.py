"""Which dates a map is made from: chosen for each cell of a fixed grid, so that they depend on no window of computing."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.canopy.image_series import ImageSeries, Limits, SeriesReader, choose_dates, grown
from datasets.products import CLOUD, MISSING, WATER
from utils import rasters
from utils.cluster import cluster
from utils.errors import InputError
from utils.rasters import Layer, Output
from utils.runs import write_json

if TYPE_CHECKING:
    from distributed import Worker

ALIGNMENT = 16  # image pixels that a window grows at most to fit a network's halvings
UNKNOWN = 255  # nodata of layers of uint8
CHOSEN = "dates.json"
CELLS = f"{rasters.BLOCKS}/cells"  # folder of the choices of single cells until all are there
DATES_OUTPUT = Output(
    "dates.tif",
    (Layer("dates"), Layer("water", "%"), Layer("cloud", "%"), Layer("no data", "%")),
    "uint8",
    UNKNOWN,
    resampling="nearest",
)

Choice = dict[str, Any]


class MapInputs(NamedTuple):
    """What a map is made from; hashable and small, for it travels with each window.

    Attributes:
        series: the images.
        area: first row and column, rows and columns that are mapped, in image pixels; windows count from its corner.
        cell: side of the cells in image pixels; they count from the images' corner.
        reach: image pixels around a window that its heights depend on.
        limits: of the images of a cell.
        kept_strips: strips of an image that are kept (see `SeriesReader`).
        folder: of the map.
        scheduler: of the Dask cluster whose workers map, or nothing.
    """

    series: ImageSeries
    area: tuple[int, int, int, int]
    cell: int
    reach: int
    limits: Limits
    kept_strips: int
    folder: str
    scheduler: str

    @property
    def grid(self) -> rasters.Grid:
        """Of the map, in image pixels."""
        return self.series.grid.part(self.whole)

    @property
    def whole(self) -> Window:
        """The area in pixels of the images."""
        return Window(self.area[1], self.area[0], self.area[3], self.area[2])

    def in_images(self, window: Window) -> Window:
        """A window of the map in pixels of the images."""
        return Window(window.col_off + self.area[1], window.row_off + self.area[0], window.width, window.height)

    def reader(self) -> SeriesReader:
        """What reads the images for the area."""
        margin = 2 * self.reach + ALIGNMENT
        columns = self.area[1] - margin, self.area[1] + self.area[3] + margin
        # Dates are chosen row by row of cells, by workers of two rows at once.
        kept_states = -(-(2 * self.cell + 2 * self.reach) // self.series.strip) + 1
        if not self.scheduler:
            strips = Path(self.folder) / rasters.BLOCKS / "strips"
        else:
            from distributed import get_worker

            strips = strips_of_machine(self, get_worker())
        return SeriesReader(self.series, strips, columns, self.kept_strips, kept_states)


def strips_of_machine(inputs: MapInputs, worker: "Worker") -> Path:
    """Where the workers of a cluster's machine keep strips: beside their own folders, to share them."""
    key = json.dumps([inputs.folder, inputs.area, inputs.reach, inputs.series.digest()])
    return Path(worker.local_directory).parent / f"canopy_map_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def remove_strips(inputs: MapInputs) -> None:
    """Remove the strips of images, on all machines."""
    if inputs.scheduler:
        with cluster(inputs.scheduler) as client:
            client.run(remove_strips_here, inputs)
    shutil.rmtree(Path(inputs.folder) / rasters.BLOCKS, ignore_errors=True)


def remove_strips_here(inputs: MapInputs, dask_worker: "Worker") -> None:
    """Remove those of one machine; distributed fills in the worker, by the argument's name."""
    shutil.rmtree(strips_of_machine(inputs, dask_worker), ignore_errors=True)


def pieces_of(window: Window, cell: int) -> Iterator[tuple[str, Window]]:
    """The parts of a window in each cell, with the cell's name; in pixels of the images."""
    for row in range(window.row_off // cell, -(-(window.row_off + window.height) // cell)):
        for column in range(window.col_off // cell, -(-(window.col_off + window.width) // cell)):
            yield f"{row}_{column}", window.intersection(Window(column * cell, row * cell, cell, cell))


def within(window: Window, outer: Window) -> tuple[slice, slice]:
    """Rows and columns of a window counted from another's corner."""
    return Window(window.col_off - outer.col_off, window.row_off - outer.row_off, window.width, window.height).toslices()


def build_chooser(inputs: MapInputs) -> Callable[[Window], tuple[NDArray[np.uint8], Choice]]:
    """What finds the dates of a cell's part in the area: the layers of `DATES_OUTPUT` and the cell's choice."""
    reader = inputs.reader()
    grid, images = inputs.series.grid, inputs.series.images
    with_mask = np.array([image.masked for image in images])

    def choose(window: Window) -> tuple[NDArray[np.uint8], Choice]:
        part = inputs.in_images(window)
        ((name, _),) = pieces_of(part, inputs.cell)
        row, column = (inputs.cell * int(number) for number in name.split("_"))
        cell = Window(column, row, inputs.cell, inputs.cell)
        around = grown(cell, inputs.reach).intersection(Window(0, 0, grid.width, grid.height))
        states = np.stack([reader.states(number, around) for number in range(len(images))])
        chosen = choose_dates(states, inputs.series.days, inputs.limits)
        inner = states[:, *within(part, around)]
        clear = (inner != CLOUD) & (inner != MISSING)
        layers = np.full((len(DATES_OUTPUT.layers), part.height, part.width), UNKNOWN, np.uint8)
        layers[0] = np.minimum(clear[chosen].sum(0), UNKNOWN - 1)
        seen = clear[with_mask].sum(0)
        np.copyto(layers[1], percent((inner[with_mask] == WATER).sum(0), np.maximum(seen, 1)), where=seen > 0)
        if with_mask.any():
            layers[2] = percent((inner[with_mask] == CLOUD).sum(0), with_mask.sum())
        layers[3] = percent((inner == MISSING).sum(0), len(images))
        mapped = int((layers[0] >= inputs.limits.min_dates).sum())
        return layers, {"cell": name, "images": chosen.tolist(), "pixels": mapped}

    return choose


def percent(part: NDArray[Any], whole_of: Any) -> NDArray[np.uint8]:
    """Shares in whole percent."""
    return np.rint(100 * part / whole_of).astype(np.uint8)


def write_dates(inputs: MapInputs, run: rasters.Run, identity: dict[str, Any], tags: dict[str, str]) -> None:
    """Choose the dates of all cells: write dates.tif and dates.json.

    Raises:
        InputError: no pixel has enough dates.
    """
    folder, area = Path(inputs.folder), inputs.whole
    if (folder / CHOSEN).exists() and (folder / DATES_OUTPUT.file).exists():
        return
    cells = [
        Window(part.col_off - area.col_off, part.row_off - area.row_off, part.width, part.height)
        for _, part in pieces_of(area, inputs.cell)
    ]

    def layers_of(windows: Iterable[Window]) -> Iterator[tuple[Window, Sequence[NDArray[np.uint8]]]]:
        for window, (layers, choice) in run(build_chooser, inputs, windows):
            write_json(folder / CELLS / f"{choice['cell']}.json", choice)  # before the block, which a restart takes as done
            yield window, [layers]

    rasters.write_map(folder, inputs.grid, [DATES_OUTPUT], cells, layers_of, identity, tags, "Choosing dates...")
    files = [folder / CELLS / f"{name}.json" for name, _ in pieces_of(area, inputs.cell)]
    choices = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not any(choice["pixels"] for choice in choices):
        raise InputError(
            f"no pixel has min_dates={inputs.limits.min_dates} clear dates among the {len(inputs.series.images)} images; "
            f"dates.tif shows where cloud or missing data is the reason"
        )
    document: dict[str, Any] = {
        "images": [image.name for image in inputs.series.images],
        "cells": {choice["cell"]: choice["images"] for choice in choices},
    }
    if inputs.series.with_angles:
        document["angles"] = angles_of_cells(inputs, document["cells"])
    write_json(folder / CHOSEN, document)
    shutil.rmtree(folder / CELLS)


def angles_of_cells(inputs: MapInputs, cells: dict[str, list[int]]) -> dict[str, list[list[float]]]:
    """Sun and view angles at the middle of each cell for its images, (image, 4) in degrees.

    Cells are as large as those of the products' grids of angles, and the middle is within the grid of the images.
    """
    grid, points = inputs.series.grid, []
    for name in cells:
        row, column = (inputs.cell * int(number) for number in name.split("_"))
        last = min(row + inputs.cell, grid.height), min(column + inputs.cell, grid.width)
        points.append(grid.transform @ ((column + last[1]) / 2, (row + last[0]) / 2))
    angles = inputs.series.angles(np.array(points))
    return {name: angles[cells[name], number].tolist() for number, name in enumerate(cells)}


def chosen_angles(folder: Path) -> dict[str, list[list[float]]]:
    """Sun and view angles of each cell's images, (image, 4) in degrees, from dates.json."""
    angles: dict[str, list[list[float]]] = json.loads((folder / CHOSEN).read_text(encoding="utf-8"))["angles"]
    return angles


def chosen_dates(folder: Path) -> dict[str, list[int]]:
    """Numbers of the images of each cell, by `row_column`, from dates.json."""
    cells: dict[str, list[int]] = json.loads((folder / CHOSEN).read_text(encoding="utf-8"))["cells"]
    return cells
