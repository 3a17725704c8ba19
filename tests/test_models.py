"""Every architecture against the golden numbers, and the estimators against their libraries."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, golden
from torch import nn

from datasets.model_inputs import Inputs
from models import ESTIMATORS, NETWORKS, make_network, model_flags, own_flags
from models.classical import GaussianProcess, Ridge, Rocket
from utils.errors import InputError

CASES = golden("biodiversity_models")["models"]
FILL = {
    "weight": lambda z: z * np.sqrt(2 / (z.size / z.shape[0])),
    "scale": lambda z: 1 + 0.1 * z,
    "bias": lambda z: 0.1 * z,
    "running_mean": lambda z: 0.1 * z,
    "running_var": lambda z: 1 + 0.1 * z**2,
}


def golden_network(case: dict[str, Any]) -> nn.Module:
    """A network in float64, filled as the golden file says, by the order of its state."""
    network = make_network(case["model"], 10, 16, DEFAULTS | case["flags"]).double()
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for (name, tensor), (_, shape, kind, seed) in zip(state.items(), case["state"], strict=True):
        values = torch.from_numpy(FILL[kind](np.random.RandomState(seed).standard_normal(shape)))
        # The golden convolutions are along the steps alone, the Transformer's first map is a convolution of one step.
        assert [size for size in tensor.shape if size > 1] == [size for size in shape if size > 1], name
        state[name] = values.view(tensor.shape)
    network.load_state_dict(state, strict=False)
    return network


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['model']} {case['flags'] or ''}".strip())
def test_golden_outputs_and_gradients(case: dict[str, Any]) -> None:
    network = golden_network(case)
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((4, 10, 16)))
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == case["trainable_parameters"]
    # The golden Transformer's positions were rounded to float32, as ours are.
    tolerance = 1e-7 if case["model"] == "Transformer" else 1e-9
    np.testing.assert_allclose(network.eval()(x).tolist(), case["eval_output"], rtol=tolerance, atol=tolerance)
    if "train_output" not in case:
        return
    predicted = network.train()(x)
    target = torch.from_numpy(np.random.RandomState(8).standard_normal((4, 1))).squeeze(1)
    loss = (predicted - target).abs().mean()
    loss.backward()
    np.testing.assert_allclose(predicted.tolist(), case["train_output"], rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(case["train_l1_loss"], rel=1e-9)
    norm = sum(float((p.grad**2).sum()) for p in network.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(case["train_gradient_l2_norm"], rel=1e-9)


def test_published_parameter_counts() -> None:
    published = {
        "MLP": 18_689,
        "BiLSTM": 930_069,
        "Transformer": 250_964,
        "FCN": 273_537,
        "ResidualNet": 508_161,
        "InceptionTime": 525_461,
        "ResNet18T": 186_817,
    }
    assert published.keys() | {"PlotEnsemble"} == NETWORKS.keys()
    for model, count in published.items():
        assert sum(p.numel() for p in make_network(model, 10, 16, {}).parameters()) == count


@pytest.mark.parametrize("model", NETWORKS)
def test_initial_weights_depend_on_the_seed_alone(model: str) -> None:
    first, other = make_network(model, 10, 16, {}, seed=1).state_dict(), make_network(model, 10, 16, {}, seed=2).state_dict()
    before = torch.random.get_rng_state()
    torch.manual_seed(5)
    again = make_network(model, 10, 16, {}, seed=1).state_dict()
    torch.random.set_rng_state(before)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.ndim > 1:
            assert not torch.equal(tensor, other[name])


def test_initial_spread_of_weights() -> None:
    conv = make_network("ResNet18T", 10, 16, {}).state_dict()["blocks.0.conv2.0.weight"]
    assert conv.std().item() == pytest.approx((2 / (64 * 5)) ** 0.5, rel=0.02)  # Kaiming normal, fan out
    state = make_network("FCN", 10, 16, {}).state_dict()
    assert state["conv2.0.weight"].abs().max().item() == pytest.approx((6 / ((128 + 256) * 5)) ** 0.5, rel=0.01)
    assert state["head.bias"].abs().max().item() == 0
    state = make_network("BiLSTM", 10, 16, {}).state_dict()
    assert state["lstm.weight_hh_l1_reverse"].abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    state = make_network("Transformer", 10, 16, {}).state_dict()
    for name in (name for name in state if name.startswith("encoder.layers.0.")):
        assert torch.equal(state[name], state[name.replace("layers.0.", "layers.4.")])
    bound = (6 / (64 + 192)) ** 0.5
    assert state["encoder.layers.0.self_attn.in_proj_weight"].abs().max().item() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("ResNet18T", {"kernel_size": 4}, "kernel_size=4"),
        ("ResNet18T", {"kernel_size": 33}, "kernel_size=33"),
        ("ResNet18T", {"strides": (4, 4, 2, 1)}, "strides=4 4 2 1 leaves no time step"),
        ("InceptionTime", {"bottleneck_factor": 257}, "bottleneck_factor=257 leaves no channel"),
    ],
)
def test_flags_that_do_not_make_a_network_are_refused(model: str, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_network(model, 10, 16, flags)


@pytest.mark.parametrize(
    "flags", [{"strides": (3, 1, 2, 1)}, {"strides": (2, 2, 2, 2)}, {"kernel_size": 31}, {"kernel_size": 1}]
)
@pytest.mark.parametrize("shortcut_pooling", [True, False])
def test_resnet18t_runs_where_strides_do_not_divide_the_steps(flags: dict[str, Any], shortcut_pooling: bool) -> None:
    network = make_network("ResNet18T", 10, 16, flags | {"shortcut_pooling": shortcut_pooling})
    assert network(torch.randn(3, 10, 16)).shape == (3,)


def test_pooled_shortcuts_average_the_remaining_steps() -> None:
    network = make_network("ResNet18T", 10, 16, {"strides": (3, 1, 1, 1)})
    pooled = network.get_submodule("blocks.0.shortcut.0")(torch.arange(16.0).view(1, 1, 1, 16))
    assert pooled.flatten().tolist() == [1, 4, 7, 10, 13, 15]


class WithSettings(nn.Module):
    """A network as anyone would write it.

    Args:
        dropout: share of features dropped.
        kernel_size: steps of a convolution.
    """

    def __init__(self, bands: int, steps: int, dropout: float = 0.5, kernel_size: int = 7, norm: bool = True) -> None:
        super().__init__()


def test_keyword_arguments_are_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "WithSettings", WithSettings)
    flags = model_flags()
    assert (flags["dropout"].default, flags["dropout"].help) == ("0.5", "WithSettings: share of features dropped.")
    assert flags["norm"].default == "yes" and flags["norm"].type("no") is False
    # Architectures with different defaults share the flag.
    assert flags["kernel_size"].default == "auto"
    assert flags["kernel_size"].help.startswith("ResNet18T, PlotEnsemble, WithSettings: ")
    assert own_flags(WithSettings, {"kernel_size": None, "dropout": 0.1})["kernel_size"] == 7
    assert own_flags(WithSettings, {"kernel_size": "9"}) == {"dropout": 0.5, "kernel_size": 9, "norm": True}
    with pytest.raises(InputError, match="kernel_size: 'wide' is not a whole number"):
        own_flags(WithSettings, {"kernel_size": "wide"})


class Lazy(nn.Module):
    """A network that gets its sizes from its first input."""

    def __init__(self, bands: int, steps: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(sample, band, step) to (sample, 1)."""
        return self.layers(x)


def test_lazy_layers_are_initialised_with_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Lazy", Lazy)
    first, again = (make_network("Lazy", 3, 4, {}, seed=5).state_dict() for _ in range(2))
    assert first["layers.1.weight"].shape == (8, 12)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert first["layers.2.num_batches_tracked"] == 0


Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def sample_problem(covariates: int = 0, steps: int = 16) -> Problem:
    """Series (sample, band, step), covariates (sample, channel), and a target that depends on both."""
    rng = np.random.default_rng(0)
    seasons = rng.standard_normal((240, 3)) @ rng.standard_normal((3, 10 * steps))
    x = (seasons + 0.3 * rng.standard_normal((240, 10 * steps))).reshape(240, 10, steps).astype(np.float32)
    further = rng.standard_normal((240, covariates)).astype(np.float32)
    return x, further, (x[:, 3, 4:8].sum(1) + 5 * further.sum(1) + rng.standard_normal(240)).astype(np.float32)


@pytest.mark.parametrize(("covariates", "steps"), [(0, 16), (2, 23)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_rebuilt_from_its_tensors(name: str, covariates: int, steps: int) -> None:
    x, further, y = sample_problem(covariates, steps)
    flags = {"num_kernels": 100} if name == "Rocket" else {}
    fitted = ESTIMATORS[name](seed=3, **flags).fit(Inputs(x[:40], further[:40], {}), y[:40])
    again = ESTIMATORS[name].from_tensors(fitted.tensors())
    new = Inputs(x[40:], further[40:], {})
    np.testing.assert_allclose(again.predict(new), fitted.predict(new), rtol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_learn_from_covariates(name: str) -> None:
    x, further, y = sample_problem(covariates=2)
    estimator = ESTIMATORS[name](seed=3, **({"num_kernels": 100} if name == "Rocket" else {}))
    predicted = estimator.fit(Inputs(x[:200], further[:200], {}), y[:200]).predict(Inputs(x[200:], further[200:], {}))
    assert np.corrcoef(predicted, y[200:])[0, 1] > 0.6


def test_rocket_is_sktimes_rocket_regressor() -> None:
    from sktime.regression.kernel_based import RocketRegressor

    x, none, y = sample_problem()
    reference = RocketRegressor(num_kernels=100, use_multivariate="yes", random_state=5).fit(x[:40], y[:40])
    ours = Rocket(seed=5, num_kernels=100).fit(Inputs(x[:40], none[:40], {}), y[:40])
    np.testing.assert_allclose(ours.predict(Inputs(x[40:], none[40:], {})), reference.predict(x[40:]), rtol=1e-4, atol=1e-5)


def test_rocket_makes_nothing_of_rounding() -> None:
    """In short series some kernels give the same number for all but what single precision rounds off."""
    x, none, y = sample_problem(steps=5)
    rocket = Rocket(seed=3, num_kernels=100).fit(Inputs(x[:200], none[:200], {}), y[:200])
    moved = np.nextafter(x[200:], np.float32(np.inf))
    after, before = (rocket.predict(Inputs(one, none[200:], {})) for one in (moved, x[200:]))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_ridge_and_gaussian_process_find_a_linear_signal() -> None:
    x, none, y = sample_problem()
    for estimator in (Ridge(seed=0), GaussianProcess(seed=0)):
        predicted = estimator.fit(Inputs(x[:200], none[:200], {}), y[:200]).predict(Inputs(x[200:], none[200:], {}))
        assert np.corrcoef(predicted, y[200:])[0, 1] > 0.5
