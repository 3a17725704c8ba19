"""The data of a finished run of main, read from its folder alone, and new rows read and scaled as its own were.

trained = read_trained(folder)                  what it was trained on, from samples.safetensors and predictions.csv
rows = rows_like(table, trained, nodata=[])     new rows with the run's bands, steps and covariates
inputs = scale_like(record, rows.x, rows.covariates, rows.names)    as the models of a fold take them
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from datasets.model_inputs import Inputs
from datasets.plot_context import Names, context_of, names_of_groups
from datasets.series_table import (
    PREDICTOR,
    Columns,
    Samples,
    Table,
    is_numeric,
    listed,
    names_of,
    numbers_of_column,
)
from utils.errors import InputError
from utils.runs import read_tensors, write_tensors

SAMPLES = "samples.safetensors"

Covariates = Mapping[str, NDArray[Any]]
"""A covariate's name to its values (sample,): numbers, or text of a category."""


class Trained(NamedTuple):
    """What a finished run was trained and tested on; rows are those of its predictions.csv, in that order.

    Attributes:
        folder: of the run.
        flags: of the run, by name.
        table: what its table is called.
        columns: what was read from where.
        x: (sample, band, step) float32, in the table's units.
        covariates: of the samples.
        categories: of each covariate of text.
        names: of plot, region and year, as far as its table has them.
        plots: (sample,) names; numbers where each row is a plot.
        folds: (sample,) the fold that tested it.
        observed, predicted: (sample,) the target, and what the models of that fold said.
    """

    folder: Path
    flags: dict[str, Any]
    table: str
    columns: Columns
    x: NDArray[np.float32]
    covariates: Covariates
    categories: dict[str, list[str]]
    names: Names
    plots: NDArray[np.str_]
    folds: NDArray[np.int64]
    observed: NDArray[np.float64]
    predicted: NDArray[np.float64]


class NewRows(NamedTuple):
    """Rows to apply a run to.

    Attributes:
        keys: columns key, and plot, year and region where the table has them.
        x: (sample, band, step) float64, as in the table.
        covariates: of the rows.
        names: of plot, region and year, as far as the table has them.
        observed: (sample,) the target, nan where there is none; None where the table has no such column.
        dropped: rows left out for a missing predictor or covariate.
    """

    keys: pd.DataFrame
    x: NDArray[np.float64]
    covariates: Covariates
    names: Names
    observed: NDArray[np.float64] | None
    dropped: int


def write_samples(path: Path, samples: Samples, order: NDArray[np.int64]) -> None:
    """Keep predictors and covariates of a run's samples, rows in the given order, for what is applied later."""
    tensors = {"x": torch.from_numpy(samples.x[order].astype(np.float32))}
    categories: dict[str, list[str]] = {}
    for name, values in samples.covariates.items():
        if values.dtype == np.float64:
            tensors[f"covariate.{name}"] = torch.from_numpy(values.to_numpy()[order])
        else:
            text = values.astype(str).to_numpy()
            categories[str(name)] = sorted(set(text))
            tensors[f"covariate.{name}"] = torch.from_numpy(np.searchsorted(categories[str(name)], text)[order])
    record = {"order": "rows of predictions.csv", "columns": samples.columns._asdict(), "categories": categories}
    write_tensors(path, tensors, record)


def read_trained(folder: Path) -> Trained:
    """The data of a finished run of main.

    Raises:
        InputError: a file of the run is absent or damaged, or its parts do not belong together.
    """
    if not (folder / SAMPLES).is_file():
        raise InputError(f"{folder} has no {SAMPLES}, for an earlier version of this project made it; train it again")
    tensors, record = read_tensors(folder / SAMPLES)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        flags, table = metrics["flags"], metrics["table"]["name"]
        predictions = pd.read_csv(folder / "predictions.csv", dtype={"plot": str, "key": str}, keep_default_na=False)
        folds, observed, predicted = (predictions[name].to_numpy(copy=True) for name in ("fold", "observed", "predicted"))
        plots = predictions["plot"].to_numpy(dtype=np.str_)
        named = {**record["columns"], "predictors": map(tuple, record["columns"]["predictors"])}
        columns = Columns(*(_as_written(named[name]) for name in Columns._fields))
        x = tensors["x"].numpy()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is no whole run of main: its files cannot be read ({error!r})") from error
    if len(x) != len(predictions) or x.shape[1:] != (len(columns.bands), len(columns.steps)):
        raise InputError(
            f"{folder}: {SAMPLES} has {len(x)} samples and predictions.csv {len(predictions)} rows; they are not of one run"
        )
    covariates = {}
    for name in columns.covariates:
        values = tensors[f"covariate.{name}"].numpy()
        covariates[name] = np.array(record["categories"][name])[values] if name in record["categories"] else values
    categories = record["categories"]
    names = names_of_groups(predictions if columns.plot else predictions.drop(columns="plot"))
    return Trained(folder, flags, table, columns, x, covariates, categories, names, plots, folds, observed, predicted)


def _as_written(value: Any) -> Any:
    """A name, or the tuple that JSON made a list."""
    return value if isinstance(value, str | None) else tuple(value)


def rows_like(table: Table, trained: Trained, nodata: Sequence[float]) -> NewRows:
    """Rows of a table with the run's predictors and covariates; plot, year, region, key and target may be absent.

    Columns are those of the run by their names; of the predictors band and step count, so that `B02_01` is `B02_1`.

    Raises:
        InputError: a predictor or covariate is absent or not what it was in training, a category is unknown, or no row is
            complete.
    """
    rows, own = table.rows.reset_index(drop=True), trained.columns
    table = table._replace(rows=rows)
    roles = {role: getattr(own, role) for role in ("plot", "year", "region", "key")}
    roles = {role: name if name in rows.columns else None for role, name in roles.items()}
    places = {}
    for column in rows.columns:
        if (match := PREDICTOR.fullmatch(column)) and is_numeric(rows[column]):
            places[match[1], int(match[2])] = column
    wanted = [(band, step) for step in own.steps for band in own.bands]
    absent = [f"{band}_{step}" for band, step in wanted if (band, step) not in places]
    if absent:
        raise InputError(
            f"{table.name} has no numbers in {listed(absent)}, which the run was trained on; its bands are "
            f"{', '.join(own.bands)}, its steps {own.steps[0]} to {own.steps[-1]}"
        )
    predictors = tuple(tuple(places[band, step] for band in own.bands) for step in own.steps)
    columns = own._replace(**roles, predictors=predictors)
    numbers = {name: numbers_of_column(table, columns, name, nodata) for name in sum(predictors, ())}
    further = {name: _covariate(table, columns, trained, name, nodata) for name in own.covariates}
    chosen = pd.DataFrame({**numbers, **further}).notna().all(axis=1)
    if not chosen.any():
        raise InputError(f"{table.name} has no row with all of the predictors that the run was trained on")
    keys: dict[str, pd.Series[Any]] = {"key": pd.Series(np.arange(2, len(rows) + 2))}
    keys |= {role: names_of(table, name).astype(str) for role, name in roles.items() if name}
    grid = np.stack([[numbers[name][chosen] for name in step] for step in predictors])  # (step, band, sample)
    observed = None
    if own.target in rows.columns and is_numeric(rows[own.target]):
        observed = numbers_of_column(table, columns, own.target, nodata)[chosen].to_numpy()
    frame = pd.DataFrame(keys)[chosen].reset_index(drop=True)
    return NewRows(
        frame,
        np.ascontiguousarray(grid.transpose(2, 1, 0)),
        {name: values[chosen].to_numpy() for name, values in further.items()},
        names_of_groups(frame),
        observed,
        int((~chosen).sum()),
    )


def _covariate(table: Table, columns: Columns, trained: Trained, name: str, nodata: Sequence[float]) -> "pd.Series[Any]":
    if name not in table.rows.columns:
        raise InputError(f"{table.name} has no column {name!r}, a covariate that the run was trained on")
    if name not in trained.categories:
        return numbers_of_column(table, columns, name, nodata)
    values = names_of(table, name)
    values = values.where(values.isna(), values.astype(str))
    check_categories(trained, name, values.dropna().unique(), table.name)
    return values


def check_categories(trained: Trained, name: str, values: Sequence[str], where: str) -> None:
    """Refuse categories that the run does not know.

    Raises:
        InputError: there is one.
    """
    known = trained.categories[name]
    unknown = [value for value in values if value not in known]
    if unknown:
        raise InputError(f"{where}, covariate {name!r}: the run does not know {unknown[0]!r}, only {', '.join(known)}")


def scale_like(record: Mapping[str, Any], x: NDArray[Any], covariates: Covariates, names: Names | None = None) -> Inputs:
    """New rows as the models of a fold take them, scaled by its training rows as in `model_inputs.standardise`.

    Args:
        record: of the fold's weights.
        x: (sample, band, step), in the units of the run's table.
        covariates: of the rows.
        names: of their plots, regions and years; None: they have no surroundings.
    """
    shape = (len(record["steps"]), len(record["bands"]))
    mean, sd = (np.reshape(record[name], shape).T for name in ("predictor_mean", "predictor_sd"))
    channels = []
    for covariate in record["covariates"]:
        values = covariates[covariate["name"]]
        if "categories" in covariate:
            known = np.isin(covariate["categories"], covariate["categories_in_training"])
            channels.append((np.asarray(values)[:, None] == np.array(covariate["categories"])) & known)
        else:
            channels.append(((values - covariate["mean"]) / covariate["sd"])[:, None])
    joined = np.concatenate(channels, axis=1) if channels else np.empty((len(x), 0))
    inputs = Inputs(((x - mean) / sd).astype(np.float32), joined.astype(np.float32), dict(record))
    if names is None:
        return inputs
    return inputs._replace(context=context_of(inputs.x, inputs.covariates, names, record.get("groups", {})))
