"""What the rows of a table tell about one another: the mean of their plot over its years, and who shares a plot or year.

Only predictors and names go in, never a target. The mean is over all rows of a plot in the table at hand, which in
`split_by_plot` and `split_by_observatory` are on one side of a split; `split_by_year` knows the predictors of all years.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

GROUPS = ("plot", "region", "year")
UNKNOWN = -1  # position of a name that a run does not know, or of none

Names = Mapping[str, NDArray[np.str_]]
"""For each of `GROUPS` that a table has, the names (sample,); an empty text where a row has none."""


class Context(NamedTuple):
    """The surroundings of samples in their table.

    Attributes:
        x: (sample, band, step) mean of the series over the rows of the sample's plot, scaled as the series are.
        covariates: (sample, channel) the same of the covariates.
        groups: for each of plot, region and year that the table has, the position (sample,) of the row's name.
    """

    x: NDArray[np.float32]
    covariates: NDArray[np.float32]
    groups: Mapping[str, NDArray[np.int64]]


def names_of_groups(keys: pd.DataFrame) -> Names:
    """Names of plot, region and year from columns of keys, as far as there are any; years as whole numbers."""
    found = {}
    for role in GROUPS:
        if role in keys:
            names = keys[role]
            if role == "year" and (years := pd.to_numeric(names, errors="coerce")).notna().any():
                names = years.round().astype("Int64")
            found[role] = names.astype("string").fillna("").to_numpy(dtype=np.str_)
    return found


def context_of(
    x: NDArray[np.float32], covariates: NDArray[np.float32], names: Names, known: Mapping[str, Sequence[str]]
) -> Context:
    """The surroundings of samples.

    Args:
        x: (sample, band, step).
        covariates: (sample, channel).
        names: of the samples; a row without the name of a plot is a plot of its own.
        known: for each group, the names that positions count in.
    """
    plots = names.get("plot", np.full(len(x), "", dtype=np.str_))
    groups = {}
    for role, every in known.items():
        positions = {name: position for position, name in enumerate(every)}
        own = names.get(role, np.full(len(x), "", dtype=np.str_))
        groups[role] = np.array([positions.get(str(name), UNKNOWN) for name in own], dtype=np.int64)
    return Context(mean_over_plots(x, plots), mean_over_plots(covariates, plots), groups)


def mean_over_plots(values: NDArray[Any], plots: NDArray[np.str_]) -> NDArray[np.float32]:
    """(sample, ...) to the mean over the samples of the same plot; a sample without a plot's name is its own mean."""
    plot, counts = _numbered(plots)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, plot, values)
    return (sums / counts.reshape(-1, *[1] * (values.ndim - 1)))[plot].astype(np.float32)


def rows_of_plots(plots: NDArray[np.str_]) -> NDArray[np.int64]:
    """(sample,) the number of rows of each sample's plot; 1 for one without a name."""
    plot, counts = _numbered(plots)
    return counts[plot]


def _numbered(plots: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The plot of each sample as a number, and the number of samples of each plot."""
    _, named = np.unique(plots, return_inverse=True)
    alone = len(plots) + np.arange(len(plots))
    _, plot, counts = np.unique(np.where(plots == "", alone, named), return_inverse=True, return_counts=True)
    return plot, counts
