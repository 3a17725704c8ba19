"""A simulated landscape of grassland parcels: a GeoTIFF a step, as satellite products come, to try maps on.

Parcels are the cells nearest to random points; each has the series of a plot of a simulated table
(`datasets.demo_table`), with noise from pixel to pixel. A pond, which no plot of the table is like, lies outside the area of
applicability of what is trained on the table, and beyond the edge of the satellite's swath there is no data.
"""

import datetime
import functools
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from datasets.demo_table import STEP_DAYS, simulate_table
from datasets.published_grassland import BANDS, STEPS
from utils.runs import whole_file

SEED = 2027
YEAR = 2020
HEIGHT, WIDTH = 240, 320  # pixels of 10 m
PARCELS = 160
NOISE = 0.02  # relative, of neighbouring pixels alike
NODATA = 0
#                 blue green  red nir nirb re1 re2 re3 swir1 swir2
WATER = np.array([500, 450, 300, 180, 190, 260, 220, 210, 90, 60])  # reflectance x 10 000


def simulate_rasters(folder: Path) -> None:
    """Write a GeoTIFF of ten bands (uint16, reflectance x 10 000) for each of the 16 steps, unless they are there."""
    dates = [datetime.date(YEAR, 1, 1) + datetime.timedelta(days=int(day) - 1) for day in STEP_DAYS]
    files = [folder / f"simulated_{date:%Y%m%d}.tif" for date in dates]
    if all(file.exists() for file in files):
        return
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": len(BANDS), "dtype": "uint16", "nodata": NODATA}
    profile |= {"crs": CRS.from_epsg(32632), "transform": Affine(10, 0, 560_000, 0, -10, 5_370_000)}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256}
    for file, image in zip(files, simulate_images(), strict=True):
        with whole_file(file) as beside, rasterio.open(beside, "w", **profile) as raster:
            raster.write(image)
            raster.descriptions = BANDS


@functools.cache
def simulate_images() -> NDArray[np.uint16]:
    """(step, band, row, column), reflectance x 10 000, 0 where there is no data."""
    rng = np.random.default_rng(SEED)
    table = simulate_table(SEED)
    series = table[table["year"] == YEAR].iloc[:, -STEPS * len(BANDS) :].to_numpy().reshape(-1, STEPS, len(BANDS))
    row, column = np.indices((HEIGHT, WIDTH))
    points = rng.uniform((0, 0), (HEIGHT, WIDTH), (PARCELS, 2))
    parcel = cKDTree(points).query(np.stack([row, column], axis=-1))[1]
    images = series[rng.integers(len(series), size=PARCELS)][parcel].transpose(2, 3, 0, 1)
    noise = gaussian_filter(rng.normal(size=images.shape), (0, 0, 1.5, 1.5))
    images = images * (1 + NOISE * noise / noise.std())
    pond = ((row - 150) / 28) ** 2 + ((column - 215) / 42) ** 2 < 1 + 0.3 * np.sin(np.arctan2(row - 150, column - 215) * 3)
    images[:, :, pond] = WATER[:, None] * (1 + 0.05 * rng.normal(size=(STEPS, len(BANDS), 1)))
    images = np.clip(np.rint(images), 1, 10_000)
    images[:, :, column < 45 - 0.3 * row] = NODATA
    return images.astype(np.uint16)
