"""The metrics of a height map: golden numbers, pooling, height classes, shifts."""

import numpy as np
import pytest
import torch
from conftest import golden
from sklearn.metrics import mean_absolute_percentage_error, r2_score, root_mean_squared_error
from test_canopy_losses import case
from torch import Tensor

from utils.canopy.metrics import (
    CanopyScores,
    class_names,
    errors_at_best_shift,
    gradient_difference,
    high_frequency_power,
    power_variation,
)

CPU = torch.device("cpu")


def heights(seed: int, samples: int = 3, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target (m) and mask of a smooth scene with noise."""
    generator = torch.Generator().manual_seed(seed)
    target = 40 * torch.rand(samples, 1, size, size, generator=generator)
    prediction = target + 3 * torch.randn(target.shape, generator=generator) + 1
    return prediction, target, torch.rand(target.shape, generator=generator) < 0.3


def test_published_metrics_match_the_reference() -> None:
    prediction, target, no_vegetation = case()
    expected = golden("canopy_losses")
    valid = (~no_vegetation).numpy()
    rmse = root_mean_squared_error(target.numpy()[valid], prediction.numpy()[valid])
    assert rmse == pytest.approx(expected["rmse_masked"], rel=1e-5)
    sums, counts = gradient_difference(prediction, target, no_vegetation)
    assert float((sums / counts).mean()) == pytest.approx(expected["gradient_difference_masked"], rel=1e-5)


def test_fine_structure_matches_the_reference() -> None:
    prediction, target, _ = case()
    one = torch.zeros(target.shape, dtype=torch.bool)
    one[0, 0, 2, 3] = True
    powers = [float(high_frequency_power(image + 1, one).mean()) for image in (prediction, target)]
    (expected,) = golden("canopy_losses")["fft_high_frequency_power_variation_percent"]
    assert power_variation(*powers) == pytest.approx(expected, rel=1e-6)


def test_metrics_do_not_depend_on_batches_and_match_scikit_learn() -> None:
    prediction, target, no_vegetation = heights(1)
    tiles = ["30TXT", "31TDM", "30TXT"]
    at_once, in_turn = CanopyScores(["30TXT", "31TDM"], CPU), CanopyScores(["30TXT", "31TDM"], CPU)
    probability = torch.sigmoid(prediction - 5)
    at_once.update(prediction, probability, target, no_vegetation, tiles)
    for row in range(3):
        part = slice(row, row + 1)
        in_turn.update(prediction[part], probability[part], target[part], no_vegetation[part], tiles[part])
    metrics, other = at_once.compute(), in_turn.compute()
    for group, values in metrics.items():
        for name, value in values.items():
            assert value == pytest.approx(other[group][name], rel=1e-4, nan_ok=True), (group, name)

    valid = (~no_vegetation).numpy()
    observed, predicted = target.numpy()[valid], prediction.clamp_min(0).numpy()[valid]
    total = metrics["all"]
    assert total["pixels"] == valid.sum()
    assert total["mae"] == pytest.approx(np.abs(predicted - observed).mean(), rel=1e-5)
    assert total["bias"] == pytest.approx((predicted - observed).mean(), rel=1e-4)
    assert total["rmse"] == pytest.approx(root_mean_squared_error(observed, predicted), rel=1e-5)
    assert total["r2"] == pytest.approx(r2_score(observed, predicted), rel=1e-4)
    assert total["mape"] == pytest.approx(mean_absolute_percentage_error(observed, predicted), rel=1e-3)
    for tile, rows in (("30TXT", [0, 2]), ("31TDM", [1])):
        errors = np.abs(prediction.clamp_min(0).numpy()[rows] - target.numpy()[rows])[valid[rows]]
        assert metrics[f"tile {tile}"]["mae"] == pytest.approx(errors.mean(), rel=1e-5)


def test_height_classes_hold_their_lower_edge() -> None:
    target = torch.tensor([0.5, 5.0, 29.9, 30.0, 31.0, 12.0, 12.0, 12.0]).repeat(8).view(1, 1, 8, 8)
    scores = CanopyScores(["t"], CPU)
    scores.update(target + 2, torch.ones(target.shape), target, torch.zeros(target.shape, dtype=torch.bool), ["t"])
    metrics = scores.compute()
    pixels = {name: metrics[name]["pixels"] for name in class_names()}
    assert pixels == {"0-5 m": 8, "5-10 m": 8, "10-15 m": 24, "15-20 m": 0, "20-25 m": 0, "25-30 m": 8, "over 30 m": 16}
    assert metrics["5-10 m"]["bias"] == pytest.approx(2)
    assert np.isnan(metrics["20-25 m"]["mae"])
    assert metrics["all"]["precision"] == 1


def test_a_shifted_map_has_no_error_at_its_best_shift() -> None:
    _, target, no_vegetation = heights(2, samples=2, size=20)
    shifted = torch.roll(target, (2, -1), dims=(2, 3))
    sums, counts = errors_at_best_shift(shifted, target, no_vegetation)
    torch.testing.assert_close(sums, torch.zeros(2))
    assert counts.tolist() == (~no_vegetation[..., 2:-2, 2:-2]).flatten(1).sum(1).tolist()
    far = torch.roll(target, 3, dims=2)
    assert float(errors_at_best_shift(far, target, no_vegetation)[0].min()) > 0


def test_a_batch_without_vegetation_counts_for_nothing_but_the_mask() -> None:
    prediction, target, no_vegetation = heights(3)
    scores = CanopyScores(["a"], CPU)
    scores.update(prediction, torch.zeros(prediction.shape), target, torch.ones_like(no_vegetation), ["a"] * 3)
    metrics = scores.compute()
    assert metrics["all"]["pixels"] == 0 and np.isnan(metrics["all"]["mae"]) and metrics["all"]["accuracy"] == 1
    assert np.isnan(metrics["all"]["gradient_difference"]) and np.isnan(metrics["all"]["fine_structure_percent"])
