"""The step `mask`: which pixels of the LiDAR squares are no tall vegetation, by the rules of `datasets.canopy.reference`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
import rasterio.features
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT

from datasets.canopy.catalogue import opened
from datasets.canopy.inputs_lidar import RASTERS
from datasets.canopy.inputs_squares import Square, Task, read_shapes, state_of, write_tif
from datasets.canopy.reference import vegetation_mask
from utils.errors import InputError
from utils.rasters import Grid
from utils.runs import whole_file

CROP = 640  # m, the centre of a square, which validation and test use


class MaskSpec(NamedTuple):
    """How masks are made: output folder, coordinate system as WKT, pixel size (m), file of fields or nothing."""

    out: str
    crs: str
    lidar_resolution: float
    fields: str


class MaskTask(NamedTuple):
    """A square and the file of its heights."""

    square: Square
    lidar: str


def mask_tasks(squares: Sequence[Square], heights: Sequence[dict[str, Any]], spec: MaskSpec) -> list[Task]:
    """A task for each square that has heights."""
    tasks = []
    for square, record in zip(squares, heights, strict=True):
        path = f"lidar/{square.tile}/res_{spec.lidar_resolution:g}/{record['lidar_name']}"
        depends_on = [spec[2:], state_of([spec.fields] if spec.fields else []), record["identity"]]
        tasks.append(Task(f"{square.tile}_{square.name}", depends_on, MaskTask(square, path)))
    return tasks


def build_masks(spec: MaskSpec) -> Callable[[MaskTask], dict[str, Any]]:
    """What a worker makes of the heights of a square: its mask, and the row of the table."""
    return lambda task: _make_mask(spec, task)


def _make_mask(spec: MaskSpec, task: MaskTask) -> dict[str, Any]:
    square, grid = task.square, task.square.grid(CRS.from_wkt(spec.crs), spec.lidar_resolution)
    with opened(Path(spec.out) / task.lidar) as raster:
        heights = raster.read(1)
    fields = fields_of(spec.fields, grid) if spec.fields else None
    mask = vegetation_mask(heights, fields, spec.lidar_resolution)
    name = f"lidar_mask_{square.name}_{square.tile}.tif"
    path = Path("lidar_mask") / square.tile / name
    write_tif(Path(spec.out) / path, mask[None], grid, None)
    margin, side = (round(length / spec.lidar_resolution) for length in ((1000 - CROP) / 2, CROP))
    crop = mask[margin : margin + side, margin : margin + side]
    row = {
        "lidar_id": square.name,
        "lidar_mask_name": name,
        "tile": square.tile,
        "valid_whole": round(100 * float((mask == 0).mean()), 2),
        "valid_crop": round(100 * float((crop == 0).mean()), 2),
    }
    return {"row": row, "files": [str(path)]}


def fields_of(fields: str, grid: Grid) -> NDArray[np.bool_]:
    """Where fields are, (row, column) of a grid: within the shapes of a vector file, or where a raster is above 0.

    A pixel belongs to a shape if its centre does.

    Raises:
        InputError: the file cannot be read or states no coordinate system.
    """
    path = Path(fields)
    if path.suffix.lower() in RASTERS:
        try:
            with rasterio.open(path) as raster:
                if raster.crs is None:
                    raise InputError(f"fields={path} states no coordinate system")
                place = {"transform": grid.transform, "height": grid.height, "width": grid.width}
                with WarpedVRT(raster, crs=grid.crs, resampling=Resampling.nearest, **place) as there:
                    values = there.read(1, masked=True)
        except RasterioError as error:
            raise InputError(f"fields={path} cannot be read as a raster: {str(error).splitlines()[0]}") from error
        return np.asarray(values.filled(0) > 0)
    bounds = rasterio.transform.array_bounds(grid.height, grid.width, grid.transform)
    shapes = read_shapes(path, "fields", "a raster", grid.crs, bounds)
    polygons = [shape for shape in shapes.geometry if shape is not None and not shape.is_empty]
    if not polygons:
        return np.zeros((grid.height, grid.width), bool)
    burnt = rasterio.features.rasterize(polygons, (grid.height, grid.width), transform=grid.transform, dtype="uint8")
    return np.asarray(burnt > 0)


def write_mask_tables(out: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write each tile's table of masks."""
    table = pd.DataFrame([record["row"] for record in records])
    for tile, rows in table.groupby("tile"):
        with whole_file(out / "lidar_mask" / str(tile) / f"mask_{tile}.parquet") as beside:
            rows.to_parquet(beside, index=False)
