"""Trained models as one graph, from the units of a table or an image to those of the target, in operations that ONNX has.

Only what `torch.export` traces through is here: every size but that of the batch, of dates and of the window is fixed, no
branch depends on a value, and all numbers that a fold or a run was standardised with are constants of the graph.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classical import GaussianProcess, Ridge
from models.threasure_net import HEADS, LEAK, QUERY_DAY, DenseBlock, ThreasureNet, UNet, convolutions, positional_encoding


class Heights(NamedTuple):
    """Outputs for canopy: height in metres and probability of tall vegetation, (sample, row, column) each."""

    height: Tensor
    vegetation: Tensor


class Predictions(NamedTuple):
    """Outputs for a table: mean and standard deviation over all folds and members, (sample,) each."""

    prediction: Tensor
    spread: Tensor


class NetworkMember(nn.Module):
    """A network and the scale of the target that it learnt."""

    def __init__(self, network: nn.Module, offset: float, factor: float) -> None:
        super().__init__()
        self.network, self.offset, self.factor = network, offset, factor

    def forward(self, x: Tensor, covariates: Sequence[Tensor]) -> Tensor:
        """Standardised (sample, band, step) and (sample, channel) each to (sample,) float64."""
        constant = [channels[:, :, None].expand(-1, -1, x.shape[2]) for channels in covariates]
        return self.network(torch.cat([x, *constant], 1)).double().flatten() * self.factor + self.offset


def flat(x: Tensor, covariates: Sequence[Tensor]) -> Tensor:
    """As `models.classical.flat`."""
    return torch.cat([x.transpose(1, 2).flatten(1), *covariates], 1).double()


class RidgeMember(nn.Module):
    """A ridge: a product with its coefficients."""

    coefficients: Tensor

    def __init__(self, estimator: Ridge) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.from_numpy(estimator.tensors()["coefficients"]))
        self.intercept = float(estimator.tensors()["intercept"][0])

    def forward(self, x: Tensor, covariates: Sequence[Tensor]) -> Tensor:
        """Standardised (sample, band, step) and (sample, channel) each to (sample,) float64."""
        return (flat(x, covariates) * self.coefficients).sum(1) + self.intercept


class GaussianProcessMember(nn.Module):
    """The mean of a Gaussian process: kernel values to its training samples times their dual weights."""

    points: Tensor
    weights: Tensor

    def __init__(self, estimator: GaussianProcess) -> None:
        super().__init__()
        tensors = {name: torch.from_numpy(values) for name, values in estimator.tensors().items()}
        variance, length, _ = tensors["log_hyperparameters"].exp().tolist()  # the noise is no part of the mean
        self.length = length
        self.register_buffer("points", tensors["training_predictors"])
        self.mean, scale = tensors["target_mean_and_scale"].tolist()
        self.register_buffer("weights", variance * scale * tensors["dual_weights"].flatten())

    def forward(self, x: Tensor, covariates: Sequence[Tensor]) -> Tensor:
        """Standardised (sample, band, step) and (sample, channel) each to (sample,) float64."""
        predictors = flat(x, covariates) / self.length
        points = self.points / self.length
        squares = (predictors**2).sum(1)[:, None] + (points**2).sum(1) - 2 * predictors @ points.t()
        return torch.exp(-0.5 * squares) @ self.weights + self.mean


class Fold(nn.Module):
    """Models of a fold and what standardises their input.

    Args:
        members: from standardised inputs to the target.
        record: of the fold's weights: scalers and covariates.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, members: Sequence[nn.Module], record: Mapping[str, Any]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        shape = (len(record["steps"]), len(record["bands"]))  # bands fastest within a step
        for name in ("mean", "sd"):
            values = torch.tensor(record[f"predictor_{name}"], dtype=torch.float64)
            self.register_buffer(name, values.view(shape).t().contiguous())
        self.covariates = record["covariates"]

    def forward(self, series: Tensor, covariates: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of `SeriesGraph` to a prediction (sample,) a member."""
        x = ((series.double() - self.mean) / self.sd).float()
        channels = [self.channels_of(values, of) for values, of in zip(covariates, self.covariates, strict=True)]
        return [member(x, channels) for member in self.members]

    @staticmethod
    def channels_of(values: Tensor, record: Mapping[str, Any]) -> Tensor:
        """Channels (sample, channel) of a covariate (sample,): a number standardised, or a 1 for its category."""
        if "categories" not in record:
            return ((values.double() - record["mean"]) / record["sd"]).float()[:, None]
        trained = [name in record["categories_in_training"] for name in record["categories"]]
        return ((values[:, None] == torch.arange(len(trained))) & torch.tensor(trained)).float()


class SeriesGraph(nn.Module):
    """All folds and members of a run of main, from the units of its table to that of its target."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(folds)

    def forward(self, series: Tensor, *covariates: Tensor) -> Predictions:
        """Prediction and spread.

        Args:
            series: (sample, band, step) float32, in the table's units.
            covariates: (sample,) each, in the run's order: float32 numbers in the table's units, or int64 positions in the
                sorted list of categories; any other number is a category that training did not know.
        """
        predictions = torch.stack([one for fold in self.folds for one in fold(series, covariates)])
        return Predictions(predictions.mean(0).float(), predictions.std(0, correction=0).float())


class CanopyGraph(nn.Module):
    """THREASURE-Net from reflectance to height and vegetation.

    Dates that are padding are computed and then left out by the attention. Dense layers are written as published, by
    concatenation: the running sums of `models.threasure_net` make a larger graph, which takes twice as long to export and is
    no faster in onnxruntime.

    Args:
        network: with its weights.
        standardise: images and angles to the network's input.
        metres: the network's heights to metres.
    """

    def __init__(
        self,
        network: ThreasureNet,
        standardise: Callable[[Tensor, Tensor | None], Tensor],
        metres: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.network, self.standardise, self.metres = network, standardise, metres

    def forward(
        self, images: Tensor, days: Tensor, query_day: Tensor, padding: Tensor, angles: Tensor | None = None
    ) -> Heights:
        """Height and vegetation at the network's resolution.

        Args:
            images: (sample, date, band, row, column) int16, reflectance x 10 000, nodata where missing.
            days: (sample, date) int64, day of the year from 0.
            query_day: (sample,) int64, day of the year from 0 that is predicted for.
            padding: (sample, date) bool, true where there is no image.
            angles: (sample, date, 6) float32, cosines and sines of sun and view angles, if the network uses them.
        """
        x = self.standardise(images, angles)
        x = self.attend(self.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]), days, query_day, padding)
        if self.network.upsampling is not None:
            x = self.network.upsampling(x, 0)
        height, logit = self.network.head(x)
        empty = padding.all(1)[:, None, None]
        return Heights(*(x[:, 0].masked_fill(empty, math.nan) for x in (self.metres(height), logit.sigmoid())))

    def encode(self, x: Tensor) -> Tensor:
        """(image, band, row, column) to (image, channel, row, column)."""
        encoder = self.network.encoder
        if isinstance(encoder, UNet):
            return encoder(x, 0)
        for conv in convolutions(encoder.conv_in):
            x = conv2d(conv, x)
        shallow, outputs = x, []
        for block in encoder.blocks:
            assert isinstance(block, DenseBlock)
            features = x
            for conv in convolutions(block.layers):
                features = torch.cat([features, F.leaky_relu(conv2d(conv, features), LEAK)], 1)
            x = block.fusion(features) + x
            outputs.append(x)
        return conv2d(encoder.conv_out, encoder.fusion(torch.cat(outputs, 1))) + shallow

    def attend(self, x: Tensor, days: Tensor, query_day: Tensor, padding: Tensor) -> Tensor:
        """(sample, date, channel, row, column) to (sample, channel, row, column); as `TemporalAttention`, but batched."""
        attention = self.network.attention
        x = x + positional_encoding(days, x.shape[2], x.dtype)[..., None, None]
        query = positional_encoding(query_day - QUERY_DAY, attention.depth, x.dtype) / math.sqrt(attention.depth)
        folded = query @ attention.keys.weight.unflatten(0, (HEADS, attention.depth)).transpose(0, 1).flatten(1)
        logits = folded.unflatten(1, (1, HEADS, -1)) @ x.flatten(3)  # (sample, date, head, pixel)
        weights = logits.masked_fill(padding[:, :, None, None], -math.inf).softmax(1)
        values = x.flatten(3).unflatten(2, (HEADS, attention.depth))
        return (values * weights.unsqueeze(3)).sum(1).flatten(1, 2).unflatten(2, x.shape[3:])


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """3x3 convolution with zeros around."""
    return F.conv2d(x, conv.weight, conv.bias, padding=1)
