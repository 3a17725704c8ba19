"""Transformer: a self-attention encoder for satellite time series.

Rußwurm and Körner, "Self-attention for raw optical satellite time series
classification", ISPRS Journal 169, 2020; encoder layers and positions of Vaswani
et al., "Attention is all you need", NeurIPS 2017.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.stacked_layers import Conv, Dropout, LayerNorm, Linear, Stack, initialise_layers, uniform_fan_in, xavier_uniform


def sinusoidal_positions(steps: int, features: int) -> Tensor:
    """(step, feature) float64 codes of positions 1..steps: sine at even, cosine at odd features, base 10000."""
    frequency = 10000 ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angle = torch.arange(1, steps + 1)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class EncoderLayer(nn.Module):
    """Post-norm encoder layer: self-attention over the steps, then a feed-forward network, ReLU."""

    def __init__(self, networks: int, features: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = Linear(networks, features, 3 * features)
        self.attention_out = Linear(networks, features, features)
        self.feed_forward1 = Linear(networks, features, feed_forward)
        self.feed_forward2 = Linear(networks, feed_forward, features)
        self.norm1 = LayerNorm(networks, features)
        self.norm2 = LayerNorm(networks, features)
        self.dropout = Dropout(dropout)

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention of (network, step, sample, feature)."""
        # (network, step, sample, feature) to query, key, value of (network, sample, head, step, feature of a head)
        query, key, value = (
            part.unflatten(3, (self.heads, -1)).permute(0, 2, 3, 1, 4) for part in self.query_key_value(x).chunk(3, dim=3)
        )
        logits = query @ key.transpose(3, 4) / math.sqrt(query.shape[-1])
        attended = self.dropout(logits.softmax(-1)) @ value
        return self.attention_out(attended.permute(0, 3, 1, 2, 4).flatten(3))

    def forward(self, x: Tensor) -> Tensor:
        """(network, step, sample, feature), shape kept."""
        x = self.norm1(x + self.dropout(self.attend(x)))
        hidden = self.dropout(self.feed_forward1(x).relu())
        return self.norm2(x + self.dropout(self.feed_forward2(hidden)))


class Transformer(Stack):
    """Layer norm, 1x1 convolution to 64, positions, five encoder layers, maximum over the steps, linear."""

    positions: Tensor

    def __init__(self, networks: int, bands: int, steps: int) -> None:
        super().__init__()
        features = 64
        self.input_norm = LayerNorm(networks, bands)
        self.input_conv = Conv(networks, bands, features, 1, bias=True)
        self.conv_norm = LayerNorm(networks, features)
        layers = [EncoderLayer(networks, features, heads=4, feed_forward=256, dropout=0.015) for _ in range(5)]
        self.layers = nn.ModuleList(layers)
        self.output_norm = LayerNorm(networks, features)
        self.head = Linear(networks, features, 1, bias=False)
        self.register_buffer("positions", sinusoidal_positions(steps, features), persistent=False)

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """PyTorch's own; the encoder layers start as copies of one another."""
        initialise_layers(self, generators, conv=uniform_fan_in, linear=uniform_fan_in, zero_bias=False)
        first = self.layers[0]
        assert isinstance(first, EncoderLayer)
        initialise_layers(first.query_key_value, generators, xavier_uniform, xavier_uniform, zero_bias=True)
        assert first.attention_out.bias is not None
        first.attention_out.bias.zero_()
        for layer in self.layers[1:]:
            layer.load_state_dict(first.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        x = self.conv_norm(self.input_conv(self.input_norm(x))) + self.positions[:, None].to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.output_norm(x).amax(1)).squeeze(2)
