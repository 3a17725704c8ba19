"""Simulated products of a grassland, and places in it: what series-inputs runs on where nothing is given.

A landscape of parcels, each with the season of a plot of the simulated grassland table (`datasets.demo_table`), seen every
ten days through clouds: 21 products in ESA's SAFE format, written as `datasets.products.demo` writes them. The places are
round plots, one a parcel, with the diversity of their plants.
"""

import datetime
import logging
from pathlib import Path

import geopandas
import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

from datasets.canopy.demo import sun_angles
from datasets.demo_table import simulate_season
from datasets.products import CLEAR, CLOUD
from datasets.products.demo_safe import write_safe
from datasets.published_grassland import BANDS
from utils.rasters import Grid
from utils.simulated import simulated_folder

SIMULATION = 1  # version, part of the folder's name: raise it with every change of the files
SEED = 2028
YEAR = 2020
TILE = "32UNU"
GRID = Grid(CRS.from_epsg(32632), Affine(10, 0, 530_000, 0, -10, 5_360_000), 200, 240)
EVERY = 2  # of the simulated dates
RADIUS = 25.0  # m, of a plot
EDGE = 40.0  # m, least distance of a plot's centre from the edge of the landscape
CLOUD_LENGTH = 25.0  # pixels
CLEAR_SKY, OVERCAST = 0.35, 0.15  # shares of dates without a cloud and without a clear pixel
BRIGHTNESS = 6000  # of clouds, reflectance x 10 000
GAIN_NOISE, PIXEL_NOISE = 0.02, 0.02  # relative, sd: of an image and of a pixel
VIEW = (4.0, 104.0)  # degrees, zenith and azimuth
ESA_ORDER = [BANDS.index(name) for name in ("blue", "green", "red", "re1", "re2", "re3", "nirb", "nir", "swir1", "swir2")]


def demo_inputs(folder: Path) -> tuple[Path, Path]:
    """Simulate products and places, completely or not at all, unless they exist.

    Args:
        folder: parent of the folder that is made.

    Returns:
        The folder of products, and the file of places.

    Raises:
        InputError: the folder cannot be written.
    """
    root = simulated_folder(folder / f"demo_series_v{SIMULATION}", _simulate, "products")
    return root / "products", root / "places.gpkg"


def _simulate(root: Path) -> None:
    rng = np.random.default_rng(SEED)
    plots, days, seasons = simulate_season(YEAR, SEED)
    size = np.array([GRID.width, GRID.height]) * GRID.transform.a
    centres = _spread(rng, size, len(plots))
    column, row = np.meshgrid(np.arange(GRID.width) + 0.5, np.arange(GRID.height) + 0.5)
    parcel = cKDTree(centres).query(np.stack([column, row], axis=-1) * GRID.transform.a)[1]
    corner = np.array([GRID.transform.c, GRID.transform.f - size[1]])
    points = geopandas.points_from_xy(*(corner + np.array([0, size[1]]) + centres * (1, -1)).T)
    places = geopandas.GeoDataFrame(plots, geometry=points, crs=GRID.crs.to_wkt())
    places.geometry = places.buffer(RADIUS)
    logging.getLogger("pyogrio").setLevel(logging.WARNING)  # Guild shows all information that is logged
    places.to_file(root / "places.gpkg", layer="places")
    for date in tqdm(range(0, len(days), EVERY), "Simulating products...", unit="product", leave=False):
        states = _states(rng)
        surface = seasons[:, date, ESA_ORDER].T[:, parcel] * (1 + GAIN_NOISE * rng.normal(size=(len(ESA_ORDER), 1, 1)))
        surface = surface * (1 + PIXEL_NOISE * rng.normal(size=surface.shape))
        surface = np.where(states == CLOUD, BRIGHTNESS, surface)
        when = datetime.date(YEAR, 1, 1) + datetime.timedelta(days=int(days[date]) - 1)
        angles = np.array([*sun_angles(int(days[date]) - 1), *VIEW])
        write_safe(root / "products", GRID, when, np.rint(surface).astype(np.int16), states, angles, tile=TILE)


def _spread(rng: np.random.Generator, size: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """(point, 2) points well apart: of random candidates each time the one furthest from the others."""
    points = [size / 2]
    for _ in range(count - 1):
        candidates = rng.uniform(EDGE, size - EDGE, (20, 2))
        points.append(candidates[cKDTree(points).query(candidates)[0].argmax()])
    return np.array(points)


def _states(rng: np.random.Generator) -> NDArray[np.uint8]:
    """CLEAR or CLOUD of each pixel of an image."""
    field = gaussian_filter(rng.normal(size=(GRID.height, GRID.width)), CLOUD_LENGTH)
    sky = rng.uniform()
    cover = 0.0 if sky < CLEAR_SKY else 1.0 if sky > 1 - OVERCAST else rng.uniform(0.1, 0.9)
    cloudy = field <= np.quantile(field, cover) if cover else np.zeros(field.shape, dtype=bool)
    return np.where(cloudy, CLOUD, CLEAR).astype(np.uint8)
