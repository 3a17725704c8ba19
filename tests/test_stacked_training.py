"""A fold trains the same way in any stack, alone, and after an interruption."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from conftest import DEFAULTS

from models import NETWORKS, make_stack
from utils.recipes import recipe_for
from utils.stacked_training import (
    FoldData,
    FoldState,
    StackTraining,
    Tensors,
    member_states,
    pack,
    patience_of,
    predict,
)

# Two folds with unlike numbers of rows and of batches.
ROWS = {1: 45, 2: 115}
CPU = torch.device("cpu")


def fold_data(number: int) -> FoldData:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(ROWS[number] + 20, 10, 16, generator=generator)
    y = x[:, 3].mean(1) * 5
    return FoldData(x[:-20], y[:-20], x[-20:], y[-20:])


def start(model: str, members: int, precision: str = "32", warmup: int = 2) -> StackTraining:
    small = DEFAULTS | {"num_channels": (8, 8, 8, 8), "stem_channels": 8, "num_filters": 8}
    stack = make_stack(model, len(ROWS) * members, 10, 16, small)
    data = [fold_data(number) for number in ROWS]
    return StackTraining(stack, data, members, recipe_for(model, small), 32, 20, warmup, 7, precision, CPU)


def advance(training: StackTraining, states: Sequence[FoldState], stops: int) -> list[FoldState]:
    """States of folds after some stops more."""
    for _ in range(stops):
        states = [one.state for one in training.advance(states)]
    return list(states)


def train(training: StackTraining, stops: int) -> list[FoldState]:
    """States of all folds, trained together for some stops from the start."""
    return advance(training, [training.initial_state(number) for number in ROWS], stops)


def assert_same(one: FoldState, other: FoldState) -> None:
    """Bit for bit."""
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert repr(one._replace(tensors=Tensors())) == repr(other._replace(tensors=Tensors()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that share folds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("model", "members", "precision"),
    [
        *((model, 1, "32") for model in NETWORKS),
        ("ResNet18T", 2, "32"),
        ("ResNet18T", 2, "bf16"),
        ("InceptionTime", 2, "bf16"),
        ("FCN", 1, "bf16"),
    ],
)
def test_a_fold_trains_the_same_alone_beside_others_and_after_an_interruption(
    model: str, members: int, precision: str
) -> None:
    """Bit for bit, whatever stack it is in and whichever process takes it on: runs rest on this."""
    together = train(start(model, members, precision), 4)
    for index, number in enumerate(ROWS):
        training = start(model, members, precision)
        (before,) = advance(training, [training.initial_state(number)], 3)
        (after,) = advance(start(model, members, precision), [deepcopy(before)], 1)
        assert after.epoch == 12 and math.isfinite(after.validation_loss)
        assert_same(after, together[index])


def test_a_member_trains_as_it_does_alone() -> None:
    """Up to rounding: more members make larger products."""
    (alone, _), (together, _) = (train(start("ResNet18T", members), 3) for members in (1, 3))
    weights = together.tensors["weights"]
    torch.testing.assert_close(weights[:1], alone.tensors["weights"], rtol=2e-3, atol=2e-4)
    assert not torch.equal(weights[0], weights[1])


def test_states_are_left_as_they_are() -> None:
    training = start("FCN", members=1)
    states = train(training, 2)
    kept = deepcopy(states)
    advance(training, states, 1)
    for state, copy in zip(states, kept, strict=True):
        assert_same(state, copy)


def test_folds_stop_where_they_report_and_are_validated() -> None:
    training = start("MLP", members=1, warmup=12)
    stops = [0]
    while stops[-1] < 32:
        stops.append(training.next_stop(stops[-1]))
    assert stops == [0, 1, 10, 12, 13, 22, 32]
    assert [stop for stop in range(33) if training.is_validated(stop)] == [13, 22, 32]


def test_the_validation_loss_is_that_of_the_mean_of_the_members() -> None:
    training = start("ResNet18T", members=3)
    state = train(training, 4)[0]
    stack = make_stack("ResNet18T", 3, 10, 16, DEFAULTS | {"num_channels": (8, 8, 8, 8), "stem_channels": 8})
    member_states(stack, state.tensors["weights"], state.tensors["statistics"])
    data = fold_data(1)
    loss = (predict(stack, data.validation_x).mean(0) - data.validation_y).abs().mean()
    assert float(loss) == pytest.approx(state.validation_loss, rel=1e-5)


def test_members_see_the_same_batches_and_epochs_differ() -> None:
    training = start("MLP", members=2)
    train(training, 1)
    first = [rows.clone() for rows, _ in training._batches(0)]
    again = [rows.clone() for rows, _ in training._batches(0)]
    other = [rows.clone() for rows, _ in training._batches(1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    seen = torch.cat([rows[1] for rows, _ in training._batches(0)])[: ROWS[2]]
    assert sorted(seen.tolist()) == list(range(ROWS[2]))
    masks = [mask for _, mask in training._batches(0)]
    assert masks[0] is None and masks[1] is not None and masks[1].sum(1).tolist() == [13, 32]


def test_bf16_products_train_to_about_the_same_place() -> None:
    (_, exact), (_, rounded) = (train(start("ResNet18T", members=2, precision=precision), 4) for precision in ("32", "bf16"))
    assert rounded.tensors["weights"].dtype == torch.float32
    assert not torch.equal(rounded.tensors["weights"], exact.tensors["weights"])
    assert rounded.validation_loss == pytest.approx(exact.validation_loss, rel=0.05)


def test_packing_keeps_every_value() -> None:
    stack = make_stack("Transformer", 2, 10, 16, DEFAULTS)
    stack.initialise([torch.Generator().manual_seed(n) for n in range(2)])
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    weights, _ = pack(stack)
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, before[name])
    weights.zero_()
    assert not any(parameter.any() for parameter in stack.parameters())


@pytest.mark.parametrize(("epochs", "patience"), [(20, 2), (150, 2), (200, 2), (500, 5), (1500, 15)])
def test_patience(epochs: int, patience: int) -> None:
    assert patience_of(epochs) == patience
