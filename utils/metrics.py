"""Metrics of a regression: how well predictions agree with observations."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress, norm
from sklearn.metrics import root_mean_squared_error

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


def coverage(
    observed: NDArray[np.float64], predicted: NDArray[np.float64], sd: NDArray[np.float64], level: float = INTERVAL
) -> float:
    """Share of observations (sample,) in the central intervals of normal distributions with the given mean and deviation."""
    return float((np.abs(observed - predicted) <= norm.ppf((1 + level) / 2) * sd).mean())
