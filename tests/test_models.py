"""Every architecture against the golden numbers, and the estimators against their libraries."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, golden

from models import ESTIMATORS, NETWORKS, make_stack
from models.classical import GaussianProcess, Ridge, Rocket
from utils.errors import InputError
from utils.seeds import INITIAL_WEIGHTS, generator_for
from utils.stacked_layers import (
    Conv,
    Stack,
    load_network_state,
    network_state,
    set_dropout_generators,
    set_product_dtype,
)

CASES = golden("biodiversity_models")["models"]
FILL = {
    "weight": lambda z: z * np.sqrt(2 / (z.size / z.shape[0])),
    "scale": lambda z: 1 + 0.1 * z,
    "bias": lambda z: 0.1 * z,
    "running_mean": lambda z: 0.1 * z,
    "running_var": lambda z: 1 + 0.1 * z**2,
}


def golden_stack(case: dict[str, Any]) -> Stack:
    """A stack of two networks in float64: the first random, the second filled as the golden file says."""
    stack = make_stack(case["model"], 2, 10, 16, DEFAULTS | case["flags"]).double()
    stack.initialise([torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)])
    state = {}
    names = list(network_state(stack, 0))
    for name, (_, shape, kind, seed) in zip(names, case["state"], strict=True):
        state[name] = torch.from_numpy(FILL[kind](np.random.RandomState(seed).standard_normal(shape)))
    load_network_state(stack, 1, state)
    return stack


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['model']} {case['flags'] or ''}".strip())
def test_golden_outputs_and_gradients(case: dict[str, Any]) -> None:
    stack = golden_stack(case)
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((4, 10, 16)).transpose(2, 0, 1).copy())
    both = x.expand(2, *x.shape).contiguous()
    assert sum(p[1].numel() for p in stack.parameters()) == case["trainable_parameters"]
    # The golden Transformer's positions were rounded to float32.
    tolerance = 1e-7 if case["model"] == "Transformer" else 1e-9
    np.testing.assert_allclose(stack.eval()(both)[1].tolist(), case["eval_output"], rtol=tolerance, atol=tolerance)
    if "train_output" not in case:
        return
    predicted = stack.train()(both)[1]
    target = torch.from_numpy(np.random.RandomState(8).standard_normal((4, 1))).squeeze(1)
    loss = (predicted - target).abs().mean()
    loss.backward()
    np.testing.assert_allclose(predicted.tolist(), case["train_output"], rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(case["train_l1_loss"], rel=1e-9)
    norm = sum(float((p.grad[1] ** 2).sum()) for p in stack.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(case["train_gradient_l2_norm"], rel=1e-9)


@pytest.mark.parametrize("model", NETWORKS)
def test_only_convolutions_see_bfloat16(model: str) -> None:
    """What several layers read is float32, for their gradients are summed in its format."""
    stack = make_stack(model, 2, 10, 16, DEFAULTS)
    stack.initialise([torch.Generator().manual_seed(n) for n in range(2)])
    set_dropout_generators(stack, [torch.Generator().manual_seed(n) for n in range(2)])
    set_product_dtype(stack, torch.bfloat16)
    read = []
    for layer in stack.modules():
        if isinstance(layer, Conv):
            layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].dtype))
    predicted = stack(torch.randn(2, 16, 4, 10))
    assert predicted.dtype == torch.float32 and set(read) <= {torch.float32}
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(predicted.sum(), list(stack.parameters())))


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
    assert published.keys() == NETWORKS.keys()
    for model, count in published.items():
        assert sum(p[0].numel() for p in make_stack(model, 1, 10, 16, DEFAULTS).parameters()) == count


@pytest.mark.parametrize("model", NETWORKS)
def test_initial_weights_depend_on_the_generator_alone(model: str) -> None:
    def start(keys: list[int]) -> Stack:
        stack = make_stack(model, len(keys), 10, 16, DEFAULTS)
        stack.initialise([generator_for(42, INITIAL_WEIGHTS, key) for key in keys])
        return stack

    together, alone = start([1, 2, 3]), start([3])
    first = network_state(together, 0)
    for name, tensor in network_state(together, 2).items():
        assert torch.equal(tensor, network_state(alone, 0)[name])
        if tensor.ndim > 1:
            assert not torch.equal(tensor, first[name])


def test_initial_spread_of_weights() -> None:
    generators = [torch.Generator().manual_seed(0)]
    resnet = make_stack("ResNet18T", 1, 10, 16, DEFAULTS)
    resnet.initialise(generators)
    conv = network_state(resnet, 0)["blocks.0.conv2.weight"]
    assert conv.std().item() == pytest.approx((2 / (64 * 5)) ** 0.5, rel=0.02)  # Kaiming normal, fan out
    fcn = make_stack("FCN", 1, 10, 16, DEFAULTS)
    fcn.initialise(generators)
    state = network_state(fcn, 0)
    assert state["conv2.weight"].abs().max().item() == pytest.approx((6 / ((128 + 256) * 5)) ** 0.5, rel=0.01)
    assert state["head.bias"].abs().max().item() == 0
    lstm = make_stack("BiLSTM", 1, 10, 16, DEFAULTS)
    lstm.initialise(generators)
    assert network_state(lstm, 0)["layer2.hidden_backward"].abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    encoder = make_stack("Transformer", 1, 10, 16, DEFAULTS)
    encoder.initialise(generators)
    state = network_state(encoder, 0)
    for name in (name for name in state if name.startswith("layers.0.")):
        assert torch.equal(state[name], state[name.replace("layers.0.", "layers.4.")])
    bound = (6 / (64 + 192)) ** 0.5
    assert state["layers.0.query_key_value.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("ResNet18T", {"kernel_size": 4}, "kernel_size=4"),
        ("ResNet18T", {"kernel_size": 33}, "kernel_size=33"),
        ("ResNet18T", {"strides": (4, 4, 2, 1)}, "strides=4 4 2 1 leaves no time step"),
        ("InceptionTime", {"bottleneck_factor": 257}, "bottleneck_factor=257 leaves no channel"),
    ],
)
def test_flags_that_make_no_network_are_refused(model: str, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_stack(model, 1, 10, 16, DEFAULTS | flags)


@pytest.mark.parametrize(
    "flags", [{"strides": (3, 1, 2, 1)}, {"strides": (2, 2, 2, 2)}, {"kernel_size": 31}, {"kernel_size": 1}]
)
@pytest.mark.parametrize("shortcut_pooling", [True, False])
def test_resnet18t_runs_where_strides_do_not_divide_the_steps(flags: dict[str, Any], shortcut_pooling: bool) -> None:
    stack = make_stack("ResNet18T", 2, 10, 16, DEFAULTS | flags | {"shortcut_pooling": shortcut_pooling})
    stack.initialise([torch.Generator(), torch.Generator()])
    assert stack(torch.randn(2, 16, 3, 10)).shape == (2, 3)


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
    fitted = ESTIMATORS[name](seed=3, **flags).fit(x[:40], further[:40], y[:40])
    again = ESTIMATORS[name].from_tensors(fitted.tensors())
    np.testing.assert_allclose(again.predict(x[40:], further[40:]), fitted.predict(x[40:], further[40:]), rtol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_learn_from_covariates(name: str) -> None:
    x, further, y = sample_problem(covariates=2)
    estimator = ESTIMATORS[name](seed=3, **({"num_kernels": 100} if name == "Rocket" else {}))
    predicted = estimator.fit(x[:200], further[:200], y[:200]).predict(x[200:], further[200:])
    assert np.corrcoef(predicted, y[200:])[0, 1] > 0.6


def test_rocket_is_sktimes_rocket_regressor() -> None:
    from sktime.regression.kernel_based import RocketRegressor

    x, none, y = sample_problem()
    reference = RocketRegressor(num_kernels=100, use_multivariate="yes", random_state=5).fit(x[:40], y[:40])
    ours = Rocket(seed=5, num_kernels=100).fit(x[:40], none[:40], y[:40])
    np.testing.assert_allclose(ours.predict(x[40:], none[40:]), reference.predict(x[40:]), rtol=1e-4, atol=1e-5)


def test_ridge_and_gaussian_process_find_a_linear_signal() -> None:
    x, none, y = sample_problem()
    for estimator in (Ridge(seed=0), GaussianProcess(seed=0)):
        predicted = estimator.fit(x[:200], none[:200], y[:200]).predict(x[200:], none[200:])
        assert np.corrcoef(predicted, y[200:])[0, 1] > 0.5
