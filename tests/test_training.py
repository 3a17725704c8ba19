"""The plain loop: a network's state in, its state some epochs later out."""

import pytest
import torch
from conftest import DEFAULTS
from torch import Tensor, nn

from models import NETWORKS, make_network
from utils.errors import InputError
from utils.recipes import recipe_for
from utils.training import FoldData, Segment, Training, TrainingState, initial_state, train

SMALL = {"num_channels": (8, 8, 8, 8), "stem_channels": 8, "num_filters": 8}


def new_training(model: str, warmup_epochs: int = 2, precision: str = "32", **settings: object) -> Training:
    flags = DEFAULTS | SMALL | settings

    def make(seed: int) -> nn.Module:
        return make_network(model, 10, 16, flags, seed)

    return Training(make, recipe_for(model, flags), 32, 30, warmup_epochs, 1, precision, torch.device("cpu"))


def fold_data(rows: int = 80) -> FoldData:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, 10, 16, generator=generator), torch.linspace(-1, 1, rows)
    return FoldData(x[0], y, x[1], y)


def assert_same(one: Segment, other: Segment) -> None:
    assert one.records == other.records
    for name, tensor in one.state.network.items():
        assert torch.equal(tensor, other.state.network[name]), name
    for index, values in one.state.optimizer["state"].items():
        for name, tensor in values.items():
            assert torch.equal(tensor, other.state.optimizer["state"][index][name]), name
    assert one.state.schedule == other.state.schedule


@pytest.mark.parametrize("model", NETWORKS)
def test_a_network_trains_the_same_in_one_go_and_in_segments(model: str) -> None:
    training, data = new_training(model), fold_data()
    start = initial_state(training, 3, 1)._replace(validation_loss=0.5)
    before = {name: tensor.clone() for name, tensor in start.network.items()}
    whole = train(training, start, data, 6)
    torch.rand(7)  # other draws in between do not matter
    parts, records = start, []
    for until in (1, 2, 3, 5, 6):
        segment = train(training, parts, data, until)
        parts = segment.state
        records += segment.records
    assert_same(whole, segment._replace(records=records))
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.network.items())
    assert whole.records[2]["loss_train"] != whole.records[4]["loss_train"]


def test_members_differ_in_weights_and_share_the_order_of_rows() -> None:
    training = new_training("MLP")
    first, second = (initial_state(training, 1, member) for member in (0, 1))
    assert not torch.equal(first.network["hidden1.weight"], second.network["hidden1.weight"])
    seen: list[Tensor] = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.weight * x[:, 0, 0]

    recording = Training(lambda _: Recording(), training.recipe, 32, 9, 2, 1, "32", torch.device("cpu"))
    for member in (0, 1):
        train(recording, initial_state(recording, 1, member), fold_data(), 2)
    orders = torch.cat(seen).view(2, 2, 80, 10, 16)
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0, 0], orders[0, 1])


def test_validation_rows_are_predicted_where_they_are_due() -> None:
    training, data = new_training("MLP", warmup_epochs=4), fold_data()
    state, stops = initial_state(training, 1, 0), []
    while state.epoch < 34:
        segment = train(training, state, data, training.next_stop(state.epoch))
        state = segment.state._replace(validation_loss=0.5)
        stops.append((state.epoch, segment.validation is not None))
    expected = [(1, False), (4, False), (5, True), (14, True), (24, True), (34, True)]
    assert stops == expected
    assert segment.validation is not None and segment.validation.shape == (80,)
    network = training.make_network(0)
    network.load_state_dict(state.network)
    assert torch.equal(network.eval()(data.validation_x), segment.validation)


def test_plateau_schedules_go_by_the_validation_of_the_ensemble() -> None:
    training, data = new_training("FCN", warmup_epochs=0), fold_data()
    object.__setattr__(training, "epochs", 200)
    state = train(training, initial_state(training, 1, 0), data, 1).state._replace(validation_loss=1.0)
    rates = [record["lr"] for record in train(training, state, data, 60).records]
    assert rates[49] == 2e-3 and rates[-1] == 1e-3  # 50 epochs of no better loss halve the rate


def test_bf16_trains_to_about_the_same_place() -> None:
    data = fold_data()
    losses = {}
    for precision in ("32", "bf16"):
        training = new_training("ResNet18T", precision=precision)
        segment = train(training, initial_state(training, 1, 0), data, 12)
        losses[precision] = segment.records[-1]["loss_train"]
        assert all(tensor.dtype != torch.bfloat16 for tensor in segment.state.network.values())
    assert losses["32"] != losses["bf16"] and losses["32"] == pytest.approx(losses["bf16"], rel=0.1)


class Regressor(nn.Module):
    """A module as from a paper: dropout, a buffer, a frozen and an unused parameter, (sample, 1) out."""

    seen: Tensor

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        self.map = nn.Linear(bands * steps, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(sample, band, step) to (sample, 1)."""
        if self.training:
            self.seen += len(x)
        return self.head(self.dropout(self.frozen(self.map(x.flatten(1)).relu())))


def test_any_module_trains_the_same_in_one_go_and_in_segments() -> None:
    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Regressor(10, 16)

    training = Training(make, recipe_for("Regressor", DEFAULTS), 32, 9, 2, 1, "32", torch.device("cpu"))
    start = initial_state(training, 1, 0)
    whole = train(training, start, fold_data(), 6)
    half = train(training, start, fold_data(), 3)
    rest = train(training, half.state, fold_data(), 6)
    assert_same(whole, rest._replace(records=half.records + rest.records))
    assert whole.state.network["seen"] == 6 * 80
    assert torch.equal(whole.state.network["frozen.weight"], start.network["frozen.weight"])
    assert whole.state.network["unused"].tolist() == [0, 0, 0]
    assert not torch.equal(whole.state.network["map.weight"], start.network["map.weight"])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda x: x[:, :2, 0], r"Wrong gives shape \(32, 2\) for 32 samples; one number a sample is expected"),
        (lambda x: x.mean(), r"Wrong gives shape \(\) for 32 samples"),
        (lambda x: (x, x), r"Wrong gives tuple for 32 samples"),
    ],
)
def test_other_outputs_are_refused(output: object, said: str) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return output(x)  # type: ignore[operator]

    training = Training(lambda _: Wrong(), recipe_for("Wrong", DEFAULTS), 32, 9, 2, 1, "32", torch.device("cpu"))
    with pytest.raises(InputError, match=said):
        train(training, initial_state(training, 1, 0), fold_data(), 1)


@pytest.mark.parametrize("batch_size", [79, 1])
def test_a_last_batch_of_one_row_joins_the_one_before(batch_size: int) -> None:
    def make(seed: int) -> nn.Module:
        return make_network("ResidualNet", 10, 1, {}, seed)

    training = Training(make, recipe_for("ResidualNet", DEFAULTS), batch_size, 9, 2, 1, "32", torch.device("cpu"))
    data = FoldData(*(tensor[..., :1] if tensor.ndim == 3 else tensor for tensor in fold_data()))
    start = initial_state(training, 1, 0)
    if batch_size == 1:
        with pytest.raises(InputError, match=r"a batch has a single value a channel, .*; a larger batch_size is needed"):
            train(training, start, data, 1)
    else:
        state = train(training, start, data, 1).state
        assert state.network["block1.conv2.1.num_batches_tracked"] == 1


@pytest.mark.parametrize(("epochs", "patience"), [(1500, 15), (250, 2), (199, 2), (1, 2)])
def test_patience(epochs: int, patience: int) -> None:
    training = new_training("MLP")
    object.__setattr__(training, "epochs", epochs)
    assert training.patience == patience


def test_a_state_is_numbers_text_and_tensors_alone() -> None:
    """So that it can be kept and handed on without unpickling anything else."""
    training = new_training("Transformer", warmup_epochs=0)
    state = train(training, initial_state(training, 1, 0), fold_data(), 2).state

    def check(value: object) -> None:
        assert value is None or isinstance(value, int | float | str | Tensor | list | tuple | dict), type(value)
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            check(one)

    assert isinstance(state, TrainingState)
    check(state)
