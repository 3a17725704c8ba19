"""From the points of a 1 km square to a raster of canopy heights: ground, height above it, a percentile for each cell.

1. Ground. Of each square metre that has ground points, the one of median height is kept. They are triangulated (Delaunay) in
   fixed blocks with a buffer, and the surface is computed at nodes 1 m apart; nodes outside of the triangles take the
   height of the nearest node within, if it is near. A terrain model can take the place of this.
2. Height above ground of vegetation returns, bilinear between the nodes. Below the ground counts as 0.
3. Outliers. Returns above `max_height` and returns with hardly another one within the 27 voxels of 5 m around them are left
   out.
4. The percentile of each cell's vegetation returns, linear between neighbouring ranks (Hyndman and Fan 1996, type 7; that of
   NumPy). Cells with returns, but none of vegetation, are 0; cells without any, and those whose ground is unknown, are -1.

Coordinates are whole millimetres and everything is sorted before it is used: the result depends neither on the order of
the points nor on how they are distributed over files.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import Delaunay, QhullError

from datasets.products.point_clouds import GROUND, NOISE, Points
from utils.errors import InputError

SIDE = 1000  # m, of a square
BUFFER = 50  # m around a square and its blocks, from which ground points are taken too
BLOCK = 500  # m, side of the blocks that are triangulated at once
NODE = 1.0  # m between the nodes of the terrain
NODES = round(SIDE / NODE) + 1
NO_RETURN = -1
BATCH = 4_000_000  # nodes that triangles are tried on at once
EDGE = 1e-9  # by which a node may lie outside of a triangle and still be filled
NEAR = 50.0  # m, to the nearest node within the triangles of one outside
VOXEL = 5  # m
FEWEST_NEIGHBOURS = 2  # a return with fewer within its 27 voxels is an outlier
COVERAGE_BLOCK = 50  # m, side of the blocks by which it is told whether points cover a square
MM = 1000
MM_PER_DM = 100
Z_BITS = 22  # heights of a square's ground span less than 4194 m

Floats = NDArray[np.float64]


class Cloud(NamedTuple):
    """The points of a square that its heights are made from.

    Attributes:
        returned: (row, column) bool, cells with a return.
        covered: share of the square's 50 m blocks with a return.
        ground: (point, 3) int32: mm east of the buffered square's left edge, south of its upper one, and up.
        vegetation: (point, 3) int32, the same of vegetation, of the square alone, from its own edges.
        points: number of the square's points without noise.
    """

    returned: NDArray[np.bool_]
    covered: float
    ground: NDArray[np.int32]
    vegetation: NDArray[np.int32]
    points: int


def sort_points(parts: Iterable[Points], resolution: float, vegetation_classes: tuple[int, ...]) -> Cloud:
    """Sort the points of a buffered square into ground and vegetation.

    Args:
        parts: of the square and `BUFFER` m around it, relative to the buffered square's upper-left corner.
        resolution: pixel size of the heights (m).
        vegetation_classes: ASPRS classes that count as vegetation.
    """
    cell, cells = round(MM * resolution), round(SIDE / resolution)
    edge, blocks = BUFFER * MM, SIDE // COVERAGE_BLOCK
    returned = np.zeros((cells, cells), bool)
    covered = np.zeros((blocks, blocks), bool)
    grounds, plants, count = [np.empty((0, 3), np.int32)], [np.empty((0, 3), np.int32)], 0
    for part in parts:
        kept = ~np.isin(part.classes, NOISE)
        ground = kept & (part.classes == GROUND)
        grounds.append(np.stack([part.east[ground], part.south[ground], part.up[ground]], axis=1))
        east, south = part.east - edge, part.south - edge
        kept &= (east >= 0) & (east < SIDE * MM) & (south >= 0) & (south < SIDE * MM)
        count += int(kept.sum())
        returned[south[kept] // cell, east[kept] // cell] = True
        covered[south[kept] // (COVERAGE_BLOCK * MM), east[kept] // (COVERAGE_BLOCK * MM)] = True
        kept &= np.isin(part.classes, vegetation_classes)
        plants.append(np.stack([east[kept], south[kept], part.up[kept]], axis=1))
    return Cloud(returned, float(covered.mean()), np.concatenate(grounds), np.concatenate(plants), count)


def thinned(ground: NDArray[np.int32]) -> Floats:
    """The ground point of median height of each square metre, in a fixed order.

    Args:
        ground: of `Cloud`.

    Returns:
        (point, 3) m: east and south of the square's upper-left corner, up.

    Raises:
        InputError: the heights of the ground span more than 4 km.
    """
    if len(ground) == 0:
        return np.empty((0, 3))
    lowest = int(ground[:, 2].min())
    if int(ground[:, 2].max()) - lowest >= 2**Z_BITS:
        raise InputError(
            f"the ground points lie {lowest / MM:.0f} to {ground[:, 2].max() / MM:.0f} m high: some are no ground"
        )
    side = SIDE + 2 * BUFFER
    east, south, up = ground.astype(np.int64).T
    # Cell, height and place within the cell in one number each, for sorting by one after the other.
    key = (((south // MM * side + east // MM) << Z_BITS | up - lowest) * MM + south % MM) * MM + east % MM
    key.sort()
    key, inner = np.divmod(key, MM * MM)
    cells, first, count = np.unique(key >> Z_BITS, return_index=True, return_counts=True)
    middle = first + (count - 1) // 2
    south, east = np.divmod(inner[middle], MM)
    east, south = cells % side * MM + east, cells // side * MM + south
    up = (key[middle] & (2**Z_BITS - 1)) + lowest
    return np.stack([east - BUFFER * MM, south - BUFFER * MM, up], axis=1) / MM


def triangulated(ground: Floats) -> Floats:
    """The terrain at the nodes of a square: (row, column) m, nan where there is no ground nearby.

    Args:
        ground: (point, 3) of `thinned`.
    """
    terrain = np.full((NODES, NODES), np.nan)
    if len(ground) == 0:
        return terrain
    per_block = round(BLOCK / NODE)
    for row in range(0, SIDE, BLOCK):
        for column in range(0, SIDE, BLOCK):
            near = np.abs(ground[:, :2] - (column + BLOCK / 2, row + BLOCK / 2)).max(axis=1) <= BLOCK / 2 + BUFFER
            place = tuple(slice(round(start / NODE), round(start / NODE) + per_block + 1) for start in (row, column))
            terrain[place] = _block_terrain(ground[near] - (column, row, 0), per_block + 1)
    missing = np.isnan(terrain)
    if missing.any() and not missing.all():
        distance, nearest = ndimage.distance_transform_edt(missing, NODE, return_indices=True)
        terrain = np.where(distance <= NEAR, terrain[tuple(nearest)], np.nan)
    return terrain


def _block_terrain(ground: Floats, nodes: int) -> Floats:
    """The triangulated surface at the nodes of a block, nan outside of the triangles.

    SciPy's own interpolation walks from triangle to triangle; among points on a fine grid, as coordinates in centimetres
    are, it gets lost and then looks through all of them. Here each triangle fills the nodes that it holds.
    """
    terrain = np.full((nodes, nodes), np.nan)
    try:
        triangles = Delaunay(ground[:, :2] - BLOCK / 2).simplices
    except (QhullError, ValueError):  # fewer than three points, or all in a line
        return terrain
    corners, heights = ground[triangles][:, :, :2] / NODE, ground[triangles][:, :, 2]
    first = np.maximum(np.ceil(corners.min(axis=1)), 0).astype(np.int64)
    last = np.minimum(np.floor(corners.max(axis=1)), nodes - 1).astype(np.int64)
    size = np.maximum(last - first + 1, 0)
    total = np.cumsum(size.prod(axis=1))
    cuts = np.searchsorted(total, np.arange(BATCH, total[-1], BATCH))
    for batch in np.split(np.arange(len(total)), np.unique(cuts)):
        _fill(terrain, corners[batch], heights[batch], first[batch], size[batch])
    return terrain


def _fill(terrain: Floats, corners: Floats, heights: Floats, first: NDArray[np.int64], size: NDArray[np.int64]) -> None:
    """Fill the nodes within triangles, in place.

    Args:
        terrain: (row, column).
        corners: (triangle, 3, 2), column and row.
        heights: (triangle, 3) m.
        first: (triangle, 2), first column and row of the rectangle around each.
        size: (triangle, 2), columns and rows of it.
    """
    count = size.prod(axis=1)
    triangle = np.repeat(np.arange(len(count)), count)
    rank = np.arange(len(triangle)) - np.repeat(np.cumsum(count) - count, count)
    row, column = np.divmod(rank, size[triangle, 0])
    row, column = row + first[triangle, 1], column + first[triangle, 0]
    one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
    with np.errstate(divide="ignore"):
        one, two = (np.where(area[:, None] == 0, np.nan, side / area[:, None]) for side in (one, two))
    east, south = column - corners[triangle, 0, 0], row - corners[triangle, 0, 1]
    # The weights of the second and the third corner.
    second = east * two[triangle, 1] - south * two[triangle, 0]
    third = south * one[triangle, 0] - east * one[triangle, 1]
    inside = (second >= -EDGE) & (third >= -EDGE) & (second + third <= 1 + EDGE)
    triangle, second, third = triangle[inside], second[inside], third[inside]
    base = heights[triangle, 0]
    values = base + second * (heights[triangle, 1] - base) + third * (heights[triangle, 2] - base)
    terrain[row[inside], column[inside]] = values


def above_ground(points: NDArray[np.int32], terrain: Floats) -> NDArray[np.int64]:
    """Heights above ground in mm, 0 below it, `NO_RETURN` where the ground is unknown: (point,).

    Args:
        points: (point, 3) mm from the square's upper-left corner, up.
        terrain: at the nodes of the square (m).
    """
    places = points[:, 1::-1].T / (NODE * MM)
    ground = ndimage.map_coordinates(terrain, places, order=1, mode="nearest", prefilter=False)
    height = np.maximum(np.rint(points[:, 2] - MM * ground), 0)
    return np.where(np.isnan(height), NO_RETURN, height).astype(np.int64)


def isolated(points: NDArray[np.int32], height: NDArray[np.int64], returned: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which returns have hardly another one around them: (point,).

    Args:
        points: (point, 3) mm from the square's upper-left corner.
        height: (point,) mm above ground, at least 0.
        returned: (row, column) cells with a return; those count near the ground, of whatever class they are.
    """
    voxel, side = VOXEL * MM, SIDE // VOXEL
    level = height // voxel
    shape = (side, side, int(level.max(initial=0)) + 1)
    place = (points[:, 1] // voxel * side + points[:, 0] // voxel).astype(np.int64) * shape[2] + level
    counts = np.bincount(place, minlength=side * side * shape[2]).reshape(shape)
    if len(returned) >= side:
        around = returned.reshape(side, len(returned) // side, side, -1).sum((1, 3))
    else:
        around = returned.repeat(side // len(returned), 0).repeat(side // len(returned), 1)
    counts[:, :, 0] = np.maximum(counts[:, :, 0], around)
    total = counts
    for axis in range(3):
        total = ndimage.correlate1d(total, np.ones(3, np.int64), axis=axis, mode="constant")
    return np.asarray(total.ravel()[place] - 1 < FEWEST_NEIGHBOURS)


def cell_percentile(cell: NDArray[np.int64], values: NDArray[np.int64], cells: int, percentile: float) -> Floats:
    """A percentile of the values of each cell, nan where a cell has none: (cell,).

    Args:
        cell: (value,) number of each value's cell.
        values: (value,) from 0 to 2^32 - 1.
        cells: their number.
        percentile: 0 to 100.
    """
    key = np.sort(cell << 32 | values)
    ranked = key & (2**32 - 1)
    count = np.bincount(cell, minlength=cells)
    filled = count > 0
    end = np.cumsum(count)[filled]
    place = end - count[filled] + (count[filled] - 1) * (percentile / 100)
    below = np.floor(place).astype(np.int64)
    low, high = ranked[below], ranked[np.minimum(below + 1, end - 1)]
    result = np.full(cells, np.nan)
    result[filled] = low + (place - below) * (high - low)
    return result


def height_raster(
    cloud: Cloud, terrain: Floats, resolution: float, percentile: float, max_height: float
) -> tuple[NDArray[np.int16], dict[str, int]]:
    """Heights of a square.

    Args:
        cloud: its points.
        terrain: at its nodes (m).
        resolution: pixel size (m).
        percentile: of the heights of vegetation returns in a cell.
        max_height: m, above which returns are outliers.

    Returns:
        (row, column) dm, 0 where there are returns, but none of vegetation, `NO_RETURN` where there is none or the ground
        is unknown; and the numbers of returns of vegetation, of outliers among them, and of those without ground.
    """
    cells = cloud.returned.shape[0]
    height = above_ground(cloud.vegetation, terrain)
    grounded = height >= 0
    outliers = grounded & (height > max_height * MM)
    kept = grounded & ~outliers
    lonely = isolated(cloud.vegetation[kept], height[kept], cloud.returned)
    kept[np.flatnonzero(kept)[lonely]] = False
    pixel = round(MM * resolution)
    number = (cloud.vegetation[:, 1] // pixel * cells + cloud.vegetation[:, 0] // pixel).astype(np.int64)
    found = cell_percentile(number[kept], height[kept], cells * cells, percentile).reshape(cells, cells)
    raster = np.where(cloud.returned, 0, NO_RETURN)
    unknown = np.bincount(number[~grounded], minlength=cells * cells).reshape(cells, cells) > 0
    raster = np.where(unknown, NO_RETURN, raster)
    raster = np.where(np.isnan(found), raster, np.rint(np.nan_to_num(found) / MM_PER_DM))
    counts = {"vegetation": len(height), "outliers": int((grounded & ~kept).sum()), "without_ground": int((~grounded).sum())}
    return raster.astype(np.int16), counts
