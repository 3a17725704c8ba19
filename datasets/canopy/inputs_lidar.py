"""The step `lidar`: height rasters of 1 km squares from point clouds, or from ready-made rasters of heights."""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyproj
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from tqdm import tqdm

from datasets.canopy.inputs_heights import (
    BUFFER,
    COVERAGE_BLOCK,
    MM,
    NO_RETURN,
    NODE,
    NODES,
    SIDE,
    height_raster,
    sort_points,
    thinned,
    triangulated,
)
from datasets.canopy.inputs_squares import RECORDS, Square, Task, share, state_of, write_tif
from datasets.canopy.map_reference import MapReference
from datasets.canopy.tiles import DECIMETRES
from datasets.products.geotiffs import date_of
from datasets.products.point_clouds import (
    GROUND,
    SUFFIXES,
    UNCLASSIFIED,
    Bounds,
    PointFile,
    Points,
    read_header,
    read_points,
    require_metres,
)
from utils.errors import InputError
from utils.rasters import Grid
from utils.runs import whole_file

RASTERS = (".tif", ".tiff", ".vrt", ".img", ".asc")
EDGES = "edges"
NO_GROUND = "no ground points"
MAX_TERRAIN_DIFFERENCE = 5.0  # m, median: more than that is another vertical reference


class Lidar(NamedTuple):
    """The LiDAR files, and what squares are cut from.

    Attributes:
        crs: of the squares.
        points: files of points.
        rasters: or those of heights.
        bounds: of each, in `crs`.
        days: ISO date of each.
    """

    crs: CRS
    points: tuple[PointFile, ...]
    rasters: tuple[str, ...]
    bounds: tuple[Bounds, ...]
    days: tuple[str, ...]


class HeightSpec(NamedTuple):
    """How heights are made: the flags of these names, and the coordinate system of the squares as WKT."""

    out: str
    crs: str
    lidar_resolution: float
    percentile: float
    vegetation_classes: tuple[int, ...]
    max_height: float
    min_coverage: float
    lidar_unit: str
    lidar_resampling: str


class HeightTask(NamedTuple):
    """What the heights of a square are made from.

    Attributes:
        square: the square.
        points: files of points to be read.
        edges: files of which only ground points beyond the square are needed, which the task of `edge_tasks` has put aside.
        rasters: files of heights.
        terrain: rasters of the terrain.
        day: of the flight.
    """

    square: Square
    points: tuple[PointFile, ...]
    edges: tuple[PointFile, ...]
    rasters: tuple[str, ...]
    terrain: tuple[str, ...]
    day: str


def find_lidar(lidar: str, folder: Path, crs: CRS | None, day: str | None, say: Callable[[str], None]) -> Lidar:
    """Find the LiDAR files and read their headers.

    Args:
        lidar: folder (with its subfolders) or list of files, of points or of heights.
        folder: that relative paths count from.
        crs: of the squares, and of files of points that state none; None: that of the files.
        day: ISO date of the flight; None: as the files say.
        say: takes lines for the user.

    Raises:
        InputError: there is none, one cannot be used, or they do not go together.
    """
    paths = files_in(lidar, folder, (*SUFFIXES, *RASTERS), "lidar", "LAS, LAZ or COPC files or rasters of heights")
    kinds = {path.suffix.lower() in SUFFIXES for path in paths}
    if len(kinds) > 1:
        raise InputError(f"lidar={lidar} has both point clouds and rasters; one kind is expected")
    if kinds == {False}:
        return _find_rasters(paths, crs, day)
    given = pyproj.CRS.from_wkt(crs.to_wkt()) if crs else None
    with tqdm(paths, "Reading headers...", unit="file", leave=False) as bar:
        files = [read_header(path, given) for path in bar]
    system = pyproj.CRS.from_wkt(files[0].crs)
    for wkt, path in {file.crs: file.path for file in files}.items():
        # Files of one system may name its parts and axes differently.
        if not system.equals(other := pyproj.CRS.from_wkt(wkt), ignore_axis_order=True):
            raise InputError(
                f"{files[0].path} is in {system.name}, but {path} in {other.name}; bring all points to one "
                f"coordinate system first"
            )
    dated = sum(file.flight for file in files)
    if day is None and dated < len(files):
        say(f"The points of {len(files) - dated} files do not tell the date of the flight; that of the file counts")
    return Lidar(
        _as_rasterio(system),
        tuple(files),
        (),
        tuple(file.bounds for file in files),
        tuple(day or file.day for file in files),
    )


def files_in(places: str, folder: Path, suffixes: Sequence[str], flag: str, expected: str) -> list[Path]:
    """The files of a folder and its subfolders, or of a list.

    Raises:
        InputError: there is none.
    """
    place = folder / places
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            raise InputError(f"{flag}={places}: {place} holds no {expected}")
        return paths
    paths = [place] if place.is_file() else [folder / name for name in places.replace(",", " ").split()]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{flag}={places}: {path} does not exist; a folder or a list of {expected} is expected")
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{flag}={places}: {path.name} is none of the {expected} ({', '.join(suffixes)})")
    return paths


def _as_rasterio(crs: pyproj.CRS) -> CRS:
    code = crs.to_epsg()
    return CRS.from_epsg(code) if code else CRS.from_wkt(crs.to_wkt())


def _find_rasters(paths: Sequence[Path], crs: CRS | None, day: str | None) -> Lidar:
    headers = [_raster_header(path, "lidar") for path in paths]
    if crs is None:
        crs = _as_rasterio(require_metres(pyproj.CRS.from_wkt(headers[0][0].to_wkt()), paths[0]))
    days = [day or _day_of_raster(path) for path in paths]
    bounds = tuple(transform_bounds(system, crs, *there) for system, there in headers)
    return Lidar(crs, (), tuple(map(str, paths)), bounds, tuple(days))


def _raster_header(path: Path, flag: str) -> tuple[CRS, Bounds]:
    """Coordinate system and bounds of a raster of heights in metres or decimetres."""
    try:
        with rasterio.open(path) as raster:
            crs, units, bounds = raster.crs, raster.units[0], tuple(raster.bounds)
        if crs is None:
            raise InputError(f"{flag}: {path} states no coordinate system")
        if re.search(r"f(oo|ee)?t", units or ""):
            raise InputError(f"{flag}: {path} has heights in {units}: convert it to metres first")
        if not crs.is_geographic:
            require_metres(pyproj.CRS.from_wkt(crs.to_wkt()), path)
    except (RasterioError, CRSError) as error:
        raise InputError(f"{flag}: {path} cannot be read as a raster: {str(error).splitlines()[0]}") from error
    return crs, bounds


def _day_of_raster(path: Path) -> str:
    try:
        return date_of(path).isoformat()
    except InputError as error:
        raise InputError(f"{error}; lidar_date=2024-01-27, say, tells it") from error


def find_terrain(terrain: str, folder: Path, crs: CRS) -> list[tuple[str, Bounds]]:
    """Terrain rasters and their bounds in the squares' coordinate system.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if terrain == "none":
        return []
    paths = files_in(terrain, folder, RASTERS, "terrain", "rasters of the terrain")
    headers = [_raster_header(path, "terrain") for path in paths]
    return [(str(path), transform_bounds(system, crs, *there)) for path, (system, there) in zip(paths, headers, strict=True)]


def lidar_tasks(
    squares: Sequence[Square], lidar: Lidar, terrain: Sequence[tuple[str, Bounds]], spec: HeightSpec
) -> list[Task]:
    """A task for each square."""
    tasks = []
    boxes = shapely.box(*np.array(lidar.bounds).T)
    files_at, terrain_at = shapely.STRtree(boxes), shapely.STRtree([shapely.box(*bounds) for _, bounds in terrain])
    for square in squares:
        buffered = shapely.box(*_buffered(square))
        numbers = np.sort(files_at.query(buffered))
        # First the file with most of the square, whose date counts.
        common = shapely.area(shapely.intersection(boxes[numbers], shapely.box(*square.bounds)))
        numbers = numbers[np.argsort(-common, kind="stable")].tolist()
        files = [lidar.points[number] for number in numbers] if lidar.points else []
        points = tuple(file for file in files if file.copc or _holds_part(file.bounds, square.bounds))
        edges = tuple(file for file in files if file not in points)
        rasters = tuple(lidar.rasters[number] for number in numbers) if lidar.rasters else ()
        below = tuple(terrain[number][0] for number in np.sort(terrain_at.query(buffered)))
        given = HeightTask(square, points, edges, rasters, below, lidar.days[numbers[0]])
        sources = state_of([*(file.path for file in files), *rasters, *below])
        # Where heights are written to does not change them.
        tasks.append(
            Task(f"{square.tile}_{square.name}", [spec[1:], given.square, given.day, bool(terrain), sources], given)
        )
    return tasks


def _buffered(square: Square) -> Bounds:
    left, bottom, right, top = square.bounds
    return (left - BUFFER, bottom - BUFFER, right + BUFFER, top + BUFFER)


def _holds_part(bounds: Bounds, square: Bounds) -> bool:
    """Whether points within bounds may lie in a square, whose left and upper edges belong to it."""
    return bounds[0] < square[2] and bounds[2] >= square[0] and bounds[1] <= square[3] and bounds[3] > square[1]


def edge_tasks(tasks: Sequence[Task]) -> list[Task]:
    """A task for each file of which some square needs the ground around it alone.

    A file of points that cannot be asked for a place is decompressed as a whole. So that this does not happen for each of a
    square's eight neighbours, ground points near the squares' edges are put aside first.
    """
    files = {file.path: file for task in tasks for file in task.given.edges}
    return [Task(_edge_name(file), [file.path, *state_of([file.path])], file) for file in files.values()]


def _edge_name(file: PointFile) -> str:
    return f"{Path(file.path).stem}_{hashlib.sha256(file.path.encode()).hexdigest()[:8]}"


def _edge_path(out: str, file: PointFile) -> Path:
    return Path(out) / RECORDS / EDGES / f"{_edge_name(file)}.npz"


def build_edges(out: str) -> Callable[[PointFile], dict[str, Any]]:
    """What a worker makes of a file: its ground points near the edges of squares."""
    return lambda file: _put_edges_aside(out, file)


def _put_edges_aside(out: str, file: PointFile) -> dict[str, Any]:
    left, bottom, right, top = (math.floor(part) for part in file.bounds)
    corner = (left, top + 1)
    parts = [np.empty((0, 3), np.int32)]
    for points in read_points(file, (left, bottom, right + 1, top + 1)):
        to_edges = [
            np.abs((along + SIDE * MM // 2) % (SIDE * MM) - SIDE * MM // 2)
            for along in (points.east + left * MM, (top + 1) * MM - points.south.astype(np.int64))
        ]
        near = (points.classes == GROUND) & (np.minimum(*to_edges) <= BUFFER * MM)
        parts.append(np.stack([points.east[near], points.south[near], points.up[near]], axis=1))
    path = _edge_path(out, file)
    with whole_file(path) as beside:
        np.savez_compressed(beside, corner=corner, ground=np.concatenate(parts))
    return {"files": [str(path.relative_to(out))]}


def _read_edges(out: str, file: PointFile, bounds: Bounds) -> Points:
    """The ground points of a file within bounds, as `read_points` gives them."""
    with np.load(_edge_path(out, file)) as arrays:
        (left, top), ground = arrays["corner"].tolist(), arrays["ground"].astype(np.int64)
    east = ground[:, 0] + round(MM * (left - bounds[0]))
    south = ground[:, 1] + round(MM * (bounds[3] - top))
    inside = (east >= 0) & (east < MM * (bounds[2] - bounds[0])) & (south >= 0) & (south < MM * (bounds[3] - bounds[1]))
    columns = (east[inside].astype(np.int32), south[inside].astype(np.int32), ground[inside, 2].astype(np.int32))
    return Points(*columns, np.full(len(columns[0]), GROUND, np.uint8))


def build_heights(spec: HeightSpec) -> Callable[[HeightTask], dict[str, Any]]:
    """What a worker makes of a square: its heights, and a record of them."""
    return lambda task: _make_heights(spec, task)


def _make_heights(spec: HeightSpec, task: HeightTask) -> dict[str, Any]:
    square, crs = task.square, CRS.from_wkt(spec.crs)
    heights, covered, counts = _from_points(spec, task, crs) if task.points else _from_rasters(spec, task, crs)
    record = {"tile": square.tile, "patch": square.name, "lidar_date": task.day, "covered": covered, **counts}
    if heights is None:
        return {**record, "left_out": NO_GROUND}
    if covered < spec.min_coverage:
        return {**record, "left_out": f"LiDAR covers less than min_coverage={spec.min_coverage:g} %"}
    name = f"pH{spec.percentile:g}_{square.name}_{task.day}.tif"
    path = Path("lidar") / square.tile / f"res_{spec.lidar_resolution:g}" / name
    write_tif(Path(spec.out) / path, heights[None], square.grid(crs, spec.lidar_resolution), NO_RETURN)
    record |= {
        "no_return": share(heights < 0),
        "mean_dm": round(float(heights[heights > 0].mean()), 1) if (heights > 0).any() else 0,
    }
    return {**record, "lidar_name": name, "files": [str(path)]}


def _from_points(spec: HeightSpec, task: HeightTask, crs: CRS) -> tuple[NDArray[np.int16] | None, float, dict[str, int]]:
    buffered = _buffered(task.square)
    seen = np.zeros(256, np.int64)

    def counted(points: Points) -> Points:
        seen[:] += np.bincount(points.classes, minlength=256)
        return points

    own = (points for file in task.points for points in read_points(file, buffered))
    around = (_read_edges(spec.out, file, buffered) for file in task.edges)
    parts = (counted(points) for points in itertools.chain(own, around))
    cloud = sort_points(parts, spec.lidar_resolution, spec.vegetation_classes)
    counts = {"points": cloud.points, "ground": len(cloud.ground), "unclassified": int(seen[UNCLASSIFIED])}
    ground = thinned(cloud.ground)
    if task.terrain:
        terrain = _terrain_of(task, crs)
        _refuse_other_reference(terrain, ground, task)
    else:
        terrain = triangulated(ground)
    covered = round(100 * cloud.covered, 2)
    if np.isnan(terrain).all():
        return None, covered, counts
    heights, returns = height_raster(cloud, terrain, spec.lidar_resolution, spec.percentile, spec.max_height)
    return heights, covered, counts | returns


def _terrain_of(task: HeightTask, crs: CRS) -> NDArray[np.float64]:
    """The terrain at the nodes of a square by given rasters, nan where they have none."""
    left, _, _, top = task.square.bounds
    grid = Grid(crs, Affine(NODE, 0, left - NODE / 2, 0, -NODE, top + NODE / 2), NODES, NODES)
    reference = MapReference(task.terrain, Path(), grid, "m", "bilinear", flag="terrain")
    return reference.heights(Window(0, 0, NODES, NODES)).astype(np.float64)


def _refuse_other_reference(terrain: NDArray[np.float64], ground: NDArray[np.float64], task: HeightTask) -> None:
    """Refuse a terrain that does not belong to the points."""
    inside = (ground[:, :2] >= 0).all(1) & (ground[:, :2] <= SIDE).all(1)
    rows, columns = (np.rint(ground[inside, axis] / NODE).astype(int) for axis in (1, 0))
    apart = ground[inside, 2] - terrain[rows, columns]
    apart = apart[np.isfinite(apart)]
    if len(apart) and abs(np.median(apart)) > MAX_TERRAIN_DIFFERENCE:
        side = "below" if np.median(apart) > 0 else "above"
        raise InputError(
            f"terrain: {task.terrain[0]} lies {abs(np.median(apart)):.1f} m {side} the ground points of "
            f"{task.points[0].path}; both need the same vertical reference, in metres"
        )


def _from_rasters(spec: HeightSpec, task: HeightTask, crs: CRS) -> tuple[NDArray[np.int16], float, dict[str, int]]:
    grid = task.square.grid(crs, spec.lidar_resolution)
    empty = np.full((grid.height, grid.width), NO_RETURN, np.int16)
    try:
        reference = MapReference(task.rasters, Path(), grid, spec.lidar_unit, spec.lidar_resampling, flag="lidar")
    except InputError as error:
        if "touches" in str(error):
            return empty, 0.0, {}
        raise
    metres = reference.heights(Window(0, 0, grid.width, grid.height))
    known = metres >= 0  # nan is not
    heights = np.where(known, np.rint(np.nan_to_num(metres) * DECIMETRES), NO_RETURN).astype(np.int16)
    block = max(1, round(COVERAGE_BLOCK / spec.lidar_resolution))
    covered = known.reshape(grid.height // block, block, -1, block).any((1, 3)).mean()
    return heights, round(100 * float(covered), 2), {}


def report_heights(records: Sequence[dict[str, Any]], spec: HeightSpec, say: Callable[[str], None]) -> None:
    """Say what the heights are like and what was left out.

    Raises:
        InputError: no square has heights.
    """
    reasons: dict[str, list[str]] = {}
    for record in records:
        if "left_out" in record:
            reasons.setdefault(record["left_out"], []).append(record["patch"])
    left_out = "; ".join(f"{reason}: {len(names)} ({names[0]}, for example)" for reason, names in reasons.items())
    made = [record for record in records if "left_out" not in record]
    if not made:
        advice = "; ground is class 2, or give terrain=..." if NO_GROUND in reasons else ""
        raise InputError(f"no square of the LiDAR can be used: {left_out}{advice}")
    say(f"Squares with LiDAR: {len(made)}{f'; left out: {left_out}' if left_out else ''}")
    without = float(np.mean([record["no_return"] for record in made]))
    say(f"Cells of {spec.lidar_resolution:g} m without a return: {without:.1f} %")
    if without > 20:
        say("That is many: trees between the returns count as bare ground. A larger lidar_resolution suits sparse points")
    if all("points" in record for record in made):
        _report_points(made, spec, say)


def _report_points(made: Sequence[dict[str, Any]], spec: HeightSpec, say: Callable[[str], None]) -> None:
    total = {name: sum(record[name] for record in made) for name in made[0] if isinstance(made[0][name], int)}
    density = total["points"] / len(made) / SIDE**2
    say(f"Points: {density:.1f} a square metre; outliers left out: {total['outliers']}")
    if total["without_ground"]:
        say(f"Vegetation returns without ground nearby, whose cells count as without a return: {total['without_ground']}")
    if total["vegetation"] == 0:
        classes = " ".join(map(str, spec.vegetation_classes))
        say(
            f"No return is of the vegetation classes {classes}, {total['unclassified']} are unclassified (1): if the cloud "
            f"was classified into ground and the rest alone, vegetation_classes=1 takes those"
        )
