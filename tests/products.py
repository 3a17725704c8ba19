"""What tests of products share: a small image, its grid and its states."""

import datetime

import numpy as np
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from datasets.products import BANDS, CLEAR, CLOUD, MISSING, NODATA, WATER
from utils.rasters import Grid

ROWS, COLUMNS = 24, 32
GRID = Grid(CRS.from_epsg(32631), Affine(10, 0, 399_960, 0, -10, 5_000_040), ROWS, COLUMNS)
WHOLE = Window(0, 0, COLUMNS, ROWS)
DAY = datetime.date(2023, 6, 16)
ANGLES = np.array([31.5, 148.2, 7.4, 359.8])


def blocks(values: NDArray[np.int16]) -> NDArray[np.int16]:
    """Each value on 2 x 2 pixels, so that bands of 20 m hold it, too."""
    return values.repeat(2, -2).repeat(2, -1)


def image(seed: int = 0, low: int = 1, high: int = 3000) -> NDArray[np.int16]:
    """(band, row, column) x 10 000, without data in the first two rows."""
    values = np.random.default_rng(seed).integers(low, high, (len(BANDS), ROWS // 2, COLUMNS // 2)).astype(np.int16)
    values[:, 0] = NODATA
    return blocks(values)


def states() -> NDArray[np.uint8]:
    """Land with a lake and a cloud, nothing in the first two rows."""
    values = np.full((ROWS, COLUMNS), CLEAR, np.uint8)
    values[:2], values[4:8, 4:8], values[10:20, 16:] = MISSING, WATER, CLOUD
    return values
