"""FCN: a fully convolutional network.

Wang, Yan and Oates, "Time series classification from scratch with deep neural
networks", IJCNN 2017.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.stacked_layers import BatchNorm, Conv, Linear, Stack, initialise_layers, xavier_uniform


class FCN(Stack):
    """Three convolutions of 128, 256 and 128 channels, each with batch norm and ReLU; mean over the steps; linear."""

    def __init__(self, networks: int, bands: int, steps: int) -> None:
        super().__init__()
        # Padding 4 on both sides of a kernel of 8: one step more comes out than went in.
        self.conv1 = Conv(networks, bands, 128, 8, padding=(4, 4))
        self.norm1 = BatchNorm(networks, 128, eps=1e-3, momentum=0.01)
        self.conv2 = Conv(networks, 128, 256, 5)
        self.norm2 = BatchNorm(networks, 256, eps=1e-3, momentum=0.01)
        self.conv3 = Conv(networks, 256, 128, 3)
        self.norm3 = BatchNorm(networks, 128, eps=1e-3, momentum=0.01)
        self.head = Linear(networks, 128, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Xavier-uniform weights, zero biases."""
        initialise_layers(self, generators, conv=xavier_uniform, linear=xavier_uniform, zero_bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        x = self.norm1(self.conv1(x), mask, relu=True)
        x = self.norm2(self.conv2(x), mask, relu=True)
        x = self.norm3(self.conv3(x), mask, relu=True)
        return self.head(x.mean(1)).squeeze(2)
