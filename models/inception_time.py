"""InceptionTime: parallel convolutions of several lengths, six modules deep.

Ismail Fawaz et al., "InceptionTime: Finding AlexNet for time series classification", Data Mining and Knowledge Discovery
34, 2020; kernel lengths of the ResNeTS paper (8, 4, 2) for series of 16 steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError


def conv(channels_in: int, channels_out: int, kernel_size: int) -> nn.Sequential:
    """Convolution along the steps that keeps their number; an even kernel gets its extra zero on the right."""
    padding = nn.ZeroPad2d(((kernel_size - 1) // 2, kernel_size // 2, 0, 0))
    convolution = nn.Conv2d(channels_in, channels_out, (1, kernel_size), bias=False)
    return nn.Sequential(padding, convolution) if kernel_size > 1 else nn.Sequential(convolution)


class InceptionModule(nn.Module):
    """A bottleneck and three parallel convolutions, and a max-pooling branch; concatenation, batch norm, ReLU."""

    def __init__(self, channels_in: int, bottleneck_factor: int, num_filters: int) -> None:
        super().__init__()
        narrow = max(1, channels_in // bottleneck_factor)
        self.bottleneck = conv(channels_in, narrow, 1)
        self.conv8 = conv(narrow, num_filters, 8)
        self.conv4 = conv(narrow, num_filters, 4)
        self.conv2 = conv(narrow, num_filters, 2)
        self.pooled = conv(channels_in, num_filters, 1)
        self.norm = nn.BatchNorm2d(4 * num_filters, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, channel in, 1, step) to (sample, 4 x num_filters, 1, step)."""
        narrow = self.bottleneck(x)
        highest = F.max_pool2d(x, (1, 3), stride=1, padding=(0, 1))
        branches = [self.conv8(narrow), self.conv4(narrow), self.conv2(narrow), self.pooled(highest)]
        return self.norm(torch.cat(branches, dim=1)).relu()


class Shortcut(nn.Module):
    """1x1 convolution and batch norm of an earlier activation, added to the current one; ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = conv(channels_in, channels_out, 1)
        self.norm = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """Both (sample, channel, 1, step)."""
        return (x + self.norm(self.conv(earlier))).relu()


class InceptionTime(nn.Module):
    """Six inception modules with a shortcut after the third and the sixth; mean over the steps; linear.

    Xavier-uniform weights, zero biases.

    Args:
        bottleneck_factor: input channels of a bottleneck divided by its output channels.
        num_filters: output channels of each branch of a module.

    Raises:
        InputError: the bottleneck leaves no channel.
    """

    def __init__(self, bands: int, steps: int, *, bottleneck_factor: int = 4, num_filters: int = 64) -> None:
        super().__init__()
        width = 4 * num_filters
        if bottleneck_factor > width:
            raise InputError(
                f"bottleneck_factor={bottleneck_factor} leaves no channel: it divides the modules' {width} channels, so at "
                f"most {width} is possible"
            )
        self.module1 = InceptionModule(bands, bottleneck_factor, num_filters)
        self.module2 = InceptionModule(width, bottleneck_factor, num_filters)
        self.module3 = InceptionModule(width, bottleneck_factor, num_filters)
        self.shortcut1 = Shortcut(bands, width)
        self.module4 = InceptionModule(width, bottleneck_factor, num_filters)
        self.module5 = InceptionModule(width, bottleneck_factor, num_filters)
        self.module6 = InceptionModule(width, bottleneck_factor, num_filters)
        self.shortcut2 = Shortcut(width, width)
        self.head = nn.Linear(width, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        # As an image of one row in channels-last: PyTorch's 2-d convolutions on it are faster than its 1-d ones.
        x = x.mT.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
        first = self.shortcut1(self.module3(self.module2(self.module1(x))), x)
        y = self.shortcut2(self.module6(self.module5(self.module4(first))), first)
        return self.head(y.mean((2, 3))).squeeze(1)
