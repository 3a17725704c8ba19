"""MLP: a multilayer perceptron on the flat series.

The baseline of Wang, Yan and Oates, "Time series classification from scratch
with deep neural networks", IJCNN 2017, in the sizes of the ResNeTS paper:
160-64-64-64-1 for 10 bands and 16 steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.stacked_layers import Linear, Stack, initialise_layers, xavier_uniform


class MLP(Stack):
    """Three hidden layers of 64, ReLU."""

    def __init__(self, networks: int, bands: int, steps: int) -> None:
        super().__init__()
        self.hidden1 = Linear(networks, bands * steps, 64)
        self.hidden2 = Linear(networks, 64, 64)
        self.hidden3 = Linear(networks, 64, 64)
        self.head = Linear(networks, 64, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Xavier-uniform weights, zero biases."""
        initialise_layers(self, generators, conv=xavier_uniform, linear=xavier_uniform, zero_bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        x = x.transpose(1, 2).flatten(2)  # bands fastest within a step, as in the table
        x = self.hidden1(x).relu()
        x = self.hidden2(x).relu()
        x = self.hidden3(x).relu()
        return self.head(x).squeeze(2)
