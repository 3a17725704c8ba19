"""Layers that hold a stack of networks and run all of them at once.

A single time-series network of this size (a few hundred thousand weights,
batches of 32) keeps neither a processor nor a GPU busy. Every layer here
therefore holds the weights of `networks` separate networks and works on
activations of shape (network, step, sample, channel). A stack of one is the
plain case, not another code path. Networks never mix: each has its own weights,
its own batch statistics and its own gradients.

With the steps outermost, the rows that one tap of a convolution reads are one
contiguous slab, so a convolution is one batched matrix product a tap, without
an unfolded copy of its input and without products with the zero padding.

The weights of network n are `parameter[n]` with the axes of PyTorch's plain
layer reversed: a convolution's (out, in, kernel) is held as (kernel, in, out), a
linear map's (out, in) as (in, out). `network_state` and `load_network_state`
translate, so that files and tests see the usual layout.

Batches may be ragged: the networks of a stack train on folds of different
lengths, so the last batch of an epoch has fewer real rows for some of them.
`mask`, (network, sample), is 1 for a real row and 0 for padding, and None when
all rows are real. Padding never enters batch statistics or gradients.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network_state(stack: nn.Module, network: int) -> dict[str, Tensor]:
    """Parameters and buffers of one network, in the layout of PyTorch's plain layers."""
    return {
        name: tensor[network].permute(*reversed(range(tensor.ndim - 1))).contiguous()
        for name, tensor in stack.state_dict().items()
    }


@torch.no_grad()
def load_network_state(stack: nn.Module, network: int, state: dict[str, Tensor]) -> None:
    """Set one network's parameters and buffers from tensors in the plain layout."""
    for name, tensor in stack.state_dict().items():
        plain = state[name]
        tensor[network].copy_(plain.permute(*reversed(range(plain.ndim))))


Initialiser = Callable[[Tensor, torch.Generator], object]
"""Fills a plain-layout tensor in place from a generator."""


def xavier_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """Glorot and Bengio 2010, uniform."""
    nn.init.xavier_uniform_(weight, generator=generator)


def kaiming_normal_fan_out(weight: Tensor, generator: torch.Generator) -> None:
    """He et al. 2015, normal, variance kept in the backward pass."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


def uniform_fan_in(weight: Tensor, generator: torch.Generator) -> None:
    """PyTorch's own for convolutions and linear maps: uniform within 1/sqrt(fan in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def initialise_layers(
    stack: nn.Module, generators: Sequence[torch.Generator], conv: Initialiser, linear: Initialiser, zero_bias: bool
) -> None:
    """Draw the convolutions and linear maps of each network from its own generator, in module order.

    Args:
        stack: layers of `len(generators)` networks.
        generators: one a network.
        conv: draws convolution weights.
        linear: draws the weights of linear maps.
        zero_bias: biases start at 0; else uniform within 1/sqrt(fan in), PyTorch's own.
    """
    for network, generator in enumerate(generators):
        for layer in stack.modules():
            if not isinstance(layer, Conv | Linear):
                continue
            plain = torch.empty(layer.weight.shape[:0:-1])
            (conv if isinstance(layer, Conv) else linear)(plain, generator)
            layer.weight[network] = plain.permute(*reversed(range(plain.ndim)))
            if layer.bias is not None:
                bound = 0 if zero_bias else 1 / math.sqrt(plain[0].numel())
                nn.init.uniform_(layer.bias[network], -bound, bound, generator=generator)


def average_steps(x: Tensor, stride: int) -> Tensor:
    """Mean of each run of `stride` steps of (network, step, sample, channel); a short last run counts its own steps."""
    if stride == 1:
        return x
    whole = x.shape[1] // stride * stride
    pooled = x[:, :whole].unflatten(1, (-1, stride)).mean(2)
    if whole == x.shape[1]:
        return pooled
    return torch.cat([pooled, x[:, whole:].mean(1, keepdim=True)], dim=1)


def _tap_ranges(steps_in: int, steps_out: int, kernel: int, stride: int, left: int) -> list[tuple[int, int, int, int]]:
    """(tap, first output step, end of output steps, first input step) of each tap that meets data."""
    ranges = []
    for tap in range(kernel):
        first = max(0, math.ceil((left - tap) / stride))
        end = min(steps_out, (steps_in - 1 + left - tap) // stride + 1)
        if end > first:
            ranges.append((tap, first, end, stride * first + tap - left))
    return ranges


def _slab(x: Tensor, first: int, count: int, stride: int = 1) -> Tensor:
    """`count` steps of x as (network, step x sample, channel); a view where the steps are adjacent."""
    return x[:, first : first + stride * (count - 1) + 1 : stride].flatten(1, 2)


class _TapConvolution(torch.autograd.Function):
    """Convolution over the steps, one batched matrix product a tap, summed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, left: int, steps_out: int) -> Tensor:
        networks, steps, samples, _ = x.shape
        ctx.taps = _tap_ranges(steps, steps_out, weight.shape[1], stride, left)
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        y = x.new_zeros(networks, steps_out, samples, weight.shape[3])
        for tap, first, end, start in ctx.taps:
            y[:, first:end].flatten(1, 2).baddbmm_(_slab(x, start, end - first, stride), weight[:, tap])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight)
        for tap, first, end, start in ctx.taps:
            count = end - first
            rows_dy = _slab(dy, first, count)
            dweight[:, tap].baddbmm_(_slab(x, start, count, ctx.stride).transpose(1, 2), rows_dy)
            if dx is None:
                continue
            weight_back = weight[:, tap].transpose(1, 2)
            if ctx.stride == 1:
                dx[:, start : start + count].flatten(1, 2).baddbmm_(rows_dy, weight_back)
            else:
                last = start + ctx.stride * (count - 1) + 1
                dx[:, start : last : ctx.stride] += torch.bmm(rows_dy, weight_back).unflatten(1, (count, x.shape[2]))
        return dx, dweight, None, None, None


def _unfolded_convolution(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """The same convolution as one product with an unfolded input, so that all taps are summed before rounding.

    In bfloat16 a product a tap would round each partial sum to 8 bits.
    """
    kernel = weight.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, *padding))
    last = padded.shape[1] - kernel + 1
    unfolded = torch.cat([padded[:, tap : tap + last : stride] for tap in range(kernel)], dim=3)
    return torch.bmm(unfolded.flatten(1, 2), weight.flatten(1, 2)).unflatten(1, unfolded.shape[1:3])


class _BatchNorm(torch.autograd.Function):
    """Training-mode batch normalisation with optional ReLU, statistics over each network's real rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.flatten(1, 2)
        count: Tensor | float = float(rows.shape[1])
        row_mask = None
        if mask is not None:
            row_mask = mask.repeat(1, x.shape[1]).unsqueeze(2)
            count = row_mask.sum(1).clamp_min(1)
            rows = rows * row_mask
        mean = rows.sum(1) / count
        centred = rows - mean.unsqueeze(1)
        if row_mask is not None:
            centred *= row_mask
        variance = (centred * centred).sum(1) / count
        rstd = (variance + eps).rsqrt()
        normed = centred.mul_(rstd.unsqueeze(1))
        y = torch.addcmul(bias.unsqueeze(1), normed, weight.unsqueeze(1))
        if relu:
            y.relu_()
        if row_mask is not None:
            y *= row_mask
        ctx.relu, ctx.count, ctx.row_mask = relu, count, row_mask
        ctx.save_for_backward(normed, weight, rstd, y if relu else normed)
        ctx.mark_non_differentiable(mean, variance)
        return y.view_as(x), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, rstd, y = ctx.saved_tensors
        dy = gradients[0].flatten(1, 2)
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        if ctx.row_mask is not None:
            dy = dy * ctx.row_mask
        dbias = dy.sum(1)
        dweight = (dy * normed).sum(1)
        scale = weight * rstd
        dx = torch.addcmul((-scale * dbias / ctx.count).unsqueeze(1), dy, scale.unsqueeze(1))
        dx.addcmul_(normed, (-scale * dweight / ctx.count).unsqueeze(1))
        if ctx.row_mask is not None:
            dx *= ctx.row_mask
        return dx.view_as(gradients[0]), dweight, dbias, None, None, None


class Conv(nn.Module):
    """A stack of 1-D convolutions, zero-padded.

    Args:
        networks: how many networks the stack holds.
        padding: zeros (left, right) of the steps; None is "same", the extra zero
            of an even kernel on the right.
        bias: add a bias a channel.
    """

    def __init__(
        self,
        networks: int,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding or ((kernel_size - 1) // 2, kernel_size // 2)
        self.product = torch.float32
        self.weight = nn.Parameter(torch.empty(networks, kernel_size, channels_in, channels_out))
        self.bias = nn.Parameter(torch.empty(networks, channels_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(network, step, sample, channel in) to (network, step out, sample, channel out)."""
        if self.product == torch.float32:
            left, right = self.padding
            steps_out = (x.shape[1] + left + right - self.weight.shape[1]) // self.stride + 1
            y = _TapConvolution.apply(x.contiguous(), self.weight, self.stride, left, steps_out)
        else:
            x_low, weight_low = x.to(self.product), self.weight.to(self.product)
            y = _unfolded_convolution(x_low, weight_low, self.stride, self.padding).to(x.dtype)
        return y if self.bias is None else y + self.bias[:, None, None]


class BatchNorm(nn.Module):
    """A stack of batch normalisations over steps and samples, each network with its own statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, networks: int, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(networks, channels))
        self.bias = nn.Parameter(torch.zeros(networks, channels))
        self.register_buffer("running_mean", torch.zeros(networks, channels))
        self.register_buffer("running_var", torch.ones(networks, channels))

    def forward(self, x: Tensor, mask: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise (network, step, sample, channel), then ReLU if asked; padding comes out as zero in training."""
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            y = torch.addcmul(shift[:, None, None], x, scale[:, None, None])
            return y.relu() if relu else y
        y, mean, variance = _BatchNorm.apply(x.contiguous(), self.weight, self.bias, mask, self.eps, relu)
        with torch.no_grad():
            if mask is None:
                count = x.shape[1] * x.shape[2]
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            else:
                counts = mask.sum(1, keepdim=True) * x.shape[1]
                momentum = self.momentum * (counts > 0).to(mean)
                self.running_mean.lerp_(mean, momentum.expand_as(mean))
                self.running_var.lerp_(variance * (counts / (counts - 1).clamp_min(1)), momentum.expand_as(mean))
        return y


class Linear(nn.Module):
    """A stack of linear maps over the last axis."""

    def __init__(self, networks: int, features_in: int, features_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(networks, features_in, features_out))
        self.bias = nn.Parameter(torch.empty(networks, features_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(network, ..., feature in) to (network, ..., feature out)."""
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.bias is None:
            y = torch.bmm(rows, self.weight)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight)
        return y.view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """A stack of layer normalisations over the last axis (eps 1e-5)."""

    def __init__(self, networks: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(networks, features))
        self.bias = nn.Parameter(torch.zeros(networks, features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
        return torch.addcmul(self.bias.view(shape), F.layer_norm(x, x.shape[-1:]), self.weight.view(shape))


class Dropout(nn.Module):
    """Dropout whose masks come from one generator a network, so that a network's draws do not depend on its stack."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generators: list[torch.Generator] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.probability
        masks = [torch.empty(x.shape[1:], device=x.device).bernoulli_(keep, generator=g) for g in self.generators]
        return x * torch.stack(masks).div_(keep)


def set_dropout_generators(stack: nn.Module, generators: list[torch.Generator]) -> None:
    """Give every dropout layer of the stack the networks' generators."""
    for layer in stack.modules():
        if isinstance(layer, Dropout):
            layer.generators = generators


def set_product_dtype(stack: nn.Module, dtype: torch.dtype) -> None:
    """Number format of the convolutions' products; weights, sums over the batch and losses stay in float32."""
    for layer in stack.modules():
        if isinstance(layer, Conv):
            layer.product = dtype
