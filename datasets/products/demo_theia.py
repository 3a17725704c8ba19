"""Simulated products of Theia: images written with the files, names and metadata of real ones.

`datasets.products.theia` reads them as it reads real ones.
"""

import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine

from datasets.canopy.catalogue import BANDS, NODATA
from datasets.products.demo_safe import (
    angle_grids,
    angles_at_nodes,
    element,
    means_of_blocks,
    view_grids,
    worst_of_blocks,
    zip_folder,
)
from datasets.products.product import CLOUD, MISSING, WATER
from datasets.products.safe import FINE_BANDS
from utils.rasters import Grid

ALL_CLOUDS = 1 | 2 | 16  # bits of CLM: clouds and shadows, clouds, clouds by thresholds
GROUND_WATER, GROUND_CLOUD = 1, 2  # bits of MG2


def write_theia(
    folder: Path,
    grid: Grid,
    when: datetime.date,
    reflectance: NDArray[np.int16],
    states: NDArray[np.uint8],
    angles: NDArray[np.float64],
    *,
    tile: str = "31TDL",
    sensor: str = "SENTINEL2A",
    quantification: int = 10_000,
    zipped: bool = False,
) -> Path:
    """Write a product in the format of Theia and MAJA; arguments as of `datasets.products.demo_safe.write_safe`."""
    name = f"{sensor}_{when:%Y%m%d}-105031-024_L2A_T{tile}_C_V3-1"
    root = folder / name
    (root / "MASKS").mkdir(parents=True)
    for number, band in enumerate(BANDS):
        values = reflectance[number] if band in FINE_BANDS else means_of_blocks(reflectance[number])
        numbers = np.where(values == NODATA, NODATA, np.rint(values * (quantification / 10_000)))
        _write_tif(root / f"{name}_FRE_{band}.tif", numbers.astype(np.int16), grid)
    for resolution, codes in (("R1", states), ("R2", worst_of_blocks(states))):
        masks = {
            "CLM": np.where(codes == CLOUD, ALL_CLOUDS, 0),
            "MG2": np.select([codes == WATER, codes == CLOUD], [GROUND_WATER, GROUND_CLOUD], 0),
            "EDG": codes == MISSING,
        }
        for kind, mask in masks.items():
            _write_tif(root / "MASKS" / f"{name}_{kind}_{resolution}.tif", mask.astype(np.uint8), grid)
    document = _metadata(name, when, tile, sensor, quantification, grid, angles)
    ElementTree.indent(document)
    ElementTree.ElementTree(document).write(root / f"{name}_MTD_ALL.xml", encoding="UTF-8", xml_declaration=True)
    return zip_folder(root) if zipped else root


def _write_tif(path: Path, numbers: NDArray[Any], grid: Grid) -> None:
    factor = grid.height // numbers.shape[0]
    profile = {"count": 1, "dtype": numbers.dtype, "crs": grid.crs, "transform": grid.transform @ Affine.scale(factor)}
    size = {"height": numbers.shape[0], "width": numbers.shape[1]}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", **size, **profile) as raster:
        raster.write(numbers, 1)


def _metadata(
    name: str, when: datetime.date, tile: str, sensor: str, quantification: int, grid: Grid, angles: NDArray[np.float64]
) -> Element:
    nodes = angles_at_nodes(angles, grid)
    place = {"ULX": grid.transform.c, "ULY": grid.transform.f, "XDIM": 10, "YDIM": -10, "NROWS": grid.height}
    place |= {"NCOLS": grid.width}
    views = {band: element("Band_Viewing_Incidence_Angles_Grids_List", band_id=band) for band in BANDS}
    for band, detector, parts in view_grids(nodes, BANDS):
        views[band].append(element("Viewing_Incidence_Angles_Grids", *parts, detector_id=f"{detector:0>2}"))
    return element(
        "Muscate_Metadata_Document",
        element(
            "Dataset_Identification", element("IDENTIFIER", name), element("GEOGRAPHICAL_ZONE", f"T{tile}", type="Tile")
        ),
        element(
            "Product_Characteristics",
            element("ACQUISITION_DATE", f"{when.isoformat()}T10:50:31.024Z"),
            element("PRODUCT_VERSION", "3.1"),
            element("PRODUCT_LEVEL", "L2A"),
            element("PLATFORM", sensor),
        ),
        element(
            "Geoposition_Informations",
            element("Horizontal_Coordinate_System", element("HORIZONTAL_CS_CODE", grid.crs.to_epsg())),
            element(
                "Group_Geopositioning_List",
                element(
                    "Group_Geopositioning", *(element(key, f"{value:.0f}") for key, value in place.items()), group_id="R1"
                ),
            ),
        ),
        element(
            "Radiometric_Informations",
            element("REFLECTANCE_QUANTIFICATION_VALUE", quantification),
            element("Special_Values_List", element("SPECIAL_VALUE", NODATA, name="nodata")),
        ),
        element(
            "Geometric_Informations",
            element(
                "Angles_Grids_List",
                element("Sun_Angles_Grids", *angle_grids(nodes[0], nodes[1])),
                element("Viewing_Incidence_Angles_Grids_List", *views.values()),
            ),
        ),
    )
