"""A year of simulated products of one place, with the files, names and metadata of real ones, but none of their values.

The landscape and what the instrument sees of it are those of `datasets.canopy.demo`: nine of its landscapes side by side,
4.5 km x 4.5 km in Lambert-93, seen on the grid of a tile in UTM. Products are of all the kinds that are read. Beside them
lie the true heights of the canopy and the ground below it, from which other instruments can be simulated.

    products/                       the products: SAFE, Theia, and a STAC catalogue
    heights.tif                     canopy height in decimetres, 1 m
    ground.tif                      number of the ground's material in `datasets.canopy.demo.GROUND`, 2 m
    SIMULATED.txt                   says that nothing here was measured
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date, timedelta
from multiprocessing import get_context
from os import sched_getaffinity
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.warp
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from tqdm import tqdm

from datasets.canopy import demo as canopy
from datasets.canopy.catalogue import BANDS, NODATA, PATCH_SIZE, PIXEL
from datasets.products.demo_safe import write_safe
from datasets.products.demo_stac import write_stac
from datasets.products.demo_theia import write_theia
from datasets.products.product import CLEAR, CLOUD, MISSING, WATER
from utils.rasters import Grid
from utils.simulated import simulated_folder

SIMULATION = 1  # version, part of the folder's name: raise it with every change of the files
ACROSS = 3  # landscapes along a side
SIDE = ACROSS * PATCH_SIZE  # image pixels
CORNER = (639_750, 6_504_250)  # m, easting and northing of the upper-left corner in Lambert-93
LAMBERT_93, UTM = CRS.from_epsg(2154), CRS.from_epsg(32631)
TILE = "31TDL"
DATES = 10
KINDS = 5  # of products: SAFE with an offset, as an archive and as a folder, SAFE without one, Theia, STAC
FINE = round(PIXEL)  # 1 m pixels along an image pixel
FRAME = 4  # image pixels around the place, like those at its edges, so that images are whole on other grids, too
WATER_SHARE = 0.5  # of a pixel, from which it counts as water


class Seen(NamedTuple):
    """A landscape.

    Attributes:
        surfaces: (date, row, column, band), reflectance x 10 000 without atmosphere and noise.
        height: (row, column) of 1 m, decimetres.
        ground: (row, column) of 2 m, numbers of materials.
    """

    surfaces: NDArray[np.float32]
    height: NDArray[np.int16]
    ground: NDArray[np.uint8]


def demo_products(root: Path, seed: int = 2024) -> Path:
    """Simulate the products, completely or not at all, unless they exist; it takes well under a minute.

    There are 10 dates in 2023, of which one or two are overcast, some have broken clouds and one is cut by the edge of the
    orbit.

    Args:
        root: parent of the folder; those of several seeds and versions lie side by side.
        seed: of every random number; the same seed gives the same values.

    Returns:
        The folder.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = root / f"demo_products_v{SIMULATION}_seed{seed}"
    return simulated_folder(folder, lambda beside: _simulate(beside, seed), "products")


def _simulate(folder: Path, seed: int) -> None:
    middle = CORNER[0] // 1000 + SIDE // 200
    whole = canopy.Square(TILE, "", middle, CORNER[1] // 1000, 0, date(canopy.YEAR, 7, 1), ())  # for the orbit's edge
    acquisitions = canopy.draw_acquisitions([whole], (seed, 0), DATES)
    landscapes = list(tqdm(_landscapes(acquisitions, seed), "Simulating landscapes...", ACROSS**2, leave=False))
    ground = _joined([seen.ground for seen in landscapes])
    _write_raster(folder / "heights.tif", _joined([seen.height for seen in landscapes]), 1, canopy.NO_HEIGHT)
    _write_raster(folder / "ground.tif", ground, canopy.CELL, None)
    cells = FINE // canopy.CELL
    water = (ground == canopy.WATER).reshape(SIDE, cells, SIDE, cells).mean((1, 3)) > WATER_SHARE
    rng = np.random.default_rng((seed, canopy.TABLE_STREAM))
    grid = _tile_grid()
    for index, acquisition in enumerate(tqdm(acquisitions, "Writing products...", leave=False)):
        surface = _joined([seen.surfaces[index] for seen in landscapes])
        image, states = _observed(surface, water, acquisition, rng)
        moment = date(canopy.YEAR, 1, 1) + timedelta(days=acquisition.day)
        seen = (*_on_tile(image, states, grid), np.array(acquisition[2:6]))
        _write_product(folder / "products", index, grid, moment, seen, acquisition.sensor)


def _write_product(
    folder: Path,
    index: int,
    grid: Grid,
    moment: date,
    seen: tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]],
    sensor: str,
) -> None:
    """Write an image as a product whose kind depends on its number."""
    kind = index % KINDS
    if kind == 0:
        write_safe(folder, grid, moment, *seen, sensor=sensor, zipped=True)
    elif kind == 1:
        write_safe(folder, grid, moment, *seen, sensor=sensor, baseline="02.14", offset=None)
    elif kind == 2:
        write_theia(folder, grid, moment, *seen, sensor=sensor)
    elif kind == 3:
        write_stac(folder / "catalogue", grid, moment, *seen, sensor=sensor)
    else:
        write_safe(folder, grid, moment, *seen, sensor=sensor)


def _landscapes(acquisitions: list[canopy.Acquisition], seed: int) -> Iterator[Seen]:
    """Draw the landscapes, each with its own seed, row by row."""
    tasks = [(acquisitions, (seed, number)) for number in range(ACROSS**2)]
    processes = min(len(sched_getaffinity(0)), len(tasks))
    if processes == 1:
        yield from map(_draw, tasks)
        return
    # Spawned, since libraries loaded here may have started threads, which do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw, tasks)


def _draw(task: tuple[list[canopy.Acquisition], tuple[int, int]]) -> Seen:
    acquisitions, seed = task
    landscape = canopy.draw_landscape(canopy.WOODED, np.random.default_rng(seed))
    surfaces = np.stack(list(canopy.surfaces_of(landscape, acquisitions)), dtype=np.float32)
    inner = (slice(canopy.FRINGE, -canopy.FRINGE),) * 2
    height = np.rint(10 * landscape.height[inner]).astype(np.int16)
    inner = (slice(canopy.FRINGE // canopy.CELL, -canopy.FRINGE // canopy.CELL),) * 2
    return Seen(surfaces, height, landscape.ground[inner].astype(np.uint8))


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Arrays (row, column, ...) of the landscapes as one of the place."""
    rows = [np.concatenate(parts[first : first + ACROSS], axis=1) for first in range(0, ACROSS**2, ACROSS)]
    return np.concatenate(rows)


def _observed(
    surface: NDArray[np.float32], water: NDArray[np.bool_], acquisition: canopy.Acquisition, rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """An image of the place and its states, on the grid of the landscapes."""
    offset = (np.arange(SIDE) + 0.5) * PIXEL / 1000
    east, north = CORNER[0] / 1000 + offset, CORNER[1] / 1000 - offset
    azimuth = np.deg2rad(acquisition.sun_azimuth)
    away = canopy.CLOUD_BASE * np.tan(np.deg2rad(acquisition.sun_zenith))
    sky = canopy.Sky(
        canopy.cloud_opacity(acquisition, east, north),
        canopy.cloud_opacity(acquisition, east + away * np.sin(azimuth), north + away * np.cos(azimuth)),
        east > (acquisition.last_easting + canopy.TRACK_SLOPE * (north - CORNER[1] / 1000))[:, None],
    )
    image = canopy.observe(surface.astype(np.float64), sky, acquisition, rng)
    states = np.where(water, WATER, CLEAR)
    states[(sky.cloud > canopy.DETECTED) | (sky.shadow > canopy.DETECTED)] = CLOUD
    states[sky.outside] = MISSING
    return image, states.astype(np.uint8)


def _tile_grid() -> Grid:
    """A part of the tile that holds the place, of whole pixels of 20 m."""
    left, bottom = CORNER[0] - FRAME * PIXEL, CORNER[1] - (SIDE + FRAME) * PIXEL
    side = (SIDE + 2 * FRAME) * PIXEL
    bounds = rasterio.warp.transform_bounds(LAMBERT_93, UTM, left, bottom, left + side, bottom + side, densify_pts=21)
    left, bottom, right, top = (round(part / 20) * 20 for part in bounds)
    return Grid(UTM, Affine(PIXEL, 0, left, 0, -PIXEL, top), int((top - bottom) / PIXEL), int((right - left) / PIXEL))


def _on_tile(image: NDArray[np.int16], states: NDArray[np.uint8], grid: Grid) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """An image and its states on the grid of the tile."""
    image = np.pad(image, ((0, 0), (FRAME, FRAME), (FRAME, FRAME)), mode="edge")
    states = np.pad(states, FRAME, mode="edge")
    corner = Affine(PIXEL, 0, CORNER[0] - FRAME * PIXEL, 0, -PIXEL, CORNER[1] + FRAME * PIXEL)
    source: dict[str, Any] = {"src_transform": corner, "src_crs": LAMBERT_93}
    target: dict[str, Any] = {"dst_transform": grid.transform, "dst_crs": grid.crs}
    warped = np.full((len(BANDS), grid.height, grid.width), NODATA, np.int16)
    nodata: dict[str, Any] = {"src_nodata": NODATA, "dst_nodata": NODATA, "resampling": rasterio.warp.Resampling.bilinear}
    rasterio.warp.reproject(image, warped, **source, **target, **nodata)
    seen = np.full((grid.height, grid.width), MISSING, np.uint8)
    rasterio.warp.reproject(states, seen, **source, **target, src_nodata=MISSING, dst_nodata=MISSING)
    seen[(warped == NODATA).any(0)] = MISSING
    return warped, seen


def _write_raster(path: Path, values: NDArray[Any], pixel: int, nodata: int | None) -> None:
    """Write values on the grid of the landscapes as a GeoTIFF."""
    place = {"crs": LAMBERT_93, "transform": Affine(pixel, 0, CORNER[0], 0, -pixel, CORNER[1])}
    size = {"count": 1, "height": values.shape[0], "width": values.shape[1], "dtype": values.dtype, "nodata": nodata}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", predictor=2, tiled=True, **size, **place) as raster:
        raster.write(values, 1)
