"""What belongs to a map of heights: its picture, its STAC item, its area, the steps between its cells."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.warp import transform_geom
from rasterio.windows import Window

from utils.canopy.plots import HEIGHT_STEP, MISSING
from utils.plots import COLUMN, MM, paper_style, wrapped
from utils.runs import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_SIDE = 1200  # pixels at most
MEDIA_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"


@paper_style()
def quick_look(path: Path, title: str) -> "Figure":
    """The first layer of a map in metres, with its colour bar and coordinates; hatched where nothing is mapped."""
    from matplotlib.figure import Figure

    with rasterio.open(path) as raster:
        shrink = max(1.0, max(raster.shape) / PICTURE_SIDE)
        shape = (max(1, round(raster.height / shrink)), max(1, round(raster.width / shrink)))
        heights = raster.scales[0] * raster.read(1, out_shape=shape, resampling=Resampling.average, masked=True)
        bounds, crs = raster.bounds, raster.crs.to_string()
    high = HEIGHT_STEP * max(1, math.ceil(np.percentile(heights.compressed(), 99) / HEIGHT_STEP))
    figure = Figure(figsize=(COLUMN, min(2 * COLUMN, 0.72 * COLUMN * shape[0] / shape[1] + 18 * MM)))
    axes = figure.add_subplot()
    axes.patch.set(**MISSING)
    extent = (bounds.left / 1000, bounds.right / 1000, bounds.bottom / 1000, bounds.top / 1000)
    shown = axes.imshow(heights, extent=extent, cmap="viridis", vmin=0, vmax=high, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="height (m)", extend="max", fraction=0.046)
    axes.set(xlabel=f"easting (km, {crs})", ylabel="northing (km)")
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(nbins=5)
    axes.spines[:].set_visible(True)
    axes.set_title(wrapped(title, 55), fontsize=8)
    return figure


def mapped_area(path: Path) -> float:
    """Square kilometres of a map's first layer that are not nodata."""
    with rasterio.open(path) as raster:
        pixels = sum(int((raster.read(1, window=window) != raster.nodata).sum()) for _, window in raster.block_windows(1))
        return float(pixels * abs(raster.transform.a * raster.transform.e) / 1e6)


def steps_between_cells(
    path: Path, chosen: Mapping[str, Sequence[int]], area: tuple[int, int, int, int], cell: int
) -> dict[str, float]:
    """How much heights change across the borders of cells that have other dates, and a pixel beside the border.

    Args:
        path: of the heights.
        chosen: images of each cell, by `row_column`.
        area: first row and column, rows and columns of the map in image pixels.
        cell: side of the cells in image pixels.

    Returns:
        pixels: pairs of neighbours across such a border; across_m and beside_m: mean absolute differences of neighbours.
    """
    top, left, rows, columns = area
    sums, counts = np.zeros(2), np.zeros(2)
    with rasterio.open(path) as raster:
        factor = raster.height // rows
        for name, images in chosen.items():
            row, column = (int(part) for part in name.split("_"))
            first_row, first_column = max(row * cell, top) - top, max(column * cell, left) - left
            height, width = (
                min((row + 1) * cell - top, rows) - first_row,
                min((column + 1) * cell - left, columns) - first_column,
            )
            below, right = (
                Window(first_column, first_row + height, width, 0),
                Window(first_column + width, first_row, 0, height),
            )
            for neighbour, border in ((f"{row + 1}_{column}", below), (f"{row}_{column + 1}", right)):
                if list(chosen.get(neighbour, images)) == list(images):
                    continue
                strip = _around_border(raster, border, factor)
                for kind, places in enumerate(((1,), (0, 2))):
                    for place in places:
                        step = np.abs(strip[place + 1] - strip[place])
                        sums[kind] += np.nansum(step)
                        counts[kind] += np.isfinite(step).sum()
    means = np.divide(sums, counts, out=np.full(2, np.nan), where=counts > 0)
    return {"pixels": float(counts[0]), "across_m": float(means[0]), "beside_m": float(means[1])}


def _around_border(raster: rasterio.io.DatasetReader, border: Window, factor: int) -> NDArray[np.float64]:
    """Two pixels on either side of a border: (4, pixel along the border), metres."""
    down = border.height == 0
    window = Window(
        factor * border.col_off - (0 if down else 2),
        factor * border.row_off - (2 if down else 0),
        factor * border.width if down else 4,
        4 if down else factor * border.height,
    )
    values = raster.read(1, window=window, masked=True, boundless=True).astype(np.float64).filled(np.nan) * raster.scales[0]
    return values if down else values.T


def write_stac_item(path: Path, files: Sequence[Path], days: Sequence[str], tags: Mapping[str, str]) -> None:
    """Describe the files of a map as a STAC item, whose assets lie beside it."""
    import pystac

    with rasterio.open(files[0]) as raster:
        left, bottom, right, top = raster.bounds
        ring = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
        geometry = transform_geom(raster.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]}, precision=6)
        code, shape, transform = raster.crs.to_string(), list(raster.shape), list(raster.transform)[:6]
    longitudes, latitudes = zip(*geometry["coordinates"][0], strict=True)
    start, end = (datetime.fromisoformat(day).replace(tzinfo=UTC) for day in (days[0], days[-1]))
    item = pystac.Item(
        id=f"canopy-height-{tags['images_sha256'][:12]}-{tags['weights_sha256'][:12]}",
        geometry=geometry,
        bbox=[min(longitudes), min(latitudes), max(longitudes), max(latitudes)],
        datetime=None,
        start_datetime=start,
        end_datetime=end,
        properties={"proj:code": code, "proj:shape": shape, "proj:transform": transform, **dict(tags)},
        stac_extensions=["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
    )
    for file in files:
        with rasterio.open(file) as raster:
            described = zip(raster.descriptions, raster.units, raster.scales, strict=True)
            bands = [
                {
                    "name": name,
                    "nodata": raster.nodata,
                    "data_type": raster.dtypes[0],
                    "unit": unit or "1",
                    "raster:scale": scale,
                }
                for name, unit, scale in described
            ]
        asset = pystac.Asset(file.name, media_type=MEDIA_TYPE, roles=["data"], extra_fields={"bands": bands})
        item.add_asset(file.stem, asset)
    item.add_asset("thumbnail", pystac.Asset("height.png", media_type=pystac.MediaType.PNG, roles=["thumbnail"]))
    item.set_self_href(path.name)
    write_json(path, item.to_dict(include_self_link=False))
