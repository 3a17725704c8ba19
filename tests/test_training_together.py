"""Networks that advance together end where each would alone."""

from dataclasses import replace

import pytest
import torch
from conftest import DEFAULTS
from test_training import SMALL, fold_data, new_training
from torch import nn

from models import NETWORKS, make_network
from utils.training import FoldData, Training, TrainingState, initial_state, train
from utils.training_together import groups_of, reason_against, train_together


def exact_training(model: str) -> Training:
    """Networks in double precision, in which differences do not grow to the size of a step, and without dropout."""

    def make(seed: int) -> nn.Module:
        network = make_network(model, 10, 16, DEFAULTS | SMALL | {"num_filters": 8}, seed).double()
        for layer in network.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            if isinstance(layer, nn.MultiheadAttention):
                layer.dropout = 0.0
        return network

    return replace(new_training(model), make_network=make)


def together(
    training: Training, states: list[TrainingState], data: dict[int, FoldData], until: int
) -> dict[tuple[int, int], TrainingState]:
    ends = {}
    for group in groups_of(training, states, data):
        for segment in train_together(training, group, [data[state.fold] for state in group], until):
            ends[segment.state.fold, segment.state.member] = segment.state._replace(validation_loss=0.5)
    return ends


# PyTorch's attention for processors is not batched over networks, but called for one after the other.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("model", [name for name in NETWORKS if name != "BiLSTM"])
def test_networks_end_where_each_would_alone(model: str) -> None:
    """Two folds whose last batches differ in size, two members each, over the end of warm-up, in two segments."""
    training = exact_training(model)
    data = {number: FoldData(*(tensor.double() for tensor in fold_data(rows))) for number, rows in ((1, 40), (2, 38))}
    start = [initial_state(training, fold, member) for fold in (1, 2) for member in (0, 1)]
    half = together(training, start, data, 2)
    ends = together(training, list(half.values()), data, 4)
    for state in start:
        alone = train(training, state, data[state.fold], 2).state._replace(validation_loss=0.5)
        alone = train(training, alone, data[state.fold], 4).state
        end = ends[state.fold, state.member]
        assert end.epoch == 4 and end.schedule == alone.schedule
        for name, tensor in alone.network.items():
            torch.testing.assert_close(end.network[name], tensor, rtol=1e-4, atol=1e-5)
        assert end.optimizer["param_groups"] == alone.optimizer["param_groups"]
        for index, values in alone.optimizer["state"].items():
            for name, tensor in values.items():
                torch.testing.assert_close(end.optimizer["state"][index][name], tensor, rtol=1e-3, atol=1e-5)


def test_records_and_validation_are_those_of_each_alone() -> None:
    training, data = replace(new_training("ResNet18T"), warmup_epochs=0), fold_data(40)
    states = [initial_state(training, 1, member) for member in (0, 1)]
    seen: list[tuple[int, int]] = []
    segments = train_together(training, states, [data, data], 1, lambda fold, epochs: seen.append((fold, epochs)))
    for state, segment in zip(states, segments, strict=True):
        alone = train(training, state, data, 1)
        assert segment.records[0] == pytest.approx(alone.records[0], rel=1e-5)
        assert segment.validation is not None and alone.validation is not None
        torch.testing.assert_close(segment.validation, alone.validation, rtol=1e-3, atol=1e-3)
    assert seen == [(1, 1), (1, 1)]


def test_folds_with_other_numbers_of_batches_or_rates_are_apart() -> None:
    data = {1: fold_data(80), 2: fold_data(60)}
    for model, count in (("ResNet18T", 2), ("FCN", 3)):
        training = new_training(model)
        folds = data | {3: fold_data(80)}
        states = [initial_state(training, fold, member) for fold in folds for member in (0, 1)]
        groups = groups_of(training, states, folds)
        grouped = sorted((state.fold, state.member) for group in groups for state in group)
        assert len(groups) == count and grouped == [(fold, member) for fold in folds for member in (0, 1)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_that_cannot_be_batched_are_named() -> None:
    assert "aten::lstm" in reason_against(new_training("BiLSTM"), fold_data())
    assert reason_against(new_training("Transformer"), fold_data()) == ""
