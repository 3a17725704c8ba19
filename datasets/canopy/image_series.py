"""A year of images of one place and grid, from products of any kind: what canopy heights are mapped from."""

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLES, BANDS, NODATA
from datasets.products import CLEAR, CLOUD, MISSING, WATER, Product, find_products
from datasets.products.geotiffs import ANGLE_TABLE
from datasets.products.product import refuse_other_grid
from utils.errors import InputError
from utils.rasters import Grid
from utils.runs import whole_file

STRIP = 256  # rows of a strip at least
GDAL_CACHE = 64  # MB: blocks are read once, and GDAL would keep 5 % of the memory in each worker


class ImageSeries(NamedTuple):
    """Images in order of date and their grid; hashable, so that workers can tell series apart."""

    images: tuple[Product, ...]
    grid: Grid
    strip: int
    """Rows of a strip, which is read from a file at once: whole blocks of the files."""
    with_angles: bool
    """Whether the network sees sun and view angles, which all images then have."""
    resampling: str = "nearest"
    """How bands of 20 m are brought to 10 m."""

    @property
    def days(self) -> NDArray[np.int64]:
        """(image,) day of the year from 0."""
        return np.array([day_of_year(image) for image in self.images])

    def angles(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(image, point, 4) sun and view angles of points (point, 2) of the grid's coordinate system, in degrees."""
        return np.stack([image.angles(points, self.grid.crs) for image in self.images])

    def digest(self) -> str:
        """sha256 of names, dates, and sizes and times of change of the files: another series has another."""
        files = [file for image in self.images for file in image.files]
        images = [(image.name, image.date.isoformat(), [band[1:] for band in image.bands]) for image in self.images]
        document = [images, [_state_of(file) for file in files], self.with_angles]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def day_of_year(image: Product) -> int:
    """From 0, 1 January."""
    return image.date.timetuple().tm_yday - 1


def _state_of(file: str) -> tuple[Any, ...]:
    """Name, size and time of change of a file of this machine, the address of another."""
    if "://" in file:
        return (file,)
    stat = Path(file).stat()
    return Path(file).name, stat.st_size, stat.st_mtime_ns


def find_series(
    images: str,
    folder: Path,
    year: int | None,
    angles: bool,
    say: Callable[[str], None] = print,
    *,
    resampling: str = "nearest",
    bounds: tuple[float, float, float, float] | None = None,
) -> ImageSeries:
    """Find and check the images of a year.

    Args:
        images: products of any kind that `datasets.products.find_products` takes; relative to `folder`.
        folder: that relative paths count from.
        year: of the images that are used; that of all of them if None.
        angles: whether the network sees angles: images without all four are left out.
        say: takes lines on what is used and left out.
        resampling: nearest or bilinear, of bands of 20 m.
        bounds: west, south, east, north in degrees that items of STAC must touch.

    Raises:
        InputError: there is nothing to use, or a product is not whole or has another grid than the others.
    """
    found = find_products(images, folder, () if year is None else (year,), say, flag="images", bounds=bounds)
    years = sorted({image.date.year for image in found})
    if len(years) > 1:
        raise InputError(f"the images are of {', '.join(map(str, years))}: year=... says which are to be mapped")
    tiles = sorted({image.tile for image in found})
    if len(tiles) > 1 and len({image.grid for image in found}) > 1:
        raise InputError(
            f"the images are of tiles {', '.join(tiles)}: one tile is mapped at a time, by images=... of its own"
        )
    grid = found[0].grid
    for image in found[1:]:
        refuse_other_grid(image.path, image.grid, found[0].name, grid)
    say(f"Images: {len(found)} of {years[0]}, {sum(image.masked for image in found)} with a mask")
    if angles:
        # The middle of the grid stands for all of it: grids of angles have no gaps.
        middle = np.array([grid.transform @ (grid.width / 2, grid.height / 2)])
        without = [image for image in found if not np.isfinite(image.angles(middle, grid.crs)).all()]
        if len(without) == len(found):
            raise InputError(
                f"the run's network sees sun and view angles, but no image has them: of GeoTIFFs, {ANGLE_TABLE} beside the "
                f"images (image_name, {', '.join(ANGLES)}) or tags of these names are expected"
            )
        if without:
            say(f"Left out, without sun or view angles: {len(without)}, {without[0].name} for example")
        found = [image for image in found if image not in without]
    block = max(image.block for image in found)
    return ImageSeries(tuple(found), grid, block * -(-STRIP // block), angles, resampling)


class SeriesReader:
    """Windows of the images of a series, beyond whose edges there is `NODATA`.

    Bands and states are read in strips as wide as the map, each once, and kept uncompressed in a folder that the workers of
    a machine share; strips that lie well above the last one read are removed, so that the folder stays small while windows
    are mapped row by row. A strip that is asked for again is read again.

    Args:
        series: the images.
        folder: of the strips.
        columns: first and last column (exclusive) that will be asked for.
        kept: strips of an image's bands that are kept.
        kept_states: strips of an image's states that are kept.
    """

    def __init__(self, series: ImageSeries, folder: Path, columns: tuple[int, int], kept: int, kept_states: int) -> None:
        self.series, self.folder = series, folder
        self.kept = {"bands": kept, "states": kept_states}
        self.first = max(0, columns[0])
        self.columns = min(columns[1], series.grid.width) - self.first

    def bands(self, number: int, window: Window) -> NDArray[np.int16]:
        """Bands of an image, (band, row, column), reflectance x 10 000."""
        result = np.full((len(BANDS), window.height, window.width), NODATA, np.int16)
        self._fill(result, "bands", number, window)
        return result

    def extended_bands(self, number: int, window: Window, reach: int) -> NDArray[np.int16]:
        """Bands of an image as in `bands`, their borders carried on into what is missing, up to `reach` pixels far.

        The network was trained without missing pixels. Left as they are, the 3 pixels nearest to a border are off by
        twice as much as others (on the demo, 7.4 m instead of 2.7 m; carried on, 2.9 m).
        """
        bands = self.bands(number, window)
        if (bands != NODATA).all():
            return bands
        # Values from as far as `reach` beyond the window, so that they do not depend on the window.
        inner = (..., slice(reach, -reach), slice(reach, -reach))
        return np.asarray(extended(self.bands(number, grown(window, reach)), reach)[inner])

    def states(self, number: int, window: Window) -> NDArray[np.uint8]:
        """What an image shows, (row, column): CLEAR, WATER, CLOUD or MISSING."""
        result = np.full((window.height, window.width), MISSING, np.uint8)
        self._fill(result, "states", number, window)
        return result

    def _fill(self, result: NDArray[Any], kind: str, number: int, window: Window) -> None:
        """Fill what is within the grid, (..., row, column)."""
        top, left = window.row_off, window.col_off
        rows = range(max(0, top), min(top + window.height, self.series.grid.height))
        start, stop = max(left, self.first), min(left + window.width, self.first + self.columns)
        for strip in range(rows.start // self.series.strip, -(-rows.stop // self.series.strip)):
            first = strip * self.series.strip
            values = self._strip(kind, number, strip)
            here = slice(max(rows.start, first), min(rows.stop, first + values.shape[-2]))
            part = values[..., here.start - first : here.stop - first, start - self.first : stop - self.first]
            result[..., here.start - top : here.stop - top, start - left : stop - left] = part

    def _strip(self, kind: str, number: int, strip: int) -> NDArray[Any]:
        """A strip of an image, (..., row, column)."""
        path = self.folder / f"{kind}_{number}_{strip}.npy"
        while True:
            try:
                return np.asarray(np.load(path, mmap_mode="r"))
            except FileNotFoundError:
                pass
            path.parent.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{kind}_{number}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    values = self._read_strip(kind, number, strip)
                    with whole_file(path) as beside, beside.open("wb") as file:
                        np.save(file, values)
                    for old in self.folder.glob(f"{kind}_{number}_*.npy"):
                        if int(old.stem.rpartition("_")[2]) <= strip - self.kept[kind]:
                            old.unlink(missing_ok=True)

    def _read_strip(self, kind: str, number: int, strip: int) -> NDArray[Any]:
        image, top = self.series.images[number], strip * self.series.strip
        window = Window(self.first, top, self.columns, min(self.series.strip, self.series.grid.height - top))
        with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE):
            return image.read(window, resampling=self.series.resampling) if kind == "bands" else image.states(window)


def grown(window: Window, by: int) -> Window:
    """A window with a margin."""
    return Window(window.col_off - by, window.row_off - by, window.width + 2 * by, window.height + 2 * by)


def extended(values: NDArray[np.int16], reach: int) -> NDArray[np.int16]:
    """Fill `NODATA` from the nearest value of the row, then of the column, if it is at most `reach` pixels away.

    Args:
        values: (..., row, column).
        reach: pixels.
    """
    return np.swapaxes(_extended_rows(np.swapaxes(_extended_rows(values, reach), -1, -2), reach), -1, -2)


def _extended_rows(values: NDArray[np.int16], reach: int) -> NDArray[np.int16]:
    valid, place = values != NODATA, np.arange(values.shape[-1])
    far = 10 * len(place) + 10 * reach
    before = np.maximum.accumulate(np.where(valid, place, -far), -1)
    after = np.minimum.accumulate(np.where(valid, place, far)[..., ::-1], -1)[..., ::-1]
    nearest = np.where(place - before <= after - place, before, after)
    filled = np.take_along_axis(values, np.clip(nearest, 0, len(place) - 1), -1)
    return np.where(np.abs(nearest - place) <= reach, filled, values)


class Limits(NamedTuple):
    """Which images a cell takes; shares are in % of its pixels where any image of the year has data."""

    max_cloud: float
    min_valid: float
    max_missing: float
    max_dates: int
    min_dates: int


def choose_dates(states: NDArray[np.uint8], days: NDArray[np.int64], limits: Limits) -> NDArray[np.int64]:
    """Numbers of the images that a cell is mapped from, in order.

    As published: images within the limits, and of more than `max_dates` the one nearest the centre of each of
    `max_dates` equal parts of the year, which may be fewer. Water counts as valid, or lakes would have no dates. Where
    these leave pixels with fewer than `min_dates` clear dates that have as many in the year, the images that help most
    of them are added one by one: no pixel goes unmapped for the clouds over its neighbours or the edge of an orbit.

    Args:
        states: (image, row, column) of `SeriesReader.states`, the cell with its margin.
        days: (image,) day of the year.
        limits: of the shares and numbers.
    """
    covered = (states != MISSING).any(0)
    if not covered.any():
        return np.array([], np.int64)
    clear = (states == CLEAR) | (states == WATER)
    share = {
        state: 100 * (what & covered).sum((1, 2)) / covered.sum()
        for state, what in (("clear", clear), ("cloud", states == CLOUD), ("missing", states == MISSING))
    }
    good = np.flatnonzero(
        (share["cloud"] <= limits.max_cloud)
        & (share["clear"] >= limits.min_valid)
        & (share["missing"] <= limits.max_missing)
    )
    if len(good) > limits.max_dates:
        centres = (np.arange(limits.max_dates) + 0.5) * 365 / limits.max_dates
        good = np.unique(good[np.abs(days[good] - centres[:, None]).argmin(1)])
    chosen = good.tolist()
    reachable = clear.sum(0) >= limits.min_dates
    while (short := reachable & (clear[chosen].sum(0) < limits.min_dates)).any():
        helped = (clear & short).sum((1, 2))
        helped[chosen] = 0
        chosen.append(int(helped.argmax()))
    return np.sort(np.array(chosen, np.int64))
