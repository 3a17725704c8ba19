"""Passes over bfloat16 activations on a CPU, compiled by numba for one thread.

Where a processor multiplies bfloat16, its matrix products take less time than PyTorch's
operations around them, each of which reads and writes the activations of the whole stack.
These passes do the work of several operations at once, network after network, whose activations
stay in the cache meanwhile. They calculate in float32, and no network's result depends on the
others.

numba has no bfloat16; it sees the bits as uint16, which are the upper half of a float32's.
Functions are compiled at import, for the types that they name, and with numpy's error model:
Python's checks every division, which keeps a loop from being vectorised.
"""

from typing import Any

import numpy as np
import torch
from numba import boolean, float32, float64, int64, njit, uint16, void
from numpy.typing import NDArray
from torch import Tensor

f32, u16, u32 = np.float32, np.uint16, np.uint32
Floats = NDArray[np.float32]
Bits = NDArray[np.uint16]

FLOATS_1, FLOATS_2, FLOATS_4 = float32[::1], float32[:, ::1], float32[:, :, :, ::1]
BITS_3, BITS_4, BITS_5 = uint16[:, :, ::1], uint16[:, :, :, ::1], uint16[:, :, :, :, ::1]


def _bits(tensor: Tensor) -> Bits:
    """The bits of a bfloat16 tensor, its own memory."""
    return tensor.view(torch.uint16).numpy()


@njit(inline="always")
def _to_float32(bits: np.uint16) -> np.float32:
    return u32(u32(bits) << u32(16)).view(f32)


@njit(inline="always")
def _to_bfloat16(value: np.float32) -> np.uint16:
    """To the nearest bfloat16, ties to even."""
    bits = f32(value).view(u32)
    odd = u32(u32(bits >> u32(16)) & u32(1))
    return u16(u32(bits + u32(0x7FFF) + odd) >> u32(16))


@njit(void(BITS_4, int64, int64, boolean, BITS_5), error_model="numpy")
def _copy_taps(x: Bits, left: int, stride: int, in_reverse: bool, unfolded: Bits) -> None:
    networks, steps, samples, channels = x.shape
    steps_out, kernel = unfolded.shape[1], unfolded.shape[3]
    for n in range(networks):
        for out in range(steps_out):
            for tap in range(kernel):
                step = out * stride + tap - left
                place = kernel - 1 - tap if in_reverse else tap
                if 0 <= step < steps:
                    # Element by element: numba compiles this loop to wide moves, an assignment of slices to calls.
                    for sample in range(samples):
                        for c in range(channels):
                            unfolded[n, out, sample, place, c] = x[n, step, sample, c]
                else:
                    unfolded[n, out, :, place] = 0


def unfold(x: Tensor, kernel: int, stride: int, padding: tuple[int, int], in_reverse: bool = False) -> Tensor:
    """bfloat16 (network, step, sample, channel) to (network, step out, sample, tap x channel), zero-padded.

    Args:
        padding: zeros (left, right) of the steps.
        in_reverse: the last tap comes first.
    """
    networks, steps, samples, channels = x.shape
    steps_out = (steps + sum(padding) - kernel) // stride + 1
    unfolded = x.new_empty(networks, steps_out, samples, kernel, channels)
    _copy_taps(_bits(x.contiguous()), padding[0], stride, in_reverse, _bits(unfolded))
    return unfolded.flatten(3)


@njit(void(BITS_3, FLOATS_1, FLOATS_1, boolean, FLOATS_1, FLOATS_1), error_model="numpy")
def _add_rows(x: Bits, mask: Floats, centre: Floats, squared: bool, of_step: Floats, total: Floats) -> None:
    """Set `total` to the sums over real rows of x (step, sample, channel) - centre, or of the squares of that.

    Summed step by step, in the scratch array `of_step`, which keeps rounding small.
    """
    steps, samples, channels = x.shape
    total[:] = 0
    for step in range(steps):
        of_step[:] = 0
        for sample in range(samples):
            if mask[sample] != 0:
                for c in range(channels):
                    deviation = _to_float32(x[step, sample, c]) - centre[c]
                    of_step[c] += deviation * deviation if squared else deviation
        for c in range(channels):
            total[c] += of_step[c]


@njit(float32(FLOATS_1, int64), error_model="numpy")
def _real_rows(mask: Floats, steps: int) -> np.float32:
    """Rows that statistics are taken over, real samples x steps; at least 1."""
    rows = f32(0)
    for real in mask:
        rows += real
    return f32(max(rows * f32(steps), f32(1)))


# Numba's array expressions would be shorter; compiling one takes as long as the rest of a function.
@njit(void(BITS_4, *(FLOATS_2,) * 3, float64, boolean, FLOATS_4, *(FLOATS_2,) * 2), error_model="numpy")
def _normalise(
    x: Bits,
    weight: Floats,
    bias: Floats,
    mask: Floats,
    eps: float,
    relu: bool,
    y: Floats,
    mean: Floats,
    variance: Floats,
) -> None:
    """Set y, mean and variance."""
    networks, steps, samples, channels = x.shape
    scale, shift, of_step = np.empty(channels, f32), np.empty(channels, f32), np.empty(channels, f32)
    zero = np.zeros(channels, f32)
    for n in range(networks):
        count = _real_rows(mask[n], steps)
        _add_rows(x[n], mask[n], zero, False, of_step, mean[n])
        for c in range(channels):
            mean[n, c] /= count
        _add_rows(x[n], mask[n], mean[n], True, of_step, variance[n])
        for c in range(channels):
            variance[n, c] /= count
            scale[c] = weight[n, c] / np.sqrt(variance[n, c] + f32(eps))
            shift[c] = bias[n, c] - mean[n, c] * scale[c]
        for step in range(steps):
            for sample in range(samples):
                if mask[n, sample] != 0:
                    for c in range(channels):
                        value = _to_float32(x[n, step, sample, c]) * scale[c] + shift[c]
                        # Written so, nan passes the ReLU, and a training that diverged is noticed.
                        y[n, step, sample, c] = f32(0) if relu and value <= 0 else value
                else:
                    y[n, step, sample] = 0


@njit(inline="always")
def _through_relu(dy: np.float32, y: np.float32, relu: bool) -> np.float32:
    """The gradient before a ReLU, if there is one, from that after it."""
    return f32(0) if relu and y <= 0 else dy


@njit(void(FLOATS_4, BITS_4, FLOATS_4, *(FLOATS_2,) * 4, float64, boolean, BITS_4, *(FLOATS_2,) * 2), error_model="numpy")
def _normalise_back(
    dy: Floats,
    x: Bits,
    y: Floats,
    weight: Floats,
    mask: Floats,
    mean: Floats,
    variance: Floats,
    eps: float,
    relu: bool,
    dx: Bits,
    dweight: Floats,
    dbias: Floats,
) -> None:
    """Set dx, dweight and dbias; y tells where ReLU let a value pass."""
    networks, steps, samples, channels = x.shape
    sum_dy, sum_dy_deviation = np.empty(channels, f32), np.empty(channels, f32)
    scale, slope, shift = np.empty(channels, f32), np.empty(channels, f32), np.empty(channels, f32)
    for n in range(networks):
        count = _real_rows(mask[n], steps)
        dweight[n] = 0
        dbias[n] = 0
        for step in range(steps):
            sum_dy[:] = 0
            sum_dy_deviation[:] = 0
            for sample in range(samples):
                if mask[n, sample] != 0:
                    for c in range(channels):
                        upstream = _through_relu(dy[n, step, sample, c], y[n, step, sample, c], relu)
                        sum_dy[c] += upstream
                        sum_dy_deviation[c] += upstream * (_to_float32(x[n, step, sample, c]) - mean[n, c])
            for c in range(channels):
                dbias[n, c] += sum_dy[c]
                dweight[n, c] += sum_dy_deviation[c]
        for c in range(channels):
            # dx = scale * (dy - dbias / count - x_hat * dweight / count), written as scale * dy + slope * x + shift.
            rstd = f32(1) / np.sqrt(variance[n, c] + f32(eps))
            dweight[n, c] *= rstd
            scale[c] = weight[n, c] * rstd
            slope[c] = -scale[c] * rstd * dweight[n, c] / count
            shift[c] = -scale[c] * dbias[n, c] / count - slope[c] * mean[n, c]
        for step in range(steps):
            for sample in range(samples):
                if mask[n, sample] != 0:
                    for c in range(channels):
                        upstream = _through_relu(dy[n, step, sample, c], y[n, step, sample, c], relu)
                        dx[n, step, sample, c] = _to_bfloat16(
                            scale[c] * upstream + slope[c] * _to_float32(x[n, step, sample, c]) + shift[c]
                        )
                else:
                    dx[n, step, sample] = 0


class Bfloat16BatchNorm(torch.autograd.Function):
    """Training-mode batch normalisation of bfloat16 with optional ReLU, statistics over each network's real rows.

    Takes x bfloat16 (network, step, sample, channel), weight and bias (network, channel), mask (network, sample) or
    None, eps and whether ReLU follows. Gives y float32, of x's shape, and mean and biased variance (network, channel).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        # The compiled signatures take contiguous arrays alone.
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        mask = weight.new_ones(x.shape[0], x.shape[2]) if mask is None else mask.contiguous()
        y, mean, variance = torch.empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)
        _normalise(
            _bits(x), weight.numpy(), bias.numpy(), mask.numpy(), eps, relu, y.numpy(), mean.numpy(), variance.numpy()
        )
        ctx.eps, ctx.relu = eps, relu
        ctx.save_for_backward(x, y, weight, mask, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        x, *saved = ctx.saved_tensors
        y, weight, mask, mean, variance = (tensor.detach().numpy() for tensor in saved)
        dx, dweight, dbias = torch.empty_like(x), torch.empty(weight.shape), torch.empty(weight.shape)
        _normalise_back(
            gradients[0].contiguous().numpy(),
            _bits(x),
            y,
            weight,
            mask,
            mean,
            variance,
            ctx.eps,
            ctx.relu,
            _bits(dx),
            dweight.numpy(),
            dbias.numpy(),
        )
        return dx, dweight, dbias, None, None, None
