"""BiLSTM: a bidirectional long short-term memory network.

Rußwurm and Körner, "Self-attention for raw optical satellite time series
classification", ISPRS Journal 169, 2020, as adapted to regression in the ResNeTS
paper: the head reads the final cell states.

PyTorch's LSTM layer runs one network; here the recurrence is written out, so that
the networks of a stack and both directions share one batched product a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.stacked_layers import Dropout, LayerNorm, Linear, Stack, initialise_layers, uniform_fan_in


class BidirectionalLayer(nn.Module):
    """One LSTM layer in both directions, without biases; gates in PyTorch's order: input, forget, cell, output."""

    def __init__(self, networks: int, features_in: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_forward = nn.Parameter(torch.empty(networks, features_in, 4 * hidden))
        self.hidden_forward = nn.Parameter(torch.empty(networks, hidden, 4 * hidden))
        self.input_backward = nn.Parameter(torch.empty(networks, features_in, 4 * hidden))
        self.hidden_backward = nn.Parameter(torch.empty(networks, hidden, 4 * hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run over the steps of (network, step, sample, feature).

        Returns:
            outputs (network, step, sample, 2 x hidden) and final cell states
            (network, sample, 2 x hidden), forward before backward.
        """
        networks, steps, samples, _ = x.shape
        # Axis 0 is direction x network: the backward direction is the forward one on the reversed series.
        both = torch.cat([x, x.flip(1)])
        weight = torch.cat([self.hidden_forward, self.hidden_backward])
        gates = torch.bmm(both.flatten(1, 2), torch.cat([self.input_forward, self.input_backward]))
        gates_by_step = gates.unflatten(1, (steps, samples)).unbind(1)
        state = x.new_zeros(2 * networks, samples, self.hidden)
        cell = x.new_zeros(2 * networks, samples, self.hidden)
        outputs = []
        for step in range(steps):
            input_forget, candidate, output = torch.baddbmm(gates_by_step[step], state, weight).split(
                [2 * self.hidden, self.hidden, self.hidden], dim=2
            )
            input_gate, forget_gate = input_forget.sigmoid().chunk(2, dim=2)
            cell = torch.addcmul(forget_gate * cell, input_gate, candidate.tanh())
            state = output.sigmoid() * cell.tanh()
            outputs.append(state)
        forward, backward = torch.stack(outputs, dim=1).chunk(2)
        return torch.cat([forward, backward.flip(1)], dim=3), torch.cat(cell.chunk(2), dim=2)


class BiLSTM(Stack):
    """Layer norm, three bidirectional layers of 128 with dropout 0.3 between them, linear head on the cell states."""

    def __init__(self, networks: int, bands: int, steps: int) -> None:
        super().__init__()
        hidden = 128
        self.input_norm = LayerNorm(networks, bands)
        self.layer1 = BidirectionalLayer(networks, bands, hidden)
        self.layer2 = BidirectionalLayer(networks, 2 * hidden, hidden)
        self.layer3 = BidirectionalLayer(networks, 2 * hidden, hidden)
        self.dropout = Dropout(0.3)
        self.head_norm = LayerNorm(networks, 6 * hidden)
        self.head = Linear(networks, 6 * hidden, 1)

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """PyTorch's own: recurrent weights uniform within 1/sqrt(hidden)."""
        for layer in (self.layer1, self.layer2, self.layer3):
            bound = layer.hidden**-0.5
            for parameter in layer.parameters():
                for network, generator in enumerate(generators):
                    parameter[network].uniform_(-bound, bound, generator=generator)
        initialise_layers(self, generators, conv=uniform_fan_in, linear=uniform_fan_in, zero_bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) to (network, sample)."""
        outputs, cell1 = self.layer1(self.input_norm(x))
        outputs, cell2 = self.layer2(self.dropout(outputs))
        _, cell3 = self.layer3(self.dropout(outputs))
        return self.head(self.head_norm(torch.cat([cell1, cell2, cell3], dim=2))).squeeze(2)
