"""That the canopy network trains on another device than the CPU, tried on PyTorch's `meta` device, as tests have no GPU.

Tensors of this device have a shape and no values: whatever needs their values on the CPU fails, and so, checked operation
by operation, does any tensor that was left there.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from meta_device import META, OneDevice
from torch import Tensor
from torch.optim import Adam

import canopy
from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS
from datasets.canopy.tiles import PUBLISHED, Batch, Sample, collate
from models.threasure_net import ENCODERS, UPSAMPLINGS, ThreasureNet
from utils.canopy.losses import LOSSES

MARGIN, WINDOW, DATES = 8, 16, 3
CHANNELS = len(BANDS) + ANGLE_CHANNELS
SMALL: dict[str, Any] = {"num_rdb": 2, "num_dense_layers": 2, "growth_channels": 8, "channels": 16}


@pytest.fixture(autouse=True)
def no_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws from PyTorch's own generator, as there are none for the meta device."""
    monkeypatch.setattr(canopy, "generator_for", lambda *_, **__: None)


def batch_of(factor: int) -> Batch:
    """Two samples with angles, one with fewer dates than the other."""
    side = WINDOW + 2 * MARGIN
    samples = [
        Sample(
            images=np.zeros((dates, len(BANDS), side, side), np.int16),
            angles=np.zeros((dates, ANGLE_CHANNELS), np.float32),
            days=np.arange(dates),
            lidar_day=180,
            height=np.zeros((WINDOW * factor, WINDOW * factor), np.float32),
            no_vegetation=np.zeros((WINDOW * factor, WINDOW * factor), np.bool_),
            name=f"31TDL/{dates}",
            corner=(0.0, 0.0),
        )
        for dates in (DATES, DATES - 1)
    ]
    return collate(samples)


def run_on_meta(network: ThreasureNet, loss: str, autocast: Callable[..., Any], precision: str) -> Any:
    """What `canopy.backward` needs of a run, one process on the meta device in place of Fabric's."""

    def net(*inputs: Tensor, **options: Any) -> Any:
        with autocast("meta", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return network(*inputs, **options)

    flags = vars(canopy.parser.parse_args([])) | {"loss": loss, "accumulate": 2, "batch_size": 2}
    fabric = SimpleNamespace(device=META, global_rank=0, world_size=1, backward=lambda total: total.backward())
    data = SimpleNamespace(statistics=PUBLISHED, margin=MARGIN)
    return SimpleNamespace(flags=flags, fabric=fabric, data=data, state=SimpleNamespace(net=net))


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_training_step_leaves_no_tensor_on_the_cpu(
    encoder: str, upsampling: str, precision: str, meta_autocast: Callable[..., Any]
) -> None:
    encoded: list[torch.dtype] = []
    for resolution, loss in zip((10, 5, 2.5), LOSSES, strict=True):
        with META:
            network = ThreasureNet(resolution, CHANNELS, encoder=encoder, upsampling=upsampling, **SMALL)
        network.encoder.register_forward_hook(lambda *hooked: encoded.append(hooked[2].dtype))
        optimizer = Adam(network.parameters(), lr=1e-3)
        run = run_on_meta(network, loss, meta_autocast, precision)
        with OneDevice():
            total, finite = canopy.backward(run, batch_of(network.factor), number=0)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.3, error_if_nonfinite=False)
            optimizer.step()
        optimizer_state = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert_on_meta([total, finite, *network.state_dict().values(), *optimizer_state])
        gradients = [parameter.grad for parameter in network.parameters()]
        assert_on_meta([gradient for gradient in gradients if gradient is not None])
        assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
        assert total.dtype == torch.float32
    assert set(encoded) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def assert_on_meta(tensors: Sequence[Tensor]) -> None:
    """All of these are on the meta device."""
    assert {tensor.device for tensor in tensors} == {META}


def test_a_tensor_on_the_cpu_would_be_noticed(meta_autocast: Callable[..., Any]) -> None:
    with META:
        network = ThreasureNet(5, CHANNELS, **SMALL)
    network.head.height.weight = torch.nn.Parameter(torch.zeros(1, SMALL["channels"]))
    run = run_on_meta(network, LOSSES[0], meta_autocast, "32")
    with OneDevice(), pytest.raises(RuntimeError, match="of tensors on cpu and meta"):
        canopy.backward(run, batch_of(2), number=0)
