"""Sentinel-2 Level-2A images of a SpatioTemporal Asset Catalog: a static catalogue, an item collection, or an API.

The items' own rasters are read by windows through rasterio, as those of every other product are; odc-stac, which loads
whole cubes, would be a second way beside it. An item needs an asset for each of the 10 bands and for the scene
classification. Names of Earth Search, of the Planetary Computer and of the Copernicus Data Space are known. Angles come from
the asset of the tile's metadata (MTD_TL.xml), or from the item's properties of the view extension.

What the numbers mean, of the first that applies:

1. `earthsearch:boa_offset_applied` is true: the offset is in the numbers already.
2. The processing baseline (`processing:baseline`, `s2:processing_baseline`, `processing:version`) is before 04.00: none.
3. The asset states an offset (`raster:bands`, `raster:offset`): that.
4. The baseline is 04.00 or later: -0.1, that is -1000.
5. Otherwise the item is refused.

The scale is what the asset states, else 0.0001. Catalogues are wrong in places; what contradicts the darkest pixels is said.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pystac
import requests
from numpy.typing import NDArray
from pystac.utils import make_absolute_href
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from rasterio.crs import CRS
from rasterio.windows import Window
from tqdm import tqdm

from datasets.canopy.catalogue import BANDS
from datasets.products.angles import esa_angles
from datasets.products.packages import parse_xml
from datasets.products.product import Band, Product, check_grid, grid_of, open_raster, read_codes
from datasets.products.safe import FINE_BANDS, STATES_OF_CLASSES, UNIT
from utils.errors import InputError

ASSETS = {
    "B2": ("blue", "B02", "B02_10m", "B2"),
    "B3": ("green", "B03", "B03_10m", "B3"),
    "B4": ("red", "B04", "B04_10m", "B4"),
    "B5": ("rededge1", "B05", "B05_20m", "B5"),
    "B6": ("rededge2", "B06", "B06_20m", "B6"),
    "B7": ("rededge3", "B07", "B07_20m", "B7"),
    "B8": ("nir", "B08", "B08_10m", "B8"),
    "B8A": ("nir08", "B8A", "B8A_20m"),
    "B11": ("swir16", "B11", "B11_20m"),
    "B12": ("swir22", "B12", "B12_20m"),
    "SCL": ("scl", "SCL", "SCL_20m"),
    "metadata": ("granule_metadata", "granule-metadata", "granule-metadata-xml"),
}
"""Names of the assets in use, the first that an item has."""
APPLIED = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
BASELINES = ("processing:baseline", "s2:processing_baseline", "processing:version", "sentinel:processing_baseline")
FIRST_WITH_OFFSET = 4.0
SCALE, OFFSET = 0.0001, -0.1
DARK_BANDS = ("B4", "B12")
"""Dark over vegetation, and over water: their darkest pixels have a reflectance of a few hundredths at most."""
DARKEST = 1  # percentile of the pixels
BRIGHT, NEGATIVE = 1000, -200  # reflectance x 10 000 of the darkest pixels, from which on the offset is doubtful
THUMBNAIL = 256  # pixels of a side that the darkest are looked for among
TIMEOUT, RETRIES = 60, 3  # seconds for an answer, and tries
THREADS = 8  # for opening files, which mostly waits for the network
QUERY = ("collections", "ids", "bbox", "datetime", "query", "filter", "intersects")
"""What an address may ask an API for."""
FAILURES = (APIError, pystac.STACError, requests.RequestException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class StacProduct(Product):
    """An item of a catalogue.

    Attributes:
        classes: address of the scene classification.
        metadata: address of MTD_TL.xml, or nothing.
        mean_angles: sun zenith, sun azimuth, view zenith, view azimuth of the whole item in degrees, each may be None.
    """

    classes: str
    metadata: str
    mean_angles: tuple[float | None, ...]

    def states(self, window: Window) -> NDArray[np.uint8]:
        """As `Product` says."""
        return STATES_OF_CLASSES[read_codes(self.classes, self.name, window, 2, 0)]

    def angles(self, points: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:
        """As `Product` says."""
        if not self.metadata:
            return np.tile(np.array(self.mean_angles, dtype=np.float64), (len(points), 1))
        try:
            content = _io().read_text(self.metadata).encode()
        except FAILURES as error:
            raise InputError(f"{self.metadata} of {self.name} cannot be read: {error}") from error
        root = parse_xml(content, self.metadata, "Level-2A_Tile_ID")
        corner = (self.grid.transform.c, self.grid.transform.f)
        return esa_angles(root, self.grid.crs, corner, self.metadata).at(points, crs)


def find_items(
    address: str, years: Collection[int], say: Callable[[str], None], bounds: tuple[float, ...] | None = None
) -> list[Product]:
    """Products of the items that an address leads to.

    Args:
        address: path or URL of a catalogue, collection, item collection or item; or the URL of an API with what it is asked
            for, as https://earth-search.aws.element84.com/v1?collections=sentinel-2-l2a&bbox=2.1,45.6,2.2,45.7.
        years: of the items that are used; of all if empty.
        say: takes lines on items whose offset is doubtful.
        bounds: west, south, east, north in degrees that items must touch.

    Raises:
        InputError: the catalogue or an item cannot be read or is not as this module says.
    """
    try:
        found = list(_search(address, years, bounds) if urlsplit(address).query else _static(address))
    except FAILURES as error:
        raise InputError(f"{address} cannot be read as a STAC catalogue: {_line(error)}") from error
    wanted = [item for item in found if _touches(item, bounds) and (not years or _year(item) in years)]
    products: list[Product] = []
    doubts: dict[bool, list[str]] = {}
    for item in tqdm(wanted, "Reading items...", unit="item", leave=False, disable=not wanted):
        product = _product(item, address)
        products.append(product)
        if doubt := _doubt(product):
            doubts.setdefault(product.bands[0].add < 0, []).append(f"{item.id} for example: {doubt}")
    for lines in doubts.values():
        say(f"Doubtful offset of {len(lines)} of {len(products)} items, {lines[0]}")
    return products


def _io() -> StacApiIO:
    """What reads documents, from files and from the web, where it has patience and tries several times."""
    return StacApiIO(timeout=TIMEOUT, max_retries=RETRIES)


def _static(address: str) -> Iterator[pystac.Item]:
    """Items of a catalogue of files."""
    document = json.loads(_io().read_text(address))
    kind = document.get("type")
    if kind == "FeatureCollection":
        for item in pystac.ItemCollection.from_dict(document, preserve_dict=False):
            if item.get_self_href() is None:
                item.set_self_href(make_absolute_href(f"{item.id}.json", address))
            yield item
    elif kind == "Feature":
        yield pystac.Item.from_file(address, stac_io=_io())
    elif "conformsTo" in document:
        raise InputError(
            f"{address} is a STAC API; what to ask it for is expected behind it, as "
            f"{address.rstrip('/')}?collections=sentinel-2-l2a&bbox=west,south,east,north"
        )
    elif kind in ("Catalog", "Collection"):
        yield from pystac.Catalog.from_file(address, stac_io=_io()).get_items(recursive=True)
    else:
        raise InputError(f"{address} is no STAC catalogue, collection or item: its type is {kind}")


def _search(address: str, years: Collection[int], bounds: tuple[float, ...] | None) -> Iterator[pystac.Item]:
    """Items that an API has for the query of an address."""
    parts = urlsplit(address)
    asked: dict[str, Any] = {name: values[0] for name, values in parse_qs(parts.query).items()}
    unknown = sorted(set(asked) - set(QUERY))
    if unknown:
        raise InputError(f"{address} asks for {unknown[0]}; known are {', '.join(QUERY)}")
    if "collections" not in asked:
        raise InputError(f"{address} names no collections=..., as collections=sentinel-2-l2a")
    if bounds and not {"bbox", "intersects", "ids"} & set(asked):
        asked["bbox"] = list(bounds)
    if not {"bbox", "intersects", "ids"} & set(asked):
        raise InputError(f"{address} says nothing of the place: bbox=west,south,east,north is expected, in degrees")
    if len(str(asked.get("bbox", "1,2,3,4")).split(",")) != 4:
        raise InputError(f"{address}: bbox=west,south,east,north is expected, four numbers in degrees")
    for name in ("collections", "ids"):
        asked |= {name: asked[name].split(",")} if name in asked else {}
    if years and "datetime" not in asked:
        asked["datetime"] = f"{min(years)}-01-01T00:00:00Z/{max(years)}-12-31T23:59:59Z"
    for name in ("query", "intersects"):
        asked |= {name: json.loads(asked[name])} if name in asked else {}
    base = parts._replace(query="", path=parts.path.rstrip("/").removesuffix("/search")).geturl()
    yield from Client.open(base, stac_io=_io()).search(**asked).items()


def _year(item: pystac.Item) -> int | None:
    return None if item.datetime is None else item.datetime.year


def _touches(item: pystac.Item, bounds: tuple[float, ...] | None) -> bool:
    if bounds is None or item.bbox is None:
        return True
    half = len(item.bbox) // 2
    (west, south), (east, north) = item.bbox[:2], item.bbox[half : half + 2]
    return bool(west <= bounds[2] and east >= bounds[0] and south <= bounds[3] and north >= bounds[1])


def _product(item: pystac.Item, address: str) -> Product:
    """An item's product, checked to be whole."""
    if item.datetime is None:
        raise InputError(f"{item.id} of {address} has no datetime")
    hrefs = {band: _href(item, band, address) for band in (*BANDS, "SCL")}
    bands, baseline = [], _baseline(item)
    for band in BANDS:
        gain, add = _meaning(item, band, baseline, address)
        bands.append(Band(hrefs[band], 1, gain, add, 0, 1 if band in FINE_BANDS else 2))
    with open_raster(hrefs[BANDS[0]], item.id) as raster:
        grid, block = grid_of(raster, item.id), int(raster.block_shapes[0][0])

    def check(band: str) -> None:
        with open_raster(hrefs[band], item.id) as raster:
            check_grid(raster, grid, 1 if band in FINE_BANDS else 2, hrefs[BANDS[0]])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, (*BANDS[1:], "SCL")))
    metadata = next((name for name in ASSETS["metadata"] if name in item.assets), None)
    return StacProduct(
        name=item.id,
        path=item.get_self_href() or address,
        date=item.datetime.date(),
        tile=_tile(item),
        sensor=str(item.properties.get("platform", "")).upper().replace("-", ""),
        grid=grid,
        bands=tuple(bands),
        files=(*(band.path for band in bands), hrefs["SCL"]),
        block=block,
        baseline="" if baseline is None else f"{baseline:05.2f}",
        sensed=item.datetime.isoformat(),
        classes=hrefs["SCL"],
        metadata="" if metadata is None else _absolute(item, metadata, address),
        mean_angles=_mean_angles(item),
    )


def _href(item: pystac.Item, band: str, address: str) -> str:
    """Where the asset of a band is."""
    name = next((name for name in ASSETS[band] if name in item.assets), None)
    if name is None:
        raise InputError(f"{item.id} of {address} has no asset of {band}; expected is one of {', '.join(ASSETS[band])}")
    return _absolute(item, name, address)


def _absolute(item: pystac.Item, asset: str, address: str) -> str:
    return make_absolute_href(item.assets[asset].href, item.get_self_href() or address)


def _baseline(item: pystac.Item) -> float | None:
    for name in BASELINES:
        if name in item.properties:
            try:
                return float(item.properties[name])
            except (TypeError, ValueError):
                continue
    return None


def _meaning(item: pystac.Item, band: str, baseline: float | None, address: str) -> tuple[float, float]:
    """Gain and addition of an asset's numbers for reflectance x 10 000."""
    asset = item.assets[next(name for name in ASSETS[band] if name in item.assets)].extra_fields
    stated = {f"raster:{name}": value for name, value in (asset.get("raster:bands") or [{}])[0].items()}
    stated |= (asset.get("bands") or [{}])[0] | {name: asset[name] for name in asset if name.startswith("raster:")}
    scale, offset = stated.get("raster:scale", SCALE), stated.get("raster:offset")
    applied = next((item.properties[name] for name in APPLIED if name in item.properties), None)
    if applied is True or (baseline is not None and baseline < FIRST_WITH_OFFSET):
        offset = 0.0
    elif offset is None and baseline is not None:
        offset = OFFSET
    if offset is None:
        raise InputError(
            f"{item.id} of {address} says neither the offset of {band} (raster:bands) nor the processing baseline "
            f"(processing:baseline), nor that it is applied (earthsearch:boa_offset_applied)"
        )
    return round(UNIT * float(scale), 9), round(UNIT * float(offset), 6)


def _doubt(product: Product) -> str:
    """Why a product's offset is doubtful by its darkest pixels, or nothing."""
    darkest = []
    for name in DARK_BANDS:
        band = product.bands[BANDS.index(name)]
        with open_raster(band.path, product.name) as raster:
            size = tuple(min(THUMBNAIL, side) for side in raster.shape)
            numbers = raster.read(1, out_shape=size)
        numbers = numbers[numbers != band.nodata]
        if numbers.size:
            darkest.append(float(np.percentile(numbers, DARKEST)) * band.gain + band.add)
    if not darkest:
        return ""
    bands, lowest, add = " and ".join(DARK_BANDS), f"{min(darkest) / UNIT:.2f}", product.bands[0].add
    if add < 0 and min(darkest) < NEGATIVE:
        return f"with {add / UNIT:g}, the darkest pixels of {bands} have reflectance {lowest}; it may be applied already"
    if add == 0 and min(darkest) > BRIGHT:
        return f"without one, the darkest pixels of {bands} have reflectance {lowest}; it may not be applied yet"
    return ""


def _tile(item: pystac.Item) -> str:
    names = ("grid:code", "s2:mgrs_tile", "s2:tile_id")
    found = (re.search(r"(\d\d[A-Z]{3})(?![0-9A-Z])", str(item.properties.get(name, ""))) for name in names)
    return next((match[1] for match in found if match), "")


def _mean_angles(item: pystac.Item) -> tuple[float | None, ...]:
    properties = item.properties
    elevation = properties.get("view:sun_elevation")
    sun = (None if elevation is None else 90 - elevation, properties.get("view:sun_azimuth"))
    view = (properties.get("view:incidence_angle"), properties.get("view:azimuth"))
    return tuple(None if angle is None else float(angle) for angle in (*sun, *view))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_stac(path: Path) -> str:
    """The document of a catalogue that a path leads to, or nothing."""
    if path.is_dir():
        return next((str(path / name) for name in ("catalog.json", "collection.json") if (path / name).is_file()), "")
    return str(path) if path.suffix.lower() in (".json", ".geojson") else ""
