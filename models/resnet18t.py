"""ResNet18T (ResNeTS): the residual network for Sentinel-2 time series.

Dieste et al., "ResNeTS: a ResNet for Time Series Analysis of Sentinel-2 Data
Applied to Grassland Plant-Biodiversity Prediction", IEEE JSTARS 2024,
doi 10.1109/JSTARS.2024.3454271: the basic blocks of He et al., "Deep residual
learning for image recognition", CVPR 2016, along the time axis, with the average
pooling in the shortcut of "Bag of tricks" (He et al., CVPR 2019).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.stacked_layers import (
    BatchNorm,
    Conv,
    Linear,
    Stack,
    average_steps,
    initialise_layers,
    kaiming_normal_fan_out,
    uniform_fan_in,
)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut; ReLU after the sum."""

    def __init__(
        self,
        networks: int,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int,
        shortcut_pooling: bool,
    ) -> None:
        super().__init__()
        self.pooling = stride if shortcut_pooling else 1
        self.shortcut: Conv | None = None
        if channels_in != channels_out or stride > 1:
            shortcut_stride = 1 if shortcut_pooling else stride
            self.shortcut = Conv(networks, channels_in, channels_out, 1, shortcut_stride)
            self.shortcut_norm = BatchNorm(networks, channels_out)
        padding = (kernel_size // 2, kernel_size // 2)
        self.conv1 = Conv(networks, channels_in, channels_out, kernel_size, stride, padding)
        self.norm1 = BatchNorm(networks, channels_out)
        self.conv2 = Conv(networks, channels_out, channels_out, kernel_size, 1, padding)
        self.norm2 = BatchNorm(networks, channels_out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, channel in) to (network, step / stride, sample, channel out)."""
        y = self.norm1(self.conv1(x), mask, relu=True)
        y = self.norm2(self.conv2(y), mask)
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(average_steps(x, self.pooling)), mask)
        return (y + x).relu()


class ResNet18T(Stack):
    """A 1x1 stem, stages of basic blocks, mean over the steps, linear.

    Args:
        num_blocks_per_stage: blocks of each stage.
        num_channels: channels of each stage.
        strides: stride of each stage, in the first convolution of its first block.
        kernel_size: steps a convolution sees; odd.
        stem_channels: channels out of the stem.
        shortcut_pooling: shortcuts average over the stride instead of skipping steps.

    Raises:
        InputError: the kernel cannot be centred or is longer than any stage's padded series.
    """

    def __init__(
        self,
        networks: int,
        bands: int,
        steps: int,
        *,
        num_blocks_per_stage: Sequence[int],
        num_channels: Sequence[int],
        strides: Sequence[int],
        kernel_size: int,
        stem_channels: int,
        shortcut_pooling: bool,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size > 2 * steps - 1:
            raise InputError(
                f"kernel_size={kernel_size} does not fit: an odd number from 1 to {2 * steps - 1} is expected "
                f"for series of {steps} steps"
            )
        self.stem = Conv(networks, bands, stem_channels, 1)
        self.stem_norm = BatchNorm(networks, stem_channels)
        blocks = []
        channels_in = stem_channels
        for count, channels, stride in zip(num_blocks_per_stage, num_channels, strides, strict=True):
            if stride > steps:
                raise InputError(
                    f"strides={' '.join(map(str, strides))} leaves no time step: a stage of stride {stride} "
                    f"would see only {steps}"
                )
            steps = -(-steps // stride)
            for index in range(count):
                blocks.append(
                    BasicBlock(networks, channels_in, channels, kernel_size, stride if index == 0 else 1, shortcut_pooling)
                )
                channels_in = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = Linear(networks, channels_in, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Kaiming-normal (fan-out) convolutions, PyTorch's own linear."""
        initialise_layers(self, generators, conv=kaiming_normal_fan_out, linear=uniform_fan_in, zero_bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        x = self.stem_norm(self.stem(x), mask, relu=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(1)).squeeze(2)
