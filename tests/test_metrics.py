"""Scores against the golden numbers and in edge cases."""

import numpy as np
import pytest
from conftest import golden

from utils.metrics import score


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
