"""Baselines of canopy height that see single pixels: the mean height, and gradient boosting.

Histogram gradient boosting (Ke et al. 2017, LightGBM; the implementation of scikit-learn) is fitted to the bands of a pixel
over the year. As acquisition dates differ between places, the year is divided into equal parts and each part has the mean of
its images; parts without an image are missing values, which the trees handle.
"""

import warnings
from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from tqdm import tqdm

from utils.canopy.metrics import CanopyScores
from utils.seeds import BASELINE_PIXELS

Floats = NDArray[np.float32]
Samples = TypeVar("Samples", bound=Sized)

PARTS_OF_YEAR = 12
BOOSTING_ROUNDS = 300
DAYS = 366  # in a year
TRAINING_WINDOWS, TRAINING_PIXELS = 200, 100_000  # maximum
DRAWS_OF_SQUARE = 10  # maximum number of windows of a square, each with its own dates
METRICS = ("pixels", "mae", "rmse", "bias", "mape", "r2")  # those of heights only


class PixelWindow(NamedTuple):
    """A window to fit or to test the baselines on.

    Attributes:
        features: (row, column, feature) at the resolution of the images, from `pixel_features`.
        height: (row, column) at the resolution of the output, m.
        no_vegetation: (row, column), True where there is no tall vegetation.
        tile: name of its tile.
    """

    features: Floats
    height: Floats
    no_vegetation: NDArray[np.bool_]
    tile: str


def pixel_features(images: NDArray[np.int16], days: NDArray[np.int64], nodata: int) -> Floats:
    """Mean bands of every pixel in each part of the year.

    Args:
        images: (date, band, row, column), reflectance x 10 000, without margin.
        days: (date,) days of the year from 0.
        nodata: value of missing pixels.

    Returns:
        (row, column, part x band) float32, NaN where a part has no image.
    """
    values = np.where(images == nodata, np.nan, images).astype(np.float32)
    parts = days * PARTS_OF_YEAR // DAYS
    features = np.full((PARTS_OF_YEAR, *images.shape[1:]), np.nan, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")  # NaN is wanted there
        for part in np.unique(parts):
            features[part] = np.nanmean(values[parts == part], axis=0)
    return np.moveaxis(features.reshape(-1, *images.shape[2:]), 0, 2)


def fit_boosting(features: Floats, heights: Floats, seed: int) -> Callable[[Floats], Floats]:
    """Fit gradient boosting to the absolute error, which is the main term of the network's loss.

    Args:
        features: (pixel, feature).
        heights: (pixel,), m.
        seed: of scikit-learn's random draws.

    Returns:
        A function that predicts heights in metres (pixel,) from features (pixel, feature).
    """
    seen = np.isfinite(features).any(axis=0)  # a part of the year may have no image at all
    trees = HistGradientBoostingRegressor(loss="absolute_error", max_iter=BOOSTING_ROUNDS, random_state=seed)
    trees.fit(features[:, seen], heights)
    return lambda pixels: trees.predict(pixels[:, seen]).astype(np.float32)


def score_baselines(
    read: Callable[[Samples, int, int], PixelWindow], training: Samples, test: Samples, tiles: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Fit both baselines to the tall vegetation of training windows, and score them on test windows.

    Args:
        read: returns a window of the samples by index and epoch.
        training: samples to fit to, with other windows in each epoch.
        test: samples to score.
        tiles: names of the tiles of `test`.
        seed: of all random draws.

    Returns:
        Metrics by baseline, in metres; empty if the training windows have no tall vegetation.
    """
    rng = np.random.default_rng([seed, BASELINE_PIXELS])
    draws = [(index, epoch) for epoch in range(DRAWS_OF_SQUARE) for index in range(len(training))]
    draws = [draws[i] for i in np.sort(rng.choice(len(draws), min(len(draws), TRAINING_WINDOWS), replace=False))]
    features, heights = [], []
    for index, epoch in tqdm(draws, "Reading the baselines' pixels...", leave=False):
        window = read(training, index, epoch)
        x = _on_output_grid(window.features, window)
        tall = np.flatnonzero(~window.no_vegetation.ravel())
        chosen = rng.choice(tall, min(len(tall), TRAINING_PIXELS // len(draws)), replace=False)
        features.append(x.reshape(-1, x.shape[2])[chosen])
        heights.append(window.height.ravel()[chosen])
    x, y = np.concatenate(features), np.concatenate(heights)
    if len(y) == 0:
        return {}
    boosted = fit_boosting(x, y, seed)
    scores = {name: CanopyScores(tiles, torch.device("cpu"), pooled=False) for name in ("mean height", "gradient boosting")}
    for index in tqdm(range(len(test)), "Testing the baselines...", leave=False):
        window = read(test, index, 0)
        boosting = boosted(window.features.reshape(-1, window.features.shape[2])).reshape(window.features.shape[:2])
        reference, no_vegetation = (torch.from_numpy(values)[None, None] for values in (window.height, window.no_vegetation))
        for name, values in (("mean height", np.full_like(boosting, y.mean())), ("gradient boosting", boosting)):
            predicted = torch.from_numpy(_on_output_grid(values, window))[None, None]
            scores[name].update(predicted, torch.ones_like(predicted), reference, no_vegetation, [window.tile])
    return {name: {key: one.compute()["all"][key] for key in METRICS} for name, one in scores.items()}


def _on_output_grid(values: Floats, window: PixelWindow) -> Floats:
    """Repeat (row, column, ...) at the resolution of the images on the finer grid of the window's heights."""
    factor = len(window.height) // len(values)
    return values.repeat(factor, axis=0).repeat(factor, axis=1)
