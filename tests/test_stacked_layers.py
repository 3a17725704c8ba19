"""The stacked layers give what PyTorch's plain layers give, network by network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.stacked_layers import (
    BatchNorm,
    Conv,
    Dropout,
    Linear,
    average_steps,
    load_network_state,
    network_state,
    set_dropout_generators,
    set_product_dtype,
)

NETWORKS, STEPS, SAMPLES = 3, 16, 5


def plain(x: Tensor, network: int) -> Tensor:
    """(network, step, sample, channel) to one network's (sample, channel, step)."""
    return x[network].permute(1, 2, 0)


def random_input(channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NETWORKS, STEPS, SAMPLES, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 1, None), (5, 1, None), (8, 1, None), (2, 1, None), (5, 2, (2, 2)), (1, 2, (0, 0)), (8, 1, (4, 4)), (3, 3, (1, 1))],
)
def test_convolution_and_its_gradients_are_those_of_conv1d(
    kernel: int, stride: int, padding: tuple[int, int] | None
) -> None:
    conv = Conv(NETWORKS, 4, 6, kernel, stride, padding).double()
    nn.init.normal_(conv.weight)
    x = random_input(4).requires_grad_()
    y = conv(x)
    upstream = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, (x, conv.weight), upstream)
    for network in range(NETWORKS):
        one = plain(x, network).detach().requires_grad_()
        weight = network_state(conv, network)["weight"].requires_grad_()
        expected = F.conv1d(F.pad(one, conv.padding), weight, stride=stride)
        torch.testing.assert_close(plain(y, network), expected)
        expected_dx, expected_dweight = torch.autograd.grad(expected, (one, weight), plain(upstream, network))
        torch.testing.assert_close(plain(dx, network), expected_dx)
        torch.testing.assert_close(dweight[network].permute(2, 1, 0), expected_dweight)


@pytest.mark.parametrize("first", [False, True], ids=["further layer", "first layer"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 1, None), (1, 1, (1, 2)), (5, 1, None), (8, 1, None), (8, 1, (4, 4)), (2, 1, (3, 0)), (5, 2, None), (1, 2, None)],
)
def test_low_precision_products_follow_the_same_convolution(
    kernel: int, stride: int, padding: tuple[int, int] | None, first: bool
) -> None:
    """A first layer's input needs no gradient, which leaves its weights another way to theirs."""
    conv = Conv(NETWORKS, 32, 16, kernel, stride, padding)
    nn.init.normal_(conv.weight, std=0.1)
    x = random_input(32).float().requires_grad_(not first)
    inputs = (conv.weight,) if first else (x, conv.weight)
    y = conv(x)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, upstream)
    set_product_dtype(conv, torch.bfloat16)
    low = conv(x)
    assert low.dtype == torch.bfloat16
    low_gradients = torch.autograd.grad(low, inputs, upstream.bfloat16())
    assert all(gradient.dtype == torch.float32 for gradient in low_gradients)
    for exact, rounded in zip((y, *gradients), (low, *low_gradients), strict=True):
        # bfloat16 keeps 8 bits: single products are off by up to 2^-8, their sums by less.
        assert (rounded - exact).norm() / exact.norm() < 2**-7


@pytest.mark.parametrize("masked", [False, True], ids=["one network after the other", "all at once"])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_and_its_gradients_are_those_of_batch_norm_1d(relu: bool, masked: bool) -> None:
    """A mask of ones takes the way of ragged batches and GPUs, which must give the same."""
    mask = torch.ones(NETWORKS, SAMPLES, dtype=torch.float64) if masked else None
    norm = BatchNorm(NETWORKS, 4, eps=1e-3, momentum=0.01).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = random_input(4).requires_grad_()
    plain_norms = []
    for network in range(NETWORKS):
        reference = nn.BatchNorm1d(4, eps=1e-3, momentum=0.01).double()
        reference.load_state_dict({**network_state(norm, network), "num_batches_tracked": torch.tensor(0)})
        plain_norms.append(reference)
    y = norm(x, mask, relu=relu)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)
    for network, reference in enumerate(plain_norms):
        one = plain(x, network).detach().requires_grad_()
        expected = reference(one).relu() if relu else reference(one)
        torch.testing.assert_close(plain(y, network), expected)
        wanted = torch.autograd.grad(expected, (one, reference.weight, reference.bias), plain(upstream, network))
        torch.testing.assert_close(plain(gradients[0], network), wanted[0])
        torch.testing.assert_close(gradients[1][network], wanted[1])
        torch.testing.assert_close(gradients[2][network], wanted[2])
        torch.testing.assert_close(norm.running_mean[network], reference.running_mean)
        torch.testing.assert_close(norm.running_var[network], reference.running_var)
    norm.eval()
    for network, reference in enumerate(plain_norms):
        torch.testing.assert_close(plain(norm(x), network), reference.eval()(plain(x, network)))


def test_padding_of_a_ragged_batch_changes_nothing() -> None:
    rows = [5, 3, 0]
    mask = torch.tensor([[float(sample < count) for sample in range(SAMPLES)] for count in rows], dtype=torch.float64)
    norm = BatchNorm(NETWORKS, 4).double()
    before = norm.running_mean.clone()
    x = random_input(4).requires_grad_()
    y = norm(x, mask, relu=True)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    for network, count in enumerate(rows[:2]):
        alone = BatchNorm(1, 4).double()
        one = x[network : network + 1, :, :count].detach().requires_grad_()
        expected = alone(one, relu=True)
        torch.testing.assert_close(y[network : network + 1, :, :count], expected)
        (wanted,) = torch.autograd.grad(expected, one, upstream[network : network + 1, :, :count])
        torch.testing.assert_close(dx[network : network + 1, :, :count], wanted)
        torch.testing.assert_close(norm.running_var[network], alone.running_var[0])
        assert not y[network, :, count:].any() and not dx[network, :, count:].any()
    torch.testing.assert_close(norm.running_mean[2], before[2])
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("in_reverse", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(5, 1, (2, 2)), (8, 1, (4, 4)), (2, 1, (-1, 0)), (5, 2, (2, 2)), (1, 3, (0, 0))]
)
def test_the_compiled_unfolding_is_that_of_pytorch(
    kernel: int, stride: int, padding: tuple[int, int], in_reverse: bool
) -> None:
    from utils.compiled_passes import unfold  # compiled at import, for seconds

    x = random_input(7).bfloat16()
    windows = F.pad(x, (0, 0, 0, 0, *padding)).unfold(1, kernel, stride)
    expected = (windows.flip(4) if in_reverse else windows).transpose(3, 4).flatten(3)
    assert torch.equal(unfold(x, kernel, stride, padding, in_reverse), expected)


@pytest.mark.parametrize("rows", [None, [5, 3, 0]], ids=["whole batch", "ragged batch"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_compiled_batch_norm_is_that_of_float32(relu: bool, rows: list[int] | None) -> None:
    """bfloat16 in, float32 within and out, gradient rounded to bfloat16."""
    mask = rows and torch.tensor([[float(sample < count) for sample in range(SAMPLES)] for count in rows])
    low, exact = (BatchNorm(NETWORKS, 40, eps=1e-3, momentum=0.01) for _ in range(2))
    nn.init.normal_(low.weight)
    nn.init.normal_(low.bias)
    exact.load_state_dict(low.state_dict())
    x = (3 + random_input(40)).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    y, expected = low(x, mask, relu=relu), exact(wide, mask, relu=relu)
    assert type(y.grad_fn).__name__ == "Bfloat16BatchNormBackward"
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, low.weight, low.bias), upstream)
    wanted = torch.autograd.grad(expected, (wide, exact.weight, exact.bias), upstream)
    torch.testing.assert_close(gradients[0].float(), wanted[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(gradients[1:], wanted[1:], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(low.running_mean, exact.running_mean)
    torch.testing.assert_close(low.running_var, exact.running_var)
    if rows:
        assert not y[2].any() and not gradients[0][2].any()
    low.eval()
    assert low(x).dtype == torch.float32
    torch.testing.assert_close(low(x), exact.eval()(wide))


def test_compiled_gradients_are_rounded_to_even_and_may_be_of_any_layout() -> None:
    """Inputs of mean 0 and variance 1, sums of dy and of dy x that are 0: dx is dy, rounded."""
    norm = BatchNorm(1, 2, eps=0)
    x = torch.tensor([1.0, 1, -1, -1])[None, None, :, None].expand(1, 1, 4, 2).bfloat16().requires_grad_()
    between = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway between two neighbours
    upstream = between.expand(1, 1, 4, 2) * torch.tensor([1.0, -1, -1, 1])[None, None, :, None]
    (dx,) = torch.autograd.grad(norm(x), x, upstream.transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(dx, upstream.bfloat16())


def test_a_diverged_network_is_not_hidden_by_the_compiled_relu() -> None:
    x = random_input(4).bfloat16()
    x[1, 2, 3, 0] = torch.nan
    y = BatchNorm(NETWORKS, 4)(x, relu=True)
    assert y[1, :, :, 0].isnan().all() and y[[0, 2]].isfinite().all() and y[1, :, :, 1:].isfinite().all()


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 16])
def test_average_of_steps_counts_only_steps_that_exist(stride: int) -> None:
    x = random_input(2)
    expected = F.avg_pool1d(plain(x, 0), stride, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(plain(average_steps(x, stride), 0), expected)


def test_dropout_of_a_network_does_not_depend_on_its_stack() -> None:
    dropout = Dropout(0.4)
    x = torch.ones(NETWORKS, STEPS, SAMPLES, 50)
    set_dropout_generators(dropout, [torch.Generator().manual_seed(n) for n in range(NETWORKS)])
    together = dropout(x)
    set_dropout_generators(dropout, [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(dropout(x[2:]), together[2:])
    assert abs(together.mean().item() - 1) < 0.05
    assert abs((together == 0).float().mean().item() - 0.4) < 0.05
    assert torch.equal(dropout.eval()(x), x)


def test_a_network_state_survives_the_way_through_the_plain_layout() -> None:
    conv = Conv(2, 3, 4, 5, bias=True)
    nn.init.normal_(conv.weight)
    assert conv.bias is not None
    nn.init.normal_(conv.bias)
    state = network_state(conv, 0)
    assert state["weight"].shape == (4, 3, 5)
    load_network_state(conv, 1, state)
    assert torch.equal(conv.weight[0], conv.weight[1]) and torch.equal(conv.bias[0], conv.bias[1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_alone_rounds_as_it_does_beside_others(bias: bool) -> None:
    """Outputs and gradients of a linear map to one feature, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        stack = Linear(3, 64, 1, bias)
        x = torch.randn(3, 100, 64, generator=generator)
        upstream = torch.randn(3, 100, 1, generator=generator).sign() / 100
        for parameter in stack.parameters():
            parameter.data.normal_(generator=generator)
        y = stack(x)
        gradients = torch.autograd.grad(y, list(stack.parameters()), upstream)
        alone = Linear(1, 64, 1, bias)
        for parameter, source in zip(alone.parameters(), stack.parameters(), strict=True):
            parameter.data = source.data[1:2]
        own = alone(x[1:2])
        assert torch.equal(own, y[1:2])
        for gradient, expected in zip(
            torch.autograd.grad(own, list(alone.parameters()), upstream[1:2]), gradients, strict=True
        ):
            assert torch.equal(gradient, expected[1:2])
