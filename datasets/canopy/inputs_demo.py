"""A simulated point cloud of the place of `datasets.products.demo`: what an airborne laser scanner would see of it.

The ground undulates by tens of metres. Every square metre of canopy has a return near its top, at the simulated 95th
percentile, and some have another one below; half of the open square metres have a return of the ground, water has few. A few
returns are noise, unclassified or hang in the air. One LAZ file (LAS 1.4, point format 6) for each km.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import rasterio
from laspy.vlrs.known import WktCoordinateSystemVlr
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.windows import from_bounds
from tqdm import tqdm

from datasets.canopy.demo import CELL, WATER
from datasets.products.point_clouds import GPS_EPOCH, GPS_OFFSET, GROUND, UNCLASSIFIED, VEGETATION
from datasets.products.point_clouds import WATER as WATER_CLASS
from utils.simulated import simulated_folder

SIMULATION = 1  # version, part of the folder's name: raise it with every change of the files
KM = 1000
FLIGHT = datetime(2023, 6, 13, 10, tzinfo=UTC)
GROUND_SHARE, UNDER_CANOPY, WATER_SHARE = 0.5, 0.08, 0.02  # of square metres with a return of the ground, of water
SECOND = 0.2  # share of square metres of canopy with a lower return
LOW, MEDIUM = 5, 15  # dm, upper limits of low and of medium vegetation
BIRDS = 55.0  # m above the ground
STRAY = 1e-5  # share of square metres with a return that is noise, unclassified or in the air


def demo_cloud(place: Path, root: Path, seed: int = 2024) -> Path:
    """Simulate the cloud, completely or not at all, unless it exists.

    Args:
        place: of `datasets.products.demo.demo_products`, with heights.tif and ground.tif.
        root: parent of the folder.
        seed: of every random number.

    Returns:
        The folder of LAZ files.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = root / f"demo_cloud_v{SIMULATION}_seed{seed}"
    return simulated_folder(folder, lambda beside: _simulate(place, beside, seed), "points")


def _simulate(place: Path, folder: Path, seed: int) -> None:
    """Write a file for each km whose images lie in the place."""
    with rasterio.open(place / "heights.tif") as heights, rasterio.open(place / "ground.tif") as ground:
        left, bottom, right, top = heights.bounds
        columns, rows = range(int(left // KM) + 1, int(right // KM)), range(int(bottom // KM) + 2, int(top // KM) + 1)
        squares = [(east, north) for north in rows for east in columns]
        for number, (east, north) in enumerate(tqdm(squares, "Simulating points...", leave=False)):
            bounds = (KM * east, KM * (north - 1), KM * (east + 1), KM * north)
            height = heights.read(1, window=from_bounds(*bounds, heights.transform))
            water = ground.read(1, window=from_bounds(*bounds, ground.transform)) == WATER
            rng = np.random.default_rng((seed, number))
            points = simulated_points(height, water.repeat(CELL, 0).repeat(CELL, 1), bounds[0], bounds[3], rng)
            write_laz(folder / f"SIMULATED_{east:04d}_{north:04d}.laz", points, CRS.from_epsg(2154))


def terrain_at(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Height of the ground (m) at easting and northing."""
    return 640.0 + 25.0 * np.sin(x / 410.0) * np.cos(y / 530.0) + 3.0 * np.sin((x + y) / 60.0)


def simulated_points(
    height: NDArray[np.int16], water: NDArray[np.bool_], left: float, top: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Points of a square.

    Args:
        height: (row, column) of 1 m, dm.
        water: (row, column).
        left: easting of the upper-left corner.
        top: its northing.
        rng: of all draws.

    Returns:
        (point, 4): x, y, z in metres, ASPRS class.
    """
    draw = rng.random(height.shape, dtype=np.float32)
    canopy, open_land = height > 0, (height <= 0) & ~water
    stray = rng.random(height.shape, dtype=np.float32) < STRAY
    second = canopy & (draw < SECOND)
    below = np.where(canopy, draw < UNDER_CANOPY, draw < GROUND_SHARE) & ~water
    parts = []
    for where, share, kind in (
        (canopy, 1.0, None),
        (second, 0.6, None),
        (below, 0.0, GROUND),
        (water & (draw < WATER_SHARE), 0.0, WATER_CLASS),
        (stray & canopy, 0.3, 7),
        (stray & open_land, 0.0, UNCLASSIFIED),
    ):
        row, column = np.nonzero(where)
        x, y = left + column + rng.random(row.size), top - row - rng.random(row.size)
        above = share * height[row, column].clip(0) / 10
        vegetation = np.select([10 * above < LOW, 10 * above < MEDIUM], VEGETATION[:2], VEGETATION[2])
        classes = vegetation if kind is None else np.full(row.size, kind)
        parts.append(np.stack([x, y, terrain_at(x, y) + above, classes], axis=1))
    birds = parts[-1].copy()
    birds[:, 2] += BIRDS
    birds[:, 3] = 5
    return np.concatenate([*parts, birds])


def write_laz(path: Path, points: NDArray[np.float64], crs: CRS | None, **options: Any) -> None:
    """Write points as a LAS or LAZ file of version 1.4.

    Args:
        path: of the file.
        points: (point, 4): x, y, z, ASPRS class.
        crs: written as WKT; None: none.
        options: `scale` (m), `withheld` (point,), `day` (datetime) of the flight.
    """
    header = laspy.LasHeader(version="1.4", point_format=6)
    header.scales = np.full(3, options.get("scale", 0.01))
    header.offsets = np.floor(points[:, :3].min(axis=0)) if len(points) else np.zeros(3)
    if crs is not None:
        header.vlrs.append(WktCoordinateSystemVlr(crs.to_wkt("WKT1_GDAL")))
        header.global_encoding.wkt = True
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = points[:, :3].T
    cloud.classification = points[:, 3].astype(np.uint8)
    day = options.get("day", FLIGHT)
    cloud.gps_time = np.full(len(points), (day - GPS_EPOCH).total_seconds() - GPS_OFFSET)
    if "withheld" in options:
        cloud.withheld = options["withheld"]
    cloud.write(path)
