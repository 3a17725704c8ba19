"""A network trains the same way in a stack, alone, and after an interruption."""

import pytest
import torch
from conftest import DEFAULTS

from models import make_stack
from utils.recipes import recipe_for
from utils.stacked_layers import network_state
from utils.stacked_training import FoldData, StackTraining, member_states, pack, patience_of, predict

# Two folds with unlike numbers of rows and of batches.
ROWS = {1: 45, 2: 70}
CPU = torch.device("cpu")


def fold_data(number: int) -> FoldData:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(ROWS[number] + 20, 10, 16, generator=generator)
    y = x[:, 3].mean(1) * 5 + 20
    return FoldData(x[:-20], y[:-20], x[-20:], y[-20:])


def start(model: str, numbers: list[int], members: int, precision: str = "32", warmup: int = 2) -> StackTraining:
    small = DEFAULTS | {"num_channels": (8, 8, 8, 8), "stem_channels": 8, "num_filters": 8}
    stack = make_stack(model, len(numbers) * members, 10, 16, small)
    data = [fold_data(number) for number in numbers]
    return StackTraining(stack, data, numbers, members, recipe_for(model, small), 32, 20, warmup, 7, precision, CPU)


def train(training: StackTraining, epochs: int, first: int = 0) -> None:
    for epoch in range(first, epochs):
        if epoch < training.warmup_epochs:
            training.begin_warm_up(epoch)
        elif epoch == training.warmup_epochs:
            training.begin_training()
        training.run_epoch(epoch)
        if epoch >= training.warmup_epochs:
            training.validate(epoch)
            training.step_schedules()


@pytest.mark.parametrize("model", ["MLP", "BiLSTM", "Transformer", "FCN", "ResidualNet", "InceptionTime", "ResNet18T"])
def test_a_network_ends_where_it_ends_alone(model: str) -> None:
    together, alone = start(model, [1, 2], members=2), start(model, [1], members=2)
    train(together, 4)
    train(alone, 4)
    for member in range(2):
        expected = network_state(alone.stack, member)
        for name, tensor in network_state(together.stack, member).items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-3, atol=2e-4)
    assert together.folds[0].validation_loss == pytest.approx(alone.folds[0].validation_loss, rel=1e-3)
    assert not torch.equal(together.packed.weights[0], together.packed.weights[1])


def test_a_fold_that_stops_leaves_the_others_as_they_were() -> None:
    through, left = start("ResNet18T", [1, 2], members=1), start("ResNet18T", [1, 2], members=1)
    train(through, 6)
    train(left, 4)
    left.leave([left.folds[0]])
    train(left, 6, first=4)
    assert [fold.number for fold in left.folds] == [2]
    assert left.packed.weights.shape[0] == 1
    torch.testing.assert_close(left.packed.weights[0], through.packed.weights[1], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("model", ["ResNet18T", "FCN", "BiLSTM"])
@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_training_goes_on_from_a_state_bit_for_bit(model: str, interrupted_after: int) -> None:
    through, before, after = (start(model, [1, 2], members=2) for _ in range(3))
    train(through, 5)
    train(before, interrupted_after)
    tensors, record = before.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    after.load_state(tensors, record)
    train(after, 5, first=interrupted_after)
    assert torch.equal(after.packed.weights, through.packed.weights)
    assert torch.equal(after.packed.statistics, through.packed.statistics)
    for one, other in zip(after.folds, through.folds, strict=True):
        assert one.best is not None and other.best is not None
        assert torch.equal(one.best.weights, other.best.weights)
        assert one.record() == other.record()


def test_the_best_ensemble_is_the_one_that_was_validated() -> None:
    training = start("ResNet18T", [1], members=3)
    train(training, 6)
    fold = training.folds[0]
    assert fold.best is not None
    stack = make_stack("ResNet18T", 3, 10, 16, DEFAULTS | {"num_channels": (8, 8, 8, 8), "stem_channels": 8})
    member_states(stack, fold.best)
    mean = predict(stack, fold.data.validation_x).mean(0)
    assert float((mean - fold.data.validation_y).abs().mean()) == pytest.approx(fold.best_loss, rel=1e-5)


def test_members_see_the_same_batches_and_epochs_differ() -> None:
    training = start("MLP", [1, 2], members=2)
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
    exact, rounded = start("ResNet18T", [2], members=2), start("ResNet18T", [2], members=2, precision="bf16")
    train(exact, 8)
    train(rounded, 8)
    assert rounded.packed.weights.dtype == torch.float32
    assert rounded.folds[0].validation_loss == pytest.approx(exact.folds[0].validation_loss, rel=0.05)


def test_packing_keeps_every_value() -> None:
    stack = make_stack("Transformer", 2, 10, 16, DEFAULTS)
    stack.initialise([torch.Generator().manual_seed(n) for n in range(2)])
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    packed = pack(stack)
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, before[name])
    packed.weights.zero_()
    assert not any(parameter.any() for parameter in stack.parameters())


@pytest.mark.parametrize(("epochs", "patience"), [(20, 2), (150, 2), (200, 2), (500, 5), (1500, 15)])
def test_patience(epochs: int, patience: int) -> None:
    assert patience_of(epochs) == patience
