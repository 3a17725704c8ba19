"""Losses of the canopy-height network on the standardised height (Kalinicheva et al. 2026, section 3.4).

Tensors are (sample, 1, row, column). A pixel weighs 1 on tall vegetation and `weight_no_vegetation` elsewhere.

Several processes that share a batch must get the gradient of the whole batch. Denominators and the percentile of the
gradient difference are therefore computed over all processes, through a `Pool`. The mean of the processes' losses, which
distributed training minimises, is then the loss of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("patch_mae+gradient+vegetation", "patch_mae+vegetation", "mae+vegetation")
GRADIENT_SHARE = 0.33  # weight of the gradient difference in the sum
EPSILON = 1e-5  # added to denominators


class Pool(NamedTuple):
    """The processes that share a batch.

    Attributes:
        processes: their number.
        gather: joins the tensors of all processes, which have one shape, along the first axis.
    """

    processes: int = 1
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def share(self, part: Tensor, whole: Tensor) -> Tensor:
        """This process's `part` over the sum of all processes' `whole`, scaled so that the mean over processes is right."""
        return part * self.processes / self.gather(whole.detach().reshape(1)).sum()


ALONE = Pool()


def pixel_weights(no_vegetation: Tensor, weight_no_vegetation: float) -> Tensor:
    """Weight of each pixel: 1 on tall vegetation, `weight_no_vegetation` elsewhere."""
    return torch.ones_like(no_vegetation, dtype=torch.float32).masked_fill_(no_vegetation, weight_no_vegetation)


def patch_average_mae(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean absolute error of each sample, then the mean over the samples."""
    errors = ((prediction - target).abs() * weights).flatten(1).sum(1)
    return (errors / (weights.flatten(1).sum(1) + EPSILON)).mean()


def pixel_average_mae(prediction: Tensor, target: Tensor, weights: Tensor, pool: Pool = ALONE) -> Tensor:
    """Weighted mean absolute error over all pixels of the batch; 0 where no pixel has weight."""
    return pool.share(((prediction - target).abs() * weights).sum(), weights.sum().clamp_min(EPSILON / pool.processes))


def percentile_95(values: Tensor, counted: Tensor) -> Tensor:
    """95th percentile of the values that are `counted`, with linear interpolation; 0 where none is.

    As `torch.nanquantile`, which stops at 2^24 values (256 windows at 2.5 m), and without waiting for a GPU, as
    `values[counted]` would.
    """
    ordered = values.masked_fill(~counted, torch.inf).flatten().sort().values
    last = counted.sum() - 1
    place = (0.95 * last.double()).clamp_min(0)
    below = place.long()
    low, high = ordered.take(torch.stack([below, torch.minimum(below + 1, last.clamp_min(0))]))
    return torch.where(last < 0, 0.0, low + (high - low) * (place - below).to(low.dtype))


def weighted_gradient_difference(prediction: Tensor, target: Tensor, weights: Tensor, pool: Pool = ALONE) -> Tensor:
    """Squared difference between the spatial gradients of prediction and target, with the highest weights at steep edges.

    Gradients are first differences along rows and columns; the result is the mean of both directions. A difference weighs
    0.1 + 0.9 g / (g95 + 1e-5), where g is the target's absolute difference times the weight of the second pixel (the right
    or lower one), and g95 is its 95th percentile over the batch.
    """
    parts = []
    for axis in (2, 3):
        second = weights.narrow(axis, 1, weights.shape[axis] - 1)
        steepness = target.diff(dim=axis).abs() * second
        all_second = pool.gather(second)
        g95 = percentile_95(pool.gather(steepness), all_second > 0).clamp_min(EPSILON)
        edge = 0.1 + 0.9 * steepness / (g95 + EPSILON)
        difference = (prediction.diff(dim=axis) - target.diff(dim=axis)) ** 2
        parts.append((difference * edge * second).sum() * pool.processes / (all_second.sum() + EPSILON))
    return (parts[0] + parts[1]) / 2


def vegetation_loss(logit: Tensor, no_vegetation: Tensor) -> Tensor:
    """Binary cross-entropy of the vegetation logit, the mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logit, (~no_vegetation).to(logit.dtype))


def canopy_loss(
    name: str,
    height: Tensor,
    logit: Tensor,
    target: Tensor,
    no_vegetation: Tensor,
    weight_no_vegetation: float,
    pool: Pool = ALONE,
) -> Tensor:
    """The loss `name` of `LOSSES`.

    Args:
        name: its terms, joined by +.
        height: predicted height, standardised.
        logit: predicted logit of tall vegetation.
        target: reference height, standardised.
        no_vegetation: True where there is no tall vegetation.
        weight_no_vegetation: weight of these pixels in the terms that compare heights.
        pool: the processes that share the batch.
    """
    weights = pixel_weights(no_vegetation, weight_no_vegetation)
    terms = name.split("+")
    total = vegetation_loss(logit, no_vegetation)
    if "patch_mae" in terms:
        total = total + patch_average_mae(height, target, weights)
    if "mae" in terms:
        total = total + pixel_average_mae(height, target, weights, pool)
    if "gradient" in terms:
        total = total + GRADIENT_SHARE * weighted_gradient_difference(height, target, weights, pool)
    return total
