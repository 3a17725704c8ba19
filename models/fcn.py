"""FCN: a fully convolutional network.

Wang, Yan and Oates, "Time series classification from scratch with deep neural networks", IJCNN 2017.
"""

from torch import Tensor, nn


def conv_norm(channels_in: int, channels_out: int, kernel_size: int, padding: str | tuple[int, int]) -> nn.Sequential:
    """Convolution along the steps, batch norm, ReLU."""
    conv = nn.Conv2d(channels_in, channels_out, (1, kernel_size), padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True))


class FCN(nn.Module):
    """Three convolutions of 128, 256 and 128 channels, each with batch norm and ReLU; mean over the steps; linear.

    Xavier-uniform weights, zero biases.
    """

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        # A kernel of 8 with padding 4 on both sides, as published: the output is one step longer than the input.
        self.conv1 = conv_norm(bands, 128, 8, (0, 4))
        self.conv2 = conv_norm(128, 256, 5, "same")
        self.conv3 = conv_norm(256, 128, 3, "same")
        self.head = nn.Linear(128, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        # As an image of one row in channels-last: PyTorch's 2-d convolutions on it are faster than its 1-d ones.
        x = x.mT.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.head(x.mean((2, 3))).squeeze(1)
