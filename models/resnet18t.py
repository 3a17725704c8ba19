"""ResNet18T (ResNeTS): the residual network for Sentinel-2 time series.

Dieste et al., "ResNeTS: a ResNet for Time Series Analysis of Sentinel-2 Data Applied to Grassland Plant-Biodiversity
Prediction", IEEE JSTARS 2024, doi 10.1109/JSTARS.2024.3454271: the basic blocks of He et al., "Deep residual learning for
image recognition", CVPR 2016, along the time axis, with the average pooling in the shortcut of "Bag of tricks" (He et al.,
CVPR 2019).
"""

from torch import Tensor, nn

from utils.errors import InputError


def conv_norm(channels_in: int, channels_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution along the steps and batch norm."""
    padding = (0, kernel_size // 2)
    conv = nn.Conv2d(channels_in, channels_out, (1, kernel_size), (1, stride), padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut; ReLU after the sum."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, stride: int, shortcut_pooling: bool) -> None:
        super().__init__()
        shortcut: list[nn.Module] = []
        if shortcut_pooling and stride > 1:
            # The last window may hold fewer steps than the stride, which are then averaged.
            shortcut.append(nn.AvgPool2d((1, stride), ceil_mode=True))
        if channels_in != channels_out or stride > 1:
            shortcut.append(conv_norm(channels_in, channels_out, 1, 1 if shortcut_pooling else stride))
        self.shortcut = nn.Sequential(*shortcut)
        self.conv1 = conv_norm(channels_in, channels_out, kernel_size, stride)
        self.conv2 = conv_norm(channels_out, channels_out, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, channel in, 1, step) to (sample, channel out, 1, step / stride)."""
        y = self.conv1(x).relu()
        return (self.conv2(y) + self.shortcut(x)).relu()


class ResNet18T(nn.Module):
    """A 1x1 stem, stages of basic blocks, mean over the steps, linear.

    Kaiming-normal initial weights of convolutions (fan out), PyTorch's default for the linear layer.

    Args:
        num_blocks_per_stage: residual blocks in each of the 4 stages.
        num_channels: channels in each of the 4 stages.
        strides: stride, in time steps, of each of the 4 stages, in the first convolution of its first block.
        kernel_size: time steps in the kernel of a convolution, odd.
        stem_channels: output channels of the stem.
        shortcut_pooling: yes/no, strided shortcuts average time steps instead of skipping them.

    Raises:
        InputError: the kernel size is even or too large for the series, or a stride is larger than the series.
    """

    def __init__(
        self,
        bands: int,
        steps: int,
        *,
        num_blocks_per_stage: tuple[int, ...] = (1, 1, 1, 1),
        num_channels: tuple[int, ...] = (64, 64, 64, 64),
        strides: tuple[int, ...] = (1, 1, 2, 1),
        kernel_size: int = 5,
        stem_channels: int = 96,
        shortcut_pooling: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size > 2 * steps - 1:
            raise InputError(
                f"kernel_size={kernel_size} does not fit: an odd number from 1 to {2 * steps - 1} is expected "
                f"for series of {steps} steps"
            )
        self.stem = conv_norm(bands, stem_channels, 1)
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
                first_stride = stride if index == 0 else 1
                blocks.append(BasicBlock(channels_in, channels, kernel_size, first_stride, shortcut_pooling))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        # As an image of one row in channels-last: PyTorch's 2-d convolutions on it are faster than its 1-d ones.
        x = x.mT.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
        x = self.blocks(self.stem(x).relu())
        return self.head(x.mean((2, 3))).squeeze(1)
