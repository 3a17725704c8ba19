"""Training without a GPU at hand, as on one: meta tensors have a device, but no values.

An operation on a tensor that was left on the CPU fails, and so does what waits for the device in the middle of an epoch, as
reading a loss does.
"""

from dataclasses import replace

import pytest
import torch
from meta_device import META, OneDevice
from test_training import fold_data, new_training
from torch import Tensor, nn

from models import NETWORKS
from utils.training import FoldData, Training, initial_state, restore, run_epoch
from utils.training_together import run_epoch_together


def training_on_meta(model: str, precision: str) -> tuple[Training, FoldData]:
    """A run's settings and a fold's data; without the fused optimisers, which PyTorch does not have there."""
    training = new_training(model, precision=precision)
    published = training.recipe.optimizer

    def not_fused(parameters: list[Tensor], fused: bool, **options: float) -> torch.optim.Optimizer:
        assert fused
        return published(parameters, **options)

    data = FoldData(*(tensor.to(META) for tensor in fold_data()))
    return replace(training, device=META, recipe=training.recipe._replace(optimizer=not_fused)), data


@pytest.mark.usefixtures("meta_autocast")
@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("model", NETWORKS)
def test_an_epoch_of_every_architecture(model: str, precision: str) -> None:
    training, data = training_on_meta(model, precision)
    state = initial_state(training, 1, 0)
    network, optimizer, _ = restore(training, state)
    with OneDevice():
        loss = run_epoch(training, network, optimizer, data, state, 0)
    assert loss.device == META
    assert all(parameter.grad is not None and parameter.grad.device == META for parameter in network.parameters())


@pytest.mark.usefixtures("meta_autocast")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("model", [name for name in NETWORKS if name != "BiLSTM"])
def test_an_epoch_of_networks_together(model: str) -> None:
    training, data = training_on_meta(model, "32")
    states = [initial_state(training, fold, 0) for fold in (1, 2)]
    fewer = FoldData(*(tensor[:-1] for tensor in data))
    network = restore(training, states[0])[0]
    parameters, buffers = (
        {name: torch.stack([tensor.detach()] * 2).requires_grad_(tensor.requires_grad) for name, tensor in named}
        for named in (network.named_parameters(), network.named_buffers())
    )
    optimizer = training.recipe.optimizer(list(parameters.values()), fused=True, lr=0.1)
    with OneDevice():
        losses = run_epoch_together(training, network, parameters, buffers, optimizer, states, [data, fewer], 0)
    assert losses.device == META and losses.shape == (2,)


class LeavesATensor(nn.Module):
    """A mistake that only a GPU would show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.scale = torch.ones(10)  # not a buffer, so that it stays on the CPU

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        return (x.mean(2) * self.weight * self.scale).sum(1)


class Waits(LeavesATensor):
    """A mistake that makes a GPU wait."""

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample,)."""
        y = (x.mean(2) * self.weight).sum(1)
        return y if y.sum() > 0 else -y


@pytest.mark.usefixtures("meta_autocast")
@pytest.mark.parametrize("mistake", [LeavesATensor, Waits])
def test_mistakes_are_found(mistake: type[nn.Module]) -> None:
    training, data = training_on_meta("MLP", "32")
    training = replace(training, make_network=lambda _: mistake())
    state = initial_state(training, 1, 0)
    network, optimizer, _ = restore(training, state)
    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_epoch(training, network, optimizer, data, state, 0)
