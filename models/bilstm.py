"""BiLSTM: a bidirectional long short-term memory network.

Rußwurm and Körner, "Self-attention for raw optical satellite time series classification", ISPRS Journal 169, 2020, as
adapted to regression in the ResNeTS paper: the head reads the final cell states.
"""

from torch import Tensor, nn


class BiLSTM(nn.Module):
    """Layer norm, three bidirectional LSTM layers of 128 with dropout 0.3 between them, linear head on the cell states."""

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        hidden, layers = 128, 3
        self.input_norm = nn.LayerNorm(bands)
        self.lstm = nn.LSTM(bands, hidden, layers, bias=False, batch_first=True, dropout=0.3, bidirectional=True)
        self.head_norm = nn.LayerNorm(2 * layers * hidden)
        self.head = nn.Linear(2 * layers * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        _, (_, cells) = self.lstm(self.input_norm(x.transpose(1, 2)))  # cells: (layer and direction, sample, feature)
        return self.head(self.head_norm(cells.transpose(0, 1).flatten(1))).squeeze(1)
