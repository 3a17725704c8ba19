"""The area of applicability of a trained model.

Meyer and Pebesma, "Predicting into unknown space? Estimating the area of applicability of spatial prediction models",
Methods in Ecology and Evolution 12, 2021. Predictors are standardised by the training samples and multiplied by the weight
that the model gives them, its permutation importance. With d the Euclidean distance there, the dissimilarity index of a
sample x is

    DI(x) = min_i d(x, x_i) / dmean,

the distance to the nearest training sample over the mean distance dmean among training samples. For a training sample the
minimum is over those of other folds of the cross-validation. The area of applicability is where DI is no larger than the
largest DI of the training samples but for outliers, min(max, Q75 + 1.5 (Q75 - Q25)): there the errors of the
cross-validation can be expected.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAIRS_AT_ONCE = 2**22  # of a new and a training sample


class Applicability(NamedTuple):
    """What the dissimilarity of new samples is computed from.

    Attributes:
        mean: (predictor,) float32 of the training samples.
        factor: (predictor,) float32, weight over standard deviation.
        points: (sample, predictor) float32, the training samples, standardised and weighted.
        mean_distance: among them.
        threshold: largest dissimilarity index within the area of applicability.
    """

    mean: Tensor
    factor: Tensor
    points: Tensor
    mean_distance: float
    threshold: float


def area_of_applicability(
    predictors: NDArray[np.floating],
    weights: NDArray[np.floating],
    standardised: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> Applicability:
    """The area of applicability of models trained on some samples.

    Args:
        predictors: (sample, predictor).
        weights: (predictor,), not negative.
        standardised: (predictor,), those that are divided by their standard deviation, where they have one.
        folds: (sample,) the fold that tested it.
    """
    values = torch.from_numpy(np.asarray(predictors, dtype=np.float64))
    sd, mean = torch.std_mean(values, 0, correction=0)
    factor = torch.from_numpy(np.asarray(weights, dtype=np.float64)) / torch.where(
        torch.from_numpy(standardised) & (sd > 0), sd, 1.0
    )
    # In single precision as new samples are, so that a training sample among them has an index of exactly 0.
    kept = (values.float() - mean.float()) * factor.float()
    points, fold = kept.double(), torch.from_numpy(folds)
    total, nearest = 0.0, []
    for rows in torch.arange(len(points)).split(max(1, PAIRS_AT_ONCE // len(points))):
        distances = torch.cdist(points[rows], points, compute_mode="use_mm_for_euclid_dist")
        total += float(distances.sum())
        nearest.append(distances.masked_fill_(fold[rows, None] == fold, torch.inf).amin(1))
    mean_distance = total / (len(points) * (len(points) - 1))
    index = (torch.cat(nearest) / mean_distance).numpy()
    low, high = np.percentile(index, (25, 75))
    threshold = float(min(index.max(), high + 1.5 * (high - low)))
    return Applicability(mean.float(), factor.float(), kept, mean_distance, threshold)


def dissimilarity(area: Applicability, predictors: Tensor) -> Tensor:
    """Dissimilarity index (sample,) float32 of samples (sample, predictor) float32.

    The nearest training sample is found by a matrix product, |x|^2 - 2 x p + |p|^2, and its distance computed anew, for
    the product loses the digits of a small one. A tree of so many dimensions would look at all samples, too.
    """
    points, found = area.points, []
    squares = (points**2).sum(1)
    for rows in predictors.split(max(1, PAIRS_AT_ONCE // len(points))):
        part = (rows - area.mean) * area.factor
        nearest = torch.addmm(squares, part, points.T, alpha=-2).argmin(1)
        found.append((part - points[nearest]).square_().sum(1).sqrt_())
    return torch.cat(found) / area.mean_distance
