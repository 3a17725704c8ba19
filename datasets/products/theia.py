"""Theia's Level-2A products of Sentinel-2, made by MAJA, in the MUSCATE format; as folders or zip archives.

    *_MTD_ALL.xml              REFLECTANCE_QUANTIFICATION_VALUE, place, sun and view angles
    *_FRE_B2.tif ...           reflectance corrected for slopes: B2 B3 B4 B8 of 10 m, the others of 20 m
    MASKS/*_CLM_R1.tif         clouds and their shadows, 10 m (R2: 20 m, read where there is no R1)
    MASKS/*_MG2_R1.tif         water, snow, shadows
    MASKS/*_EDG_R1.tif         1 beyond the image; R2 as well, for the bands of 20 m

Reflectance is the number / REFLECTANCE_QUANTIFICATION_VALUE; the special value nodata, -10000, is no data.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from datasets.canopy.catalogue import BANDS, NODATA
from datasets.products.angles import AngleGrids, theia_angles
from datasets.products.packages import Package, number_of, open_package, text_of
from datasets.products.product import (
    CLEAR,
    CLOUD,
    MISSING,
    WATER,
    Band,
    Product,
    check_grid,
    grid_of,
    open_raster,
    read_codes,
)
from datasets.products.safe import FINE_BANDS, UNIT
from utils.errors import InputError
from utils.rasters import Grid

XML_ENDING, ROOT = "_MTD_ALL.xml", "Muscate_Metadata_Document"
WATER_BIT = 1  # of MG2
TILE = re.compile(r"(?<![0-9A-Z])T?(\d\d[A-Z]{3})(?![0-9A-Z])")
# Any bit of CLM is a cloud or a shadow of one. Bits of MG2 above that of water are clouds, snow, shadows of clouds and of
# the relief, ground that the relief hides, and a sun too low for the correction of slopes: there is no reflectance to use.


class Mask(NamedTuple):
    """A mask: its path and how many 10 m pixels lie along one of its own."""

    path: str
    factor: int


@dataclass(frozen=True, kw_only=True)
class TheiaProduct(Product):
    """A product of Theia.

    Attributes:
        clouds: CLM.
        ground: MG2.
        edges: EDG, of one resolution or of both.
        xml: name of the metadata in the product.
    """

    clouds: Mask
    ground: Mask
    edges: tuple[Mask, ...]
    xml: str

    def states(self, window: Window) -> NDArray[np.uint8]:
        """As `Product` says."""
        clouds, ground, *edges = (
            read_codes(mask.path, self.name, window, mask.factor, outside=1)
            for mask in (self.clouds, self.ground, *self.edges)
        )
        states = np.where(ground & WATER_BIT, WATER, CLEAR).astype(np.uint8)
        states[(clouds != 0) | (ground > WATER_BIT)] = CLOUD
        for edge in edges:
            states[edge != 0] = MISSING
        return states

    def angles(self, points: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:
        """As `Product` says."""
        package = open_package(Path(self.path))
        where = str(package.path / self.xml)
        return _angles(package.xml(self.xml, ROOT), self.grid, where).at(points, crs)


def is_theia(names: frozenset[str]) -> bool:
    """Whether these are the files of a product of Theia."""
    return any(name.endswith(XML_ENDING) and "/" not in name for name in names)


def date_of_theia(package: Package) -> date:
    """When a product was sensed.

    Raises:
        InputError: its XML cannot be read.
    """
    xml, root = _metadata(package)
    return _sensed(root, str(package.path / xml)).date()


def read_theia(package: Package) -> Product:
    """A product, checked to be whole.

    Raises:
        InputError: it is of another level, or something is missing, truncated or of another grid.
    """
    xml, root = _metadata(package)
    where = str(package.path / xml)
    level = text_of(root, "PRODUCT_LEVEL", where)
    if level != "L2A":
        raise InputError(f"{package.path} is of level {level}; L2A is expected")
    quantification = number_of(root, "REFLECTANCE_QUANTIFICATION_VALUE", where)
    if not quantification > 0:
        raise InputError(f"{where}: REFLECTANCE_QUANTIFICATION_VALUE is {quantification:g}, a positive number is expected")
    special = root.find(".//SPECIAL_VALUE[@name='nodata']")
    nodata = float(NODATA if special is None else special.text or "nan")

    first = package.one(f"_FRE_{BANDS[0]}.tif", f"band {BANDS[0]}, corrected for slopes")
    with open_raster(package.gdal(first), package.path.name) as raster:
        grid, block = grid_of(raster, package.path.name), int(raster.block_shapes[0][0])
    _check_place(root, grid, where)
    bands = []
    for band in BANDS:
        factor = 1 if band in FINE_BANDS else 2
        name = package.one(f"_FRE_{band}.tif", f"band {band}, corrected for slopes")
        _check_image(package, name, grid, factor, first)
        bands.append(Band(package.gdal(name), 1, UNIT / quantification, 0.0, nodata, factor))
    masks = {kind: _masks(package, kind, grid, first) for kind in ("CLM", "MG2", "EDG")}
    _angles(root, grid, where)  # refused now rather than later
    sensed = _sensed(root, where)
    tile = TILE.search(root.findtext(".//GEOGRAPHICAL_ZONE") or "") or TILE.search(xml.replace("_", " "))
    parts = [package.gdal(xml), *(band.path for band in bands), *(mask.path for kind in masks.values() for mask in kind)]
    return TheiaProduct(
        name=package.path.name,
        path=str(package.path),
        date=sensed.date(),
        tile=tile[1] if tile else "",
        sensor=text_of(root, "PLATFORM", where),
        grid=grid,
        bands=tuple(bands),
        files=(str(package.path),) if package.zipped else tuple(parts),
        block=block,
        baseline=root.findtext(".//PRODUCT_VERSION") or "",
        sensed=sensed.isoformat(),
        clouds=masks["CLM"][0],
        ground=masks["MG2"][0],
        edges=masks["EDG"],
        xml=xml,
    )


def _metadata(package: Package) -> tuple[str, Element]:
    xml = package.one(XML_ENDING, "metadata of Theia")
    return xml, package.xml(xml, ROOT)


def _sensed(root: Element, path: str) -> datetime:
    text = text_of(root, "ACQUISITION_DATE", path)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{path}: ACQUISITION_DATE is {text}, a date and time is expected") from None


def _check_image(package: Package, name: str, grid: Grid, factor: int, first: str) -> None:
    with open_raster(package.gdal(name), package.path.name) as raster:
        check_grid(raster, grid, factor, Path(first).name)


def _masks(package: Package, kind: str, grid: Grid, first: str) -> tuple[Mask, ...]:
    """The masks of a kind, that of 10 m first."""
    found = []
    for resolution, factor in (("R1", 1), ("R2", 2)):
        ending = f"_{kind}_{resolution}.tif"
        if any(name.endswith(ending) for name in package.names):
            name = package.one(ending, "mask")
            _check_image(package, name, grid, factor, first)
            found.append(Mask(package.gdal(name), factor))
    if not found:
        raise InputError(f"{package.path} has no mask {kind} (*_{kind}_R1.tif or *_{kind}_R2.tif)")
    return tuple(found)


def _check_place(root: Element, grid: Grid, path: str) -> None:
    """Refuse a grid that the metadata does not state."""
    code = text_of(root, "HORIZONTAL_CS_CODE", path)
    group = root.find(".//Group_Geopositioning[@group_id='R1']")
    if group is None:
        raise InputError(f"{path} does not state the place of 10 m (Group_Geopositioning R1)")
    names = ("ULX", "ULY", "NROWS", "NCOLS")
    stated = tuple(number_of(group, name, path) for name in names)
    found = (grid.transform.c, grid.transform.f, grid.height, grid.width)
    if found != stated or str(grid.crs.to_epsg()) != code.removeprefix("EPSG:"):
        said = ", ".join(f"{name} {value:.0f}" for name, value in zip(names, stated, strict=True))
        here = ", ".join(f"{value:.0f}" for value in found)
        raise InputError(f"{path} says {said} in EPSG:{code}, but the images have {here} in {grid.crs.to_string()}")


def _angles(root: Element, grid: Grid, path: str) -> AngleGrids:
    return theia_angles(root, grid.crs, (grid.transform.c, grid.transform.f), path)
