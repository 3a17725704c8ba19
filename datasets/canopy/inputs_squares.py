"""The 1 km squares that training data are made of: which lie in an area, what they are called, what is done and left to do.

A step of `canopy-inputs` is a list of tasks, one for each square or image. The record of a finished task is a small JSON
file under `.inputs/<step>/` in the output folder, written after the task's files. A task whose record has the same identity,
a digest of all that its result depends on, and whose files are there is not done again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from tqdm import tqdm

from datasets.canopy.catalogue import BORDER, PATCH_SIZE, PIXEL, SQUARE_SIZE
from datasets.products.point_clouds import Bounds
from utils.errors import InputError
from utils.rasters import Build, Grid, workers
from utils.runs import whole_file, write_json

KM = 1000
EDGE = 0.5  # m that a file or an area may reach into a square without being counted
RECORDS = ".inputs"


class Square(NamedTuple):
    """A 1 km square of LiDAR heights, by its tile and the km of its upper-left corner."""

    tile: str
    east: int
    north: int

    @property
    def name(self) -> str:
        """The id of its patch."""
        return f"{self.east:04d}_{self.north:04d}"

    @property
    def bounds(self) -> Bounds:
        """Left, bottom, right, top (m)."""
        return (KM * self.east, KM * (self.north - 1), KM * (self.east + 1), KM * self.north)

    def grid(self, crs: CRS, resolution: float) -> Grid:
        """The pixels of its heights."""
        side = round(SQUARE_SIZE * PIXEL / resolution)
        return Grid(crs, Affine(resolution, 0, KM * self.east, 0, -resolution, KM * self.north), side, side)

    def patch_grid(self, crs: CRS) -> Grid:
        """The pixels of its images, which reach further on each side."""
        corner = (KM * self.east - BORDER * PIXEL, KM * self.north + BORDER * PIXEL)
        return Grid(crs, Affine(PIXEL, 0, corner[0], 0, -PIXEL, corner[1]), PATCH_SIZE, PATCH_SIZE)


class Task(NamedTuple):
    """A piece of a step: its name, what its result depends on, and what its worker is given."""

    name: str
    depends_on: Any
    given: Any

    @property
    def identity(self) -> str:
        """Digest of what the result depends on."""
        return hashlib.sha256(json.dumps(self.depends_on, sort_keys=True, default=str).encode()).hexdigest()


def area_of(area: str, folder: Path, crs: CRS) -> shapely.Geometry | None:
    """The shape of an area, or None for all.

    Args:
        area: `all`; left, bottom, right and top in `crs`, separated by commas or spaces; or a vector file (GeoJSON,
            GeoPackage, shapefile and others), of which all shapes count.
        folder: that a relative path counts from.
        crs: of the squares.

    Raises:
        InputError: it is none of these, or the file states no coordinate system.
    """
    if area == "all":
        return None
    try:
        left, bottom, right, top = (float(part) for part in area.replace(",", " ").split())
        return shapely.box(left, bottom, right, top)
    except ValueError:
        shapes = read_shapes(folder / area, "area", "all or four numbers (left, bottom, right, top)", crs)
        return shapely.union_all(shapes.geometry.to_numpy())


def read_shapes(path: Path, flag: str, otherwise: str, crs: CRS, bounds: Bounds | None = None) -> geopandas.GeoDataFrame:
    """The shapes of a vector file in a coordinate system, if bounds are given those that touch them.

    Raises:
        InputError: it cannot be read or states no coordinate system.
    """
    try:
        system = pyogrio.read_info(path)["crs"]
        if system is None:
            raise InputError(f"{flag}={path} states no coordinate system")
        if bounds is not None:
            there = pyproj.Transformer.from_crs(crs.to_wkt(), system, always_xy=True).transform_bounds(*bounds)
            return geopandas.read_file(path, bbox=there).to_crs(crs.to_wkt())
        return geopandas.read_file(path).to_crs(crs.to_wkt())
    except (OSError, ValueError, pyogrio.errors.DataSourceError, pyproj.exceptions.ProjError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag}={path} is neither {otherwise} nor a vector file that can be read: {reason}") from error


def squares_of(bounds: Iterable[Bounds], area: shapely.Geometry | None) -> list[tuple[int, int]]:
    """East and north (km) of the squares that lie in the bounds of some file and in the area, in order.

    Raises:
        InputError: a square's name cannot be written, as its corner is negative.
    """
    found = set()
    for left, bottom, right, top in bounds:
        columns = range(math.floor((left + EDGE) / KM), math.ceil((right - EDGE) / KM))
        rows = range(math.floor((bottom + EDGE) / KM) + 1, math.ceil((top - EDGE) / KM) + 1)
        found |= {(east, north) for east in columns for north in rows}
    if area is not None:
        shapely.prepare(area)
        found = {(east, north) for east, north in found if area.intersects(_inner(east, north))}
    negative = [place for place in found if min(place) < 0]
    if negative:
        raise InputError(f"the square at {negative[0]} km cannot be named: coordinates below 0 are not foreseen")
    return sorted(found)


def _inner(east: int, north: int) -> shapely.Geometry:
    return shapely.box(KM * east + EDGE, KM * (north - 1) + EDGE, KM * (east + 1) - EDGE, KM * north - EDGE)


def finished(out: Path, step: str, wanted: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records of a step's finished tasks by name, as far as there are any."""
    found = {}
    for name in wanted:
        path = out / RECORDS / step / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found


def do_tasks(
    out: Path, step: str, tasks: Sequence[Task], build: Build, spec: Any, count: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Do the tasks that are not done yet, and record them.

    Args:
        out: output folder.
        step: its name.
        tasks: all of them.
        build: makes, from the spec, the function from what a task is given to its record: a dictionary that JSON can hold,
            with the files it has written under `files`.
        spec: small and hashable.
        count: processes.
        say: takes a line on what was there already.

    Returns:
        The records by name.

    Raises:
        InputError: a task says so, or a file cannot be written.
    """
    records = finished(out, step, (task.name for task in tasks))
    left = undone(out, step, tasks)
    if len(left) < len(tasks):
        say(f"Step {step}: {len(tasks) - len(left)} of {len(tasks)} are done already")
    if left:
        by_given = {id(task.given): task for task in left}
        with (
            workers(min(count, len(left)), "") as run,
            tqdm(total=len(tasks), initial=len(tasks) - len(left), desc=f"{step}...", unit="task") as bar,
        ):
            for given, record in run(build, spec, [task.given for task in left]):
                task = by_given[id(given)]
                records[task.name] = {"identity": task.identity, **record}
                write_json(out / RECORDS / step / f"{task.name}.json", records[task.name])
                bar.update()
    return {task.name: records[task.name] for task in tasks}


def undone(out: Path, step: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks of a step that are still to be done."""
    records = finished(out, step, (task.name for task in tasks))
    return [task for task in tasks if not _is_done(records.get(task.name), task, out)]


def _is_done(record: dict[str, Any] | None, task: Task, out: Path) -> bool:
    return (
        record is not None
        and record.get("identity") == task.identity
        and all((out / file).is_file() for file in record.get("files", ()))
    )


def state_of(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files, by which a changed one is recognised; of an address, itself."""
    found = []
    for path in paths:
        try:
            stat = Path(path).stat()
            found.append((path, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append((path, 0, 0))
    return found


def write_tif(path: Path, bands: NDArray[Any], grid: Grid, nodata: int | None, names: Sequence[str] = ()) -> None:
    """Write bands (band, row, column) whole as a GeoTIFF.

    Raises:
        InputError: it cannot be written.
    """
    profile = {**grid._asdict(), "count": len(bands), "dtype": bands.dtype, "nodata": nodata}
    # In memory first: GDAL does not always say that a disk is full.
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", compress="deflate", predictor=2, **profile) as raster:
            raster.write(bands)
            raster.descriptions = tuple(names) or raster.descriptions
        with whole_file(path) as beside:
            beside.write_bytes(memory.read())


def share(part: NDArray[np.bool_]) -> float:
    """Percent of the pixels that are true, to 4 decimals."""
    return round(100 * float(part.mean()), 4)
