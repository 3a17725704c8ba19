"""Intervals of CV+ against its formula, and their coverage of new plots."""

import numpy as np
import pytest
import torch

from utils.conformal import interval, residuals_of


def test_plots_of_one_row_give_the_papers_order_statistics() -> None:
    rng = np.random.default_rng(3)
    n, folds = 57, rng.integers(1, 5, 57)
    observed, predicted = rng.normal(size=(2, n))
    means = rng.normal(size=(4, 9))
    residuals = residuals_of(observed, predicted, np.arange(n).astype(str), folds)
    for level in (0.5, 0.8, 0.9):
        lower, upper = interval(residuals, torch.from_numpy(means), level)
        sizes = np.abs(observed - predicted)[:, None]
        alpha = 1 - level
        above = np.sort(means[folds - 1] + sizes, axis=0)[int(np.ceil(round((1 - alpha) * (n + 1), 9))) - 1]
        below = np.sort(means[folds - 1] - sizes, axis=0)[int(np.floor(round(alpha * (n + 1), 9))) - 1]
        np.testing.assert_allclose(upper, above, atol=1e-7)
        np.testing.assert_allclose(lower, below, atol=1e-7)


def test_a_plot_counts_once_however_many_rows_it_has() -> None:
    """Three plots, the first with three years; worked by hand: weights 1/3, 1/3, 1/3, 1, 1, and 4 x 0.6 = 2.4 of them."""
    observed, plots = np.array([1.0, 2.0, 9.0, 4.0, 3.0]), np.array(["a", "a", "a", "b", "c"])
    residuals = residuals_of(observed, np.zeros(5), plots, np.array([1, 1, 1, 2, 2]))
    # In order: 1 (1/3), 2 (2/3), 3 (5/3), 4 (8/3): the first with at least 2.4 is 4.
    lower, upper = interval(residuals, torch.tensor([[10.0], [10.0]], dtype=torch.float64), 0.6)
    assert (lower.item(), upper.item()) == pytest.approx((6, 14))
    # With fold 2 predicting 20, upwards: 11 (1/3), 12 (2/3), 19 (1), 23 (2), 24 (3); downwards: 17 (1), 16 (2), 9 (7/3), 8.
    lower, upper = interval(residuals, torch.tensor([[10.0], [20.0]], dtype=torch.float64), 0.6)
    assert (lower.item(), upper.item()) == pytest.approx((8, 24))
    lower, upper = interval(residuals, torch.tensor([[10.0], [10.0]], dtype=torch.float64), 0.8)
    assert (lower.item(), upper.item()) == (-np.inf, np.inf)


def test_ninety_percent_of_new_plots_are_covered() -> None:
    """Plots of one to five years, whose effects no predictor tells; a model a fold that is as good as its mean."""
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(300):
        years = rng.integers(1, 6, 50)
        plot = np.repeat(np.arange(50), years)
        observed = rng.standard_t(5, 50)[plot] + rng.normal(0, 0.5, len(plot))
        fold = plot % 5 + 1
        means = np.array([observed[fold != number].mean() for number in range(1, 6)])
        residuals = residuals_of(observed, means[fold - 1], plot.astype(str), fold)
        new = rng.standard_t(5, 20) + rng.normal(0, 0.5, 20)
        lower, upper = interval(residuals, torch.from_numpy(np.tile(means[:, None], 20)), 0.9)
        covered.append(np.mean((lower.numpy() <= new) & (new <= upper.numpy())))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)
