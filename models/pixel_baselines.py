"""Baselines of canopy height that look at one pixel: what the network must beat.

Gradient boosting (Ke et al. 2017, LightGBM; scikit-learn's histogram version) on the bands of a pixel over the year. The
images of a place come at dates of their own, so the year is cut in equal parts and each part has the mean of its images;
parts without a clear image are missing values, which the trees know how to treat.
"""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

Floats = NDArray[np.float32]

PARTS_OF_YEAR = 12
BOOSTING_ROUNDS = 300
DAYS = 366


def pixel_features(images: NDArray[np.int16], days: NDArray[np.int64], padding: NDArray[np.bool_], nodata: int) -> Floats:
    """Bands of each part of the year, of every pixel.

    Args:
        images: (date, band, row, column), reflectance x 10 000, without margin.
        days: (date,) days of the year from 0.
        padding: (date,) True where there is no image.
        nodata: value of missing pixels.

    Returns:
        (row, column, part x band) float32, nan where a part has no image.
    """
    values = np.where(images == nodata, np.nan, images).astype(np.float32)
    parts = days * PARTS_OF_YEAR // DAYS
    features = np.full((PARTS_OF_YEAR, *images.shape[1:]), np.nan, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")  # a pixel without data in a part stays nan
        for part in np.unique(parts[~padding]):
            features[part] = np.nanmean(values[(parts == part) & ~padding], axis=0)
    return np.moveaxis(features.reshape(-1, *images.shape[2:]), 0, 2)


def fit_boosting(features: Floats, heights: Floats, seed: int) -> Callable[[Floats], Floats]:
    """Gradient boosting of absolute errors, which is what the network learns, too.

    Args:
        features: (pixel, feature).
        heights: (pixel,), m.
        seed: of the trees' draws.

    Returns:
        What predicts (pixel,) heights in metres from (pixel, feature).
    """
    seen = np.isfinite(features).any(axis=0)  # a part of the year may have no image at all
    trees = HistGradientBoostingRegressor(loss="absolute_error", max_iter=BOOSTING_ROUNDS, random_state=seed)
    trees.fit(features[:, seen], heights)
    return lambda pixels: trees.predict(pixels[:, seen]).astype(np.float32)
