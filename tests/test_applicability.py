"""The area of applicability: a case worked by hand, and training samples at no distance from themselves."""

import numpy as np
import pytest
import torch

from utils.applicability import area_of_applicability, dissimilarity


def test_a_case_worked_by_hand() -> None:
    """Five samples on a line, in two folds, and a predictor that weighs nothing.

    The first predictor, 0 1 3 6 10, left unstandardised, has the distances 1 3 6 10 2 5 9 3 7 4, of mean 5; the weight 2
    doubles them, so that it is without effect on the index. Nearest samples of the other fold: 0 to 1 (1), 1 to 0 (1),
    3 to 1 (2), 6 to 10 (4), 10 to 6 (4). The indices are 0.2 0.2 0.4 0.8 0.8, the quartiles 0.2 and 0.8; 0.8 + 1.5 x 0.6
    lies above the largest, which is the threshold.
    """
    predictors = np.array([[0.0, 5], [1, -3], [3, 8], [6, 1], [10, 2]])
    folds = np.array([1, 2, 1, 1, 2])
    area = area_of_applicability(predictors, np.array([2.0, 0.0]), np.array([False, False]), folds)
    assert area.mean_distance == pytest.approx(10)
    assert area.threshold == pytest.approx(0.8)
    new = torch.tensor([[0.0, 99], [2.5, 0], [-2, 0], [15, 0]])
    assert dissimilarity(area, new).tolist() == pytest.approx([0, 0.1, 0.4, 1.0], abs=1e-6)


def test_standardised_predictors_have_no_unit() -> None:
    rng = np.random.default_rng(0)
    predictors, folds = rng.normal(size=(50, 3)), rng.integers(1, 6, 50)
    new = rng.normal(size=(20, 3))
    indices = []
    for unit in (np.ones(3), np.array([1e-3, 1, 1e4])):
        area = area_of_applicability(predictors * unit, np.ones(3), np.ones(3, dtype=bool), folds)
        indices.append(dissimilarity(area, torch.from_numpy((new * unit).astype(np.float32))))
    np.testing.assert_allclose(indices[0], indices[1], rtol=1e-4)


def test_one_outlier_does_not_move_the_threshold() -> None:
    line = np.arange(40.0)[:, None]
    folds = np.arange(40) % 2
    plain = area_of_applicability(line, np.ones(1), np.zeros(1, dtype=bool), folds)
    line[0] = -500
    other = area_of_applicability(line, np.ones(1), np.zeros(1, dtype=bool), folds)
    assert other.threshold * other.mean_distance == pytest.approx(plain.threshold * plain.mean_distance)


def test_distances_are_those_to_the_nearest_sample() -> None:
    """In blocks, of many predictors, with samples that lie far from the origin as well as close together."""
    rng = np.random.default_rng(1)
    predictors, folds = rng.normal(200, 1, size=(3000, 40)), rng.integers(1, 6, 3000)
    area = area_of_applicability(predictors, np.ones(40), np.ones(40, dtype=bool), folds)
    new = torch.from_numpy(np.concatenate([predictors[:30], rng.normal(200, 1, size=(9000, 40))]).astype(np.float32))
    index = dissimilarity(area, new)
    assert (index[:30] == 0).all()
    scaled = (new[30:230] - area.mean) * area.factor
    direct = torch.cdist(scaled.double(), area.points.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    np.testing.assert_allclose(index[30:230], direct / area.mean_distance, rtol=1e-5)
