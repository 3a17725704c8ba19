"""A long table, a row for each place and date, as Google Earth Engine or the R package sits export series.

    system:index,           plot, date,       B2,  B3,  ..., SCL
    20230612T1046_..._000a, p1,   2023-06-12, 312, 540, ..., 4

Earth Engine leaves a cell empty where a pixel is masked. Where there is no column of dates, the image's name in
`system:index` begins with one; `system:time_start` counts milliseconds. sits calls the date `Index` and has longitude and
latitude in place of a name.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datasets.place_series.bands import Channels, choose_channels, is_band
from datasets.place_series.places import NAMES, name_column
from datasets.place_series.regular import Rules, days_from
from datasets.place_series.rows import Observed, Records
from datasets.series_table import Table, is_numeric, listed, names_of, read_table
from utils.errors import InputError

DATES = ("date", "index", "datetime", "time", "timestamp", "day", "system:time_start", "system:index")
CLOUDS = ("cloud", "clouds", "cloudy", "cloud_mask", "is_cloud", "SCL", "QA60", "MSK_CLDPRB")
INDICES = ("ndvi", "evi", "evi2", "savi", "ndwi", "mndwi", "ndmi", "gndvi", "nbr", "ndre", "lai", "fapar", "fcover")
LOCATION = (("longitude", "latitude"), ("lon", "lat"), ("x", "y"))
NOT_CARRIED = {".geo", "system:index", "geometry"}
SCL_CLEAR = (4, 5, 6, 7)  # vegetation, soil, water, unclassified; not dark (2), snow (11), clouds, shadows
QA60_CLOUDS = (1 << 10) | (1 << 11)  # opaque clouds, cirrus
IMAGE_DATE = re.compile(r"(?:^|_)((?:19|20)\d{2})(\d{2})(\d{2})T\d{6}")


class Roles(NamedTuple):
    """Columns of a long table: the place's name, the date, the clouds (None: as far as values are there, they are clear)."""

    plot: str
    date: str
    cloud: str | None


class Long(NamedTuple):
    """A long table as read.

    Attributes:
        records: that series are wanted for, a place in a year.
        observed: clear values.
        channels: bands and indices.
        lacking: (index,) values that an index lacks although its bands have theirs.
        said: what should be said of how it was read.
        table: name and sha256.
    """

    records: Records
    observed: Observed
    channels: Channels
    lacking: NDArray[np.int64]
    said: list[str]
    table: Table


def read_long(
    path: Path,
    rules: Rules,
    years: list[int],
    *,
    bands: str,
    indices: str,
    plot_column: str,
    date_column: str,
    cloud_column: str,
    max_cloud: float,
) -> Long:
    """Read a long table.

    Columns that do not change within a place and year are carried to the table of series. Rows of the same place and date
    are averaged, those alone that are clear.

    Args:
        path: .csv, .tsv, .xlsx or .parquet.
        rules: of the series, for the dates that they use.
        years: that are wanted; all that have a date in the season if empty.
        bands: columns; `all` for those with the name of a band of Sentinel-2 or of a common index.
        indices: formulas.
        plot_column: names the place; auto guesses, from longitude and latitude if need be.
        date_column: auto guesses.
        cloud_column: none, a column, or auto, which guesses; of `SCL` and `QA60` the classes and bits of clouds and shadows
            are cloudy, of any other what is larger than `max_cloud`.
        max_cloud: see there.

    Raises:
        InputError: a column is absent or holds something else, or nothing is clear.
    """
    table = read_table(path)
    if table.rows.empty:
        raise InputError(f"{path} has no rows below its column names")
    frame, said = table.rows.reset_index(drop=True), list[str]()
    roles, frame = _roles(table._replace(rows=frame), plot_column, date_column, cloud_column)
    dates = _dates(frame, roles.date, path.name)
    available = _available(frame, roles, bands)
    channels = choose_channels(bands, indices, available, 1.0, path.name)
    said.append(
        f"Columns: place {roles.plot}, date {roles.date}, clouds {roles.cloud or 'none'}, bands {listed(channels.sources)}"
    )
    names = names_of(table._replace(rows=frame), roles.plot).astype(str)
    values = frame[list(channels.sources)].apply(_numbers, source=path.name)
    if roles.cloud:
        cloudy = _cloudy(frame[roles.cloud], roles.cloud, max_cloud, path.name)
        values = values.mask(cloudy)
        said.append(f"Cloudy rows: {int(cloudy.sum())} of {len(frame)}, by column {roles.cloud}")
    means = values.groupby([dates.to_numpy(), names.to_numpy()]).mean()
    if len(means) < len(values):
        said.append(f"Rows of the same place and date, which are averaged: {len(values) - len(means)}")
    cube, own_dates, own_names = _cube(means)
    computed, lacking = channels.compute(cube)
    records, ignored = _records(frame, names, dates, roles, channels, rules, years)
    if ignored:
        said.append(f"Ignored columns: {listed(ignored)}; bands=... names bands among them")
    places = pd.Series(np.arange(len(own_names)), index=own_names)[records.columns["__place__"]].to_numpy()
    columns = records.columns.drop(columns="__place__")
    observed = Observed(np.arange(len(own_names)), own_dates, computed, {})
    return Long(records._replace(columns=columns, places=places), observed, channels, lacking, said, table)


def _roles(table: Table, plot_column: str, date_column: str, cloud_column: str) -> tuple[Roles, pd.DataFrame]:
    """The columns by their roles, and the rows, with a column of places where longitude and latitude name them."""
    rows, lowered = table.rows, {name.lower(): name for name in reversed(table.rows.columns)}
    for flag, name in (("plot_column", plot_column), ("date_column", date_column), ("cloud_column", cloud_column)):
        if name not in ("auto", "none") and name not in rows.columns:
            raise InputError(f"{table.name} has no column {name!r}, named in {flag}; its columns are {listed(rows.columns)}")
    if date_column in ("auto", "none"):
        date_column = next((lowered[name] for name in DATES if name in lowered), "")
        if not date_column:
            raise InputError(
                f"{table.name} has no column of dates, such as date; date_column=... names it; its columns are "
                f"{listed(rows.columns)}"
            )
    if cloud_column == "auto":
        cloud_column = next((lowered[name.lower()] for name in CLOUDS if name.lower() in lowered), "none")
    if plot_column in ("auto", "none"):
        found = next((lowered[name] for name in NAMES if name in lowered and lowered[name] != date_column), None)
        pair = next((pair for pair in LOCATION if all(name in lowered for name in pair)), None)
        if found is None and pair is None:
            raise InputError(
                f"{table.name} has no column that names the places; plot_column=... names it; its columns are "
                f"{listed(rows.columns)}"
            )
        if found is None and pair is not None:
            first, second = (rows[lowered[name]] for name in pair)
            rows = rows.assign(place=first.map("{:.6f}".format) + " " + second.map("{:.6f}".format))
            found = "place"
        plot_column = str(found)
    plot_column, rows = name_column(rows, plot_column, table.name)
    return Roles(plot_column, date_column, None if cloud_column == "none" else cloud_column), rows


def _dates(frame: pd.DataFrame, column: str, source: str) -> "pd.Series[pd.Timestamp]":
    """Days of a column of dates, of milliseconds, or of names of images that begin with a date."""
    texts = frame[column]
    if is_numeric(texts) and pd.to_numeric(texts, errors="coerce").gt(1e11).any():
        dates = pd.to_datetime(pd.to_numeric(texts, errors="coerce"), unit="ms", errors="coerce")
    elif is_numeric(texts):
        whole = pd.to_numeric(texts, errors="coerce").map("{:.0f}".format)
        dates = pd.to_datetime(whole, format="%Y%m%d", errors="coerce")
    elif column.lower() == "system:index":
        dates = pd.to_datetime(
            texts.astype(str).str.extract(IMAGE_DATE).fillna("").agg("".join, axis=1), format="%Y%m%d", errors="coerce"
        )
    else:
        dates = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    wrong = np.flatnonzero(dates.isna())
    if len(wrong):
        raise InputError(
            f"{source}, row {wrong[0] + 2}, column {column!r}: '{texts.iloc[wrong[0]]}' is no date such as 2023-06-12; "
            f"date_column=... names another column"
        )
    return dates.dt.normalize()


def _available(frame: pd.DataFrame, roles: Roles, bands: str) -> list[str]:
    """Columns that may be bands; for all of them, those that have the name of one."""
    taken = {roles.plot, roles.date, roles.cloud, *NOT_CARRIED}
    numbers = [name for name in frame.columns if name not in taken and (is_numeric(frame[name]) or frame[name].isna().all())]
    if bands != "all":
        return numbers
    known = [name for name in numbers if is_band(name) or name.lower() in INDICES]
    if not known:
        raise InputError(
            f"no column has the name of a band of Sentinel-2, such as B4 or red; bands=... names the bands among "
            f"{listed(numbers) or 'the columns, of which none has numbers'}"
        )
    return known


def _numbers(column: "pd.Series[float]", source: str) -> "pd.Series[float]":
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    wrong = np.flatnonzero((numbers.isna() & column.notna()) | np.isinf(numbers))
    if len(wrong):
        raise InputError(
            f"{source}, row {wrong[0] + 2}, column {column.name!r}: '{column.iloc[wrong[0]]}' is not a finite number"
        )
    return numbers


def _cloudy(column: "pd.Series[float]", name: str, max_cloud: float, source: str) -> "pd.Series[bool]":
    """Which rows are cloudy; those without a value are, where others have one."""
    lowered = column.map(lambda value: value.strip().lower() if isinstance(value, str) else value)
    words = {"true": 1, "false": 0, "yes": 1, "no": 0, "cloud": 1, "cloudy": 1, "clear": 0}
    numbers = _numbers(lowered.map(lambda value: words.get(value, value)).rename(name), source)
    kind = name.upper()
    if kind in ("SCL", "QA60"):
        wrong = np.flatnonzero(numbers.notna() & (numbers % 1 != 0))
        if len(wrong):
            raise InputError(
                f"{source}, row {wrong[0] + 2}, column {name!r}: {numbers.iloc[wrong[0]]:g} is no code but a mean of "
                f"several; mask clouds before averaging, and cloud_column=none"
            )
        if kind == "SCL":
            return ~numbers.isin(SCL_CLEAR)
        return numbers.isna() | (numbers.fillna(0).astype(np.int64) & QA60_CLOUDS != 0)
    return ~(numbers <= max_cloud)


def _cube(means: pd.DataFrame) -> tuple[NDArray[np.float32], NDArray[np.datetime64], "pd.Index[str]"]:
    """(date, band, place) of rows by date and place, with the dates and places."""
    date, place = (means.index.get_level_values(level) for level in (0, 1))
    dates, names = date.unique().sort_values(), place.unique()
    cube = np.full((len(dates), means.shape[1], len(names)), np.nan, dtype=np.float32)
    cube[dates.get_indexer(date), :, names.get_indexer(place)] = means.to_numpy()
    return cube, dates.to_numpy().astype("datetime64[D]"), names


def _records(
    frame: pd.DataFrame,
    names: "pd.Series[str]",
    dates: "pd.Series[pd.Timestamp]",
    roles: Roles,
    channels: Channels,
    rules: Rules,
    years: list[int],
) -> tuple[Records, list[str]]:
    """A record for each place and year that has a date in the season, and the columns that are ignored.

    The place's name is repeated in the column `__place__`.
    """
    taken = {roles.date, roles.cloud, *channels.sources, *NOT_CARRIED}
    others = [name for name in frame.columns if name not in taken and name.lower() != "year"]
    days, parts = dates.to_numpy().astype("datetime64[D]"), []
    for year in years or sorted({*dates.dt.year, *(dates.dt.year + 1)}):
        first, last = rules.season(year)
        day = days_from(days, year)
        chosen = (day >= first) & (day <= last)
        parts.append(frame.loc[chosen, others].assign(__place__=names[chosen], __year__=year))
    every = pd.concat(parts)
    if every.empty:
        wanted = " ".join(map(str, years)) or "any year"
        raise InputError(f"no date lies in the season of {wanted}; dates are from {days.min()} to {days.max()}")
    groups = every.groupby(["__place__", "__year__"], sort=False)
    constant = [name for name in others if groups[name].nunique().max() <= 1]
    first_rows = groups[constant].first().reset_index()
    columns = first_rows[[*constant, "__place__"]]
    ignored = [name for name in others if name not in constant]
    return Records(columns, roles.plot, np.empty(0, np.int64), first_rows["__year__"].to_numpy(np.int64)), ignored
