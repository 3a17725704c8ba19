"""MLP: a multilayer perceptron on the flattened series.

The baseline of Wang, Yan and Oates, "Time series classification from scratch with deep neural networks", IJCNN 2017, in
the sizes of the ResNeTS paper: 160-64-64-64-1 for 10 bands and 16 steps.
"""

from torch import Tensor, nn


class MLP(nn.Module):
    """Three hidden layers of 64, ReLU; Xavier-uniform weights, zero biases."""

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(bands * steps, 64)
        self.hidden2 = nn.Linear(64, 64)
        self.hidden3 = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1)
        for layer in (self.hidden1, self.hidden2, self.hidden3, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        x = x.transpose(1, 2).flatten(1)  # bands fastest within a step, as in the table
        x = self.hidden1(x).relu()
        x = self.hidden2(x).relu()
        x = self.hidden3(x).relu()
        return self.head(x).squeeze(1)
