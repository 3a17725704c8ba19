"""Metrics of a regression: how well predictions agree with observations."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress, norm
from sklearn.metrics import root_mean_squared_error

from utils.seeds import BOOTSTRAP, seed_for

MIN_PREDICTION_STD_RATIO = 0.01  # of the observations' standard deviation; below it, predictions hardly tell plots apart
INTERVAL = 0.9  # share of observations that an interval is to cover


class Scores(NamedTuple):
    """Agreement of predictions with observations.

    Attributes:
        r2: squared Pearson correlation; 0 where the predictions are constant.
        rrmse: root mean squared error over the absolute mean observation.
        rmses: systematic part of the error, in the target's unit (Willmott 1981).
        rmseu: unsystematic part of the error, in the target's unit.
    """

    r2: float
    rrmse: float
    rmses: float
    rmseu: float


def score(observed: NDArray[np.float64], predicted: NDArray[np.float64]) -> Scores:
    """Scores of predictions (sample,) against observations (sample,).

    With the least-squares line p ~ a + b o, the systematic error is that of the line against the 1:1 line and the
    unsystematic error is what remains: their squares add up to the mean squared error. Constant observations have no such
    line; their r2, rmses and rmseu are nan.
    """
    rmse = root_mean_squared_error(observed, predicted)
    if np.ptp(observed) == 0:
        return Scores(np.nan, rmse / abs(observed.mean()), np.nan, np.nan)
    line = linregress(observed, predicted)
    r2 = 0.0 if np.ptp(predicted) == 0 else line.rvalue**2
    rmses = root_mean_squared_error(observed, line.intercept + line.slope * observed)
    rmseu = np.sqrt(max(rmse**2 - rmses**2, 0.0))
    return Scores(float(r2), float(rmse / abs(observed.mean())), float(rmses), float(rmseu))


def doubt_about(observed: NDArray[np.float64], predicted: NDArray[np.float64]) -> str:
    """Why the metrics of a fold say little; empty if they do not."""
    if np.ptp(observed) == 0:
        return "all test observations are the same, r2 is undefined"
    if np.ptp(predicted) == 0:
        return "all predictions are the same, r2 is undefined and counted as 0"
    if predicted.std() < MIN_PREDICTION_STD_RATIO * observed.std():
        spread = f"sd {predicted.std():.2g} against {observed.std():.2g} of the observations"
        return f"predictions hardly differ, {spread}; r2 and RMSEU say little; more epochs or another lr may help"
    return ""


def coverage(
    observed: NDArray[np.float64], predicted: NDArray[np.float64], sd: NDArray[np.float64], level: float = INTERVAL
) -> float:
    """Share of observations (sample,) in the central intervals of normal distributions with the given mean and deviation."""
    return float((np.abs(observed - predicted) <= norm.ppf((1 + level) / 2) * sd).mean())


class Difference(NamedTuple):
    """A difference and the ends of its interval."""

    mean: float
    lower: float
    upper: float


def r2_difference(
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    reference: NDArray[np.float64],
    plots: NDArray[Any],
    folds: NDArray[np.int64],
    *,
    seed: int,
    draws: int = 2000,
    level: float = 0.95,
) -> Difference:
    """By how much the r2 of some predictions, the mean over folds, is above that of others, with its interval.

    The interval is that of the paired bootstrap over plots (Efron and Tibshirani 1993, chapter 13): plots, with all their
    rows, are drawn anew within each fold, the same for both. Rows of a plot are alike, so that drawing rows would make the
    interval too narrow. It holds for other plots like these, not for other folds or other training rows.

    Args:
        observed: (sample,).
        predicted: (sample,), or (run, sample) of several runs, whose r2 are averaged.
        reference: what they are compared with, in the same way.
        plots: (sample,) names.
        folds: (sample,) the fold that tested it.
        seed: of the draws.
        draws: their number.
        level: share of draws within the interval.
    """
    generator = np.random.default_rng(seed_for(seed, BOOTSTRAP))
    total = np.zeros(draws + 1)
    numbers = np.unique(folds)
    for fold in numbers:
        rows = folds == fold
        _, plot = np.unique(plots[rows], return_inverse=True)
        count = int(plot.max()) + 1
        drawn = generator.multinomial(count, np.full(count, 1 / count), draws)
        weights = np.concatenate([np.ones((1, count)), drawn])[:, plot]  # the plots as they are, then the draws
        r2 = [_weighted_r2(observed[rows], np.atleast_2d(one)[:, rows], weights) for one in (predicted, reference)]
        total += (r2[0] - r2[1]) / len(numbers)
    lower, upper = np.quantile(total[1:], ((1 - level) / 2, (1 + level) / 2))
    return Difference(float(total[0]), float(lower), float(upper))


def _weighted_r2(
    observed: NDArray[np.float64], predicted: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Squared correlation (draw,), mean over runs, of (sample,) with (run, sample) by weights (draw, sample)."""
    shares = weights / weights.sum(1, keepdims=True)
    o, p = observed - observed.mean(), (predicted - predicted.mean(1, keepdims=True)).T
    o_mean, p_mean = (shares @ o)[:, None], shares @ p
    covariance = shares @ (o[:, None] * p) - o_mean * p_mean
    variances = ((shares @ o**2)[:, None] - o_mean**2) * (shares @ p**2 - p_mean**2)
    return np.divide(covariance**2, variances, out=np.zeros_like(covariance), where=variances > 0).mean(1)
