"""Scores against the golden numbers and in edge cases."""

import numpy as np
import pytest
from conftest import golden

from utils.metrics import _weighted_r2, coverage, r2_difference, score


def test_golden_scores() -> None:
    reference = golden("biodiversity_metrics")
    scores = score(np.array(reference["targets"]), np.array(reference["predictions"]))
    for name, value in scores._asdict().items():
        assert value == pytest.approx(reference[name], rel=1e-6)


def test_systematic_and_unsystematic_errors_add_up() -> None:
    rng = np.random.default_rng(1)
    observed = rng.normal(30, 10, 2000)
    predicted = 10 + 0.5 * observed + rng.normal(0, 2, 2000)
    scores = score(observed, predicted)
    assert scores.rmses**2 + scores.rmseu**2 == pytest.approx(np.mean((observed - predicted) ** 2))
    assert scores.rmseu == pytest.approx(2, rel=0.1)


def test_constant_predictions_explain_nothing() -> None:
    scores = score(np.array([1.0, 2.0, 3.0]), np.full(3, 2.0))
    assert scores.r2 == 0
    assert scores.rmseu == pytest.approx(0, abs=1e-9)
    assert scores.rmses == pytest.approx((2 / 3) ** 0.5)


def test_constant_observations_have_no_r2() -> None:
    assert np.isnan(score(np.full(3, 2.0), np.array([1.0, 2.0, 3.0])).r2)


def test_coverage_counts_observations_within_the_normal_interval() -> None:
    observed, sd = np.array([0.0, 1.6, 1.7, -3.2, -3.4]), np.array([1.0, 1.0, 1.0, 2.0, 2.0])
    assert coverage(observed, np.zeros(5), sd) == pytest.approx(3 / 5)  # 1.645 deviations to either side
    assert coverage(observed, np.zeros(5), sd, level=0.95) == pytest.approx(1)


def plots_in_folds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    plots = np.repeat(np.arange(60), 3)
    observed = np.repeat(rng.normal(0, 1, 60), 3) + rng.normal(0, 0.3, 180)
    return {"observed": observed, "plots": plots, "folds": plots % 3, "noise": rng.normal(0, 1, 180)}


def test_weights_count_rows_as_often() -> None:
    rows = plots_in_folds(1)
    times = np.random.default_rng(2).integers(0, 4, 180)
    predicted = rows["observed"] + rows["noise"]
    expected = score(np.repeat(rows["observed"], times), np.repeat(predicted, times)).r2
    assert _weighted_r2(rows["observed"], predicted[None], times[None].astype(np.float64))[0] == pytest.approx(expected)
    assert _weighted_r2(rows["observed"], np.ones((1, 180)), times[None].astype(np.float64))[0] == 0  # constant predictions


def test_the_difference_of_r2_is_that_of_the_folds_means_with_an_interval_over_plots() -> None:
    rows = plots_in_folds(1)
    observed, plots, folds = rows["observed"], rows["plots"], rows["folds"]
    good, poor = observed + 0.5 * rows["noise"], observed + 2 * rows["noise"]
    found = r2_difference(observed, good, poor, plots, folds, seed=1)

    def mean_r2(predicted: np.ndarray) -> float:
        return float(np.mean([score(observed[folds == fold], predicted[folds == fold]).r2 for fold in range(3)]))

    assert found.mean == pytest.approx(mean_r2(good) - mean_r2(poor))
    assert 0 < found.lower < found.mean < found.upper < 1
    assert found == r2_difference(observed, good, poor, plots, folds, seed=1)
    assert found != r2_difference(observed, good, poor, plots, folds, seed=2)
    assert r2_difference(observed, good, good, plots, folds, seed=1) == (0, 0, 0)
    # Several runs: the mean of their r2, not the r2 of their mean.
    runs = r2_difference(observed, np.stack([good, poor]), poor, plots, folds, seed=1)
    assert runs.mean == pytest.approx(found.mean / 2)
    # Rows of a plot are alike: as plots of their own they would seem to say more.
    rowwise = r2_difference(observed, good + 0.0, np.repeat(poor[::3], 3), np.arange(180), folds, seed=1)
    plotwise = r2_difference(observed, good + 0.0, np.repeat(poor[::3], 3), plots, folds, seed=1)
    assert plotwise.upper - plotwise.lower > rowwise.upper - rowwise.lower
