"""Simulated products of ESA: images written with the files, names and metadata of real ones.

`datasets.products.safe` reads them as it reads real ones.
"""

import datetime
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine

from datasets.canopy.catalogue import BANDS, NODATA
from datasets.products.product import CLEAR, CLOUD, MISSING, WATER
from datasets.products.safe import FINE_BANDS
from utils.rasters import Grid

ALL_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
"""In the order of their numbers in ESA's XML."""
CLASS_OF_STATE = np.array([4, 6, 9, 0], np.uint8)
"""In the scene classification: vegetation, water, cloud, no data; by CLEAR, WATER, CLOUD, MISSING."""
NODE_STEP = 5000  # m
DETECTORS = ("5", "6")  # see the west and the east, both the node in the middle
BAND_ZENITH, BAND_AZIMUTH = 0.05, 0.5  # degrees between the views of neighbouring bands
JP2 = {"driver": "JP2OpenJPEG", "quality": "100", "reversible": "yes", "ycbcr420": "no"}


def write_safe(
    folder: Path,
    grid: Grid,
    when: datetime.date,
    reflectance: NDArray[np.int16],
    states: NDArray[np.uint8],
    angles: NDArray[np.float64],
    *,
    tile: str = "31TDL",
    sensor: str = "SENTINEL2A",
    baseline: str = "05.09",
    offset: int | None = -1000,
    quantification: int = 10_000,
    zipped: bool = False,
) -> Path:
    """Write a product in ESA's SAFE format.

    Args:
        folder: where to.
        grid: of 10 m, with an even number of rows and columns.
        when: date of sensing.
        reflectance: (band, row, column) x 10 000, of `BANDS`, NODATA where there is none; bands of 20 m get means of 2 x 2.
        states: (row, column), CLEAR, WATER, CLOUD or MISSING; the scene classification of 20 m gets the worst of 2 x 2.
        angles: (4,) or (4, row, column) at nodes 5 km apart: sun zenith, sun azimuth, view zenith, view azimuth in degrees.
        tile: name.
        sensor: SENTINEL2A, SENTINEL2B or SENTINEL2C.
        baseline: of the processing.
        offset: BOA_ADD_OFFSET of all bands, or None: no such element, as before baseline 04.00.
        quantification: numbers of reflectance 1.
        zipped: write a zip archive instead of a folder.

    Returns:
        The product.
    """
    moment = f"{when:%Y%m%d}T105031"
    short, level = f"S{sensor[-2:]}", f"N{baseline.replace('.', '')}"
    name = f"{short}_MSIL2A_{moment}_{level}_R051_T{tile}_{when:%Y%m%d}T140000.SAFE"
    root = folder / name
    granule = f"GRANULE/L2A_T{tile}_A012345_{moment}"
    images = {}
    for number, band in enumerate(BANDS):
        size = 10 if band in FINE_BANDS else 20
        values = reflectance[number] if size == 10 else means_of_blocks(reflectance[number])
        numbers = np.rint(values * (quantification / 10_000)) - (offset or 0)
        numbers = np.where(values == NODATA, 0, np.clip(numbers, 1, 65_535)).astype(np.uint16)
        images[_image_name(granule, tile, moment, band, size)] = numbers
    images[_image_name(granule, tile, moment, "SCL", 20)] = CLASS_OF_STATE[worst_of_blocks(states)]
    for image, numbers in images.items():
        _write_jp2(root / f"{image}.jp2", numbers, grid)
    tile_id = f"{short}_OPER_MSI_L2A_TL_2APS_{when:%Y%m%d}T140000_A012345_T{tile}_{level}"
    product = _product_xml(name, when, sensor, baseline, offset, quantification, list(images))
    _write_xml(root / "MTD_MSIL2A.xml", product, "Level-2A_User_Product")
    _write_xml(root / granule / "MTD_TL.xml", _tile_xml(tile_id, grid, angles), "Level-2A_Tile_ID")
    (root / "manifest.safe").write_text("<XFDU/>\n", encoding="utf-8")
    return zip_folder(root) if zipped else root


def zip_folder(folder: Path) -> Path:
    """Replace a product's folder by a zip archive that holds it."""
    archive = folder.with_name(f"{folder.name.removesuffix('.SAFE')}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


def means_of_blocks(values: NDArray[np.int16]) -> NDArray[np.int16]:
    """Means of blocks of 2 x 2 pixels, NODATA where one has none."""
    rows, columns = values.shape
    blocks = values.reshape(rows // 2, 2, columns // 2, 2)
    return np.where((blocks == NODATA).any((1, 3)), NODATA, np.rint(blocks.mean((1, 3)))).astype(np.int16)


def worst_of_blocks(states: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The worst state of blocks of 2 x 2 pixels."""
    assert CLEAR < WATER < CLOUD < MISSING
    rows, columns = states.shape
    return states.reshape(rows // 2, 2, columns // 2, 2).max((1, 3))


def _image_name(granule: str, tile: str, moment: str, band: str, size: int) -> str:
    digits = band if band[-1] in "AL" else f"B{int(band[1:]):02d}"
    return f"{granule}/IMG_DATA/R{size}m/T{tile}_{moment}_{digits}_{size}m"


def _write_jp2(path: Path, numbers: NDArray[np.uint8] | NDArray[np.uint16], grid: Grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = grid.height // numbers.shape[0]
    profile = {"count": 1, "dtype": numbers.dtype, "crs": grid.crs, "transform": grid.transform @ Affine.scale(factor)}
    with rasterio.open(path, "w", height=numbers.shape[0], width=numbers.shape[1], **profile, **JP2) as raster:
        raster.write(numbers, 1)


def element(name: str, /, *parts: Element | str | float, **attributes: str) -> Element:
    """An XML element with a text or with others in it."""
    result = Element(name, attributes)
    for part in parts:
        if isinstance(part, Element):
            result.append(part)
        else:
            result.text = str(part)
    return result


def _write_xml(path: Path, root: Element, name: str) -> None:
    """Write an ESA document, whose root alone has a namespace."""
    root.tag = f"n1:{name}"
    root.set("xmlns:n1", f"https://psd-14.sentinel2.eo.esa.int/PSD/{name}.xsd")
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="UTF-8", xml_declaration=True)


def _product_xml(
    name: str, when: datetime.date, sensor: str, baseline: str, offset: int | None, quantification: int, images: list[str]
) -> Element:
    information = element(
        "Product_Info",
        element("PRODUCT_URI", name),
        element("PROCESSING_LEVEL", "Level-2A"),
        element("PROCESSING_BASELINE", baseline),
        element(
            "Datatake",
            element("SPACECRAFT_NAME", f"Sentinel-{sensor[-2:]}"),
            element("DATATAKE_SENSING_START", f"{when.isoformat()}T10:50:31.024Z"),
        ),
        element("Product_Organisation", element("Granule", *(element("IMAGE_FILE", image) for image in images))),
    )
    numbers = [str(number) for number in range(len(ALL_BANDS))]
    characteristics = element(
        "Product_Image_Characteristics",
        element("QUANTIFICATION_VALUES_LIST", element("BOA_QUANTIFICATION_VALUE", quantification, unit="none")),
        element(
            "Spectral_Information_List",
            *(
                element("Spectral_Information", bandId=number, physicalBand=band)
                for number, band in zip(numbers, ALL_BANDS, strict=True)
            ),
        ),
    )
    if offset is not None:
        offsets = [element("BOA_ADD_OFFSET", offset, band_id=number) for number in numbers]
        characteristics.append(element("BOA_ADD_OFFSET_VALUES_LIST", *offsets))
    return element("", element("General_Info", information, characteristics))


def _tile_xml(tile_id: str, grid: Grid, angles: NDArray[np.float64]) -> Element:
    sizes, places = [], []
    for pixel in (10, 20):
        rows, columns = (10 * pixels // pixel for pixels in (grid.height, grid.width))
        sizes.append(element("Size", element("NROWS", rows), element("NCOLS", columns), resolution=str(pixel)))
        corner = [element("ULX", f"{grid.transform.c:.0f}"), element("ULY", f"{grid.transform.f:.0f}")]
        steps = [element("XDIM", pixel), element("YDIM", -pixel)]
        places.append(element("Geoposition", *corner, *steps, resolution=str(pixel)))
    code = element("HORIZONTAL_CS_CODE", f"EPSG:{grid.crs.to_epsg()}")
    nodes = angles_at_nodes(angles, grid)
    views = [
        element("Viewing_Incidence_Angles_Grids", *parts, bandId=str(ALL_BANDS.index(band)), detectorId=detector)
        for band, detector, parts in view_grids(nodes, ALL_BANDS)
    ]
    return element(
        "",
        element("General_Info", element("TILE_ID", tile_id)),
        element(
            "Geometric_Info",
            element("Tile_Geocoding", code, *sizes, *places),
            element("Tile_Angles", element("Sun_Angles_Grid", *angle_grids(nodes[0], nodes[1])), *views),
        ),
    )


def angles_at_nodes(angles: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Angles (4,) or (4, row, column) at the nodes of a grid, (4, row, column): 23 x 23 of a whole tile."""
    rows, columns = (-(-10 * pixels // NODE_STEP) + 1 for pixels in (grid.height, grid.width))
    return np.broadcast_to(angles.reshape(4, 1, 1) if angles.ndim == 1 else angles, (4, rows, columns))


def view_grids(nodes: NDArray[np.float64], bands: Sequence[str]) -> Iterator[tuple[str, str, list[Element]]]:
    """Bands, detectors and grids of their views, whose mean over the bands is that of the nodes."""
    columns = np.arange(nodes.shape[2])
    seen = (columns <= columns[-1] / 2, columns >= columns[-1] / 2)
    for number, band in enumerate(bands):
        away = number - (len(bands) - 1) / 2
        for detector, part in zip(DETECTORS, seen, strict=True):
            zenith = np.where(part, nodes[2] + BAND_ZENITH * away, np.nan)
            azimuth = np.where(part, (nodes[3] + BAND_AZIMUTH * away) % 360, np.nan)
            yield band, detector, angle_grids(zenith, azimuth)


def angle_grids(zenith: NDArray[np.float64], azimuth: NDArray[np.float64]) -> list[Element]:
    """Elements of zeniths and azimuths at nodes."""
    result = []
    for name, values in (("Zenith", zenith), ("Azimuth", azimuth)):
        rows = [element("VALUES", " ".join("NaN" if np.isnan(v) else f"{v:.6g}" for v in row)) for row in values]
        steps = [element(step, NODE_STEP, unit="m") for step in ("COL_STEP", "ROW_STEP")]
        result.append(element(name, *steps, element("Values_List", *rows)))
    return result
