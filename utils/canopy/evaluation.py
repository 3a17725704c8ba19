"""The result of a validation or test, accumulated over batches and processes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.canopy.metrics import BINS, CanopyScores, joint_histogram
from utils.canopy.plots import Scene
from utils.processes import reduced

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SCENES = 3  # windows kept for a plot


@dataclass
class Evaluation:
    """The result of a validation or test.

    Attributes:
        loss: mean over the samples of the loss of each, so that it does not depend on batches.
        scores: metrics by group, in metres.
        histogram: pixels by height of the reference (row) and of the prediction (column).
        scenes: the first windows.
    """

    loss: float
    scores: dict[str, dict[str, float]]
    histogram: NDArray[np.int64]
    scenes: list[Scene]


class EvaluationCollector:
    """Accumulates an `Evaluation` over batches and processes.

    Args:
        fabric: the processes.
        tiles: names of all tiles.
        resolution: pixel size of the heights, m.
    """

    def __init__(self, fabric: "Fabric", tiles: Iterable[str], resolution: float) -> None:
        self.fabric, self.resolution = fabric, resolution
        self.scores = CanopyScores(tiles, fabric.device)
        self.losses = torch.zeros(2, dtype=torch.float64, device=fabric.device)
        self.histogram = torch.zeros(BINS, BINS, dtype=torch.int64, device=fabric.device)
        self.scenes: list[Scene] = []

    def update(
        self,
        losses: Sequence[Tensor],
        metres: Tensor,
        vegetation: Tensor,
        reference: Tensor,
        no_vegetation: Tensor,
        images: Tensor,
        names: Sequence[str],
    ) -> None:
        """Add a batch.

        Args:
            losses: one per sample.
            metres: predicted heights in metres, (sample, 1, row, column).
            vegetation: predicted probability of tall vegetation, (sample, 1, row, column).
            reference: heights in metres, (sample, 1, row, column).
            no_vegetation: True where there is no tall vegetation, (sample, 1, row, column).
            images: one per sample to plot, (sample, band, row, column), reflectance x 10 000, nan where missing.
            names: tile/patch of each sample.
        """
        for loss in losses:
            self.losses[0] += loss
        self.losses[1] += len(names)
        self.scores.update(metres, vegetation, reference, no_vegetation, [name.partition("/")[0] for name in names])
        self.histogram += joint_histogram(metres, reference, no_vegetation)
        for row in range(min(SCENES - len(self.scenes), len(names))):
            image, target, predicted, mask = (
                tensor.cpu().numpy() for tensor in (images[row], reference[row, 0], metres[row, 0], no_vegetation[row, 0])
            )
            self.scenes.append(Scene(names[row], image, target, predicted, mask, self.resolution))

    def compute(self) -> Evaluation:
        """The evaluation over all processes."""
        losses, histogram = (reduced(self.fabric, tensor, "sum") for tensor in (self.losses, self.histogram))
        return Evaluation(float(losses[0] / losses[1]), self.scores.compute(), histogram.cpu().numpy(), self.scenes)
