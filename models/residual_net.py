"""ResidualNet: the residual CNN for time series, before ResNeTS.

Wang, Yan and Oates, "Time series classification from scratch with deep neural
networks", IJCNN 2017.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.stacked_layers import BatchNorm, Conv, Linear, Stack, initialise_layers, xavier_uniform


class ResidualBlock(nn.Module):
    """Convolutions of 8, 5 and 3 steps beside a shortcut; ReLU after the sum."""

    def __init__(self, networks: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        changes = channels_in != channels_out
        self.shortcut = Conv(networks, channels_in, channels_out, 1) if changes else nn.Identity()
        self.shortcut_norm = BatchNorm(networks, channels_out, eps=1e-3, momentum=0.01)
        self.conv1 = Conv(networks, channels_in, channels_out, 8)
        self.norm1 = BatchNorm(networks, channels_out, eps=1e-3, momentum=0.01)
        self.conv2 = Conv(networks, channels_out, channels_out, 5)
        self.norm2 = BatchNorm(networks, channels_out, eps=1e-3, momentum=0.01)
        self.conv3 = Conv(networks, channels_out, channels_out, 3)
        self.norm3 = BatchNorm(networks, channels_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, channel in) to (network, step, sample, channel out)."""
        y = self.norm1(self.conv1(x), mask, relu=True)
        y = self.norm2(self.conv2(y), mask, relu=True)
        y = self.norm3(self.conv3(y), mask)
        return (y + self.shortcut_norm(self.shortcut(x), mask)).relu()


class ResidualNet(Stack):
    """Three residual blocks of 64, 128 and 128 channels; mean over the steps; linear."""

    def __init__(self, networks: int, bands: int, steps: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(networks, bands, 64)
        self.block2 = ResidualBlock(networks, 64, 128)
        self.block3 = ResidualBlock(networks, 128, 128)
        self.head = Linear(networks, 128, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Xavier-uniform weights, zero biases."""
        initialise_layers(self, generators, conv=xavier_uniform, linear=xavier_uniform, zero_bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        x = self.block1(x, mask)
        x = self.block2(x, mask)
        x = self.block3(x, mask)
        return self.head(x.mean(1)).squeeze(2)
