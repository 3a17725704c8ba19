"""ESA's Level-2A products of Sentinel-2 in the SAFE format, as folders or zip archives.

    MTD_MSIL2A.xml                      quantification value, BOA_ADD_OFFSET of each band, list of the images
    GRANULE/*/MTD_TL.xml                the tile's grid, sun and view angles
    GRANULE/*/IMG_DATA/R10m/*.jp2       B02 B03 B04 B08
    GRANULE/*/IMG_DATA/R20m/*.jp2       B05 B06 B07 B8A B11 B12 and the scene classification, SCL

Reflectance is (number + BOA_ADD_OFFSET) / quantification value, 0 is no data. The offset is what the product's own XML says,
0 where it says nothing: reprocessed products of early years have one, though products of those years had none at first.
Numbers of bands in the XML (`band_id`) are explained by the same XML (`Spectral_Information`).
"""

from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.windows import Window

from datasets.canopy.catalogue import BANDS, PIXEL
from datasets.products.angles import AngleGrids, esa_angles
from datasets.products.packages import Package, number_of, open_package, text_of
from datasets.products.product import (
    CLEAR,
    CLOUD,
    MISSING,
    WATER,
    Band,
    Product,
    check_grid,
    open_raster,
    read_codes,
)
from utils.errors import InputError
from utils.rasters import Grid

PRODUCT_XML, TILE_XML = "MTD_MSIL2A.xml", "MTD_TL.xml"
FINE_BANDS = ("B2", "B3", "B4", "B8")
NODATA_NUMBER = 0
UNIT = 10_000  # of reflectance 1
STATES_OF_CLASSES = np.full(256, MISSING, np.uint8)
"""Of the scene classification: 0 no data and 1 saturated or defective are MISSING; 3 cloud shadow, 8 and 9 cloud, 10 thin
cirrus and 11 snow or ice are CLOUD; 6 is WATER; dark areas, vegetation, bare ground and unclassified are CLEAR."""
STATES_OF_CLASSES[[2, 4, 5, 7]] = CLEAR
STATES_OF_CLASSES[6] = WATER
STATES_OF_CLASSES[[3, 8, 9, 10, 11]] = CLOUD


class Header(NamedTuple):
    """What MTD_MSIL2A.xml says.

    Attributes:
        sensed: date and time.
        sensor: as SENTINEL2A.
        baseline: of the processing.
        quantification: numbers of reflectance 1.
        offsets: numbers to be added, by band.
        images: paths of the images without their ending.
    """

    sensed: datetime
    sensor: str
    baseline: str
    quantification: float
    offsets: dict[str, float]
    images: list[str]


@dataclass(frozen=True, kw_only=True)
class SafeProduct(Product):
    """A SAFE product.

    Attributes:
        classes: path of the scene classification.
        tile_xml: name of MTD_TL.xml in the product.
    """

    classes: str
    tile_xml: str

    def states(self, window: Window) -> NDArray[np.uint8]:
        """As `Product` says."""
        return STATES_OF_CLASSES[read_codes(self.classes, self.name, window, 2, 0)]

    def angles(self, points: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:
        """As `Product` says."""
        return read_angles(Path(self.path), self.tile_xml).at(points, crs)


def is_safe(names: frozenset[str]) -> bool:
    """Whether these are the files of a SAFE product, of whatever level."""
    return any(name in ("manifest.safe", PRODUCT_XML, "MTD_MSIL1C.xml") for name in names)


def date_of_safe(package: Package) -> date:
    """When a product was sensed.

    Raises:
        InputError: it is of another level, or its XML cannot be read.
    """
    return _header(package).sensed.date()


def read_safe(package: Package) -> Product:
    """A product, checked to be whole.

    Raises:
        InputError: it is of another level, or something is missing, truncated or of another grid.
    """
    header = _header(package)
    tile_xml = package.one(f"/{TILE_XML}", "metadata of a tile")
    tile_path = str(package.path / tile_xml)
    root = package.xml(tile_xml, "Level-2A_Tile_ID")
    grid = read_grid(root, tile_path)
    esa_angles(root, grid.crs, (grid.transform.c, grid.transform.f), tile_path)  # refused now rather than later

    bands, block = [], 0
    for band in BANDS:
        factor = 1 if band in FINE_BANDS else 2
        image = _image(package, header.images, f"{_two_digits(band)}_{10 * factor}m")
        rows = _check_image(package, image, grid, factor)
        block = max(block, rows) if factor == 1 else block
        gain = UNIT / header.quantification
        bands.append(Band(package.gdal(image), 1, gain, gain * header.offsets.get(band, 0.0), NODATA_NUMBER, factor))
    classes = _image(package, header.images, "SCL_20m")
    _check_image(package, classes, grid, 2)
    parts = [package.gdal(name) for name in (PRODUCT_XML, tile_xml, classes)] + [band.path for band in bands]
    return SafeProduct(
        name=package.path.name,
        path=str(package.path),
        date=header.sensed.date(),
        tile=text_of(root, "TILE_ID", tile_path).rpartition("_T")[2].partition("_")[0],
        sensor=header.sensor,
        grid=grid,
        bands=tuple(bands),
        files=(str(package.path),) if package.zipped else tuple(parts),
        block=block,
        baseline=header.baseline,
        sensed=header.sensed.isoformat(),
        classes=package.gdal(classes),
        tile_xml=tile_xml,
    )


def _header(package: Package) -> Header:
    if PRODUCT_XML not in package.names:
        level = " but MTD_MSIL1C.xml: it is of Level-1C, Level-2A is expected" if "MTD_MSIL1C.xml" in package.names else ""
        raise InputError(f"{package.path} has no {PRODUCT_XML}{level}")
    return read_header(package.xml(PRODUCT_XML, "Level-2A_User_Product"), str(package.path / PRODUCT_XML))


def read_header(root: Element, path: str) -> Header:
    """What is needed of MTD_MSIL2A.xml.

    Raises:
        InputError: something is missing or no number.
    """
    names = {band.get("bandId", ""): band.get("physicalBand", "") for band in root.iterfind(".//Spectral_Information")}
    offsets = {}
    for offset in root.iterfind(".//BOA_ADD_OFFSET"):
        number = offset.get("band_id", "")
        if number not in names:
            raise InputError(f"{path} has a BOA_ADD_OFFSET of band_id {number}, which no Spectral_Information explains")
        try:
            offsets[names[number]] = float(offset.text or "")
        except ValueError:
            raise InputError(f"{path}: BOA_ADD_OFFSET is {offset.text}, a number is expected") from None
    lacking = [band for band in BANDS if offsets and band not in offsets]
    if lacking:
        raise InputError(f"{path} has a BOA_ADD_OFFSET of some bands, but none of {', '.join(lacking)}")
    quantification = number_of(root, "BOA_QUANTIFICATION_VALUE", path)
    if not quantification > 0:
        raise InputError(f"{path}: BOA_QUANTIFICATION_VALUE is {quantification:g}, a positive number is expected")
    sensed = text_of(root, "DATATAKE_SENSING_START", path)
    try:
        moment = datetime.fromisoformat(sensed)
    except ValueError:
        raise InputError(f"{path}: DATATAKE_SENSING_START is {sensed}, a date and time is expected") from None
    images = [image.text or "" for image in root.iterfind(".//IMAGE_FILE")]
    sensor = text_of(root, "SPACECRAFT_NAME", path).upper().replace("-", "")
    return Header(moment, sensor, text_of(root, "PROCESSING_BASELINE", path), quantification, offsets, images)


def read_grid(root: Element, path: str) -> Grid:
    """The 10 m grid that MTD_TL.xml states.

    Raises:
        InputError: something is missing or no number.
    """
    code = text_of(root, "HORIZONTAL_CS_CODE", path)
    size, place = (root.find(f".//{name}[@resolution='10']") for name in ("Size", "Geoposition"))
    if size is None or place is None:
        raise InputError(f"{path} does not state the grid of 10 m")
    try:
        crs = CRS.from_user_input(code)
    except CRSError:
        raise InputError(f"{path}: HORIZONTAL_CS_CODE is {code}, which is no coordinate system") from None
    corner = (number_of(place, name, path) for name in ("ULX", "ULY"))
    rows, columns = (int(number_of(size, name, path)) for name in ("NROWS", "NCOLS"))
    return Grid(crs, Affine(PIXEL, 0, next(corner), 0, -PIXEL, next(corner)), rows, columns)


def read_angles(path: Path, tile_xml: str) -> AngleGrids:
    """Angles of a product.

    Raises:
        InputError: they cannot be read.
    """
    root = open_package(path).xml(tile_xml, "Level-2A_Tile_ID")
    where = str(path / tile_xml)
    grid = read_grid(root, where)
    return esa_angles(root, grid.crs, (grid.transform.c, grid.transform.f), where)


def _two_digits(band: str) -> str:
    return band if band[-1] == "A" else f"B{int(band[1:]):02d}"


def _image(package: Package, images: list[str], ending: str) -> str:
    """The file of an image that the product's XML lists."""
    listed = [image for image in images if image.endswith(f"_{ending}")]
    if len(listed) != 1:
        raise InputError(f"{package.path / PRODUCT_XML} lists {len(listed)} images *_{ending}, one is expected")
    name = f"{listed[0]}.jp2"
    if name not in package.names:
        raise InputError(f"{package.path} has no {name}, which its {PRODUCT_XML} lists")
    return name


def _check_image(package: Package, name: str, grid: Grid, factor: int) -> int:
    """Refuse an image that is not whole or of another grid; the rows of its blocks."""
    package.check_jp2(name)
    with open_raster(package.gdal(name), package.path.name) as raster:
        check_grid(raster, grid, factor, f"{TILE_XML} says")
        return int(raster.block_shapes[0][0])
