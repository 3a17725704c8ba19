"""Prediction intervals from out-of-fold residuals: CV+, with plots of several rows.

Barber, Candès, Ramdas and Tibshirani, "Predictive inference with the jackknife+", Annals of Statistics 49, 2021, section 3.
With the model mu_k of fold k, the residuals R_i = |y_i - mu_k(i)(x_i)| of its test rows and n samples in all, the interval
of a new x at the level 1 - alpha reaches

    from  the floor(alpha (n + 1))-th smallest of       mu_k(i)(x) - R_i
    to    the ceil((1 - alpha)(n + 1))-th smallest of   mu_k(i)(x) + R_i,

over all i. Where folds are small against the sample it covers at least 1 - 2 alpha of new samples, and 1 - alpha in all but
contrived cases. Rows of one plot are no independent samples. So a plot counts once: each of its N rows
weighs 1 / N, and n is the number of plots (Lee, Barber and Willett, "Distribution-free inference with hierarchical data",
2023). Covered is then a row of a new plot. A plot's mean residual instead would hide how much its years differ, and cover
too little; its largest would cover all years of a plot at once, and too much.

MAPIE and crepes refit estimators on folds of their own or take one calibration set for one model, so that neither takes
the folds, members and plots of a run.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HALVINGS = 30  # of the folds' range, which leave a billionth of it


class Residuals(NamedTuple):
    """Out-of-fold residuals of a run.

    Attributes:
        sizes: of each fold, (row,) float64 absolute residuals in ascending order.
        weights: of each fold, (row + 1,) float64: how much the rows before each position weigh.
        plots: their number.
    """

    sizes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    plots: int


def residuals_of(
    observed: NDArray[np.float64], predicted: NDArray[np.float64], plots: NDArray[np.str_], folds: NDArray[np.int64]
) -> Residuals:
    """Residuals of samples that each were tested in one fold, all (sample,); folds in ascending order of their numbers."""
    sizes = np.abs(observed - predicted)
    _, plot, counts = np.unique(plots, return_inverse=True, return_counts=True)
    parts, weights = [], []
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        rows = rows[np.argsort(sizes[rows], kind="stable")]
        parts.append(torch.from_numpy(sizes[rows]))
        weights.append(torch.from_numpy(np.concatenate([[0.0], np.cumsum(1 / counts[plot[rows]])])))
    return Residuals(tuple(parts), tuple(weights), len(counts))


def interval(residuals: Residuals, means: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the CV+ interval.

    Args:
        residuals: of the run.
        means: (fold, sample) float64, what each fold's ensemble predicts.
        level: 1 - alpha, the share of new samples that is to be covered.

    Returns:
        (sample,) each, infinite where the run has too few plots for the level.
    """
    return -_upper(residuals, -means, level), _upper(residuals, means, level)


def _upper(residuals: Residuals, means: Tensor, level: float) -> Tensor:
    """The smallest t with a weight of at least level (plots + 1) among the values mean + residual up to it."""
    enough = level * (residuals.plots + 1) - 1e-9  # weights of 1/3 and the like add up to a little less
    if enough > residuals.plots:
        return torch.full_like(means[0], torch.inf)
    # Were the folds of one mind, t would lie this quantile of all residuals above it.
    sizes, order = torch.cat(residuals.sizes).sort()
    weights = torch.cat([one.diff() for one in residuals.weights])[order].cumsum(0)
    quantile = sizes[int((weights < enough).sum())]
    low, high = means.amin(0) + quantile, means.amax(0) + quantile
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        suffices = _weight(residuals, means, middle) >= enough
        low, high = torch.where(suffices, low, middle), torch.where(suffices, middle, high)
    return high


def _weight(residuals: Residuals, means: Tensor, values: Tensor) -> Tensor:
    """Weight (sample,) of all mean + residual up to the values (sample,)."""
    total = torch.zeros_like(values)
    for mean, sizes, weights in zip(means, residuals.sizes, residuals.weights, strict=True):
        total += weights[torch.searchsorted(sizes, values - mean, right=True)]
    return total
