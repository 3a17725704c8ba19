"""Metrics of a height map against its LiDAR reference, pooled over all pixels of tall vegetation.

Heights are in metres, tensors (sample, 1, row, column), masks True where there is no tall vegetation. The metrics of the
published code are means over batches and depend on the batch size; these do not.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import (
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    R2Score,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    BinaryJaccardIndex,
    BinaryPrecision,
    BinaryRecall,
)

CLASS_EDGES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)  # metres; the last class is open
LARGEST_STEP = 100.0  # metres; first differences are clamped to it
LARGEST_SHIFT = 2  # output pixels
VALID_SHARE = 0.7  # minimum share of valid pixels for the spectrum of a quarter to count
BIN = 0.5  # metres, of the joint histogram
BINS = 100
EPSILON = 1e-6  # added to the denominator of the high-frequency power

# Metrics of a test in the order of the report: label, name, unit.
REPORTED = (
    ("MAE", "mae", " m"),
    ("RMSE", "rmse", " m"),
    ("Bias", "bias", " m"),
    ("MAPE", "mape", ""),
    ("Coefficient of determination (R2)", "r2", ""),
    ("Gradient difference", "gradient_difference", " m2"),
    ("Fine structure", "fine_structure_percent", " %"),
    ("MAE at best shift", "mae_best_shift", " m"),
    ("Vegetation precision", "precision", ""),
    ("Vegetation recall", "recall", ""),
    ("Vegetation F1", "f1", ""),
    ("Vegetation accuracy", "accuracy", ""),
    ("Vegetation IoU", "iou", ""),
)


def class_names() -> list[str]:
    """Names of the height classes, `0-5 m` to `over 30 m`."""
    bounded = [f"{low:g}-{high:g} m" for low, high in itertools.pairwise(CLASS_EDGES)]
    return [*bounded, f"over {CLASS_EDGES[-1]:g} m"]


def gradient_difference(prediction: Tensor, target: Tensor, no_vegetation: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squared differences between the spatial gradients of prediction and target, and numbers of pixels.

    Gradients are first differences along rows and columns, where the second pixel is tall vegetation. The target is 0
    elsewhere, so the edge of a stand is a step down to the ground.

    Returns:
        (2,) sums, in the squared unit of the heights, and (2,) counts, along columns and rows.
    """
    sums, counts = [], []
    for axis in (2, 3):
        steps = [heights.diff(dim=axis).clamp(-LARGEST_STEP, LARGEST_STEP) for heights in (prediction, target)]
        valid = ~no_vegetation.narrow(axis, 1, no_vegetation.shape[axis] - 1)
        sums.append(((steps[0] - steps[1]) ** 2)[valid].sum())
        counts.append(valid.sum())
    return torch.stack(sums), torch.stack(counts)


def high_frequency_power(heights: Tensor, no_vegetation: Tensor) -> Tensor:
    """High-frequency power of each quarter of each sample that has enough valid pixels: (quarter,).

    Invalid pixels are set to the quarter's mean; |FFT| is summed outside the central square of half the width and divided
    by the number of valid pixels twice, once for the transform and once for the sum.
    """
    rows, columns = (size // 2 for size in heights.shape[-2:])
    quarters = heights[:, 0].unfold(1, rows, rows).unfold(2, columns, columns).reshape(-1, rows, columns)
    valid = ~no_vegetation[:, 0].unfold(1, rows, rows).unfold(2, columns, columns).reshape(-1, rows, columns)
    counts = valid.sum((1, 2))
    enough = counts >= VALID_SHARE * rows * columns
    if not bool(enough.any()):
        return heights.new_zeros(0)
    quarters, valid, counts = quarters[enough], valid[enough], counts[enough]
    means = (quarters * valid).sum((1, 2)) / counts
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.where(valid, quarters, means[:, None, None])), dim=(1, 2)).abs()
    high = torch.ones(rows, columns, dtype=torch.bool, device=heights.device)
    high[rows // 2 - rows // 4 : rows // 2 + rows // 4, columns // 2 - columns // 4 : columns // 2 + columns // 4] = False
    return (spectrum * high).sum((1, 2)) / counts**2


def errors_at_best_shift(prediction: Tensor, target: Tensor, no_vegetation: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of absolute errors of each sample at the shift of up to 2 pixels that minimises them, and numbers of pixels.

    This is the error without a misregistration of image and LiDAR. All shifts are compared on the same reference pixels,
    those further from the window's edge than the largest shift.

    Returns:
        (sample,) sums and (sample,) counts of tall-vegetation pixels.
    """
    edge = LARGEST_SHIFT
    inner = slice(edge, -edge)
    reference, valid = target[..., inner, inner], ~no_vegetation[..., inner, inner]
    rows, columns = reference.shape[-2:]
    sums = [
        ((prediction[..., down : down + rows, right : right + columns] - reference).abs() * valid).flatten(1).sum(1)
        for down in range(2 * edge + 1)
        for right in range(2 * edge + 1)
    ]
    return torch.stack(sums).amin(0), valid.flatten(1).sum(1)


def joint_histogram(prediction: Tensor, target: Tensor, no_vegetation: Tensor) -> Tensor:
    """Number of pixels by height of target (row) and prediction (column), in bins of `BIN` metres; the last is open."""
    valid = ~no_vegetation
    observed, predicted = ((heights[valid] / BIN).long().clamp(0, BINS - 1) for heights in (target, prediction))
    return torch.bincount(observed * BINS + predicted, minlength=BINS * BINS).view(BINS, BINS)


def _height_metrics(**options: Any) -> dict[str, Metric]:
    return {
        "pixels": SumMetric(**options),
        "mae": MeanAbsoluteError(**options),
        "rmse": MeanSquaredError(squared=False, **options),
        "bias": MeanMetric(**options),
        "mape": MeanAbsolutePercentageError(**options),
        "r2": R2Score(**options),  # coefficient of determination
    }


class CanopyScores:
    """Accumulates the metrics of a test or validation over batches and processes.

    Args:
        tiles: names of all tiles.
        device: of the batches.
        pooled: whether `compute` includes the batches of the other processes.
    """

    def __init__(self, tiles: Iterable[str], device: torch.device, pooled: bool = True) -> None:
        groups = ["all", *class_names(), *(f"tile {tile}" for tile in tiles)]
        options: dict[str, Any] = {"sync_on_compute": pooled}
        self.heights = {group: _height_metrics(**options) for group in groups}
        self.vegetation: dict[str, Metric] = {
            "precision": BinaryPrecision(**options),
            "recall": BinaryRecall(**options),
            "f1": BinaryF1Score(**options),
            "accuracy": BinaryAccuracy(**options),
            "iou": BinaryJaccardIndex(**options),
        }
        names = ("step_errors_down", "steps_down", "step_errors_right", "steps_right", "shifted_errors", "shifted_pixels")
        powers = ("power_prediction", "power_reference", "quarters")
        self.sums: dict[str, Metric] = {name: SumMetric(**options) for name in (*names, *powers)}
        every = [*self.heights.values(), self.vegetation, self.sums]
        for metric in itertools.chain.from_iterable(metrics.values() for metrics in every):
            # Sums over a hundred million pixels need more digits than float32 has.
            metric.to(device).set_dtype(torch.float64)

    def update(
        self,
        prediction: Tensor,
        vegetation: Tensor,
        target: Tensor,
        no_vegetation: Tensor,
        tiles: Sequence[str],
        seen: Tensor | None = None,
    ) -> None:
        """Add a batch: heights in metres, vegetation probability, mask, and the tile of each sample.

        Pixels that are not `seen` do not count for the vegetation; the mask must exclude them from the rest.
        """
        prediction, target = prediction.clamp_min(0).double(), target.double()
        valid = ~no_vegetation
        self._update_heights("all", prediction[valid], target[valid])
        classes = torch.bucketize(target[valid], torch.tensor(CLASS_EDGES[1:], device=target.device), right=True)
        for number, name in enumerate(class_names()):
            chosen = classes == number
            self._update_heights(name, prediction[valid][chosen], target[valid][chosen])
        for tile in set(tiles):
            rows = torch.tensor([name == tile for name in tiles], device=valid.device)
            self._update_heights(f"tile {tile}", prediction[rows][valid[rows]], target[rows][valid[rows]])
        for metric in self.vegetation.values():
            whole = (vegetation, valid) if seen is None else (vegetation[seen], valid[seen])
            metric.update(whole[0].flatten(), whole[1].flatten().long())
        errors, counts = gradient_difference(prediction, target, no_vegetation)
        shifted, pixels = errors_at_best_shift(prediction, target, no_vegetation)
        powers = [high_frequency_power(heights, no_vegetation) for heights in (prediction, target)]
        values = [errors[0], counts[0], errors[1], counts[1], shifted.sum(), pixels.sum(), *(p.sum() for p in powers)]
        values.append(torch.tensor(len(powers[0])))
        for metric, value in zip(self.sums.values(), values, strict=True):
            metric.update(value)

    def _update_heights(self, group: str, prediction: Tensor, target: Tensor) -> None:
        for name, metric in self.heights[group].items():
            if name == "pixels":
                metric.update(len(target))
            elif len(target) > 0:
                metric.update(*((prediction - target,) if name == "bias" else (prediction, target)))

    def compute(self) -> dict[str, dict[str, float]]:
        """Metrics of each group: `all`, the height classes and `tile ...`; NaN where a group has too few pixels."""
        with warnings.catch_warnings():
            # A process or a validation may have no pixel of a height class.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            result = {}
            for group, metrics in self.heights.items():
                pixels = int(metrics["pixels"].compute())
                enough = {name: pixels > (name == "r2") or name == "pixels" for name in metrics}
                result[group] = {
                    name: float(metric.compute()) if enough[name] else math.nan for name, metric in metrics.items()
                }
            total = {name: float(metric.compute()) for name, metric in self.sums.items()}
            vegetation = {name: float(metric.compute()) for name, metric in self.vegetation.items()}
        down = _ratio(total["step_errors_down"], total["steps_down"])
        right = _ratio(total["step_errors_right"], total["steps_right"])
        powers = [_ratio(total[name], total["quarters"]) for name in ("power_prediction", "power_reference")]
        result["all"] |= vegetation | {
            "gradient_difference": (down + right) / 2,
            "fine_structure_percent": power_variation(*powers),
            "mae_best_shift": _ratio(total["shifted_errors"], total["shifted_pixels"]),
        }
        return result


def power_variation(prediction: float, reference: float) -> float:
    """The high-frequency power of a prediction relative to that of its reference, as a difference in %."""
    return 100 * (prediction - reference) / (reference + EPSILON)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
