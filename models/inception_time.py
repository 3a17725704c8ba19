"""InceptionTime: parallel convolutions of several lengths, six modules deep.

Ismail Fawaz et al., "InceptionTime: Finding AlexNet for time series
classification", Data Mining and Knowledge Discovery 34, 2020; kernel lengths of
the ResNeTS paper (8, 4, 2) for series of 16 steps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.stacked_layers import BatchNorm, Conv, Linear, Stack, initialise_layers, xavier_uniform


class InceptionModule(nn.Module):
    """Bottleneck and three convolutions, beside a max-pool; concatenated, batch norm, ReLU."""

    def __init__(self, networks: int, channels_in: int, bottleneck_factor: int, num_filters: int) -> None:
        super().__init__()
        narrow = max(1, channels_in // bottleneck_factor)
        self.bottleneck = Conv(networks, channels_in, narrow, 1)
        self.conv8 = Conv(networks, narrow, num_filters, 8)
        self.conv4 = Conv(networks, narrow, num_filters, 4)
        self.conv2 = Conv(networks, narrow, num_filters, 2)
        self.pooled = Conv(networks, channels_in, num_filters, 1)
        self.norm = BatchNorm(networks, 4 * num_filters, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, channel in) to (network, step, sample, 4 x num_filters)."""
        # Never in bfloat16: three convolutions read it, and their gradients are summed in its format.
        narrow = self.bottleneck(x).to(x.dtype)
        around = F.pad(x, (0, 0, 0, 0, 1, 1), value=float("-inf"))
        highest = torch.maximum(torch.maximum(around[:, :-2], around[:, 2:]), x)
        branches = [self.conv8(narrow), self.conv4(narrow), self.conv2(narrow), self.pooled(highest)]
        return self.norm(torch.cat(branches, dim=3), mask, relu=True)


class Shortcut(nn.Module):
    """1x1 convolution and batch norm of an earlier activation, added to the present one; ReLU."""

    def __init__(self, networks: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = Conv(networks, channels_in, channels_out, 1)
        self.norm = BatchNorm(networks, channels_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor, earlier: Tensor, mask: Tensor | None = None) -> Tensor:
        """Both (network, step, sample, channel)."""
        return (x + self.norm(self.conv(earlier), mask)).relu()


class InceptionTime(Stack):
    """Six inception modules with a shortcut after the third and the sixth; mean over the steps; linear."""

    def __init__(self, networks: int, bands: int, steps: int, *, bottleneck_factor: int, num_filters: int) -> None:
        super().__init__()
        width = 4 * num_filters
        if bottleneck_factor > width:
            raise InputError(
                f"bottleneck_factor={bottleneck_factor} leaves no channel: it divides the modules' {width} channels, so at "
                f"most {width} is possible"
            )
        self.module1 = InceptionModule(networks, bands, bottleneck_factor, num_filters)
        self.module2 = InceptionModule(networks, width, bottleneck_factor, num_filters)
        self.module3 = InceptionModule(networks, width, bottleneck_factor, num_filters)
        self.shortcut1 = Shortcut(networks, bands, width)
        self.module4 = InceptionModule(networks, width, bottleneck_factor, num_filters)
        self.module5 = InceptionModule(networks, width, bottleneck_factor, num_filters)
        self.module6 = InceptionModule(networks, width, bottleneck_factor, num_filters)
        self.shortcut2 = Shortcut(networks, width, width)
        self.head = Linear(networks, width, 1)

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Xavier-uniform weights, zero biases."""
        initialise_layers(self, generators, conv=xavier_uniform, linear=xavier_uniform, zero_bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        y = self.module3(self.module2(self.module1(x, mask), mask), mask)
        first = self.shortcut1(y, x, mask)
        y = self.module6(self.module5(self.module4(first, mask), mask), mask)
        y = self.shortcut2(y, first, mask)
        return self.head(y.mean(1)).squeeze(2)
