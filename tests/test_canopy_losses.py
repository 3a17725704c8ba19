"""The losses: golden numbers, and that processes sharing a batch end in the loss and gradient of the whole."""

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor

from utils.canopy.losses import (
    LOSSES,
    Pool,
    canopy_loss,
    patch_average_mae,
    percentile_95,
    pixel_average_mae,
    pixel_weights,
    vegetation_loss,
    weighted_gradient_difference,
)

SHAPE = (2, 1, 16, 16)


def case() -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and mask of the golden numbers."""
    prediction = torch.from_numpy(np.random.RandomState(3).standard_normal(SHAPE)).float()
    no_vegetation = torch.from_numpy(np.random.RandomState(5).uniform(size=SHAPE) < 0.4)
    no_vegetation[1, :, :4] = True
    target = torch.from_numpy(np.random.RandomState(4).standard_normal(SHAPE)).float()
    return prediction, target.masked_fill(no_vegetation, 0), no_vegetation


def test_losses_match_the_reference() -> None:
    prediction, target, no_vegetation = case()
    expected = golden("canopy_losses")
    soft, hard = pixel_weights(no_vegetation, 0.1), pixel_weights(no_vegetation, 0)
    for value, name in (
        (patch_average_mae(prediction, target, soft), "patch_average_mae_weight_nv_0.1"),
        (patch_average_mae(prediction, target, hard), "patch_average_mae_masked_only"),
        (pixel_average_mae(prediction, target, soft), "mae_weight_nv_0.1"),
        (weighted_gradient_difference(prediction, target, soft), "weighted_gradient_difference_weight_nv_0.1"),
        (weighted_gradient_difference(prediction, target, hard), "weighted_gradient_difference_masked_only"),
        (vegetation_loss(prediction, no_vegetation), "bce_vegetation_logits"),
        (canopy_loss(LOSSES[0], prediction, prediction, target, no_vegetation, 0.1), "total_default_loss"),
    ):
        assert float(value) == pytest.approx(expected[name], rel=1e-5), name


def test_ablations_are_sums_of_their_terms() -> None:
    prediction, target, no_vegetation = case()
    weights, entropy = pixel_weights(no_vegetation, 0.1), vegetation_loss(prediction, no_vegetation)
    patch = canopy_loss("patch_mae+vegetation", prediction, prediction, target, no_vegetation, 0.1)
    pixel = canopy_loss("mae+vegetation", prediction, prediction, target, no_vegetation, 0.1)
    torch.testing.assert_close(patch, patch_average_mae(prediction, target, weights) + entropy)
    torch.testing.assert_close(pixel, pixel_average_mae(prediction, target, weights) + entropy)


@pytest.mark.parametrize("length", [0, 1, 2, 19, 20, 21, 1000])
def test_percentile_interpolates_between_neighbours(length: int) -> None:
    counted = torch.tensor([True, False] * length + [False])
    values = torch.randn(len(counted), generator=torch.Generator().manual_seed(length))
    expected = np.percentile(values[counted].numpy(), 95) if length else 0
    assert float(percentile_95(values, counted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_processes_that_share_a_batch_end_in_its_gradient(name: str) -> None:
    prediction, target, no_vegetation = case()
    whole = prediction.clone().requires_grad_()
    loss = canopy_loss(name, whole, whole, target, no_vegetation, 0.1)
    (expected,) = torch.autograd.grad(loss, whole)

    # Each process's gather is played by doing its computation twice: first to see what both would send, in order.
    sent: list[list[Tensor]] = [[], []]

    def part(process: int, pool: Pool) -> tuple[Tensor, Tensor]:
        rows = slice(process, process + 1)
        mine = prediction[rows].clone().requires_grad_()
        value = canopy_loss(name, mine, mine, target[rows], no_vegetation[rows], 0.1, pool)
        return value, torch.autograd.grad(value, mine)[0]

    for process in (0, 1):

        def record(tensor: Tensor, process: int = process) -> Tensor:
            sent[process].append(tensor)
            return tensor

        part(process, Pool(2, record))
    joined = [torch.cat(pair) for pair in zip(*sent, strict=True)]
    results = []
    for process in (0, 1):
        answers = iter(joined)
        results.append(part(process, Pool(2, lambda _, answers=answers: next(answers))))  # type: ignore[misc]
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]) / 2, expected)


def test_a_batch_without_vegetation_has_a_finite_loss_and_gradient() -> None:
    prediction, target, _ = case()
    prediction.requires_grad_()
    for name in LOSSES:
        for weight in (0.0, 0.1):
            loss = canopy_loss(name, prediction, prediction, target, torch.ones(SHAPE, dtype=torch.bool), weight)
            assert bool(torch.isfinite(loss))
            assert bool(torch.isfinite(torch.autograd.grad(loss, prediction)[0]).all())
