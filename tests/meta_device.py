"""PyTorch's `meta` device in place of a GPU: checks that nothing is left on the CPU, and autocast, which it has none of."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
LOWER_PRECISION = (F.conv1d, F.conv2d, F.conv_transpose2d, F.linear, Tensor.matmul, Tensor.__matmul__, torch.addmm)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, apart from copies; PyTorch lets some pass where one of them is meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check an operation's tensors before it runs."""
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if len(devices) > 1 and func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(devices))}")
        return func(*args, **kwargs or {})


class Autocast(TorchFunctionMode):
    """Does for meta tensors what `torch.autocast` does for those of other devices."""

    enabled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round an operation's tensors before it runs."""
        if self.enabled and func in LOWER_PRECISION:
            args, kwargs = tree_map(rounded, (args, kwargs))
        return func(*args, **kwargs or {})

    @contextlib.contextmanager
    def switch(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
        """In place of `torch.autocast`."""
        assert device_type == "meta"
        before, self.enabled = self.enabled, enabled
        yield
        self.enabled = before


def rounded(value: Any) -> Any:
    """A float32 tensor in bfloat16, anything else as it is."""
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
