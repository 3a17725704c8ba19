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

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

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


class Stack(nn.Module):
    """A stack of networks of one architecture: what every architecture of `models` is."""

    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        """Draw the initial weights of each network from its own generator."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(network, step, sample, band) and mask (network, sample) to predictions (network, sample)."""
        raise NotImplementedError


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


class _Tap(NamedTuple):
    """The part of a convolution that one tap does, in rows of (step x sample)."""

    tap: int
    first_out: int
    first_in: int
    rows: int


@functools.lru_cache(maxsize=256)
def _taps(steps_in: int, steps_out: int, samples: int, kernel: int, left: int) -> list[_Tap]:
    """Taps that meet data, at stride 1; the one that covers most output steps first."""
    taps = []
    for tap in range(kernel):
        first, end = max(0, left - tap), min(steps_out, steps_in + left - tap)
        if end > first:
            taps.append(_Tap(tap, first * samples, (first + tap - left) * samples, (end - first) * samples))
    return sorted(taps, key=lambda tap: -tap.rows)


class _TapConvolution(torch.autograd.Function):
    """Convolution over the steps at stride 1, one batched matrix product a tap, summed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: int, steps_out: int) -> Tensor:
        networks, steps, samples, _ = x.shape
        ctx.taps = _taps(steps, steps_out, samples, weight.shape[1], left)
        ctx.save_for_backward(x, weight)
        rows, weights = x.flatten(1, 2), weight.unbind(1)
        y = x.new_empty(networks, steps_out * samples, weight.shape[3])
        whole = ctx.taps[0].rows == y.shape[1]
        if not whole:
            y.zero_()
        for index, (tap, first_out, first_in, count) in enumerate(ctx.taps):
            beta = 0 if index == 0 and whole else 1
            y.narrow(1, first_out, count).baddbmm_(rows.narrow(1, first_in, count), weights[tap], beta=beta)
        return y.unflatten(1, (steps_out, samples))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows_back, weights_back = x.flatten(1, 2).transpose(1, 2), weight.transpose(2, 3).unbind(1)
        dy = gradients[0].contiguous().flatten(1, 2)
        dx = torch.empty_like(x).flatten(1, 2) if ctx.needs_input_grad[0] else None
        whole = ctx.taps[0].rows == x.shape[1] * x.shape[2]
        if dx is not None and not whole:
            dx.zero_()
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if len(ctx.taps) < weight.shape[1]:
            dweight.zero_()
        dweights = dweight.unbind(1)
        for index, (tap, first_out, first_in, count) in enumerate(ctx.taps):
            upstream = dy.narrow(1, first_out, count)
            dweights[tap].baddbmm_(rows_back.narrow(2, first_in, count), upstream, beta=0)
            if dx is not None:
                beta = 0 if index == 0 and whole else 1
                dx.narrow(1, first_in, count).baddbmm_(upstream, weights_back[tap], beta=beta)
        return None if dx is None else dx.view_as(x), dweight, None, None


def _unfold(x: Tensor, kernel: int, stride: int, padding: tuple[int, int], in_reverse: bool = False) -> Tensor:
    """(network, step, sample, channel) to (network, step out, sample, tap x channel), zero-padded."""
    if kernel == stride == 1 and padding == (0, 0):
        return x
    if _uses_compiled_passes(x.dtype, x.device):
        return _compiled_passes().unfold(x, kernel, stride, padding, in_reverse)
    padded = F.pad(x, (0, 0, 0, 0, *padding))
    parts = [padded[:, steps] for steps in _steps_of_taps(padded.shape[1], kernel, stride)]
    return torch.cat(parts[::-1] if in_reverse else parts, dim=3)


def _steps_of_taps(steps: int, kernel: int, stride: int) -> list[slice]:
    """The padded steps that each tap reads, one for every output step."""
    return [slice(tap, tap + steps - kernel + 1, stride) for tap in range(kernel)]


def _uses_compiled_passes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the passes over activations of this type are those of `utils.compiled_passes`."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def _compiled_passes() -> ModuleType:
    """`utils.compiled_passes`, imported where it is needed, for that takes seconds."""
    from utils import compiled_passes

    return compiled_passes


class _UnfoldedConvolution(torch.autograd.Function):
    """Convolution over the steps as one product with an unfolded input.

    For strides, where the steps of a tap are not adjacent, and for bfloat16, where a
    product a tap would round each partial sum to 8 bits. All products take and give
    numbers of type `product`; the gradients of x and weight have their types.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], product: torch.dtype) -> Tensor:
        ctx.dtypes, x, weight = (x.dtype, weight.dtype), x.to(product), weight.to(product)
        unfolded = _unfold(x, weight.shape[1], stride, padding)
        ctx.stride, ctx.padding, ctx.steps = stride, padding, x.shape[1]
        ctx.unfolds_dy = stride == 1 and ctx.needs_input_grad[0]
        ctx.save_for_backward(x if ctx.unfolds_dy else unfolded, weight)
        return torch.bmm(unfolded.flatten(1, 2), weight.flatten(1, 2)).unflatten(1, unfolded.shape[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight = ctx.saved_tensors
        dy, dx = gradients[0], None
        x_dtype, weight_dtype = ctx.dtypes
        kernel, (left, right) = weight.shape[1], ctx.padding
        saved_back = saved.flatten(1, 2).transpose(1, 2)
        if ctx.unfolds_dy:
            # The gradient of x is a convolution, too, of dy with the taps in reverse; that of the weights shares its input.
            outer = (kernel - 1 - left, kernel - 1 - right)
            unfolded = _unfold(dy, kernel, 1, outer, in_reverse=True).flatten(1, 2)
            dx = torch.bmm(unfolded, weight.transpose(1, 2).flatten(2).transpose(1, 2)).view_as(saved)
            dweight = torch.bmm(saved_back, unfolded).unflatten(2, (kernel, -1)).transpose(1, 2)
            return dx.to(x_dtype), dweight.to(weight_dtype), None, None, None
        dweight = torch.bmm(saved_back, dy.flatten(1, 2)).view_as(weight)
        if ctx.needs_input_grad[0]:
            by_tap = torch.bmm(dy.flatten(1, 2), weight.flatten(1, 2).transpose(1, 2)).view_as(saved)
            dpadded = dy.new_zeros(len(dy), left + ctx.steps + right, dy.shape[2], weight.shape[2])
            steps_of_taps = _steps_of_taps(dpadded.shape[1], kernel, ctx.stride)
            for steps, part in reversed(list(zip(steps_of_taps, by_tap.chunk(kernel, dim=3), strict=True))):
                dpadded[:, steps] += part
            dx = dpadded[:, left : left + ctx.steps].contiguous().to(x_dtype)
        return dx, dweight.to(weight_dtype), None, None, None


class _BatchNorm(torch.autograd.Function):
    """Training-mode batch normalisation with optional ReLU, statistics over each network's real rows, all at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.flatten(1, 2)
        count: Tensor | int = rows.shape[1]
        row_mask = None
        if mask is not None:
            row_mask = mask.repeat(1, x.shape[1]).unsqueeze(2)
            count = row_mask.sum(1, keepdim=True).clamp_min(1)
            rows = rows * row_mask
        mean = rows.sum(1, keepdim=True).div_(count)
        normed = rows - mean
        if row_mask is not None:
            normed *= row_mask
        variance = (normed * normed).sum(1, keepdim=True).div_(count)
        rstd = (variance + eps).rsqrt_()
        normed *= rstd
        weight = weight.unsqueeze(1)
        y = torch.addcmul(bias.unsqueeze(1), normed, weight)
        if relu:
            y.relu_()
        if row_mask is not None:
            y *= row_mask
        ctx.relu, ctx.count, ctx.row_mask = relu, count, row_mask
        ctx.save_for_backward(normed, weight * rstd, y if relu else normed)
        mean, variance = mean.squeeze(1), variance.squeeze(1)
        ctx.mark_non_differentiable(mean, variance)
        return y.view_as(x), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, y = ctx.saved_tensors
        dy = gradients[0].flatten(1, 2)
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        if ctx.row_mask is not None:
            dy = dy * ctx.row_mask
        dbias = dy.sum(1, keepdim=True)
        dweight = (dy * normed).sum(1, keepdim=True)
        share = scale / -ctx.count
        dx = torch.addcmul(share * dbias, dy, scale)
        dx.addcmul_(normed, share * dweight)
        if ctx.row_mask is not None:
            dx *= ctx.row_mask
        return dx.view_as(gradients[0]), dweight.squeeze(1), dbias.squeeze(1), None, None, None


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
        """(network, step, sample, channel in) to (network, step out, sample, channel out).

        In the format of the products (`self.product`); with a bias, in that of the weights.
        """
        if self.stride == 1 and self.product == torch.float32:
            steps_out = x.shape[1] + sum(self.padding) - self.weight.shape[1] + 1
            y = _TapConvolution.apply(x.contiguous(), self.weight, self.padding[0], steps_out)
        else:
            product = x.dtype if self.product == torch.float32 else self.product
            y = _UnfoldedConvolution.apply(x, self.weight, self.stride, self.padding, product)
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
        if mask is None and x.device.type == "cpu" and x.dtype == self.weight.dtype:
            # PyTorch's own kernels, one network after the other: two calls for what takes `_BatchNorm` some twenty.
            tensors = (x.flatten(1, 2), self.weight, self.bias, self.running_mean, self.running_var)
            parts = [
                torch.batch_norm(rows, weight, bias, mean, variance, True, self.momentum, self.eps, False)
                for rows, weight, bias, mean, variance in zip(*(tensor.unbind() for tensor in tensors), strict=True)
            ]
            y = torch.stack(parts).view_as(x)
            return y.relu_() if relu else y
        if _uses_compiled_passes(x.dtype, x.device):
            function = _compiled_passes().Bfloat16BatchNorm
        else:
            function, x = _BatchNorm, x.to(self.weight.dtype).contiguous()
        y, mean, variance = function.apply(x, self.weight, self.bias, mask, self.eps, relu)
        with torch.no_grad():
            momentum: float | Tensor = self.momentum
            count: float | Tensor = float(x.shape[1] * x.shape[2])
            unbias: float | Tensor = count / max(count - 1, 1)
            if mask is not None:
                count = mask.sum(1, keepdim=True) * x.shape[1]
                momentum = (self.momentum * (count > 0).to(mean)).expand_as(self.running_mean)
                unbias = count / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * unbias, momentum)
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
        weight: Tensor = self.weight
        bias = None if self.bias is None else self.bias.unsqueeze(1)
        if len(rows) == 1 and weight.shape[2] == 1:
            # A lone product with a vector is rounded otherwise than one among others; two networks do not depend on a third.
            rows, weight = rows.expand(2, -1, -1), weight.expand(2, -1, -1)
            bias = None if bias is None else bias.expand(2, -1, -1)
        y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
        return y[: len(x)].view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """A stack of layer normalisations over the last axis (eps 1e-5)."""

    def __init__(self, networks: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(networks, features))
        self.bias = nn.Parameter(torch.zeros(networks, features))

    def forward(self, x: Tensor) -> Tensor:
        """(network, ..., feature), shape kept."""
        shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
        return torch.addcmul(self.bias.view(shape), F.layer_norm(x, x.shape[-1:]), self.weight.view(shape))


class Dropout(nn.Module):
    """Dropout whose masks come from one generator a network, so that a network's draws do not depend on its stack."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generators: list[torch.Generator] = []

    def forward(self, x: Tensor) -> Tensor:
        """(network, ...), shape kept; in training, values are zeroed and the rest scaled up to keep the mean."""
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
        elif isinstance(layer, BatchNorm) and _uses_compiled_passes(dtype, layer.weight.device):
            _compiled_passes()  # compiled now, for all processes that will be forked from this one
