"""From the clear observations of places to the rows of a table that main reads, with the reasons of those left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datasets.place_series.bands import predictor_names
from datasets.place_series.regular import Rules, days_from, regular_series
from datasets.series_table import PREDICTOR, predictors_among, read_table
from utils.errors import InputError

YEAR, CLEAR_DATES, WIDEST_GAP = "year", "clear_dates", "widest_gap"
OUTSIDE, PARTLY = "outside of the products", "not wholly in one tile"
NO_CLEAR, NO_VALUE, GAP = "no clear date", "band or index without a value", "gap wider than max_gap"
ENDINGS = (".csv", ".tsv", ".parquet")


class Observed(NamedTuple):
    """Clear observations of places on common dates: those of one tile, or of a long table.

    Attributes:
        places: (place,) numbers of the places.
        dates: (date,) datetime64[D], ascending, each once.
        values: (date, channel, place) float32, nan where not clear.
        columns: further columns of the table, a value a place.
    """

    places: NDArray[np.int64]
    dates: NDArray[np.datetime64]
    values: NDArray[np.float32]
    columns: dict[str, NDArray[Any]]


class Records(NamedTuple):
    """What the table is to have a row for.

    Attributes:
        columns: carried through, a row a record, without the year.
        name_column: of `columns`, the place's name.
        places: (record,) numbers of the places.
        years: (record,).
    """

    columns: pd.DataFrame
    name_column: str
    places: NDArray[np.int64]
    years: NDArray[np.int64]


class Rows(NamedTuple):
    """The table, and how many records were left out, by reason."""

    table: pd.DataFrame
    left_out: dict[str, int]


def each_year(columns: pd.DataFrame, name_column: str, own_years: NDArray[np.int64] | None, years: Sequence[int]) -> Records:
    """A record for each place and year, or for each row of its own year.

    Args:
        columns: of the places, a row each, without the year.
        name_column: the place's name.
        own_years: (place,) of the rows; None: each place has a record in each year.
        years: that are wanted; rows of others are left out.
    """
    if own_years is None:
        places = np.tile(np.arange(len(columns)), len(years))
        of_records = np.repeat(np.array(years, dtype=np.int64), len(columns))
    else:
        places = np.flatnonzero(np.isin(own_years, years))
        of_records = own_years[places]
    return Records(columns.iloc[places].reset_index(drop=True), name_column, places, of_records)


def make_rows(records: Records, observed: Sequence[Observed], channels: Sequence[str], rules: Rules) -> Rows:
    """The rows that have a series without too wide a gap.

    Args:
        records: that a row is wanted for.
        observed: what there is of their places; a place is in one of them at most.
        channels: names of bands and indices.
        rules: of the series.
    """
    predictors = predictor_names(channels, rules.steps)
    parts, reasons = [], []
    for one in observed:
        of_place = pd.Series(np.arange(len(one.places)), index=one.places)
        for year in np.unique(records.years):
            chosen = np.flatnonzero((records.years == year) & np.isin(records.places, one.places))
            if not len(chosen):
                continue
            here = of_place[records.places[chosen]].to_numpy()
            regular = regular_series(days_from(one.dates, int(year)), one.values[:, :, here], rules, int(year))
            complete = regular.complete(rules.max_gap)
            lacking = np.where(np.isnan(regular.series).any((0, 1)), NO_VALUE, GAP)
            reasons += np.where(regular.clear_dates == 0, NO_CLEAR, lacking)[~complete].tolist()
            series = regular.series.transpose(2, 0, 1).reshape(len(chosen), -1)
            own = pd.DataFrame({name: values[here] for name, values in one.columns.items()}, index=chosen)
            own = own.assign(**{CLEAR_DATES: regular.clear_dates, WIDEST_GAP: regular.widest_gap})
            parts.append(pd.concat([own, pd.DataFrame(series, columns=predictors, index=chosen)], axis=1)[complete])
    table = records.columns.assign(**{YEAR: records.years})
    table = table[[records.name_column, YEAR, *(name for name in records.columns if name != records.name_column)]]
    made = pd.concat(parts) if parts else pd.DataFrame(columns=predictors)
    return Rows(table.join(made, how="inner").reset_index(drop=True), dict(Counter(reasons)))


def new_names(columns: pd.DataFrame, channels: Sequence[str], steps: int, own: Sequence[str], source: str) -> dict[str, str]:
    """New names for columns that main would take for bands and steps, by the old ones.

    Args:
        columns: of the places.
        channels: names of bands and indices.
        steps: of the series.
        own: names of the columns that the table gets beside the series.
        source: of the columns, for messages.

    Raises:
        InputError: a column has the name of one that the table gets.
    """
    ours = {name.casefold() for name in (*own, *predictor_names(channels, steps))}
    twice = next((name for name in columns if str(name).casefold() in ours), None)
    if twice is not None:
        raise InputError(f"{source} has a column {twice!r}, which the table of series gets itself; another name is expected")
    matches = {name: match for name in columns if (match := PREDICTOR.fullmatch(str(name)))}
    stems = Counter(match[1] for match in matches.values())
    return {
        name: f"{match[1]}-{match[2]}"
        for name, match in matches.items()
        if match[1] in channels or 1 <= int(match[2]) <= steps or stems[match[1]] > 1
    }


def check_table(path: Path, channels: Sequence[str], steps: int, rows: int) -> str:
    """Read a table as main does and see that it finds the series in it; its sha256.

    Raises:
        InputError: it does not, which is an error of this project or of the disk.
    """
    table = read_table(path)
    found = predictors_among(table.rows, ())
    expected = {(name, step) for name in channels for step in range(1, steps + 1)}
    if set(found) != expected or len(table.rows) != rows:
        raise InputError(
            f"{path} was written, but is read with {len(table.rows)} rows and {len(found)} predictors instead of {rows} and "
            f"{len(expected)}"
        )
    return table.sha256


def write_rows(path: Path, table: pd.DataFrame) -> None:
    """Write the table in the form of its ending; numbers in single precision are read back as they are."""
    match path.suffix.lower():
        case ".parquet":
            table.to_parquet(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case _:
            table.to_csv(path, index=False)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """The reasons and their numbers."""
    return ", ".join(f"{reason}: {count}" for reason, count in left_out.items() if count) or "none"
