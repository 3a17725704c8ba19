"""A Sentinel-2 image of one tile and date, read in the same way whatever it came as.

Reflectances are x 10 000 with the product's own offset applied, states say what a pixel shows, angles are those of the
nearest upper-left node of the product's 5 km grid. `datasets.products` finds products; its other modules know one kind each.
"""

import contextlib
import datetime
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from datasets.canopy.catalogue import BANDS, NODATA, PIXEL
from utils.errors import InputError
from utils.rasters import Grid

CLEAR, WATER, CLOUD, MISSING = range(4)
"""What a pixel shows: clear land, clear water, cloud (also its shadow, and snow), nothing."""
RESAMPLINGS = ("nearest", "bilinear")
"""How bands of 20 m are brought to 10 m."""

REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_CONNECTTIMEOUT": 20,
    "GDAL_HTTP_TIMEOUT": 120,
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 2,
}
"""GDAL's settings for files on other machines: no listing of folders, patience, several tries."""


class Band(NamedTuple):
    """Where a band is and what its numbers mean: reflectance x 10 000 = number x gain + add.

    Attributes:
        path: as rasterio opens it.
        number: of the band in the file, from 1.
        gain: reflectance x 10 000 a unit.
        add: reflectance x 10 000 at 0.
        nodata: the number of pixels without data, or None.
        factor: 10 m pixels along one of the band's.
    """

    path: str
    number: int = 1
    gain: float = 1.0
    add: float = 0.0
    nodata: float | None = None
    factor: int = 1


@dataclass(frozen=True, kw_only=True)
class Product(ABC):
    """An image of one tile and date; small, hashable, and made to travel between processes.

    Attributes:
        name: folder, archive, file or item as its user knows it.
        path: where it is.
        date: of sensing, UTC.
        tile: of the military grid, as 31TDL; empty if nothing says.
        sensor: as SENTINEL2A; empty if nothing says.
        grid: of its 10 m pixels.
        bands: in the order of `BANDS`.
        files: whose sizes and times of change tell one version of the product from another.
        block: rows of the blocks that its 10 m bands are compressed in.
        baseline: of the processing, as 05.09; empty if nothing says.
        sensed: date and time of sensing, by which versions of the same image are recognised.
        masked: whether it says where clouds are.
    """

    name: str
    path: str
    date: datetime.date
    tile: str
    sensor: str
    grid: Grid
    bands: tuple[Band, ...]
    files: tuple[str, ...]
    block: int
    baseline: str = ""
    sensed: str = ""
    masked: bool = True

    def read(self, window: Window, bands: Sequence[str] = BANDS, resampling: str = "nearest") -> NDArray[np.int16]:
        """Reflectance x 10 000 with the offset applied.

        Files are compressed in blocks of up to 1024 x 1024 pixels, and each call decodes all blocks that it touches: few
        large windows are read many times faster than many small ones.

        Args:
            window: of the 10 m grid; beyond its edges there is `NODATA`.
            bands: names, of `BANDS`.
            resampling: nearest or bilinear, of the bands of 20 m.

        Returns:
            (band, row, column), `NODATA` where a band has none.

        Raises:
            InputError: a file cannot be read.
        """
        wanted = [self.bands[BANDS.index(name)] for name in bands]
        result = np.full((len(wanted), window.height, window.width), NODATA, np.int16)
        places = sorted(range(len(wanted)), key=lambda place: wanted[place].path)
        for path, group in groupby(places, key=lambda place: wanted[place].path):
            of_file = list(group)
            factor = wanted[of_file[0]].factor
            bilinear = resampling == "bilinear" and factor > 1
            numbers = [wanted[place].number for place in of_file]
            with open_raster(path, self.name) as raster:
                values, placed = read_around(raster, numbers, window, factor, margin=int(bilinear))
            for place, part in zip(of_file, values, strict=True):
                reflectance = to_reflectance(part, wanted[place])
                fine = _bilinear(reflectance, factor) if bilinear else repeated(reflectance, factor)
                result[place][placed.target] = fine[placed.source]
        return result

    @abstractmethod
    def states(self, window: Window) -> NDArray[np.uint8]:
        """CLEAR, WATER, CLOUD or MISSING of each 10 m pixel, (row, column); MISSING beyond the grid."""

    @abstractmethod
    def angles(self, points: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:
        """Sun and view angles.

        Args:
            points: (point, 2), easting and northing.
            crs: of the points.

        Returns:
            (point, 4): sun zenith, sun azimuth, view zenith, view azimuth in degrees, to 0.1; NaN where there are none.
        """


class Placed(NamedTuple):
    """Where what was read goes: slices of the pixels that were read, and of the window."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]


@contextlib.contextmanager
def open_raster(path: str, product: str) -> Iterator[DatasetReader]:
    """Open a file of a product for reading.

    Raises:
        InputError: it cannot be opened, or not be read within the block.
    """
    remote = rasterio.Env(**REMOTE) if "://" in path else contextlib.nullcontext()
    try:
        with remote, rasterio.open(path, sharing=False) as raster:
            yield raster
    except RasterioError as error:
        raise InputError(f"{path} of {product} cannot be read, it may be missing or truncated: {_line(error)}") from error


def read_around(
    raster: DatasetReader, numbers: list[int], window: Window, factor: int, margin: int = 0
) -> tuple[NDArray[Any], Placed]:
    """Numbers of a file that cover a window of 10 m pixels, as far as the file reaches.

    Args:
        raster: the file.
        numbers: of the bands.
        window: of 10 m pixels.
        factor: 10 m pixels along one of the file's.
        margin: pixels of the file to read beyond the window.

    Returns:
        What is read, (band, row, column), and which of their pixels, each repeated `factor` x `factor` times, go where.
    """
    axes = []
    for start, length, size in (
        (window.row_off, window.height, raster.height),
        (window.col_off, window.width, raster.width),
    ):
        first, last = max(start, 0), min(start + length, size * factor)
        low, high = max(0, first // factor - margin), min(size, -(-last // factor) + margin)
        axes.append((first, max(first, last), low, max(low, high), start))
    (_, _, top, bottom, _), (_, _, left, right, _) = axes
    values = np.asarray(raster.read(numbers, window=Window(left, top, right - left, bottom - top)))
    source = tuple(slice(first - low * factor, last - low * factor) for first, last, low, _, _ in axes)
    target = tuple(slice(first - start, last - start) for first, last, _, _, start in axes)
    return values, Placed((source[0], source[1]), (target[0], target[1]))


def read_codes(path: str, product: str, window: Window, factor: int, outside: int) -> NDArray[np.uint8]:
    """Codes of a mask on a window of 10 m pixels, (row, column); `outside` beyond its edges."""
    result = np.full((window.height, window.width), outside, np.uint8)
    with open_raster(path, product) as raster:
        numbers, inner = read_around(raster, [1], window, factor)
    result[inner.target] = repeated(numbers[0], factor)[inner.source]
    return result


def to_reflectance(numbers: NDArray[Any], band: Band) -> NDArray[np.int16]:
    """Reflectance x 10 000 of a band's numbers; what has data never comes out as `NODATA`."""
    if band.gain == 1 and float(band.add).is_integer():
        values = numbers.astype(np.int32) + int(band.add)
    else:
        values = np.rint(numbers * band.gain + band.add)
    result = np.clip(values, NODATA + 1, np.iinfo(np.int16).max).astype(np.int16)
    if band.nodata is not None:
        result[numbers == band.nodata] = NODATA
    return result


def repeated(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Each pixel `factor` x `factor` times."""
    return values if factor == 1 else values.repeat(factor, 0).repeat(factor, 1)


def _bilinear(values: NDArray[np.int16], factor: int) -> NDArray[np.int16]:
    """Pixels between the centres of coarser ones; those without data take no part, and their pixels get none."""
    weight = (values != NODATA).astype(np.float32)
    total = values * weight
    for axis in (0, 1):
        place = (np.arange(values.shape[axis] * factor) + 0.5) / factor - 0.5
        low = np.clip(np.floor(place).astype(int), 0, values.shape[axis] - 1)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        share = np.clip(place - low, 0, 1).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        weight, total = ((1 - share) * part.take(low, axis) + share * part.take(high, axis) for part in (weight, total))
    known = repeated(values, factor) != NODATA
    return np.where(known, np.rint(total / np.where(weight > 0, weight, 1)), NODATA).astype(np.int16)


def check_grid(raster: DatasetReader, expected: Grid, factor: int, reference: str) -> None:
    """Refuse a file of a product that does not lie on its grid.

    Args:
        raster: the file.
        expected: grid of 10 m.
        factor: 10 m pixels along one of the file's.
        reference: what the grid is known from.

    Raises:
        InputError: the coordinate system, the corner, the pixels or the size differ.
    """
    stated = Grid(
        expected.crs, expected.transform @ Affine.scale(factor), expected.height // factor, expected.width // factor
    )
    found = Grid(raster.crs, raster.transform, raster.height, raster.width)
    if found != stated or (expected.height % factor, expected.width % factor) != (0, 0):
        here, there = (
            f"{place_of(grid)} of {grid.transform.a:g} m in {grid.crs.to_string() if grid.crs else 'no coordinate system'}"
            for grid in (found, stated)
        )
        raise InputError(f"{raster.name} has another grid ({here}) than {reference} ({there})")


def grid_of(raster: DatasetReader, path: str) -> Grid:
    """The grid of a file of 10 m pixels.

    Raises:
        InputError: it is in degrees, without a coordinate system in metres, not north up or of other pixels.
    """
    crs, transform = raster.crs, raster.transform
    if crs is None or not crs.is_projected or crs.linear_units_factor[1] != 1.0:
        what = "in degrees" if crs is not None and crs.is_geographic else "without a projected coordinate system in metres"
        raise InputError(f"{path} is {what}; a grid in metres is expected, such as UTM")
    if not (transform.a == -transform.e == PIXEL and transform.b == transform.d == 0):
        raise InputError(f"{path} has pixels of {transform.a:g} x {-transform.e:g} m, not {PIXEL:g} m, north up")
    return Grid(crs, transform, raster.height, raster.width)


def refuse_other_grid(path: str, grid: Grid, reference: str, expected: Grid) -> None:
    """Refuse a file whose grid is not that of another.

    Raises:
        InputError: it has another coordinate system, place or size.
    """
    if grid.crs != expected.crs:
        raise InputError(f"{path} is in {grid.crs.to_string()}, but {reference} in {expected.crs.to_string()}")
    if grid != expected:
        raise InputError(f"{path} has another grid ({place_of(grid)}) than {reference} ({place_of(expected)})")


def place_of(grid: Grid) -> str:
    """Size and corner of a grid, in words."""
    return f"{grid.height} x {grid.width} pixels from {grid.transform.c:.0f} {grid.transform.f:.0f}"


def _line(error: Exception) -> str:
    return (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
