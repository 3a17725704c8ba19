"""The canopy-height network against golden numbers and against the same network written plainly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor, nn

from benchmarks.plain_threasure_net import PlainThreasureNet
from models.threasure_net import ThreasureNet, UNet, UNetLevel
from utils.errors import InputError

GOLDEN = golden("canopy_models")
GOLDEN_UNET = golden("canopy_unet")
MARGINS = {10: 24, 5: 32, 2.5: 32}
SMALL: dict[str, Any] = {"num_rdb": 1, "num_dense_layers": 2, "growth_channels": 8, "channels": 16}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a golden network."""
    return {"num_rdb": 4, "num_dense_layers": 4} if case["resolution"] == 10 else {}


def fill(network: nn.Module, case: dict[str, Any]) -> None:
    """Set the parameters as the golden file says, by their order."""
    parameters = list(network.parameters())
    assert [list(p.shape) for p in parameters if p.ndim < 4] == [s[1] for s in case["state"] if len(s[1]) < 4]
    with torch.no_grad():
        for parameter, (_, shape, kind, seed) in zip(parameters, case["state"], strict=True):
            z = np.random.RandomState(seed).standard_normal(shape)
            scaled = z * np.sqrt(1 / (z.size / z.shape[0])) if kind == "weight" else 0.1 * z
            assert list(parameter.shape) == shape
            parameter.copy_(torch.from_numpy(scaled))


def unet_blocks(encoder: UNet) -> dict[str, nn.Sequential]:
    """Our convolutions with their batch norms, by the published name of the convolution."""
    blocks: dict[str, nn.Module] = {
        "in_conv.conv.conv.0": encoder.stem[0],
        "in_conv.conv.conv.3": encoder.stem[1],
        "out_conv.conv.conv.0": encoder.conv_out,
    }
    level: UNetLevel | None = encoder.levels
    for number in range(4):
        assert level is not None
        blocks |= {
            f"down_blocks.{number}.down.conv.0": level.down[:2],
            f"down_blocks.{number}.conv1.conv.0": level.down[3],
            f"down_blocks.{number}.conv2.conv.0": level.refine_down,
            f"up_blocks.{3 - number}.skip_conv.0": level.skip,
            f"up_blocks.{3 - number}.up.0": level.up,
            f"up_blocks.{3 - number}.conv1.conv.0": level.join,
            f"up_blocks.{3 - number}.conv2.conv.0": level.refine_up,
        }
        level = level.below
    assert level is None
    return {name: block for name, block in blocks.items() if isinstance(block, nn.Sequential)}


def unet_value(shape: list[int], kind: str, seed: int) -> Tensor:
    """A published U-Net's parameter as its golden file says."""
    z = np.random.RandomState(seed).standard_normal(shape)
    if kind == "bias":
        return torch.from_numpy(0.1 * z)
    return torch.from_numpy(1.4 * z * np.sqrt(1 / (z.size / z.shape[0])) if z.ndim > 1 else z)


def fill_unet(network: ThreasureNet) -> int:
    """Set a U-Net's parameters as its golden file says; the number of published biases that it does without."""
    assert isinstance(network.encoder, UNet)
    prefix = "spatio_spectral_encoder.spectral_encoding.model."
    values = {name.removeprefix(prefix): unet_value(*described) for name, *described in GOLDEN_UNET["state"]}
    inert = 0
    with torch.no_grad():
        for name, block in unet_blocks(network.encoder).items():
            parent, _, index = name.rpartition(".")
            norm = f"{parent}.{int(index) + 1}"
            bias = values.pop(f"{name}.bias")
            inert += bias.numel()
            sources = {"0.weight": values.pop(f"{name}.weight"), "1.running_mean": -bias}
            sources |= {f"1.{part}": values.pop(f"{norm}.{part}") for part in ("weight", "bias")}
            for ours, value in sources.items():
                tensor = block.state_dict()[ours]
                assert tensor.shape == value.shape
                tensor.copy_(value)
        others = [p for name, p in network.named_parameters() if not name.startswith("encoder.")]
        for parameter, value in zip(others, values.values(), strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)
    return inert


def golden_inputs(angles: bool, size: int = 20) -> Inputs:
    """The golden files' images of size x size pixels, standardised, days, LiDAR days and padding."""
    x = np.random.RandomState(7).randint(0, 4000, (2, 4, 10, size, size))
    x[0, 1, 3, 5, 6] = -10000
    x[0, 2, :, 0, 0] = 16000
    mean, scale = (np.array(GOLDEN[name])[:, None, None] for name in ("band_mean", "band_scale"))
    images = np.where(x == -10000, 0, (x.clip(0, 15000) - mean) / scale)
    if angles:
        drawn = np.random.RandomState(9).uniform(-1, 1, (2, 4, 6)).round(4)
        images = np.concatenate([images, np.broadcast_to(drawn[..., None, None], (2, 4, 6, size, size))], 2)
    images[1, 3] = 0
    days = torch.tensor([[12, 105, 190, 300], [40, 150, 260, 0]])
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 3] = True
    return torch.from_numpy(images).float(), days, torch.tensor([27, 210]), padding


def random_inputs(rows: int, columns: int, bands: int = 5) -> Inputs:
    """Two samples, of three and two dates, in float64."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, bands, rows, columns, generator=generator, dtype=torch.float64)
    padding = torch.tensor([[False, False, False], [False, True, False]])
    return images, torch.tensor([[10, 100, 300], [50, 0, 200]]), torch.tensor([30, 250]), padding


def small_network(resolution: float = 5, **changes: Any) -> ThreasureNet:
    """A network of a few thousand weights, in float64."""
    network = ThreasureNet(resolution, 5, **SMALL | changes)
    network.initialise(torch.Generator().manual_seed(1))
    return network.eval().double()


def gradients(network: ThreasureNet | PlainThreasureNet, inputs: Inputs, cut: int, cut_after: int = 0) -> list[Tensor]:
    """Gradients of the parameters for a loss that weighs every output pixel differently."""
    network.zero_grad()
    outputs = network(*inputs, cut)
    n = cut_after * network.factor
    height, vegetation = (part[..., n : part.shape[2] - n, n : part.shape[3] - n] for part in outputs)
    weights = torch.randn(height.shape, generator=torch.Generator().manual_seed(5)).to(height)
    (height * weights + vegetation * weights.flip(3)).sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def assert_alike(ours: list[Tensor], reference: list[Tensor], tolerance: float = 1e-9) -> None:
    """Each tensor the same, up to a share of its largest entry."""
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def assert_golden(outputs: Sequence[Tensor], case: dict[str, Any]) -> None:
    """Height and logit as the golden file says, up to 1e-4 of their standard deviation."""
    for values, name in zip(outputs, ("height", "logit"), strict=True):
        assert list(values.shape) == case["output_shape"]
        spread = case[f"{name}_std"]
        assert float(values.mean()) == pytest.approx(case[f"{name}_mean"], abs=1e-4 * spread)
        assert float(values.std(correction=0)) == pytest.approx(spread, rel=1e-4)
        for pixel in case["samples"]:
            value = float(values[pixel["sample"], 0, pixel["row"], pixel["col"]])
            assert value == pytest.approx(pixel[name], abs=1e-4 * spread)


@pytest.mark.parametrize("case", GOLDEN["models"], ids=lambda case: f"{case['resolution']} m, angles {case['angles']}")
def test_golden_outputs_counts_and_margins(case: dict[str, Any]) -> None:
    network = ThreasureNet(case["resolution"], 16 if case["angles"] else 10, **settings(case)).eval()
    fill(network, case)
    assert sum(p.numel() for p in network.parameters()) == case["parameters"]
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]
    assert network.margin == MARGINS[case["resolution"]]
    with torch.no_grad():
        assert_golden(network(*golden_inputs(case["angles"])), case)


def test_golden_outputs_and_count_of_the_unet() -> None:
    case = GOLDEN_UNET
    network = ThreasureNet(case["resolution"], 16, encoder=case["encoder"], upsampling=case["upsampling"]).eval()
    inert = fill_unet(network)
    unused_query = 64
    assert sum(p.numel() for p in network.parameters()) == case["parameters"] - inert - unused_query
    with torch.no_grad():
        assert_golden(network(*golden_inputs(case["angles"], size=32)), case)


@pytest.mark.parametrize(("resolution", "doublings"), [(10, 0), (5, 1), (2.5, 2)])
def test_agrees_with_the_network_written_plainly(resolution: float, doublings: int) -> None:
    ours = ThreasureNet(resolution, 5, num_rdb=2, num_dense_layers=3).eval().double()
    ours.initialise(torch.Generator().manual_seed(1))
    plain = PlainThreasureNet(5, blocks=2, layers=3, doublings=doublings).eval().double()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        a.data.copy_(b.data)
    inputs = random_inputs(14, 16)
    with torch.no_grad():
        assert_alike(list(ours(*inputs, 3)), list(plain(*inputs, 3)))
    assert_alike(gradients(ours, inputs, 3), gradients(plain, inputs, 3))


@pytest.mark.parametrize(
    ("resolution", "changes"),
    [
        (10, {}),
        (5, {}),
        (2.5, {}),
        (5, {"upsampling": "interpolation"}),
        (2.5, {"upsampling": "interpolation"}),
        (5, {"encoder": "unet"}),
        (10, {"encoder": "unet"}),
    ],
    ids=str,
)
def test_a_cut_leaves_out_pixels_and_changes_nothing_else(resolution: float, changes: dict[str, Any]) -> None:
    network = small_network(resolution, **changes)
    inputs = random_inputs(23, 26)
    factor = network.factor
    with torch.no_grad():
        full = network(*inputs)
        assert full.height.shape == (2, 1, 23 * factor, 26 * factor)
        for cut in (1, 2, 3, 5, 6, 7, 10):  # the receptive field is 5 to 7 pixels
            n = cut * factor
            assert_alike(list(network(*inputs, cut)), [part[..., n:-n, n:-n] for part in full])
    for cut in (2, 8):
        assert_alike(gradients(network, inputs, cut), gradients(network, inputs, 0, cut))


@pytest.mark.parametrize(
    ("resolution", "upsampling"), [(10, "shuffle"), (5, "shuffle"), (2.5, "shuffle"), (2.5, "interpolation")]
)
def test_no_output_pixel_depends_on_pixels_beyond_the_margin(resolution: float, upsampling: str) -> None:
    network = small_network(resolution, upsampling=upsampling)
    assert network.margin == 8
    inputs = random_inputs(23, 23)
    changed = inputs[0].clone().requires_grad_()
    height = network(changed, *inputs[1:]).height
    row = 11 * network.factor
    height[0, 0, row, row].backward()
    assert changed.grad is not None
    seen = changed.grad[0].abs().sum((0, 1, 2)).nonzero()
    receptive_field = 11 - int(seen.min())
    convolutions = 3 + 2 + (resolution != 10)
    assert receptive_field in (convolutions, convolutions + 1) and receptive_field <= network.margin


@pytest.mark.parametrize(
    ("blocks", "layers", "resolution", "margin"),
    [(1, 4, 10, 8), (1, 5, 10, 8), (1, 6, 10, 16), (1, 5, 5, 16), (2, 5, 2.5, 16)],
)
def test_the_margin_follows_from_the_receptive_field(blocks: int, layers: int, resolution: float, margin: int) -> None:
    assert ThreasureNet(resolution, 5, num_rdb=blocks, num_dense_layers=layers).margin == margin


def test_padding_is_not_computed_and_changes_nothing() -> None:
    network = small_network()
    images, days, lidar_day, padding = random_inputs(12, 12)
    seen = []
    network.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.no_grad():
        both = network(images, days, lidar_day, padding)
        spoilt = torch.where(padding[..., None, None, None], torch.nan, images)
        assert_alike(list(network(spoilt, days, lidar_day, padding)), list(both))
        alone = network(images[1:, [0, 2]], days[1:, [0, 2]], lidar_day[1:], padding[1:, [0, 2]])
    assert seen == [5, 5, 2]
    assert_alike(list(alone), [part[1:] for part in both])


def test_dropout_depends_only_on_the_samples_generator() -> None:
    network = small_network().train()
    inputs = random_inputs(10, 10)

    def heights(samples: list[int], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            return network(*[part[samples] for part in inputs], generators=generators).height

    both = heights([0, 1], [4, 9])
    torch.testing.assert_close(heights([1, 0], [9, 4]), both.flip(0))
    torch.testing.assert_close(heights([1], [9]), both[1:])
    assert not torch.allclose(heights([0], [5]), both[:1])
    with torch.no_grad():
        network.attention.train(mode=False)
        assert not torch.allclose(network(*inputs).height, both)


def test_dropout_keeps_the_mean() -> None:
    attention = small_network().attention.train()
    weights = torch.full((100, 50, 4, 1), 0.25)
    dropped = attention.dropout(weights, torch.Generator().manual_seed(0))
    assert float(dropped.mean()) == pytest.approx(0.25, rel=0.01)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("encoder", ["rdn", "unet"])
def test_initial_weights_depend_only_on_the_generator(encoder: str) -> None:
    first, second, other = (small_network(encoder=encoder) for _ in range(3))
    torch.randn(3)
    second.float().initialise(torch.Generator().manual_seed(1))
    other.float().initialise(torch.Generator().manual_seed(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value.to(second.state_dict()[name]), second.state_dict()[name])
    weights = [name for name in first.state_dict() if name.endswith("fusion.weight") or name.endswith("keys.weight")]
    assert not any(torch.equal(first.state_dict()[name], other.state_dict()[name]) for name in weights)


def test_initial_weights_have_the_published_spread() -> None:
    network = ThreasureNet(2.5, 16).requires_grad_(False)
    network.initialise(torch.Generator().manual_seed(0))
    for name, parameter in network.encoder.named_parameters():
        expected = np.sqrt(2 / parameter[0].numel()) if name.endswith("weight") else 0
        assert float(parameter.std()) == pytest.approx(expected, rel=0.06)
    assert float(network.attention.keys.weight.std()) == pytest.approx(np.sqrt(2 / 16), rel=0.05)
    assert network.upsampling is not None
    for conv in network.upsampling.convs[:-1]:
        assert isinstance(conv, nn.Conv2d)
        noise = conv.weight.unflatten(0, (64, 4)).std(1).square().mean().sqrt()
        assert float(noise) == pytest.approx(1e-3, rel=0.05)
        assert float(conv.weight.square().mean().sqrt()) == pytest.approx(0.059, rel=0.02)
        assert conv.bias is not None
        assert float(conv.bias.unflatten(0, (64, 4)).std(1).mean()) > 0.01, "biases are not repeated"
        bound = 1 / np.sqrt(64 * 9)
        assert float(conv.bias.abs().max()) <= bound
        assert float(conv.bias.std()) == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_the_unet_takes_any_size_over_16() -> None:
    network = ThreasureNet(5, 5, encoder="unet", upsampling="interpolation").eval().double()
    network.initialise(torch.Generator().manual_seed(0))
    assert network.margin == 32
    with torch.no_grad():
        assert network(*random_inputs(17, 40)).height.shape == (2, 1, 34, 80)
        with pytest.raises(InputError, match="16 x 40 pixels are too small for the U-Net: over 16"):
            network(*random_inputs(16, 40))


@pytest.mark.parametrize("encoder", ["rdn", "unet"])
def test_bfloat16_stays_close(encoder: str) -> None:
    network = small_network(encoder=encoder).float()
    images, *others = random_inputs(20, 20)
    inputs = (images.float(), *others)
    with torch.no_grad():
        exact = network(*inputs, 4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(*inputs, 4)
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < float((a - b).abs().mean()) < 0.004


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 3}, "resolution=3 is unknown: one of 10, 5, 2.5 is expected"),
        ({"encoder": "vit"}, "encoder=vit is unknown: one of rdn, unet is expected"),
        ({"upsampling": "cubic"}, "upsampling=cubic is unknown: one of shuffle, interpolation"),
        ({"channels": 30}, "channels=30 does not fit: a multiple of the 4 attention heads"),
        ({"num_rdb": 0}, "num_rdb=0 is too small"),
        ({"growth_channels": 0}, "growth_channels=0 is too small"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_network(**{"resolution": 5} | changes)


def test_windows_that_do_not_fit_are_refused() -> None:
    network = small_network()
    images, days, lidar_day, padding = random_inputs(12, 14)
    with pytest.raises(InputError, match="cut=6 leaves nothing of 12 x 14 pixels: over 12"):
        network(images, days, lidar_day, padding, 6)
    padding[1] = True
    with pytest.raises(InputError, match="sample 1 of the batch has no image"):
        network(images, days, lidar_day, padding)
