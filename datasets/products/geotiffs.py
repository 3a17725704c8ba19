"""Dated images as this project itself keeps them: GeoTIFFs of 10 bands.

    <name with a date>.tif         10 bands B2 B3 B4 B5 B6 B7 B8 B8A B11 B12, reflectance x 10 000, 10 m
    <name with a date>_mask.tif    optional, of the same grid: 0 clear, bit 4 (16) water, any of the bits 0 to 3 (6 and 14
                                   in the published data) cloud, its shadow or snow; 255 or its own nodata no data
    angles.csv                     optional, beside the images: image_name, sun_zenith, sun_azimuth, view_zenith,
                                   view_azimuth (degrees); or the image's tags of these names. Of a patch of training
                                   data, the tile's table of angles

The date is the first YYYYMMDD or YYYY-MM-DD in the name. Bands may come in another order where the file names them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.io import DatasetReader
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLES, BANDS, NODATA, opened
from datasets.products.product import (
    CLEAR,
    CLOUD,
    MISSING,
    WATER,
    Band,
    Product,
    grid_of,
    read_codes,
    refuse_other_grid,
)
from utils.errors import InputError
from utils.rasters import Grid

WATER_BIT, CLOUD_BITS, MASK_NODATA = 16, 15, 255
MASK_SUFFIX = "_mask"
ANGLE_TABLE = "angles.csv"
DATE = re.compile(r"(?<!\d)(\d{4})-?(\d\d)-?(\d\d)(?!\d)")
TILE = re.compile(r"(?<![0-9A-Z])T?(\d\d[A-Z]{3})(?![0-9A-Z])")
SENSOR = re.compile(r"S(?:ENTINEL)?-?(2[A-D])", re.IGNORECASE)
FOUR = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GeoTiff(Product):
    """An image of 10 bands.

    Attributes:
        mask: its path, or nothing.
        mask_nodata: code of pixels without data.
        degrees: the four angles of the whole image, or None.
    """

    mask: str = ""
    mask_nodata: int = MASK_NODATA
    degrees: FOUR | None = None

    def states(self, window: Window) -> NDArray[np.uint8]:
        """As `Product` says."""
        states = np.full((window.height, window.width), CLEAR, np.uint8)
        if self.mask:
            codes = read_codes(self.mask, self.name, window, 1, MASK_NODATA)
            states[codes & WATER_BIT != 0] = WATER
            states[codes & CLOUD_BITS != 0] = CLOUD
            states[(codes == MASK_NODATA) | (codes == self.mask_nodata)] = MISSING
        states[self.read(window, BANDS[:1])[0] == NODATA] = MISSING
        return states

    def angles(self, points: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:  # noqa: ARG002
        """As `Product` says."""
        return np.tile(np.full(4, np.nan) if self.degrees is None else np.array(self.degrees), (len(points), 1))


class Header(NamedTuple):
    """What an image's file says: its grid, rows of blocks, order of the bands, value without data, tags."""

    grid: Grid
    block: int
    order: tuple[int, ...]
    nodata: float | None
    tags: Mapping[str, str]


def is_image(path: Path) -> bool:
    """Whether a file may be an image."""
    return path.suffix.lower() in (".tif", ".tiff") and not path.stem.endswith(MASK_SUFFIX) and path.name[0] != "."


def date_of(path: Path) -> date:
    """The date in an image's name.

    Raises:
        InputError: there is none.
    """
    for parts in DATE.findall(path.stem):
        try:
            return date(*map(int, parts))
        except ValueError:
            continue
    raise InputError(f"{path} has no date in its name: YYYYMMDD or YYYY-MM-DD is expected")


def read_images(paths: Sequence[Path], say: Callable[[str], None]) -> list[Product]:
    """Images, checked.

    Args:
        paths: of the images.
        say: takes a line where bands are in another order.

    Raises:
        InputError: a file is not as this module says, or a mask of another grid than its image.
    """
    tables = _angle_tables(paths)
    products: list[Product] = []
    named = 0
    for path in paths:
        header = _read_header(path)
        named += header.order != tuple(range(1, len(BANDS) + 1))
        degrees, table = tables.get(path.name) or (_angles_in(path, header.tags), "")
        mask, mask_nodata = _mask_of(path, header.grid)
        tile, sensor = TILE.search(path.stem.replace("_", " ")), SENSOR.search(path.stem)
        # The image's own value without data, where it has none that of the published images.
        nodata = NODATA if header.nodata is None else header.nodata
        products.append(
            GeoTiff(
                name=path.name,
                path=str(path),
                date=date_of(path),
                tile=tile[1] if tile else "",
                sensor=f"SENTINEL{sensor[1].upper()}" if sensor else "",
                grid=header.grid,
                bands=tuple(Band(str(path), number, nodata=nodata) for number in header.order),
                files=tuple(file for file in (str(path), mask, table) if file),
                block=header.block,
                masked=bool(mask),
                mask=mask,
                mask_nodata=mask_nodata,
                degrees=degrees,
            )
        )
    if named:
        say(f"Bands of {named} images are in another order, by their names, and are read as {' '.join(BANDS)}")
    return products


def _read_header(path: Path) -> Header:
    with opened(path) as raster:
        if raster.count != len(BANDS):
            raise InputError(
                f"{path} has {raster.count} bands; the {len(BANDS)} that are known are expected, {' '.join(BANDS)}"
            )
        if raster.dtypes[0] not in ("int16", "uint16"):
            raise InputError(f"{path} is of type {raster.dtypes[0]}; expected is reflectance x 10 000 as int16 or uint16")
        return Header(
            grid_of(raster, str(path)), raster.block_shapes[0][0], _order(raster, path), raster.nodata, raster.tags()
        )


def _order(raster: DatasetReader, path: Path) -> tuple[int, ...]:
    """Numbers of the file's bands in the order of `BANDS`, by their names if they have any."""
    names = [re.sub(r"^B0(?=\d)", "B", name or "") for name in raster.descriptions]
    if not any(names):
        return tuple(range(1, len(BANDS) + 1))
    if sorted(names) != sorted(BANDS):
        unknown = ", ".join(sorted(set(names) - set(BANDS))) or "a band twice"
        raise InputError(f"{path} has bands that are not known ({unknown}); {' '.join(BANDS)} are expected")
    return tuple(names.index(band) + 1 for band in BANDS)


def _mask_of(image: Path, grid: Grid) -> tuple[str, int]:
    """An image's mask and its code without data, or nothing."""
    path = image.with_name(f"{image.stem}{MASK_SUFFIX}{image.suffix}")
    if not path.is_file():
        return "", MASK_NODATA
    with opened(path) as raster:
        if raster.count != 1 or raster.dtypes[0] != "uint8":
            raise InputError(f"{path} is no mask: one band of uint8 is expected")
        refuse_other_grid(str(path), grid_of(raster, str(path)), image.name, grid)
        return str(path), MASK_NODATA if raster.nodata is None else int(raster.nodata)


def _angle_tables(paths: Sequence[Path]) -> dict[str, tuple[FOUR, str]]:
    """Angles and the table that has them, by the name of the image, from the tables beside the images."""
    found: dict[str, tuple[FOUR, str]] = {}
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
                found[name.removesuffix(".tif") + ".tif"] = tuple(row.tolist()), str(table)
    return found


def _angles_in(path: Path, tags: Mapping[str, str]) -> FOUR | None:
    """Angles from an image's own tags."""
    given = {name.lower(): value for name, value in tags.items()}
    if not all(name in given for name in ANGLES):
        return None
    try:
        return tuple(float(given[name]) for name in ANGLES)
    except ValueError:
        raise InputError(f"{path} has tags {', '.join(ANGLES)} that are no numbers") from None
