"""Transformer: a self-attention encoder for satellite time series.

Rußwurm and Körner, "Self-attention for raw optical satellite time series classification", ISPRS Journal 169, 2020;
encoder layers and positional encoding of Vaswani et al., "Attention is all you need", NeurIPS 2017.
"""

import torch
from torch import Tensor, nn


def positional_encoding(steps: int, features: int) -> Tensor:
    """Encoding of positions 1..steps, (step, feature) float32: sine at even, cosine at odd features, base 10000."""
    frequency = 10000 ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angle = torch.arange(1, steps + 1)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()


class Transformer(nn.Module):
    """Layer norm, linear map to 64, positions, five post-norm encoder layers, maximum over the steps, linear.

    The encoder layers start with identical weights.
    """

    positions: Tensor

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        features = 64
        self.input_norm = nn.LayerNorm(bands)
        self.input_map = nn.Linear(bands, features)
        self.map_norm = nn.LayerNorm(features)
        layer = nn.TransformerEncoderLayer(features, nhead=4, dim_feedforward=256, dropout=0.015, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 5, norm=nn.LayerNorm(features), enable_nested_tensor=False)
        self.head = nn.Linear(features, 1, bias=False)
        self.register_buffer("positions", positional_encoding(steps, features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        x = self.map_norm(self.input_map(self.input_norm(x.transpose(1, 2)))) + self.positions
        return self.head(self.encoder(x).amax(1)).squeeze(1)
