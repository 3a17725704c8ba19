"""ResidualNet: the residual CNN for time series, before ResNeTS.

Wang, Yan and Oates, "Time series classification from scratch with deep neural networks", IJCNN 2017.
"""

from torch import Tensor, nn


def conv_norm(channels_in: int, channels_out: int, kernel_size: int) -> nn.Sequential:
    """Convolution along the steps that keeps their number (the extra zero of even kernels is on the right), batch norm."""
    left, right = (kernel_size - 1) // 2, kernel_size // 2
    padding = [nn.ZeroPad2d((left, right, 0, 0))] if left != right else []
    conv = nn.Conv2d(channels_in, channels_out, (1, kernel_size), padding=(0, left if left == right else 0), bias=False)
    return nn.Sequential(*padding, conv, nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01))


class ResidualBlock(nn.Module):
    """Convolutions of 8, 5 and 3 steps beside a shortcut; ReLU after the sum."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        changes = channels_in != channels_out
        norm = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01)
        self.shortcut = conv_norm(channels_in, channels_out, 1) if changes else norm
        self.conv1 = conv_norm(channels_in, channels_out, 8)
        self.conv2 = conv_norm(channels_out, channels_out, 5)
        self.conv3 = conv_norm(channels_out, channels_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, channel in, 1, step) to (sample, channel out, 1, step)."""
        y = self.conv1(x).relu()
        y = self.conv2(y).relu()
        return (self.conv3(y) + self.shortcut(x)).relu()


class ResidualNet(nn.Module):
    """Three residual blocks of 64, 128 and 128 channels; mean over the steps; linear.

    Xavier-uniform weights, zero biases.
    """

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(bands, 64)
        self.block2 = ResidualBlock(64, 128)
        self.block3 = ResidualBlock(128, 128)
        self.head = nn.Linear(128, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        # As an image of one row in channels-last: PyTorch's 2-d convolutions on it are faster than its 1-d ones.
        x = x.mT.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean((2, 3))).squeeze(1)
