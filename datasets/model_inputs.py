"""Samples of a table as the models of a fold take them: standardised and coded by its training rows, with surroundings."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from datasets.plot_context import Context, context_of, names_of_groups
from datasets.series_table import Samples


class Inputs(NamedTuple):
    """All samples as inputs of the models of a fold.

    Attributes:
        x: (sample, band, step) float32, standardised.
        covariates: (sample, channel) float32, standardised numbers and a channel of 0 and 1 for each category.
        record: all that is needed to prepare other rows in the same way.
        context: their surroundings in the table; None where there is no table, in a map.
    """

    x: NDArray[np.float32]
    covariates: NDArray[np.float32]
    record: dict[str, Any]
    context: Context | None = None

    def of_rows(self, ids: NDArray[np.int64] | slice) -> Self:
        """The inputs of some samples."""
        context = self.context
        if context is not None:
            groups = {role: positions[ids] for role, positions in context.groups.items()}
            context = Context(context.x[ids], context.covariates[ids], groups)
        return self._replace(x=self.x[ids], covariates=self.covariates[ids], context=context)


def standardise(samples: Samples, train: NDArray[np.int64]) -> Inputs:
    """Inputs of the models of a fold, standardised and coded by its training rows alone.

    A category has a channel in every fold; if no training row has the category, the channel is 0 throughout.
    """
    flat = samples.x.transpose(0, 2, 1).reshape(len(samples.x), -1)
    scaler = StandardScaler().fit(flat[train])
    scaled = scaler.transform(flat).astype(np.float32).reshape(len(flat), *samples.x.shape[:0:-1]).transpose(0, 2, 1)
    channels, covariates = [], []
    for name, values in samples.covariates.items():
        if values.dtype == np.float64:
            numbers = values.to_numpy()[:, None]
            own = StandardScaler().fit(numbers[train])
            channels.append(own.transform(numbers))
            covariates.append({"name": name, "mean": float(own.mean_[0]), "sd": float(own.scale_[0])})
            continue
        text = values.astype(str).to_numpy()
        categories, trained = sorted(set(text)), sorted(set(text[train]))
        channels.append((text[:, None] == np.array(categories)) & np.isin(categories, trained))
        covariates.append({"name": name, "categories": categories, "categories_in_training": trained})
    joined = np.concatenate(channels, axis=1) if channels else np.empty((len(flat), 0))
    training = samples.x[train]
    groups = names_of_groups(samples.keys if samples.columns.plot else samples.keys.drop(columns="plot"))
    record: dict[str, Any] = {
        "bands": samples.columns.bands,
        "steps": samples.columns.steps,
        "study_var": samples.columns.target,
        "predictor_mean": scaler.mean_.tolist(),
        "predictor_sd": scaler.scale_.tolist(),
        "predictor_order": "bands fastest within a step, covariates after them",
        "value_range": {
            band: [float(training[:, index].min()), float(training[:, index].max())]
            for index, band in enumerate(samples.columns.bands)
        },
        "covariates": covariates,
        "groups": {role: sorted(set(names) - {""}) for role, names in groups.items()},
        "groups_in_training": {role: sorted(set(names[train]) - {""}) for role, names in groups.items()},
    }
    coded = joined.astype(np.float32)
    return Inputs(scaled, coded, record, context_of(scaled, coded, groups, record["groups"]))


def channels(inputs: Inputs, plot_context: bool = False) -> NDArray[np.float32]:
    """Input of a network, (sample, channel, step): the bands, then each covariate as a channel that is constant in time.

    With `plot_context`, the mean series over the years of the sample's plot follow the bands, and its region and year the
    covariates, coded as 0 and 1; of a region or year that is not in training, as all 0.
    """
    series, constant = [inputs.x], [inputs.covariates]
    if plot_context:
        assert inputs.context is not None
        if "plot" in inputs.record["groups"]:
            series.append(inputs.context.x)
        for role in context_covariates(inputs.record):
            names = inputs.record["groups"][role]
            known = np.isin(names, inputs.record["groups_in_training"][role])
            constant.append(((inputs.context.groups[role][:, None] == np.arange(len(names))) & known).astype(np.float32))
    joined = np.concatenate(constant, axis=1)
    return np.concatenate([*series, np.broadcast_to(joined[:, :, None], (*joined.shape, inputs.x.shape[2]))], axis=1)


def channel_count(record: Mapping[str, Any], plot_context: bool) -> int:
    """The number of channels that `channels` makes, from what `standardise` recorded."""
    count = len(record["bands"]) + sum(len(one.get("categories", [0])) for one in record["covariates"])
    if plot_context:
        count += len(record["bands"]) * ("plot" in record["groups"])
        count += sum(len(record["groups"][role]) for role in context_covariates(record))
    return count


def context_covariates(record: Mapping[str, Any]) -> list[str]:
    """Those of region and year that the table has."""
    return [role for role in ("region", "year") if role in record["groups"]]
