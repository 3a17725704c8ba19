"""Size and cost of one network of a stack, layer by layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FLOAT_BYTES = 4


class Summary(NamedTuple):
    """Cost of one network for one sample.

    Attributes:
        lines: a table of the layers that have weights.
        params: trainable parameters.
        multiply_adds: products with weights, each weight once for every step that it is applied to.
        megabytes: input, activations of forward and backward pass, and weights in float32, in 10^6 bytes.
    """

    lines: list[str]
    params: int
    multiply_adds: int
    megabytes: float


def summarise(stack: nn.Module, bands: int, steps: int) -> Summary:
    """Summary of the first network of a stack, measured on one sample of zeros."""
    rows: list[tuple[str, str, str, int, int]] = []
    handles = []

    def record(name: str, layer: nn.Module) -> Any:
        own = list(layer.parameters(recurse=False))

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            shape = (output if isinstance(output, Tensor) else output[0]).shape
            applied = shape[1] if len(shape) == 4 else 1
            # A weight matrix is used at every step; scales and shifts are counted once.
            cost = sum(p[0].numel() * (applied if p.ndim > 2 else 1) for p in own)
            sizes = " x ".join(str(size) for size in (shape[1], shape[-1]) if len(shape) == 4) or str(shape[-1])
            rows.append((name, type(layer).__name__, sizes, sum(p[0].numel() for p in own), cost))
            outputs.append(shape.numel() // shape[0])

        return hook

    outputs: list[int] = []
    for name, layer in stack.named_modules():
        if list(layer.parameters(recurse=False)):
            handles.append(layer.register_forward_hook(record(name, layer)))
    networks, device = next(stack.parameters()).shape[0], next(stack.parameters()).device
    was_training = stack.training
    stack.eval()
    with torch.no_grad():
        stack(torch.zeros(networks, steps, 1, bands, device=device))
    stack.train(was_training)
    for handle in handles:
        handle.remove()
    params = sum(parameter[0].numel() for parameter in stack.parameters())
    megabytes = FLOAT_BYTES * (bands * steps + 2 * sum(outputs) + params) / 1e6
    table = ("layer", "type", "output", "params", "mult-adds")
    lines = ["{:<28} {:<18} {:>12} {:>10} {:>12}".format(*row) for row in (table, *rows)]
    return Summary(lines, params, sum(row[4] for row in rows), megabytes)
