"""Sun and view angles from the metadata of a tile: grids with a node every 5 km, as ESA and Theia write them.

View angles come for each band and detector. Detectors are merged, the first one with a value at a node first; bands are
averaged, azimuths as vectors; nodes beyond the orbit take the nearest node's. A point has the angles of the upper-left node
of the cell that holds it, to 0.1 degree, which is how the published angles of THREASURE-Net were made, but for their
azimuths (averaged as numbers across 0/360) and their places (the grid's axes carried to another projection one by one).
"""

from collections.abc import Iterable
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
import rasterio.warp
from numpy.typing import NDArray
from rasterio.crs import CRS
from scipy import ndimage

from datasets.products.packages import number_of
from utils.errors import InputError

Reals = NDArray[np.float64]


class AngleGrids(NamedTuple):
    """Angles at the nodes of a grid.

    Attributes:
        crs: of the tile.
        corner: easting and northing of the first node, the tile's upper-left corner.
        step: metres between columns and between rows.
        values: (4, row, column), sun zenith, sun azimuth, view zenith, view azimuth in degrees.
    """

    crs: CRS
    corner: tuple[float, float]
    step: tuple[float, float]
    values: Reals

    def at(self, points: Reals, crs: CRS) -> Reals:
        """Angles of points (point, 2) of a coordinate system: (point, 4) degrees to 0.1, NaN outside the grid."""
        eastings, northings = rasterio.warp.transform(crs, self.crs, points[:, 0].tolist(), points[:, 1].tolist())
        with np.errstate(invalid="ignore"):
            columns = np.floor((np.asarray(eastings) - self.corner[0]) / self.step[0])
            rows = np.floor((self.corner[1] - np.asarray(northings)) / self.step[1])
        inside = (rows >= 0) & (rows < self.values.shape[1]) & (columns >= 0) & (columns < self.values.shape[2])
        result = np.full((len(points), 4), np.nan)
        found = self.values[:, rows[inside].astype(int), columns[inside].astype(int)].T.round(1)
        found[:, [1, 3]] %= 360
        result[inside] = found
        return result


def esa_angles(root: Element, crs: CRS, corner: tuple[float, float], path: str) -> AngleGrids:
    """Angles from MTD_TL.xml of ESA.

    Raises:
        InputError: the grids are missing or incomplete.
    """
    views = [(grids.get("bandId", ""), grids) for grids in root.iterfind(".//Viewing_Incidence_Angles_Grids")]
    return _grids(root.find(".//Sun_Angles_Grid"), views, crs, corner, path)


def theia_angles(root: Element, crs: CRS, corner: tuple[float, float], path: str) -> AngleGrids:
    """Angles from *_MTD_ALL.xml of Theia and MAJA.

    Raises:
        InputError: the grids are missing or incomplete.
    """
    bands = root.iterfind(".//Band_Viewing_Incidence_Angles_Grids_List")
    views = [(band.get("band_id", ""), grids) for band in bands for grids in band.iterfind("Viewing_Incidence_Angles_Grids")]
    return _grids(root.find(".//Sun_Angles_Grids"), views, crs, corner, path)


def _grids(
    sun: Element | None, views: Iterable[tuple[str, Element]], crs: CRS, corner: tuple[float, float], path: str
) -> AngleGrids:
    if sun is None:
        raise InputError(f"{path} has no grid of sun angles")
    sun_angles = _pair(sun, path)
    by_band: dict[str, Reals] = {}
    for band, grids in views:
        angles = _pair(grids, path)
        if angles.shape != sun_angles.shape:
            raise InputError(
                f"{path}: the grids of sun and view angles have {sun_angles.shape[1:]} and {angles.shape[1:]} nodes"
            )
        before = by_band.setdefault(band, angles)
        by_band[band] = np.where(np.isnan(before), angles, before)
    if not by_band:
        raise InputError(f"{path} has no grid of view angles")
    values = np.concatenate([sun_angles, mean_over_bands(np.stack(list(by_band.values())))])
    step = number_of(sun, "COL_STEP", path), number_of(sun, "ROW_STEP", path)
    return AngleGrids(crs, corner, step, np.stack([filled(part) for part in values]))


def mean_over_bands(angles: Reals) -> Reals:
    """Mean zenith and azimuth, (2, row, column), of bands (band, 2, row, column); NaN where no band has a value."""
    counted = ~np.isnan(angles[:, 0]) & ~np.isnan(angles[:, 1])
    count = np.where(counted.any(0), counted.sum(0), np.nan)
    zenith = np.where(counted, angles[:, 0], 0).sum(0) / count
    azimuths = np.radians(np.where(counted, angles[:, 1], 0))
    east, north = ((part(azimuths) * counted).sum(0) / count for part in (np.sin, np.cos))
    return np.stack([zenith, np.degrees(np.arctan2(east, north)) % 360])


def filled(grid: Reals) -> Reals:
    """A grid whose NaN have the nearest node's value; all NaN stay where there is no other."""
    missing = np.isnan(grid)
    if missing.all():
        return grid
    nearest = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
    return np.asarray(grid[tuple(nearest)])


def _pair(grids: Element, path: str) -> Reals:
    """Zenith and azimuth, (2, row, column)."""
    pair = []
    for name in ("Zenith", "Azimuth"):
        rows = [(row.text or "").split() for row in grids.iterfind(f"{name}/Values_List/VALUES")]
        try:
            pair.append(np.array(rows, dtype=np.float64))
        except ValueError:
            raise InputError(f"{path}: a grid of angles has rows of several lengths or not only numbers") from None
    if pair[0].shape != pair[1].shape or pair[0].ndim != 2 or not pair[0].size:
        raise InputError(f"{path}: a grid of angles is empty, or zeniths and azimuths have different sizes")
    return np.stack(pair)
