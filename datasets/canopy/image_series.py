"""A year of dated images of one place, as GeoTIFFs of one grid: what canopy heights are mapped from.

    <name with a date>.tif         10 bands B2 B3 B4 B5 B6 B7 B8 B8A B11 B12, reflectance x 10 000, 10 m
    <name with a date>_mask.tif    optional, of the same grid: 0 clear, bit 4 (16) water, any of the bits 0 to 3 (6 and 14
                                   in the published data) cloud, its shadow or snow; 255 or its own nodata no data
    angles.csv                     optional, beside the images: image_name, sun_zenith, sun_azimuth, view_zenith,
                                   view_azimuth (degrees); or the image's tags of these names. Of a patch of training
                                   data, the tile's table of angles

The date is the first YYYYMMDD or YYYY-MM-DD in the name. Bands may come in another order where the file names them.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLES, BANDS, NODATA, PIXEL, angle_channels, opened
from utils.errors import InputError
from utils.rasters import Grid
from utils.runs import whole_file

CLEAR, WATER, CLOUD, MISSING = range(4)
"""What a pixel of an image shows."""
WATER_BIT, CLOUD_BITS, MASK_NODATA = 16, 15, 255
MASK_SUFFIX = "_mask"
ANGLE_TABLE = "angles.csv"
STRIP = 256  # rows of a strip at least
DATE = re.compile(r"(?<!\d)(\d{4})-?(\d\d)-?(\d\d)(?!\d)")


class Image(NamedTuple):
    """One image.

    Attributes:
        path: of the bands.
        mask: path of the mask, or None.
        day: ISO date.
        order: numbers of the file's bands in the order of `BANDS`.
        angles: sun zenith and azimuth, view zenith and azimuth in degrees, or None.
    """

    path: str
    mask: str | None
    day: str
    order: tuple[int, ...]
    angles: tuple[float, ...] | None

    @property
    def day_of_year(self) -> int:
        """From 0, 1 January."""
        return date.fromisoformat(self.day).timetuple().tm_yday - 1


class ImageSeries(NamedTuple):
    """Images in order of date and their grid; hashable, so that workers can tell series apart."""

    images: tuple[Image, ...]
    grid: Grid
    strip: int
    """Rows of a strip, which is read from a file at once: whole blocks of the first image."""

    @property
    def days(self) -> NDArray[np.int64]:
        """(image,) day of the year from 0."""
        return np.array([image.day_of_year for image in self.images])

    @property
    def angle_channels(self) -> NDArray[np.float32]:
        """(image, 6) of `datasets.canopy.catalogue.angle_channels`."""
        return angle_channels(np.array([image.angles for image in self.images], dtype=np.float64))

    def digest(self) -> str:
        """sha256 of names, dates, angles, and sizes and times of change of the files: another series has another."""
        files = [path for image in self.images for path in (image.path, image.mask) if path]
        stats = [(Path(path).name, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps([stats, [image[2:] for image in self.images]]).encode()).hexdigest()


def find_series(
    images: str, folder: Path, year: int | None, angles: bool, say: Callable[[str], None] = print
) -> ImageSeries:
    """Find and check the images of a year.

    Args:
        images: a folder, or files separated by commas or spaces; relative to `folder`.
        folder: that relative paths count from.
        year: of the images that are used; that of all of them if None.
        angles: whether the network sees angles: images without all four are left out.
        say: takes lines on what is used and left out.

    Raises:
        InputError: there is nothing to use, or a file is not as this module says or has another grid than the others.
    """
    paths = _paths(images, folder)
    days = {path: _day(path) for path in paths}
    years = sorted({day.year for day in days.values()})
    if year is None and len(years) > 1:
        raise InputError(f"the images are of {', '.join(map(str, years))}: year=... says which are to be mapped")
    paths = sorted((path for path in paths if year in (None, days[path].year)), key=lambda path: (days[path], path.name))
    if not paths:
        raise InputError(f"year={year}: no image is of that year; there are {', '.join(map(str, years))}")
    headers = [_check_image(path) for path in paths]
    for path, (grid, _, _) in zip(paths, headers, strict=True):
        _refuse_other_grid(path, grid, paths[0], headers[0][0])
    masks = [_mask_of(path, headers[0][0]) for path in paths]
    table = _angle_tables(paths)
    found = []
    for path, (_, order, tags), mask in zip(paths, headers, masks, strict=True):
        found.append(Image(str(path), mask, days[path].isoformat(), order, table.get(path.name, _angles_of(path, tags))))
    named = sum(order != tuple(range(1, len(BANDS) + 1)) for _, order, _ in headers)
    say(f"Images: {len(found)} of {days[paths[0]].year}, {sum(mask is not None for mask in masks)} with a mask")
    if named:
        say(f"Bands of {named} images are in another order, by their names, and are read as {' '.join(BANDS)}")
    if angles:
        without = [image for image in found if image.angles is None]
        if len(without) == len(found):
            raise InputError(
                f"the run's network sees sun and view angles, but no image has them: expected is {ANGLE_TABLE} beside the "
                f"images (image_name, {', '.join(ANGLES)}) or tags of these names"
            )
        if without:
            say(f"Left out, without sun or view angles: {len(without)}, {Path(without[0].path).name} for example")
        found = [image for image in found if image.angles is not None]
    with opened(paths[0]) as raster:
        block = raster.block_shapes[0][0]
    return ImageSeries(tuple(found), headers[0][0], block * -(-STRIP // block))


def _paths(images: str, folder: Path) -> list[Path]:
    place = folder / images
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.suffix.lower() in (".tif", ".tiff"))
        paths = [path for path in paths if not path.stem.endswith(MASK_SUFFIX) and not path.name.startswith(".")]
        if not paths:
            raise InputError(f"images={images}: {place} has no GeoTIFF (*.tif)")
        return paths
    paths = [folder / name for name in ([images] if place.is_file() else images.replace(",", " ").split())]
    for path in paths:
        if not path.is_file():
            raise InputError(f"images={images}: {path} does not exist; a folder or a list of dated GeoTIFFs is expected")
    return paths


def _day(path: Path) -> date:
    for parts in DATE.findall(path.stem):
        try:
            return date(*map(int, parts))
        except ValueError:
            continue
    raise InputError(f"{path} has no date in its name: YYYYMMDD or YYYY-MM-DD is expected")


def _check_image(path: Path) -> tuple[Grid, tuple[int, ...], Mapping[str, str]]:
    """Grid, order of bands and tags of an image."""
    with opened(path) as raster:
        if raster.count != len(BANDS):
            raise InputError(
                f"{path} has {raster.count} bands; the {len(BANDS)} that the run knows are expected, {' '.join(BANDS)}"
            )
        if raster.dtypes[0] not in ("int16", "uint16"):
            raise InputError(f"{path} is of type {raster.dtypes[0]}; expected is reflectance x 10 000 as int16 or uint16")
        grid = _grid_of(raster, path)
        if not (grid.transform.a == -grid.transform.e == PIXEL and grid.transform.b == grid.transform.d == 0):
            raise InputError(
                f"{path} has pixels of {grid.transform.a:g} x {-grid.transform.e:g} m, not {PIXEL:g} m, north up"
            )
        names = [re.sub(r"^B0(?=\d)", "B", name or "") for name in raster.descriptions]
        if not any(names):
            return grid, tuple(range(1, len(BANDS) + 1)), raster.tags()
        if sorted(names) != sorted(BANDS):
            unknown = ", ".join(sorted(set(names) - set(BANDS))) or "a band twice"
            raise InputError(f"{path} has bands that the run does not know ({unknown}); {' '.join(BANDS)} are expected")
        return grid, tuple(names.index(band) + 1 for band in BANDS), raster.tags()


def _grid_of(raster: DatasetReader, path: Path) -> Grid:
    crs = raster.crs
    if crs is None or not crs.is_projected or crs.linear_units_factor[1] != 1.0:
        what = "in degrees" if crs is not None and crs.is_geographic else "without a projected coordinate system in metres"
        raise InputError(f"{path} is {what}; heights are mapped on a grid in metres, such as UTM")
    return Grid(crs, raster.transform, raster.height, raster.width)


def _refuse_other_grid(path: Path, grid: Grid, first: Path, expected: Grid) -> None:
    if grid.crs != expected.crs:
        raise InputError(f"{path} is in {grid.crs.to_string()}, but {first.name} in {expected.crs.to_string()}")
    if grid != expected:
        raise InputError(f"{path} has another grid ({_place(grid)}) than {first.name} ({_place(expected)})")


def _place(grid: Grid) -> str:
    return f"{grid.height} x {grid.width} pixels from {grid.transform.c:.0f} {grid.transform.f:.0f}"


def _mask_of(image: Path, grid: Grid) -> str | None:
    path = image.with_name(f"{image.stem}{MASK_SUFFIX}{image.suffix}")
    if not path.is_file():
        return None
    with opened(path) as raster:
        if raster.count != 1 or raster.dtypes[0] != "uint8":
            raise InputError(f"{path} is no mask: one band of uint8 is expected")
        _refuse_other_grid(path, _grid_of(raster, path), image, grid)
    return str(path)


def _angle_tables(paths: Sequence[Path]) -> dict[str, tuple[float, ...]]:
    """Angles by the name of the image, from the tables beside the images."""
    found: dict[str, tuple[float, ...]] = {}
    beside = {path.with_name(ANGLE_TABLE) for path in paths}
    # Patches of training data have theirs as datasets.canopy.catalogue says.
    beside |= {path.parents[3] / "angles" / f"{path.parents[1].name}.csv" for path in paths if len(path.parents) > 3}
    for table in sorted(beside):
        if not table.is_file():
            continue
        try:
            rows = pd.read_csv(table)
        except (ValueError, OSError) as error:
            raise InputError(f"{table} cannot be read as a table: {str(error).splitlines()[0]}") from error
        missing = [name for name in ("image_name", *ANGLES) if name not in rows.columns]
        if missing:
            raise InputError(f"{table} has no column {', '.join(missing)}")
        values = rows[list(ANGLES)].apply(pd.to_numeric, errors="coerce")
        for name, row in zip(rows["image_name"].astype(str), values.to_numpy(np.float64), strict=True):
            if np.isfinite(row).all():
                found[name.removesuffix(".tif") + ".tif"] = tuple(row.tolist())
    return found


def _angles_of(path: Path, tags: Mapping[str, str]) -> tuple[float, ...] | None:
    """Angles from an image's own tags."""
    given = {name.lower(): value for name, value in tags.items()}
    if not all(name in given for name in ANGLES):
        return None
    try:
        return tuple(float(given[name]) for name in ANGLES)
    except ValueError:
        raise InputError(f"{path} has tags {', '.join(ANGLES)} that are no numbers") from None


class SeriesReader:
    """Windows of the images of a series, beyond whose edges there is `NODATA`.

    Bands are read in strips as wide as the map, each once, and kept uncompressed in a folder that the workers of a
    machine share; strips that lie well above the last one read are removed, so that the folder stays small while windows
    are mapped row by row. A strip that is asked for again is read again.

    Args:
        series: the images.
        folder: of the strips.
        columns: first and last column (exclusive) that will be asked for.
        kept: strips of an image that are kept.
    """

    def __init__(self, series: ImageSeries, folder: Path, columns: tuple[int, int], kept: int) -> None:
        self.series, self.folder, self.kept = series, folder, kept
        self.first = max(0, columns[0])
        self.columns = min(columns[1], series.grid.width) - self.first
        self._files: dict[str, DatasetReader] = {}

    def bands(self, number: int, window: Window) -> NDArray[np.int16]:
        """Bands of an image, (band, row, column), reflectance x 10 000."""
        top, left = window.row_off, window.col_off
        result = np.full((len(BANDS), window.height, window.width), NODATA, np.int16)
        rows = range(max(0, top), min(top + window.height, self.series.grid.height))
        start, stop = max(left, self.first), min(left + window.width, self.first + self.columns)
        for strip in range(rows.start // self.series.strip, -(-rows.stop // self.series.strip)):
            first = strip * self.series.strip
            values = self._strip(number, strip)
            here = slice(max(rows.start, first), min(rows.stop, first + values.shape[1]))
            part = values[:, here.start - first : here.stop - first, start - self.first : stop - self.first]
            result[:, here.start - top : here.stop - top, start - left : stop - left] = part
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
        """What an image shows, (row, column) of a window within the grid: CLEAR, WATER, CLOUD or MISSING.

        By its mask, and MISSING where the first band has no data.
        """
        image = self.series.images[number]
        states = np.full((window.height, window.width), CLEAR, np.uint8)
        if image.mask is not None:
            raster = self._opened(image.mask)
            codes = _read(raster, image.mask, 1, window)
            states[codes & WATER_BIT != 0] = WATER
            states[codes & CLOUD_BITS != 0] = CLOUD
            states[(codes == MASK_NODATA) | (codes == (MASK_NODATA if raster.nodata is None else raster.nodata))] = MISSING
        raster = self._opened(image.path)
        values = _read(raster, image.path, image.order[0], window)
        states[(values == NODATA) | (values == (NODATA if raster.nodata is None else raster.nodata))] = MISSING
        return states

    def _opened(self, path: str) -> DatasetReader:
        if path not in self._files:
            self._files[path] = rasterio.open(path, driver="GTiff", sharing=False)
        return self._files[path]

    def _strip(self, number: int, strip: int) -> NDArray[np.int16]:
        """A strip of an image, (band, row, column)."""
        path = self.folder / f"{number}_{strip}.npy"
        while True:
            try:
                return np.asarray(np.load(path, mmap_mode="r"))
            except FileNotFoundError:
                pass
            path.parent.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{number}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    values = self._read_strip(number, strip)
                    with whole_file(path) as beside, beside.open("wb") as file:
                        np.save(file, values)
                    for old in self.folder.glob(f"{number}_*.npy"):
                        if int(old.stem.partition("_")[2]) <= strip - self.kept:
                            old.unlink(missing_ok=True)

    def _read_strip(self, number: int, strip: int) -> NDArray[np.int16]:
        image, top = self.series.images[number], strip * self.series.strip
        window = Window(self.first, top, self.columns, min(self.series.strip, self.series.grid.height - top))
        raster = self._opened(image.path)
        values = _read(raster, image.path, list(image.order), window)
        # Reflectance stays far below the type's limit.
        bands = np.minimum(values, np.iinfo(np.int16).max).astype(np.int16)
        if raster.nodata is not None:
            bands[values == raster.nodata] = NODATA
        return bands


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


def _read(raster: DatasetReader, path: str, bands: int | list[int], window: Window) -> NDArray[Any]:
    try:
        return np.asarray(raster.read(bands, window=window))
    except rasterio.errors.RasterioError as error:
        raise InputError(f"{path} cannot be read, it may be truncated: {str(error).splitlines()[0]}") from error


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
