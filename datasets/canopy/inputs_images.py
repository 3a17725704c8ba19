"""The steps `images` and `angles`: patches of 1.5 km of every product around the LiDAR squares, and the tables of a tile."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import array_bounds
from rasterio.warp import reproject, transform_bounds
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLES, BANDS, BORDER, MAX_DAYS_FROM_LIDAR, NODATA, PIXEL
from datasets.canopy.inputs_contexts import LEFT_OUT
from datasets.canopy.inputs_squares import KM, Square, Task, share, state_of, write_tif
from datasets.products import CLOUD, MISSING, WATER, Product
from datasets.products.geotiffs import CLOUD_BITS, MASK_NODATA, MASK_SUFFIX, WATER_BIT
from utils.errors import InputError
from utils.rasters import Grid
from utils.runs import whole_file

BLOCK = 10  # km: squares of such a block are cut out of one read of a product
MARGIN = 4  # image pixels around what is read, for resampling
UNNAMED = "untiled"  # squares of products that do not say of which tile they are
CLOUDY, CUT, EMPTY = "too cloudy", "cut by the edge of the product", "without data"


class ImageSpec(NamedTuple):
    """How images are made: the flags of these names, and the coordinate system of the squares as WKT."""

    out: str
    crs: str
    resampling: str
    max_masked: float
    min_valid: float


class ImageTask(NamedTuple):
    """Products of the same tile, sensor and day, and neighbouring squares."""

    products: tuple[Product, ...]
    squares: tuple[Square, ...]


def degrees_around(places: Sequence[tuple[int, int]], crs: CRS) -> tuple[float, float, float, float]:
    """West, south, east and north of the patches of squares, given by east and north (km) in a coordinate system."""
    (first, bottom), (last, top) = np.min(places, axis=0), np.max(places, axis=0)
    border = BORDER * PIXEL
    edges = (KM * first - border, KM * (bottom - 1) - border, KM * (last + 1) + border, KM * top + border)
    west, south, east, north = transform_bounds(crs, "EPSG:4326", *edges, densify_pts=21)
    return west, south, east, north


def tiles_of(places: Sequence[tuple[int, int]], products: Sequence[Product], crs: CRS) -> list[Square]:
    """The squares whose patches some tile's products cover, each with the tile that has most products there.

    Args:
        places: east and north of each square (km).
        products: that may cover them.
        crs: of the squares.

    Raises:
        InputError: the products cover none of them.
    """
    counts = Counter((product.tile or UNNAMED, product.grid) for product in products)
    squares = []
    for east, north in places:
        patch = _bounds(Square("", east, north).patch_grid(crs))
        covering: Counter[str] = Counter()
        for (tile, grid), count in counts.items():
            if _covers(grid, transform_bounds(crs, grid.crs, *patch, densify_pts=3)):
                covering[tile] += count
        if covering:
            tile = min(covering, key=lambda name: (-covering[name], name))
            squares.append(Square(tile, east, north))
    if not squares:
        first = transform_bounds(next(iter(counts))[1].crs, crs, *_bounds(next(iter(counts))[1]))
        there = " ".join(f"{part:.0f}" for part in first)
        raise InputError(
            f"the {len(places)} LiDAR squares of the area, {places[0]} to {places[-1]} (km), lie outside of the products, "
            f"which cover left, bottom, right, top {there} in {crs.to_string()}; images reach 250 m beyond the squares"
        )
    return squares


def _bounds(grid: Grid) -> tuple[float, float, float, float]:
    return array_bounds(grid.height, grid.width, grid.transform)


def _covers(grid: Grid, bounds: tuple[float, float, float, float]) -> bool:
    left, bottom, right, top = _bounds(grid)
    return bounds[0] >= left and bounds[1] >= bottom and bounds[2] <= right and bounds[3] <= top


def image_tasks(
    squares: Sequence[Square],
    contexts: Mapping[tuple[str, str], str],
    days: Mapping[Square, str],
    products: Sequence[Product],
    spec: ImageSpec,
) -> list[Task]:
    """A task for each image and block of squares that are in use and whose LiDAR is of about the same time.

    Args:
        squares: all.
        contexts: by tile and patch.
        days: of the LiDAR, by square.
        products: all.
        spec: flags.
    """
    images: dict[tuple[str, str, date], list[Product]] = {}
    for product in products:
        images.setdefault((product.tile or UNNAMED, product.sensor or "SENTINEL2", product.date), []).append(product)
    used = [square for square in squares if contexts.get((square.tile, square.name), LEFT_OUT) != LEFT_OUT]
    blocks: dict[tuple[str, int, int], list[Square]] = {}
    for square in used:
        blocks.setdefault((square.tile, square.east // BLOCK, square.north // BLOCK), []).append(square)
    tasks = []
    for (tile, sensor, day), same in sorted(images.items()):
        for (of_tile, east, north), members in sorted(blocks.items()):
            near = tuple(square for square in members if _days_apart(day, days[square]) <= MAX_DAYS_FROM_LIDAR)
            if of_tile == tile and near:
                sources = state_of(file for product in same for file in product.files)
                depends_on = [spec[1:], [product.name for product in same], near, sources]
                tasks.append(Task(f"{tile}_{sensor}_{day:%Y%m%d}_{east}_{north}", depends_on, ImageTask(tuple(same), near)))
    return tasks


def _days_apart(day: date, lidar: str) -> int:
    return abs((day - date.fromisoformat(lidar)).days)


def build_images(spec: ImageSpec) -> Callable[[ImageTask], dict[str, Any]]:
    """What a worker makes of an image and a block of squares: its patches, and their rows of the table."""
    return lambda task: _make_images(spec, task)


def _make_images(spec: ImageSpec, task: ImageTask) -> dict[str, Any]:
    crs = CRS.from_wkt(spec.crs)
    cut = [_Source(product, task.squares, crs, spec.resampling) for product in task.products]
    rows: list[dict[str, Any]] = []
    files: list[str] = []
    left_out: Counter[str] = Counter()
    for square in task.squares:
        grid = square.patch_grid(crs)
        bands, states = cut[0].on(grid)
        for other in cut[1:]:  # the same overflight in several products: what the first lacks, the next may have
            more, its_states = other.on(grid)
            lacking = states == MISSING
            bands, states = np.where(lacking, more, bands), np.where(lacking, its_states, states)
        quality = quality_of(states)
        reason = _reason(quality, spec)
        if reason:
            left_out[reason] += 1
            continue
        first = task.products[0]
        name = f"{first.sensor or 'SENTINEL2'}_{first.date:%Y%m%d}_{square.tile}_{square.name}"
        folder = Path("patches") / square.tile / square.name
        write_tif(Path(spec.out) / folder / f"{name}{MASK_SUFFIX}.tif", codes_of(states)[None], grid, MASK_NODATA)
        write_tif(Path(spec.out) / folder / f"{name}.tif", bands, grid, NODATA, BANDS)
        files += [str(folder / f"{name}{ending}.tif") for ending in (MASK_SUFFIX, "")]
        rows.append(
            {
                "lidarhd_id": square.name,
                "s2_date": first.date.isoformat(),
                "sensor": first.sensor or "SENTINEL2",
                "tile_name": square.tile,
                "image_name": f"{name}.tif",
                "mask_name": f"{name}{MASK_SUFFIX}.tif",
                **quality,
            }
        )
    return {"rows": rows, "files": files, "left_out": dict(left_out)}


class _Source:
    """A product around some squares, read once, to be brought to the grid of each.

    Args:
        product: the product.
        squares: to be covered.
        crs: of the squares.
        resampling: nearest or bilinear, of bands of 20 m to 10 m and of all to the squares' grid.
    """

    def __init__(self, product: Product, squares: Sequence[Square], crs: CRS, resampling: str) -> None:
        edges = np.array([transform_bounds(crs, product.grid.crs, *_bounds(square.patch_grid(crs))) for square in squares])
        to_pixels = ~product.grid.transform
        (left, top), (right, bottom) = (
            to_pixels * (edges[:, 0].min(), edges[:, 3].max()),
            to_pixels
            * (
                edges[:, 2].max(),
                edges[:, 1].min(),
            ),
        )
        first, start = int(np.floor(left)) - MARGIN, int(np.floor(top)) - MARGIN
        window = Window(first, start, int(np.ceil(right)) + MARGIN - first, int(np.ceil(bottom)) + MARGIN - start)
        self.grid, self.resampling = product.grid.part(window), Resampling[resampling]
        self.bands = product.read(window, resampling=resampling)
        self.states = product.states(window)
        self.states[(self.bands == NODATA).any(0)] = MISSING

    def on(self, grid: Grid) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Bands (band, row, column) and states (row, column) on a grid."""
        places: dict[str, Any] = {"src_transform": self.grid.transform, "src_crs": self.grid.crs}
        places |= {"dst_transform": grid.transform, "dst_crs": grid.crs}
        bands = np.full((len(BANDS), grid.height, grid.width), NODATA, np.int16)
        states = np.full((grid.height, grid.width), MISSING, np.uint8)
        reproject(self.bands, bands, **places, src_nodata=NODATA, dst_nodata=NODATA, resampling=self.resampling)
        reproject(self.states, states, **places, src_nodata=MISSING, dst_nodata=MISSING, resampling=Resampling.nearest)
        states[(bands == NODATA).any(0)] = MISSING
        return bands, states


def quality_of(states: NDArray[np.uint8]) -> dict[str, float]:
    """The columns of quality, % of a patch's pixels.

    `masked_pixels` are cloud, its shadow, snow or missing, `ratio_cloud` the same without missing; water is neither.
    """
    missing, cloud = states == MISSING, states == CLOUD
    shares = {"masked_pixels": missing | cloud, "valid_pixels": ~missing, "ratio_cloud": cloud, "ratio_border": missing}
    return {name: share(part) for name, part in shares.items()}


def codes_of(states: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """States in the codes of image masks: 0 clear, 16 water, 15 cloud, 255 missing."""
    codes = np.zeros(states.shape, np.uint8)
    for state, code in ((WATER, WATER_BIT), (CLOUD, CLOUD_BITS), (MISSING, MASK_NODATA)):
        codes[states == state] = code
    return codes


def _reason(quality: Mapping[str, float], spec: ImageSpec) -> str:
    if quality["valid_pixels"] == 0:
        return EMPTY
    if quality["valid_pixels"] < spec.min_valid:
        return CUT
    return CLOUDY if quality["masked_pixels"] > spec.max_masked else ""


def report_images(records: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Say how many images there are and what was left out.

    Raises:
        InputError: no image is left.
    """
    left_out = sum((Counter(record["left_out"]) for record in records), Counter[str]())
    count = sum(len(record["rows"]) for record in records)
    listed = ", ".join(f"{reason} ({number})" for reason, number in sorted(left_out.items()))
    if not count:
        reason = f": {listed}" if listed else f", as none is within {MAX_DAYS_FROM_LIDAR} days of the LiDAR"
        raise InputError(f"no image can be used{reason}")
    say(f"Images: {count}{f'; left out: {listed}' if listed else ''}")


def write_patch_tables(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    contexts: Mapping[tuple[str, str], str],
    heights: Mapping[Square, Mapping[str, Any]],
) -> None:
    """Write each tile's table of images."""
    table = pd.DataFrame([row for record in records for row in record["rows"]])
    of = {(square.tile, square.name): record for square, record in heights.items()}
    keys = list(zip(table["tile_name"], table["lidarhd_id"], strict=True))
    table.insert(1, "context", [contexts[key] for key in keys])
    table.insert(2, "lidar_date", [of[key]["lidar_date"] for key in keys])
    table.insert(3, "lidar_name", [of[key]["lidar_name"] for key in keys])
    for tile, rows in table.groupby("tile_name"):
        rows = rows.sort_values(["lidarhd_id", "s2_date", "image_name"]).reset_index(drop=True)
        rows.insert(0, "index", np.arange(len(rows)))
        with whole_file(out / "patches" / str(tile) / f"{tile}.parquet") as beside:
            rows.to_parquet(beside, index=False)


def angle_tasks(tasks: Sequence[Task], records: Mapping[str, Mapping[str, Any]], crs: str) -> list[Task]:
    """A task for each image and block of squares that has patches."""
    found = []
    for task in tasks:
        names = {row["lidarhd_id"]: row["image_name"] for row in records[task.name]["rows"]}
        squares = tuple(square for square in task.given.squares if square.name in names)
        if squares:
            given = (task.given.products, squares, tuple(names[square.name] for square in squares))
            found.append(Task(task.name, [records[task.name]["identity"], crs], given))
    return found


def build_angles(crs: str) -> Callable[[tuple[tuple[Product, ...], tuple[Square, ...], tuple[str, ...]]], dict[str, Any]]:
    """What a worker makes of an image and squares: rows of the table of angles."""
    return lambda given: {"rows": _angle_rows(CRS.from_wkt(crs), *given)}


def _angle_rows(
    crs: CRS, products: tuple[Product, ...], squares: tuple[Square, ...], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    centres = np.array([(1000.0 * square.east + 500, 1000.0 * square.north - 500) for square in squares])
    angles = products[0].angles(centres, crs)
    for other in products[1:]:
        angles = np.where(np.isnan(angles).any(1, keepdims=True), other.angles(centres, crs), angles)
    return [
        # The published tables have northing and easting this way round.
        {"patch_id": square.name, "image_name": name, "x": centre[1], "y": centre[0]} | dict(zip(ANGLES, row, strict=True))
        for square, name, centre, row in zip(squares, names, centres.tolist(), angles.tolist(), strict=True)
        if np.isfinite(row).all()
    ]


def write_angle_tables(
    out: Path, tasks: Sequence[Task], records: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]
) -> None:
    """Write each tile's table of angles; a tile whose products have none gets no table."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        rows.setdefault(task.given[1][0].tile, []).extend(records[task.name]["rows"])
    for tile, of_tile in rows.items():
        path = out / "angles" / f"{tile}.csv"
        if not of_tile:
            say(f"No product of tile {tile} has sun and view angles: canopy will not use angles")
            path.unlink(missing_ok=True)
            continue
        with whole_file(path) as beside:
            pd.DataFrame(of_tile).sort_values(["patch_id", "image_name"]).to_csv(beside, index=False)
    without = sum(len(task.given[1]) - len(records[task.name]["rows"]) for task in tasks)
    say(f"Angles: of {sum(map(len, rows.values()))} images{f'; without: {without}' if without else ''}")
