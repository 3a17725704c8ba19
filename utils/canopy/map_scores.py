"""Metrics of a whole map against reference heights, and the calibration of its spread."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from utils.canopy.metrics import BINS, CLASS_EDGES, CanopyScores, class_names, joint_histogram

TREE_COVER = 2.0  # metres, from which Open-Canopy and SERA-H count a pixel as tree cover
SHARE = 0.9  # of errors within an interval
RATIO_BINS = np.logspace(-3, 3, 1201)  # of an error over the spread; 1 % each
SMALLEST_SPREAD = 0.05  # metres: maps hold whole decimetres


class MapScores:
    """Collects metrics window by window; heights in metres, arrays (row, column).

    All metrics of training, and two that other papers report, as Fogel et al. define them (Open-Canopy, CVPR 2025, and
    SERA-H after it): nMAE, the mean of |predicted - reference| / (1 m + reference) over tall vegetation, and the
    intersection over union of tree cover, pixels of at least 2 m, over all pixels with a reference.
    """

    def __init__(self) -> None:
        self.scores = CanopyScores([], torch.device("cpu"))
        self.histogram = torch.zeros(BINS, BINS, dtype=torch.int64)
        self.sums = dict.fromkeys(("relative", "tall", "both", "either", "pixels"), 0.0)
        self.ratios = np.zeros((2, len(CLASS_EDGES), len(RATIO_BINS) + 1), np.int64)

    def update(
        self,
        predicted: NDArray[np.float32],
        vegetation: NDArray[np.float32],
        reference: NDArray[np.float32],
        no_vegetation: NDArray[np.bool_],
    ) -> None:
        """Take in a window; nan where nothing is mapped or no reference is, and these pixels do not count."""
        seen = np.isfinite(predicted) & np.isfinite(reference)
        tall = seen & ~no_vegetation
        heights = torch.from_numpy(np.where(seen, predicted, 0))[None, None]
        target = torch.from_numpy(np.where(tall, reference, 0))[None, None]
        mask, whole = torch.from_numpy(~tall)[None, None], torch.from_numpy(seen)[None, None]
        self.scores.update(heights, torch.from_numpy(vegetation)[None, None], target, mask, [], whole)
        self.histogram += joint_histogram(heights, target, mask)
        error = np.abs(predicted - reference)[tall].astype(np.float64)
        self.sums["relative"] += float((error / (1 + reference[tall])).sum())
        self.sums["tall"] += int(tall.sum())
        covers = [values[seen] >= TREE_COVER for values in (predicted, reference)]
        self.sums["both"] += int((covers[0] & covers[1]).sum())
        self.sums["either"] += int((covers[0] | covers[1]).sum())
        self.sums["pixels"] += int(seen.sum())

    def update_spread(
        self,
        predicted: NDArray[np.float32],
        spread: NDArray[np.float32],
        reference: NDArray[np.float32],
        no_vegetation: NDArray[np.bool_],
        half: int,
    ) -> None:
        """Take in the spread of a window of one half (0 or 1): one half calibrates it, the other one checks."""
        tall = np.isfinite(predicted) & np.isfinite(reference) & ~no_vegetation
        ratio = np.abs(predicted - reference)[tall] / np.maximum(spread[tall], SMALLEST_SPREAD)
        classes = np.digitize(reference[tall], CLASS_EDGES[1:])
        np.add.at(self.ratios[half], (classes, np.digitize(ratio, RATIO_BINS)), 1)

    def compute(self) -> dict[str, dict[str, float]]:
        """Metrics of each group as in training; `all` with nmae and tree_cover_iou."""
        result = self.scores.compute()
        sums = self.sums
        result["all"]["nmae"] = sums["relative"] / sums["tall"] if sums["tall"] else math.nan
        result["all"]["tree_cover_iou"] = sums["both"] / sums["either"] if sums["either"] else math.nan
        result["all"]["pixels_with_reference"] = sums["pixels"]
        return result

    def calibration(self) -> dict[str, Any]:
        """The factor by which the spread becomes the half width of a 90 % interval, and what it covers.

        Returns:
            factor: from one half of the windows; coverage: of the other half's errors, and coverage_by_class.
        """
        known, checked = self.ratios
        total = known.sum()
        if not total or not checked.sum():
            return {}
        place = int(np.searchsorted(known.sum(0).cumsum(), SHARE * total))
        within = checked[:, : place + 1].sum(1), checked.sum(1)
        by_class = {name: float(a / b) for name, a, b in zip(class_names(), *within, strict=True) if b}
        factor = float(RATIO_BINS[min(place, len(RATIO_BINS) - 1)])
        return {"factor": factor, "coverage": float(within[0].sum() / within[1].sum()), "coverage_by_class": by_class}
