"""Point clouds for tests: forest on a slope, and a COPC file of one node."""

import struct
from pathlib import Path

import laspy
import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from datasets.canopy.inputs_demo import write_laz

LAMBERT = CRS.from_epsg(2154)
GROUND, TREE = 2, 5


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Height of an inclined plane."""
    return 200 + 0.1 * (x - 640_000) - 0.05 * (y - 6_504_000)


def forest(left: float, top: float, side: float, points: int, seed: int) -> NDArray[np.float64]:
    """Points (x, y, z, class), half of them ground, half of trees 20 m high in the west, none in the east."""
    rng = np.random.default_rng(seed)
    x, y = left + side * rng.random(points), top - side * rng.random(points)
    tree = (rng.random(points) < 0.5) & (x < left + 0.7 * side)
    above = np.where(tree, 20 * rng.random(points) ** 0.2, 0)
    return np.round(np.stack([x, y, slope(x, y) + above, np.where(tree, TREE, GROUND)], axis=1), 2)


def write_copc(path: Path, points: NDArray[np.float64], crs: CRS = LAMBERT) -> None:
    """Write a COPC 1.0 file whose octree has its root alone; fewer points than a chunk of LAZ has."""
    assert len(points) < 50_000
    plain = path.with_name("plain.laz")
    write_laz(plain, points, crs)
    cloud = laspy.read(plain)
    cloud.header.vlrs.insert(0, laspy.VLR("copc", 1, "", bytes(160)))
    cloud.evlrs = laspy.vlrs.vlrlist.VLRList([laspy.VLR("copc", 1000, "", bytes(32))])
    cloud.write(path)
    plain.unlink()
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 96)
    (table,) = struct.unpack_from("<q", content, start)
    (evlr,) = struct.unpack_from("<Q", content, 235)
    low, high = points[:, :3].min(0), points[:, :3].max(0)
    root = (*(low + high) / 2, float((high - low).max() / 2 + 1), 1.0, evlr + 60, 32, 0.0, 0.0)
    struct.pack_into("<5dQQ2d", content, 375 + 54, *root)
    struct.pack_into("<4iQii", content, evlr + 60, 0, 0, 0, 0, start + 8, table - start - 8, len(points))
    path.write_bytes(content)
