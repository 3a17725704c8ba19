"""A simulated static STAC catalogue of images, as Earth Search describes its own, with their rasters beside it.

`datasets.products.stac` reads it as it reads real ones.
"""

import datetime
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import rasterio
import rasterio.warp
from numpy.typing import NDArray

from datasets.canopy.catalogue import BANDS
from datasets.products.demo_safe import write_safe
from datasets.products.safe import FINE_BANDS
from datasets.products.stac import ASSETS
from utils.rasters import Grid

COLLECTION = "sentinel-2-l2a"


def write_stac(
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
    applied: bool | None = False,
    stated: float | None = -0.1,
) -> Path:
    """Add an item to a static catalogue, which is begun if need be; arguments as of `write_safe`, and:

    Args:
        folder: of the catalogue.
        grid: of 10 m.
        when: date of sensing.
        reflectance: (band, row, column) x 10 000.
        states: (row, column).
        angles: (4,) or (4, row, column) at nodes.
        tile: name.
        sensor: as SENTINEL2A.
        baseline: of the processing.
        offset: what the numbers of the rasters really carry.
        applied: `earthsearch:boa_offset_applied`, or None: it is not there.
        stated: offset in `raster:bands`, or None: it is not there.

    Returns:
        The catalogue's file.
    """
    name = f"S{sensor[-2:]}_{tile}_{when:%Y%m%d}_0_L2A"
    place = folder / name
    place.mkdir(parents=True)
    settings: dict[str, Any] = {"tile": tile, "sensor": sensor, "baseline": baseline, "offset": offset}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        safe = write_safe(Path(temporary), grid, when, reflectance, states, angles, **settings)
        for path in safe.rglob("*_?0m.jp2"):
            _copy(path, place / f"{path.stem.split('_')[-2]}.tif")
        shutil.copy(next(safe.rglob("MTD_TL.xml")), place / "granule_metadata.xml")
    left, bottom, right, top = rasterio.transform.array_bounds(grid.height, grid.width, grid.transform)
    bounds = list(rasterio.warp.transform_bounds(grid.crs, "EPSG:4326", left, bottom, right, top))
    west, south, east, north = bounds
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    moment = datetime.datetime.combine(when, datetime.time(10, 50, 31), datetime.UTC)
    properties: dict[str, Any] = {"platform": f"sentinel-{sensor[-2:].lower()}", "grid:code": f"MGRS-{tile}"}
    properties |= {"s2:processing_baseline": baseline} if baseline else {}
    properties |= {} if applied is None else {"earthsearch:boa_offset_applied": applied}
    item = pystac.Item(name, {"type": "Polygon", "coordinates": [ring]}, bounds, moment, properties)
    for band in (*BANDS, "SCL"):
        digits = band if band[-1] in "AL" else f"B{int(band[1:]):02d}"
        meaning: dict[str, Any] = {"nodata": 0, "spatial_resolution": 10 if band in FINE_BANDS else 20}
        if band != "SCL" and stated is not None:
            meaning |= {"scale": 0.0001, "offset": stated}
        asset = pystac.Asset(f"./{digits}.tif", media_type=pystac.MediaType.COG, extra_fields={"raster:bands": [meaning]})
        item.add_asset(ASSETS[band][0], asset)
    item.add_asset("granule_metadata", pystac.Asset("./granule_metadata.xml", media_type=pystac.MediaType.XML))
    path = folder / "catalog.json"
    catalogue = pystac.Catalog.from_file(path) if path.exists() else pystac.Catalog(COLLECTION, "Simulated images")
    catalogue.add_item(item)
    catalogue.normalize_hrefs(str(folder))
    catalogue.save(pystac.CatalogType.SELF_CONTAINED)
    return path


def _copy(source: Path, target: Path) -> None:
    """Copy a JP2 file as a tiled GeoTIFF."""
    with rasterio.open(source) as raster:
        profile = {"count": 1, "dtype": raster.dtypes[0], "crs": raster.crs, "transform": raster.transform, "nodata": 0}
        with rasterio.open(
            target, "w", driver="GTiff", height=raster.height, width=raster.width, compress="deflate", **profile
        ) as copy:
            copy.write(raster.read())
