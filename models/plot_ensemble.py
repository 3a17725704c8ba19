"""PlotEnsemble: networks that see the plot, averaged with the additive Gaussian process."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from datasets.model_inputs import Inputs
from datasets.series_table import Split
from models.additive_gaussian_process import AdditiveGaussianProcess
from models.resnet18t import ResNet18T


class PlotEnsemble(ResNet18T):
    """ResNet18T with plot_context=yes; predictions are averaged with those of AdditiveGaussianProcess, by `Blend`."""


class Blend(NamedTuple):
    """What the networks of a fold are averaged with.

    Attributes:
        process: fitted to training and validation rows.
        weight: of the process, from 0 to 1; the networks have the rest.
    """

    process: AdditiveGaussianProcess
    weight: float

    @classmethod
    def fit(cls, inputs: Inputs, y: NDArray[np.floating[Any]], ids: Split, networks: NDArray[np.float64]) -> Self:
        """Choose the weight that has the smallest squared error on the validation rows, and fit the process.

        For the choice, the process knows the training rows alone, as the networks do.

        Args:
            inputs: of all samples.
            y: (sample,).
            ids: rows of the fold.
            networks: (validation row,) what their mean predicts.
        """
        process = AdditiveGaussianProcess(seed=0).fit(inputs.of_rows(ids.train), y[ids.train])
        apart = process.predict(inputs.of_rows(ids.validation)) - networks
        weight = float(apart @ (y[ids.validation] - networks) / max(float(apart @ apart), 1e-300))
        rows = np.concatenate([ids.train, ids.validation])
        return cls(AdditiveGaussianProcess(seed=0).fit(inputs.of_rows(rows), y[rows]), min(max(weight, 0.0), 1.0))

    def predict(self, inputs: Inputs, networks: NDArray[np.float64]) -> NDArray[np.float64]:
        """What networks predict (..., sample), averaged with what the process predicts of the inputs."""
        return self.weight * self.process.predict(inputs) + (1 - self.weight) * networks

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays of the process, and the weight."""
        return {
            **{f"process.{name}": values for name, values in self.process.tensors().items()},
            "weight": np.array(self.weight),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The blend of `tensors()`, among which there may be others."""
        own = {name.removeprefix("process."): one for name, one in tensors.items() if name.startswith("process.")}
        return cls(AdditiveGaussianProcess.from_tensors(own), float(tensors["weight"]))
