"""THREASURE-Net: canopy height at 10, 5 or 2.5 m from a year of Sentinel-2 images.

Kalinicheva et al., "Super-Resolved Canopy Height Mapping from Sentinel-2 Time Series Using LiDAR HD Reference Data
across Metropolitan France", Remote Sensing of Environment 2026, arXiv 2512.11524. An encoder is applied to the image of
each date, attention over the dates merges the feature maps into one, sub-pixel convolutions upsample it, and a per-pixel
MLP predicts height and vegetation. The encoder is the residual dense network of Zhang et al., "Residual dense network for
image super-resolution", CVPR 2018, or a U-Net.

What makes it fast, measured by `benchmarks.canopy_speed` against the same network written plainly:

- Only what the output needs is computed. If the margin of a window is cut off, each layer computes only what the layers
  after it need; padded dates are not computed.
- Dense blocks do not concatenate. Each feature map is convolved once with the weights of all later layers, up to 120
  channels instead of 24, which CPUs do more efficiently, and the later layers accumulate the results. A concatenation per
  layer would have to be kept for the backward pass.
- Tensors are channels-last.
- All pixels share one query, so no keys are computed: the key projection is folded into the query.

Apart: a training step (96 x 96 pixels, 2 dates, one core, float32) takes 1.61 s written plainly, 0.64 s with a margin of 32
pixels cut off, and 0.56 s here, of which channels-last saves 2 to 6 % and the shared query nothing measurable; blocks that
concatenate take 4 % longer (23 % with bfloat16; 13 and 37 % without a cut), and on whole windows a step's peak memory is
95 % of that written plainly instead of 37 %.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.canopy import FACTORS
from utils.errors import InputError

ENCODERS = ("rdn", "unet")
UPSAMPLINGS = ("shuffle", "interpolation")
HEADS = 4
QUERY_DAY = 183
"""Day of the year from which the encoding of the query counts."""
ATTENTION_DROPOUT = 0.1
LEAK = 0.2  # negative slope of LeakyReLU
ICNR_NOISE = 1e-3
"""Standard deviation of the noise by which the initial weights of a channel's sub-pixels differ."""
INFERENCE_PIXELS = 2**17
"""Input pixels encoded at once when no gradients are needed."""
UNET_MARGIN = 32
UNET_REACH = 112
"""Input pixels that an output pixel of the U-Net depends on to each side: 105, upsampling included 107, rounded up."""


class Prediction(NamedTuple):
    """Output of the network, (sample, 1, row, column) each."""

    height: Tensor
    """Standardised height."""
    vegetation: Tensor
    """Logit of tall vegetation."""


class _Crop(torch.autograd.Function):
    """Crop by slicing, with a backward pass that keeps gradients channels-last, unlike that of a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inset: int) -> Tensor:
        ctx.inset = inset
        return x[..., inset:-inset, inset:-inset]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return F.pad(gradients[0], [ctx.inset] * 4), None


def crop(x: Tensor, inset: int) -> Tensor:
    """Crop `inset` pixels from each side of (image, channel, row, column)."""
    return _Crop.apply(x, inset) if inset else x


def crop_like(x: Tensor, smaller: Tensor) -> Tensor:
    """Crop the centre of (image, channel, row, column) to the size of `smaller`."""
    return crop(x, (x.shape[-1] - smaller.shape[-1]) // 2)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, valid: bool) -> Tensor:
    """3x3 convolution: without padding (`valid`), one pixel smaller at each side, or with zeros around."""
    return F.conv2d(x, weight, bias, padding=0 if valid else 1)


def convolutions(layers: nn.ModuleList) -> list[nn.Conv2d]:
    """The convolutions of a list, with their type."""
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def fuse(conv: nn.Conv2d, parts: Sequence[Tensor]) -> Tensor:
    """1x1 convolution of parts (image, channel, row, column) as if joined along the channels, which would copy them."""
    first, *others = zip(parts, conv.weight.split([part.shape[1] for part in parts], 1), strict=True)
    total = F.conv2d(*first, conv.bias)
    for part, weight in others:
        total += F.conv2d(part, weight)
    return total


def initialise_uniform(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, generator: torch.Generator) -> None:
    """PyTorch's default initialisation, uniform within 1/sqrt(fan in), drawn from a generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def initialise_sub_pixels(conv: nn.Conv2d, generator: torch.Generator) -> None:
    """Initialise a convolution before a pixel shuffle by 2: the four sub-pixels of a channel start equal up to noise (ICNR).

    Aitken et al., "Checkerboard artifact free sub-pixel convolution", 2017. There is one Kaiming-normal kernel per channel;
    biases have PyTorch's default initialisation and differ within a channel, as in the published code.
    """
    initialise_uniform(conv, generator)
    kernels = conv.weight.new_empty(conv.out_channels // 4, *conv.weight.shape[1:])
    nn.init.kaiming_normal_(kernels, nonlinearity="relu", generator=generator)
    noise = torch.empty_like(conv.weight.data).normal_(std=ICNR_NOISE, generator=generator)
    conv.weight.data.copy_(kernels.repeat_interleave(4, 0) + noise)


class DenseBlock(nn.Module):
    """Residual dense block: 3x3 convolutions, each of all feature maps before it, a 1x1 fusion, and the input added."""

    def __init__(self, channels: int, growth: int, num_layers: int) -> None:
        super().__init__()
        self.sizes = [channels] + [growth] * num_layers
        self.layers = nn.ModuleList(nn.Conv2d(channels + growth * k, growth, 3) for k in range(num_layers))
        self.fusion = nn.Conv2d(channels + growth * num_layers, channels, 1)

    def weights_by_feature(self) -> list[Tensor]:
        """For each feature map but the last, the weights that all later layers apply to it, joined."""
        by_layer = [layer.weight.split(self.sizes[: k + 1], 1) for k, layer in enumerate(convolutions(self.layers))]
        return [torch.cat([weights[k] for weights in by_layer[k:]]) for k in range(len(by_layer))]

    def forward(self, x: Tensor, valid: Sequence[bool]) -> Tensor:
        """(image, channel, row, column), cropped by a pixel at each side for each layer that is `valid` (not padded)."""
        features = [x]
        later: Tensor | None = None  # what the later layers have accumulated so far
        bias: Tensor | None = torch.cat([layer.bias for layer in convolutions(self.layers) if layer.bias is not None])
        for weight, is_valid in zip(self.weights_by_feature(), valid, strict=True):
            total = conv3x3(features[-1], weight, bias, is_valid)
            bias = None
            if later is not None:
                total += crop_like(later, total)
            growth, rest = self.sizes[-1], total.shape[1] - self.sizes[-1]
            if rest:
                total, later = total.split([growth, rest], 1)
                if later.is_cpu and later.dtype == torch.bfloat16:
                    # Adding to a slice of 24 channels, less than a vector of bfloat16, is slower than copying it first.
                    later = later.contiguous(memory_format=torch.channels_last)
            # A copy, since the activation is kept for the backward pass, and a slice would keep all of `total` with it.
            features.append(F.leaky_relu_(total.clone(memory_format=torch.channels_last), LEAK))
        parts = [crop_like(feature, features[-1]) for feature in features]
        return fuse(self.fusion, parts).add_(parts[0])


class ResidualDenseNetwork(nn.Module):
    """Encoder of single images: dense blocks and the fusion of their outputs, plus the shallow features."""

    def __init__(self, channels_in: int, channels: int, growth: int, num_blocks: int, num_layers: int) -> None:
        super().__init__()
        self.conv_in = nn.ModuleList([nn.Conv2d(channels_in, channels, 3), nn.Conv2d(channels, channels, 3)])
        self.blocks = nn.ModuleList(DenseBlock(channels, growth, num_layers) for _ in range(num_blocks))
        self.fusion = nn.Conv2d(num_blocks * channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, channels, 3)
        self.num_layers = num_layers
        self.receptive_field = 3 + num_blocks * num_layers
        """Radius of the receptive field in pixels: one for each 3x3 convolution."""

    def initialise(self, generator: torch.Generator) -> None:
        """Kaiming-normal weights, biases 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, inset: int) -> Tensor:
        """(image, band, row, column) to (image, channel, row, column), cropped by `inset` pixels at each side."""
        x = crop(x, max(inset - self.receptive_field, 0))
        # The last layers are not padded, so that every layer computes only what those after it need.
        unpadded = min(inset, self.receptive_field)
        valid = [False] * (self.receptive_field - unpadded) + [True] * unpadded
        for conv, is_valid in zip(convolutions(self.conv_in), valid[:2], strict=True):
            x = conv3x3(x, conv.weight, conv.bias, is_valid)
        shallow, outputs = x, []
        for index, block in enumerate(self.blocks):
            first = 2 + index * self.num_layers
            x = block(x, valid[first : first + self.num_layers])
            outputs.append(x)
        x = fuse(self.fusion, [crop_like(output, x) for output in outputs])
        x = conv3x3(x, self.conv_out.weight, self.conv_out.bias, valid[-1])
        return x.add_(crop_like(shallow, x))


def reflecting_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution with reflected borders, batch norm, ReLU."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode="reflect", bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class UNetLevel(nn.Module):
    """A level of the U-Net: a strided convolution down, the level below, a transposed one up, and a skip convolution."""

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        top, below = encoder[:2]
        down = nn.Conv2d(top, top, 2, 2, bias=False)
        self.down = nn.Sequential(down, nn.BatchNorm2d(top), nn.ReLU(inplace=True), reflecting_conv(top, below))
        self.refine_down = reflecting_conv(below, below)
        self.below = UNetLevel(encoder[1:], decoder[1:]) if len(encoder) > 2 else None
        up = nn.ConvTranspose2d(decoder[1], decoder[0], 2, 2, bias=False)
        self.up = nn.Sequential(up, nn.BatchNorm2d(decoder[0]), nn.ReLU(inplace=True))
        self.skip = nn.Sequential(nn.Conv2d(top, top, 1, bias=False), nn.BatchNorm2d(top), nn.ReLU(inplace=True))
        self.join = reflecting_conv(decoder[0] + top, decoder[0])
        self.refine_up = reflecting_conv(decoder[0], decoder[0])

    def forward(self, x: Tensor) -> Tensor:
        """(image, encoder channel, row, column) to (image, decoder channel, row, column)."""
        y = self.down(x)
        y = y + self.refine_down(y)
        if self.below is not None:
            y = self.below(y)
        y = self.join(torch.cat([self.up(y), self.skip(x)], 1))
        return y + self.refine_up(y)


class UNet(nn.Module):
    """U-Net encoder of single images, from the paper's ablation: four levels, batch norm, reflected borders.

    Batch statistics are those of all images of a batch except padding. The published convolutions have biases, which the
    batch norm after each of them cancels; these have none.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        encoder = (channels // 2, channels, channels, 2 * channels, 2 * channels)
        decoder = (channels, channels, channels, 2 * channels, 2 * channels)
        self.stem = nn.Sequential(reflecting_conv(channels_in, encoder[0]), reflecting_conv(encoder[0], encoder[0]))
        self.levels = UNetLevel(encoder, decoder)
        self.conv_out = reflecting_conv(decoder[0], channels)
        self.grid = 2 ** (len(encoder) - 1)

    def initialise(self, generator: torch.Generator) -> None:
        """PyTorch's default initialisation."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                initialise_uniform(layer, generator)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()

    def forward(self, x: Tensor, inset: int) -> Tensor:
        """(image, band, row, column) to (image, channel, row, column), cropped by `inset` pixels at each side.

        Images are padded to a multiple of 16 by reflection at the lower and right edge.

        Raises:
            InputError: the images are too small to be halved four times and reflected.
        """
        rows, columns = x.shape[2:]
        if min(rows, columns) <= self.grid:
            raise InputError(
                f"images of {rows} x {columns} pixels are too small for the U-Net: over {self.grid} are expected"
            )
        x = F.pad(x, (0, -columns % self.grid, 0, -rows % self.grid), mode="reflect")
        return crop(self.conv_out(self.levels(self.stem(x)))[..., :rows, :columns], inset)


def positional_encoding(days: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal encoding of days (Vaswani et al. 2017) with base 365: (...) to (..., size), sines at even indices."""
    index = torch.arange(size, device=days.device)
    angle = days.unsqueeze(-1).to(dtype) / 365 ** (2 * (index // 2) / size)
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())


class TemporalAttention(nn.Module):
    """Attention over the dates of each pixel; the query of all heads and pixels is the positional encoding of the LiDAR day.

    Garnot and Landrieu, "Lightweight temporal self-attention for classifying satellite images time series", 2020, without
    the learned query. The values are the features themselves, divided among the heads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.keys = nn.Linear(channels, channels, bias=False)
        self.depth = channels // HEADS

    def initialise(self, generator: torch.Generator) -> None:
        """Normal, standard deviation sqrt(2 / channels of a head)."""
        nn.init.normal_(self.keys.weight, std=math.sqrt(2 / self.depth), generator=generator)

    def forward(self, x: Tensor, days: Tensor, lidar_day: Tensor, generator: torch.Generator | None) -> Tensor:
        """Of one sample: (date, channel, row, column), days (date,) and the LiDAR day () to (channel, row, column)."""
        dtype = self.keys.weight.dtype
        x = (x + positional_encoding(days, x.shape[1], dtype)[:, :, None, None]).permute(0, 2, 3, 1)
        query = positional_encoding(lidar_day - QUERY_DAY, self.depth, dtype) / math.sqrt(self.depth)
        # query . (keys x) = (query keys) . x: one vector per head instead of a key for each pixel and date.
        folded = query @ self.keys.weight.unflatten(0, (HEADS, self.depth))
        weights = self.dropout((x @ folded.t()).softmax(0), generator)
        return (x.unflatten(3, (HEADS, self.depth)) * weights.unsqueeze(4)).sum(0).flatten(2).permute(2, 0, 1)

    def dropout(self, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout in training, drawn from the sample's own generator if given, otherwise from PyTorch's."""
        if not self.training or generator is None:
            return F.dropout(weights, ATTENTION_DROPOUT, self.training)
        kept = torch.empty(weights.shape, dtype=torch.bool, device=generator.device)
        kept.bernoulli_(1 - ATTENTION_DROPOUT, generator=generator)
        return weights * kept.to(weights.device) / (1 - ATTENTION_DROPOUT)


class Upsampling(nn.Module):
    """Doublings of the resolution, with a 3x3 convolution before each of them and one at the end.

    With `shuffle`, these are sub-pixel convolutions (Shi et al., CVPR 2016) without activation, and a ReLU at the end;
    otherwise convolution, LeakyReLU and nearest-neighbour interpolation, and a LeakyReLU at the end.
    """

    def __init__(self, channels: int, doublings: int, shuffle: bool) -> None:
        super().__init__()
        self.shuffle = shuffle
        widened = 4 * channels if shuffle else channels
        self.convs = nn.ModuleList(nn.Conv2d(channels, widened, 3) for _ in range(doublings))
        self.convs.append(nn.Conv2d(channels, channels, 3))
        self.receptive_field = 2 ** len(self.convs) - 1
        """Radius of the receptive field in output pixels, beyond the input pixel that contains the output pixel."""

    def initialise(self, generator: torch.Generator) -> None:
        """ICNR before a shuffle, otherwise PyTorch's default initialisation."""
        *before_doubling, last = convolutions(self.convs)
        for conv in before_doubling:
            (initialise_sub_pixels if self.shuffle else initialise_uniform)(conv, generator)
        initialise_uniform(last, generator)

    def insets(self, inset: int) -> list[int]:
        """Pixels cropped at each side before each convolution and, last, after all of them, to end at `inset`."""
        insets = [max(inset - 1, 0), inset]
        for _ in self.convs[:-1]:
            insets.insert(0, max(insets[0] // 2 - 1, 0))
        return insets

    def forward(self, x: Tensor, inset: int) -> Tensor:
        """(sample, channel, row, column), already cropped by `insets(inset)[0]`, to the pixels of the output."""
        *doubled, last = convolutions(self.convs)
        for conv, following in zip(doubled, self.insets(inset)[1:-1], strict=True):
            x = conv3x3(x, conv.weight, conv.bias, following // 2 > 0)
            x = F.pixel_shuffle(x, 2) if self.shuffle else F.interpolate(F.leaky_relu_(x, LEAK), scale_factor=2)
            x = crop(x, following % 2)
        x = conv3x3(x, last.weight, last.bias, inset > 0)
        return x.relu_() if self.shuffle else F.leaky_relu_(x, LEAK)


class Head(nn.Module):
    """Per-pixel MLP with a linear layer for the height and, on detached features, one for the vegetation logit."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.height = nn.Linear(widths[-1], 1)
        self.vegetation = nn.Linear(widths[-1], 1)

    def initialise(self, generator: torch.Generator) -> None:
        """PyTorch's default initialisation."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                initialise_uniform(layer, generator)

    def forward(self, x: Tensor) -> Prediction:
        """(sample, channel, row, column), in float32 even under autocast: bfloat16 would round heights by centimetres."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.permute(0, 2, 3, 1).to(self.height.weight.dtype)
            for layer in self.trunk:
                x = layer(x).relu_()
            return Prediction(self.height(x).permute(0, 3, 1, 2), self.vegetation(x.detach()).permute(0, 3, 1, 2))


class ThreasureNet(nn.Module):
    """The network; call `initialise` or load a state before use.

    Args:
        resolution: pixel size of the output in metres: 10, 5 or 2.5.
        channels_in: bands and angle channels of an image.
        encoder: "rdn" (residual dense network) or "unet".
        num_rdb: residual dense blocks (4 at 10 m, otherwise 5 in the paper); rdn only.
        num_dense_layers: layers of a dense block (the same numbers in the paper); rdn only.
        growth_channels: channels of a dense layer; rdn only.
        channels: channels of the features; levels of the U-Net have half to twice as many.
        upsampling: "shuffle" or "interpolation".

    Attributes:
        factor: output pixels along an input pixel.
        margin: input pixels to cut off at each side so that no output pixel depends on padding: the radius of the receptive
            field, rounded up to a multiple of 8. The U-Net's of some 100 pixels is more than windows can spare; its
            margin of 32 keeps the published windows and is a multiple of 16, as its four halvings need.

    Raises:
        InputError: a setting is invalid.
    """

    def __init__(
        self,
        resolution: float,
        channels_in: int,
        *,
        encoder: str = "rdn",
        num_rdb: int = 5,
        num_dense_layers: int = 5,
        growth_channels: int = 24,
        channels: int = 64,
        upsampling: str = "shuffle",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("resolution", resolution, tuple(FACTORS)),
            ("encoder", encoder, ENCODERS),
            ("upsampling", upsampling, UPSAMPLINGS),
        ):
            if value not in known:
                raise InputError(f"{name}={value} is unknown: one of {', '.join(map(str, known))} is expected")
        for name, count in (
            ("channels_in", channels_in),
            ("num_rdb", num_rdb),
            ("num_dense_layers", num_dense_layers),
            ("growth_channels", growth_channels),
        ):
            if count < 1:
                raise InputError(f"{name}={count} is too small: at least 1 is expected")
        if channels < 1 or channels % HEADS:
            raise InputError(f"channels={channels} does not fit: a multiple of the {HEADS} attention heads is expected")
        self.factor = FACTORS[resolution]
        self.encoder: ResidualDenseNetwork | UNet
        if encoder == "rdn":
            self.encoder = ResidualDenseNetwork(channels_in, channels, growth_channels, num_rdb, num_dense_layers)
            widths = [channels, channels, 2 * channels, channels]
        else:
            self.encoder = UNet(channels_in, channels)
            widths = [channels, channels, 2 * channels, 2 * channels, channels]
        self.attention = TemporalAttention(channels)
        self.upsampling: Upsampling | None = None
        if self.factor > 1:
            self.upsampling = Upsampling(channels, self.factor // 2, upsampling == "shuffle")
        self.head = Head(widths)

    @property
    def margin(self) -> int:
        """Input pixels to cut off at each side."""
        if isinstance(self.encoder, UNet):
            return UNET_MARGIN
        receptive_field = self.encoder.receptive_field * self.factor
        if self.upsampling:
            receptive_field += self.upsampling.receptive_field
        return 8 * math.ceil(receptive_field / (8 * self.factor))

    @property
    def reach(self) -> int:
        """Input pixels to cut at each side so that an output pixel is the same in whatever window it is computed."""
        return UNET_REACH if isinstance(self.encoder, UNet) else self.margin

    @property
    def alignment(self) -> int:
        """What the first row and column of a window must be multiples of for that."""
        return self.encoder.grid if isinstance(self.encoder, UNet) else 1

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the initial weights from a generator on the device of the weights."""
        for part in (self.encoder, self.attention, self.upsampling, self.head):
            if part is not None:
                part.initialise(generator)

    def forward(
        self,
        images: Tensor,
        days: Tensor,
        lidar_day: Tensor,
        padding: Tensor,
        cut: int = 0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Prediction:
        """Predict height and vegetation of a window on the LiDAR day.

        Args:
            images: (sample, date, band, row, column), standardised.
            days: (sample, date), day of the year from 0.
            lidar_day: (sample,), day of the year from 0.
            padding: (sample, date), True where there is no image; nothing is computed there. Best on the CPU, where its
                values are needed.
            cut: input pixels to cut off at each side; the rest of the output is the same as without cutting.
            generators: one per sample, for the dropout of attention weights in training, so that a sample's dropout does
                not depend on the rest of the batch; PyTorch's default generator if None.

        Raises:
            InputError: the cut leaves nothing, or a sample has no image.
        """
        samples, _, _, rows, columns = images.shape
        if min(rows, columns) <= 2 * cut:
            raise InputError(f"cut={cut} leaves nothing of {rows} x {columns} pixels: over {2 * cut} are expected")
        real = ~padding.cpu()  # its values decide what is computed
        counts = real.sum(1).tolist()
        if 0 in counts:
            raise InputError(f"sample {counts.index(0)} of the batch has no image: at least one date must not be padding")
        inset = self.upsampling.insets(cut * self.factor)[0] if self.upsampling else cut
        index = real.flatten().nonzero().squeeze(1).to(images.device, non_blocking=True)
        packed = images.flatten(0, 1)[index].contiguous(memory_format=torch.channels_last)
        features, dates = self.encode(packed, inset).split(counts), days.flatten()[index].split(counts)
        draws: Sequence[torch.Generator | None] = generators or [None] * samples
        maps = [self.attention(*sample) for sample in zip(features, dates, lidar_day, draws, strict=True)]
        x = torch.stack(maps).contiguous(memory_format=torch.channels_last)
        if self.upsampling:
            x = self.upsampling(x, cut * self.factor)
        return self.head(x)

    def encode(self, images: Tensor, inset: int) -> Tensor:
        """(image, band, row, column) to features; in inference, a few images at a time to save memory."""
        if torch.is_grad_enabled() or self.training:
            return self.encoder(images, inset)
        at_once = max(1, INFERENCE_PIXELS // (images.shape[2] * images.shape[3]))
        return torch.cat([self.encoder(some, inset) for some in images.split(at_once)])


def make_network(flags: Mapping[str, Any], channels_in: int) -> ThreasureNet:
    """The network that a run's flags describe, not initialised."""
    names = ("encoder", "num_rdb", "num_dense_layers", "growth_channels", "channels", "upsampling")
    return ThreasureNet(flags["resolution"], channels_in, **{name: flags[name] for name in names})
