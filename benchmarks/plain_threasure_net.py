"""THREASURE-Net written plainly, as a yardstick for `models.threasure_net`: the same function of the same weights.

Every date is computed, padded or not, keys are made for each pixel and date, dense layers concatenate their inputs,
tensors lie channel by channel, and a margin is cut from the finished output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> nn.Conv2d:
    """Convolution with zeros around."""
    return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)


class PlainDenseBlock(nn.Module):
    """Residual dense block that concatenates."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(64 + 24 * k, 24) for k in range(layers))
        self.fusion = conv(64 + 24 * layers, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(image, channel, row, column)."""
        features = x
        for layer in self.layers:
            features = torch.cat([features, F.leaky_relu_(layer(features), 0.2)], 1)
        return self.fusion(features) + x


def plain_positional_encoding(days: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(...) to (..., size)."""
    index = torch.arange(size)
    angle = days.unsqueeze(-1).to(dtype) / 365 ** (2 * (index // 2) / size)
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())


class PlainThreasureNet(nn.Module):
    """The network at 64 channels, growth 24, with sub-pixel convolutions; parameters in the same order.

    Args:
        channels_in: bands and angles.
        blocks: residual dense blocks.
        layers: layers of a block.
        doublings: 0, 1 or 2 for 10, 5 or 2.5 m.
    """

    def __init__(self, channels_in: int, blocks: int = 5, layers: int = 5, doublings: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Sequential(conv(channels_in, 64), conv(64, 64))
        self.blocks = nn.ModuleList(PlainDenseBlock(layers) for _ in range(blocks))
        self.fusion = nn.Sequential(conv(64 * blocks, 64, 1), conv(64, 64))
        self.keys = nn.Linear(64, 64, bias=False)
        upsampling: list[nn.Module] = []
        for _ in range(doublings):
            upsampling += [conv(64, 256), nn.PixelShuffle(2)]
        self.upsampling = nn.Sequential(*upsampling, *([conv(64, 64), nn.ReLU()] if doublings else []))
        self.trunk = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        self.height = nn.Linear(64, 1)
        self.vegetation = nn.Linear(64, 1)
        self.factor = 2**doublings

    def encode(self, x: Tensor) -> Tensor:
        """(image, band, row, column) to (image, channel, row, column)."""
        x = shallow = self.conv_in(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return self.fusion(torch.cat(outputs, 1)) + shallow

    def attend(self, x: Tensor, days: Tensor, lidar_day: Tensor, padding: Tensor) -> Tensor:
        """(sample, date, channel, row, column) to (sample, channel, row, column)."""
        dtype = self.keys.weight.dtype
        x = (x + plain_positional_encoding(days, 64, dtype)[..., None, None]).permute(0, 3, 4, 1, 2)
        keys = self.keys(x).unflatten(4, (4, 16))
        query = plain_positional_encoding(lidar_day - 183, 16, dtype)
        logits = torch.einsum("srcdhk,sk->srcdh", keys, query) / math.sqrt(16)
        weights = logits.masked_fill(padding[:, None, None, :, None], -torch.inf).softmax(3)
        weights = F.dropout(weights, 0.1, self.training)
        return torch.einsum("srcdh,srcdhk->srchk", weights, x.unflatten(4, (4, 16))).flatten(3).permute(0, 3, 1, 2)

    def forward(
        self, images: Tensor, days: Tensor, lidar_day: Tensor, padding: Tensor, cut: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As ThreasureNet: height and vegetation, (sample, 1, row, column) each."""
        features = self.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        x = self.upsampling(self.attend(features, days, lidar_day, padding))
        n = cut * self.factor
        x = (x[..., n:-n, n:-n] if n else x).permute(0, 2, 3, 1)
        x = self.trunk(x)
        return self.height(x).permute(0, 3, 1, 2), self.vegetation(x.detach()).permute(0, 3, 1, 2)
