"""A finished run of main applied to new samples: mean, spread, interval, dissimilarity, and whether they are inside.

`prepare_area` computes once, from the run, what the dissimilarity of new samples needs, and keeps it in a file; `load`
restores the run's models and that file, in whatever process, and `apply` predicts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.finished_run import Covariates, Trained, read_trained
from datasets.plot_context import Names
from models.saved import SavedFold, load_folds, permutation_importance, predict_fold
from utils.applicability import Applicability, area_of_applicability, dissimilarity
from utils.conformal import Residuals, interval, residuals_of
from utils.runs import read_tensors, write_tensors

RESULTS = ("mean", "spread", "lower", "upper", "dissimilarity", "inside")


class Applied(NamedTuple):
    """A finished run, ready to be applied.

    Attributes:
        folds: its models.
        categories: of each covariate of text.
        residuals: out of fold.
        area: of applicability.
        level: share of new plots that the interval is to cover.
    """

    folds: list[SavedFold]
    categories: Mapping[str, list[str]]
    residuals: Residuals
    area: Applicability
    level: float


def prepare_area(trained: Trained, folds: list[SavedFold], path: Path) -> dict[str, Any]:
    """Compute the area of applicability of a run and keep it in a file.

    Bands weigh what their permutation adds to the mean squared error, in all their steps alike. Covariates of text are
    channels of 0 and 1 of the same weight, not standardised. If no band has an importance, all weigh the same.

    Returns:
        `importance` of each band and covariate, `mean_distance`, and `threshold` of the dissimilarity index.
    """
    importance = permutation_importance(trained, folds)
    weights = importance if any(importance.values()) else dict.fromkeys(importance, 1.0)
    columns = trained.columns
    sizes = [len(columns.steps)] * len(columns.bands)
    sizes += [len(trained.categories.get(name, [0])) for name in columns.covariates]
    standardised = [name not in trained.categories for name in weights]
    predictors = predictors_of(trained.categories, trained.x, trained.covariates)
    area = area_of_applicability(
        predictors, np.repeat(list(weights.values()), sizes), np.repeat(standardised, sizes), trained.folds
    )
    tensors = {"mean": area.mean, "factor": area.factor, "points": area.points}
    record = {"importance": importance, "mean_distance": area.mean_distance, "threshold": area.threshold}
    write_tensors(path, tensors, record)
    return record


def predictors_of(
    categories: Mapping[str, list[str]], x: NDArray[np.float32], covariates: Covariates
) -> NDArray[np.float32]:
    """(sample, predictor) float32: bands one after the other with all their steps, then covariates, text as 0 and 1."""
    parts = [x.reshape(len(x), -1).astype(np.float32, copy=False)]
    for name, values in covariates.items():
        if name in categories:
            parts.append((np.asarray(values)[:, None] == np.array(categories[name])).astype(np.float32))
        else:
            parts.append(np.asarray(values, dtype=np.float32)[:, None])
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def load(folder: Path, area: Path, level: float, device: torch.device) -> Applied:
    """A finished run and its area of applicability, from their files.

    Raises:
        InputError: a file is damaged, or not of the present code.
    """
    trained = read_trained(folder)
    residuals = residuals_of(trained.observed, trained.predicted, trained.plots, trained.folds)
    tensors, record = read_tensors(area)
    kept = Applicability(**tensors, mean_distance=record["mean_distance"], threshold=record["threshold"])
    return Applied(load_folds(folder, device), trained.categories, residuals, kept, level)


def apply(
    applied: Applied, x: NDArray[np.floating], covariates: Covariates, names: Names | None = None
) -> NDArray[np.float64]:
    """What a run says of new samples.

    Args:
        applied: the run.
        x: (sample, band, step), in the units of the run's table.
        covariates: of the samples.
        names: of their plots, regions and years, all rows of a plot at once; None: pixels, which have none.

    Returns:
        (result, sample), in the order of `RESULTS`: mean and standard deviation over folds and their members, the ends of
        the interval, dissimilarity index, and 1 inside the area of applicability, 0 outside.
    """
    predictions = np.stack([predict_fold(fold, x, covariates, names) for fold in applied.folds])  # (fold, member, sample)
    lower, upper = interval(applied.residuals, torch.from_numpy(predictions.mean(1)), applied.level)
    index = dissimilarity(applied.area, torch.from_numpy(predictors_of(applied.categories, x, covariates))).numpy()
    inside = index <= applied.area.threshold
    return np.stack([predictions.mean((0, 1)), predictions.std((0, 1)), lower.numpy(), upper.numpy(), index, inside])
