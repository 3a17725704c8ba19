"""Any table of satellite time series: one row a plot, or a plot in a year, a column for each band and time step.

Predictors are columns `<band>_<step>`, in any order and unit, such as `B02_1` to `B12_36` or `ndvi_0` to `ndvi_22`; they
must fill a grid of bands and steps. A table also has the target and a column that identifies the plot; year, region,
key and covariates are optional. The published grassland table is one such table (`datasets.published_grassland`).

    table = read_table(path)                       a file, or `demo_table()`
    samples = prepare(table, "SpecRichness")       columns found and checked, rows selected
    folds = split(samples, "split_by_plot", 42)    row ids
    inputs = standardise(samples, fold.train)      inputs of the models (`datasets.model_inputs`)
"""

import csv
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, GroupShuffleSplit

from datasets import published_grassland
from datasets.demo_table import simulate_table
from utils.errors import InputError
from utils.simulated import is_simulated

SPLIT_PROCEDURES = ("split_by_plot", "split_by_observatory", "split_by_year")
FOLDS = 5
NAMES_LISTED = 5  # at most, in a message
LARGEST = float(np.finfo(np.float32).max)  # networks compute in single precision
FAR_OFF = 5  # interquartile ranges outside the quartiles of a band, target or covariate: values further off are reported
PREDICTOR = re.compile(r"(.+)_(-?\d+)")  # band and step
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
NO_COLUMN = "none"


class Table(NamedTuple):
    """A table as read: its rows, its name in messages, the sha256 of its file, and whether it is simulated."""

    rows: pd.DataFrame
    name: str
    sha256: str
    simulated: bool


class Columns(NamedTuple):
    """The roles of a table's columns.

    Attributes:
        target: the study variable.
        plot, year, region, key: of each row; None if absent.
        bands: in order of first appearance.
        steps: in ascending order.
        predictors: (step, band), names of columns.
        covariates: further inputs of the models beside the series.
        ignored: all other columns.
    """

    target: str
    plot: str | None
    year: str | None
    region: str | None
    key: str | None
    bands: tuple[str, ...]
    steps: tuple[int, ...]
    predictors: tuple[tuple[str, ...], ...]
    covariates: tuple[str, ...]
    ignored: tuple[str, ...]


class Samples(NamedTuple):
    """The rows an experiment uses; row ids are positions in these arrays.

    Attributes:
        keys: columns key and plot, and year and region where the table has them; one row a sample.
        x: (sample, band, step) float64, as in the table.
        y: (sample,) float64, the study variable.
        covariates: a column each, float64 numbers or text.
        columns: the roles of the columns.
        dropped: number of rows left out, by reason.
        missing: number of rows without a value, by column, for columns that have any.
        repeated: number of rows that equal another row in everything used but the key.
        far_off: number of values far outside the quartiles, and the furthest of them, by band, target or covariate.
    """

    keys: pd.DataFrame
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    covariates: pd.DataFrame
    columns: Columns
    dropped: dict[str, int]
    missing: dict[str, int]
    repeated: int
    far_off: dict[str, tuple[int, float]]


class Split(NamedTuple):
    """Row ids of one fold."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def demo_table() -> Table:
    """The simulated table of `datasets.demo_table`."""
    rows = simulate_table()
    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()
    return Table(rows, "simulated table", digest, simulated=True)


def read_table(path: Path) -> Table:
    """Read an .xlsx, .csv, .tsv or .parquet table; `my.xlsx#plots` reads the sheet `plots` of a workbook.

    Raises:
        InputError: the file or sheet is missing or cannot be read.
    """
    sheet: str | int = 0
    if not path.exists() and ".xlsx#" in path.name.lower():
        name, sheet = path.name.rsplit("#", 1)
        path = path.with_name(name)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"{path} {what}; an .xlsx, .csv, .tsv or .parquet table is expected, a relative path counts from where the "
            f"command is given"
        )
    readers = {
        ".xlsx": functools.partial(_read_sheet, sheet=sheet),
        ".csv": _read_text,
        ".tsv": _read_text,
        ".parquet": pd.read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} has the ending {path.suffix!r}; .xlsx, .csv, .tsv or .parquet is expected")
    try:
        rows = reader(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in its reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a {path.suffix} table, it may be truncated or empty: {reason}"
        ) from error
    rows.columns = rows.columns.map(str).str.strip()
    name = f"{path.name}#{rows.attrs['sheet']}" if "sheet" in rows.attrs else path.name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Table(rows, name, digest, is_simulated(path) or _made_from_simulated(path, digest))


def _made_from_simulated(path: Path, digest: str) -> bool:
    """Whether the record that series-inputs leaves beside a table says that it is of simulated products."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("sha256") == digest and record.get("simulated") is True


def _read_sheet(path: Path, sheet: str | int) -> pd.DataFrame:
    # With a named engine, pandas does not ask for other packages if a file is not what its ending says.
    with pd.ExcelFile(path, engine="openpyxl") as workbook:
        if isinstance(sheet, str) and sheet not in workbook.sheet_names:
            raise InputError(f"{path} has no sheet {sheet!r}; it has {listed(map(str, workbook.sheet_names))}")
        rows = workbook.parse(sheet)
        if len(workbook.sheet_names) > 1:
            rows.attrs["sheet"] = workbook.sheet_names[0] if sheet == 0 else sheet
        return rows


def _read_text(path: Path) -> pd.DataFrame:
    """Read a delimited text file as spreadsheets of any language write it.

    The separator is whichever of comma, semicolon and tab splits the header into most names. If it is not the comma, a comma
    in a number is a decimal comma. The encoding is UTF-8, UTF-16 with a byte-order mark, or else Windows-1252.

    Raises:
        InputError: a line has too few fields; pandas would fill them with missing values.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        encoding = "cp1252"
    with path.open(encoding=encoding, newline="") as file:
        header = file.readline()
        separator = max(SEPARATORS, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))
        file.seek(0)
        lines = csv.reader(file, delimiter=separator)
        columns = len(next(lines, []))
        decimal = "."
        for fields in lines:
            if 0 < len(fields) < columns:
                raise InputError(
                    f"{path}, line {lines.line_num} has {len(fields)} of {columns} fields, separated by "
                    f"{SEPARATORS[separator]}; the file may be truncated"
                )
            if separator != "," and any(re.fullmatch(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*", field) for field in fields):
                decimal = ","
    return pd.read_csv(path, sep=separator, decimal=decimal, encoding=encoding)


def prepare(
    table: Table,
    study_var: str,
    *,
    plot_column: str = published_grassland.PLOT,
    year_column: str = published_grassland.YEAR,
    region_column: str = published_grassland.REGION,
    key_column: str = published_grassland.KEY,
    covariates: Sequence[str] = (),
    bands: Sequence[str] = (),
    steps: Sequence[int] = (),
    nodata: Sequence[float] = (),
) -> Samples:
    """Find the columns of an experiment, check them, and select its rows.

    Rows with a missing value in any column used are dropped. So are the rows that the authors of the published table left
    out, if the table has the columns of the published one. Rows are sorted by key if there is one.

    Args:
        table: as read.
        study_var: column of the target.
        plot_column: identifies the plot, whose rows stay on one side of a split; `none`: each row is a plot.
        year_column: year, a whole number; may be absent if it has the name that it has in the published table.
        region_column: observatory or region; may be absent in the same way.
        key_column: unique in each row; may be absent in the same way. The key is then the row number in a spreadsheet.
        covariates: columns of further inputs of the models.
        bands: those to use; all if empty.
        steps: those to use; all if empty.
        nodata: numbers that stand for missing values.

    Raises:
        InputError: a column is absent, repeated or unfit for its role, the predictors do not fill a grid, a value is not a
            number, a key is repeated, or no row is left.
    """
    table = table._replace(rows=table.rows.reset_index(drop=True))
    roles = {
        "plot": _role(table, "plot", plot_column, required=True),
        "year": _role(table, "year", year_column, required=year_column != published_grassland.YEAR),
        "region": _role(table, "region", region_column, required=region_column != published_grassland.REGION),
        "key": _role(table, "key", key_column, required=key_column != published_grassland.KEY),
    }
    columns = _find_columns(table, study_var, roles, covariates, bands, steps)
    _refuse_repeated_columns(table, columns)
    rows, lines = table.rows, pd.Series(np.arange(2, len(table.rows) + 2), index=table.rows.index)
    names = [*sum(columns.predictors, ()), study_var]
    numbers = {name: numbers_of_column(table, columns, name, nodata) for name in names}
    keys: dict[str, pd.Series[Any]] = {}
    keys["key"] = names_of(table, columns.key) if columns.key else lines
    keys["plot"] = names_of(table, columns.plot) if columns.plot else lines
    if columns.year:
        keys["year"] = numbers_of_column(table, columns, columns.year, ())
        _refuse(table, columns, columns.year, keys["year"] % 1 > 0, "is not a whole year")
    if columns.region:
        keys["region"] = names_of(table, columns.region)
    if columns.key:
        repeated = keys["key"].astype(str).duplicated() & keys["key"].notna()
        _refuse(table, columns, columns.key, repeated, "appears more than once; a key must be unique")
    covariate_values = {
        name: numbers_of_column(table, columns, name, nodata) if is_numeric(rows[name]) else names_of(table, name)
        for name in columns.covariates
    }
    values = pd.DataFrame({**numbers, **covariate_values}, index=rows.index)
    chosen, dropped = _select(table, columns, pd.DataFrame(keys), values)
    missing = {**pd.DataFrame(keys).isna().sum(), **values.isna().sum()}
    repeated = pd.concat([pd.DataFrame(keys).drop(columns="key"), values], axis=1)[chosen].duplicated().sum()
    # A spreadsheet may hold some names as numbers.
    frame = pd.DataFrame(keys)[chosen].astype({name: str for name in ("plot", "region") if name in keys})
    if "year" in frame:
        frame = frame.astype({"year": np.int64})
    if columns.key:
        frame = frame.astype({"key": str}).sort_values("key", kind="stable")
    grid = np.stack([[numbers[name][frame.index] for name in step] for step in columns.predictors])
    x = np.ascontiguousarray(grid.transpose(2, 0, 1)).transpose(0, 2, 1)
    y = numbers[study_var][frame.index].to_numpy()
    chosen_covariates = pd.DataFrame(covariate_values, index=rows.index).loc[frame.index].reset_index(drop=True)
    checked = {band: x[:, index] for index, band in enumerate(columns.bands)} | {study_var: y}
    checked |= {name: values.to_numpy() for name, values in chosen_covariates.items() if values.dtype == np.float64}
    far_off = {name: found for name, values in checked.items() if (found := _far_off(values))}
    return Samples(
        frame.reset_index(drop=True),
        x,
        y,
        chosen_covariates,
        columns,
        dropped,
        {str(name): int(count) for name, count in missing.items() if count},
        int(repeated),
        far_off,
    )


def _role(table: Table, role: str, name: str, *, required: bool) -> str | None:
    """The column of a role; None if the user says that there is none, or if it is absent and may be.

    Raises:
        InputError: the column is absent.
    """
    if name in table.rows.columns:
        return name
    if name == NO_COLUMN or not required:
        return None
    hint = _similar_column(table, name) or f"; {role}_column=... names another column"
    if role == "plot":
        hint += f" and {role}_column={NO_COLUMN} makes each row a plot"
    text = [column for column in table.rows.columns if not is_numeric(table.rows[column])]
    there = f" (columns with text: {listed(text)})" if text else f" (its columns are {listed(table.rows.columns)})"
    raise InputError(f"{table.name} has no column {name!r}, which gives the {role} of a row{hint}{there}")


def _find_columns(
    table: Table,
    study_var: str,
    roles: dict[str, str | None],
    covariates: Sequence[str],
    bands: Sequence[str],
    steps: Sequence[int],
) -> Columns:
    """Find the grid of predictors among the columns that have no other role.

    Raises:
        InputError: a requested column is absent, or the predictors do not fill a grid.
    """
    rows = table.rows
    taken = {*roles.values(), *covariates, study_var}
    found = predictors_among(rows, taken, table.name)
    present = tuple(dict.fromkeys(band for band, _ in found))
    present_steps = tuple(sorted({step for _, step in found}))
    for name in covariates:
        if name not in rows.columns:
            hint = _similar_column(table, name) or "; names with spaces are separated by commas, as in 'plot id, use'"
            raise InputError(f"{table.name} has no column {name!r}, named in covariates{hint}")
        if name == study_var:
            raise InputError(f"covariates={name}: the study variable cannot be an input, too")
    if rows.empty:
        raise InputError(f"{table.name} has no rows below its column names")
    if study_var not in rows.columns or not is_numeric(rows[study_var]):
        others = [name for name in rows.columns if is_numeric(rows[name]) and name not in {*found.values(), *taken}]
        beside = f"; columns with numbers that are no predictors: {listed(others)}" if others else ""
        if study_var in rows.columns:
            raise InputError(
                f"{table.name}, column {study_var!r}: '{rows[study_var].iloc[0]}' is not a number, as the study "
                f"variable must be{beside}"
            )
        hint = _similar_column(table, study_var) or beside or "; its only columns with numbers are the predictors"
        raise InputError(f"{table.name} has no column {study_var!r}, the requested study variable{hint}")
    for flag_value, name in ((f"study_var={study_var}", study_var), *((f"covariates={name}", name) for name in covariates)):
        match = PREDICTOR.fullmatch(name)
        if match and match[1] in present:
            raise InputError(
                f"{flag_value}: it is one of the predictors, of the band {match[1]!r}; another column is expected"
            )
    if not found:
        raise InputError(
            f"{table.name} has no predictors: numbers in columns <band>_<step>, such as B02_1, are expected; it has the "
            f"columns {listed(rows.columns)}"
        )
    for flag, wanted, there in (("bands", bands, present), ("steps", steps, present_steps)):
        absent = [one for one in wanted if one not in there]
        if absent:
            raise InputError(f"{flag}: {absent[0]} is not among those of {table.name}, which are {listed(map(str, there))}")
    chosen_bands = tuple(band for band in present if not bands or band in bands)
    # Of the chosen bands: others may have further steps.
    chosen_steps = tuple(s for s in present_steps if (s in steps if steps else any((b, s) in found for b in chosen_bands)))
    holes = [f"{band}_{step}" for step in chosen_steps for band in chosen_bands if (band, step) not in found]
    if study_var in holes:
        raise InputError(
            f"study_var={study_var} is one of the predictors {chosen_bands[0]}_{chosen_steps[0]} to {holes[-1]}"
        )
    if holes:
        empty = [name for name in holes if name in rows.columns]
        hint = f"; {empty[0]!r} has no numbers" if empty else _similar_column(table, holes[0])
        raise InputError(
            f"{table.name}: the grid of {len(chosen_bands)} bands ({listed(chosen_bands)}) x {len(chosen_steps)} steps has "
            f"holes: no column {listed(map(repr, holes))}; bands=... and steps=... select a complete part{hint}"
        )
    for column in rows.columns:
        match = None if column in {*taken, *found.values()} else PREDICTOR.fullmatch(column)
        if match and match[1] in chosen_bands and (not steps or int(match[2]) in steps):
            raise InputError(f"{table.name}, column {column!r}: it has no numbers, unlike the other columns of its band")
    predictors = tuple(tuple(found[band, step] for band in chosen_bands) for step in chosen_steps)
    used = {*taken, *sum(predictors, ())}
    ignored = tuple(column for column in rows.columns if column not in used)
    return Columns(
        target=study_var,
        **roles,
        bands=chosen_bands,
        steps=chosen_steps,
        predictors=predictors,
        covariates=tuple(covariates),
        ignored=ignored,
    )


def predictors_among(rows: pd.DataFrame, taken: Collection[str | None], name: str = "") -> dict[tuple[str, int], str]:
    """The columns that are the predictors of a table, by band and step.

    Args:
        rows: of the table.
        taken: columns that have another role.
        name: of the table, for messages.

    Raises:
        InputError: two columns are the same band and step.
    """
    found: dict[tuple[str, int], str] = {}
    for column in rows.columns:
        may_be = column not in taken and (is_numeric(rows[column]) or rows[column].isna().all())
        if may_be and (match := PREDICTOR.fullmatch(column)):
            place = (match[1], int(match[2]))
            if place in found:
                raise InputError(f"{name}: the columns {found[place]!r} and {column!r} are the same band and step")
            found[place] = column
    return _without_strays(found)


def _without_strays(found: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Drop single columns like `biomass_2019`, whose number is not a step of any band with several columns."""
    counts = pd.Series([band for band, _ in found]).value_counts()
    steps = {step for band, step in found if counts[band] > 1}
    return {(band, step): name for (band, step), name in found.items() if not steps or counts[band] > 1 or step in steps}


def is_numeric(column: "pd.Series[Any]") -> bool:
    """Whether the column has any number."""
    return column.dtype != bool and bool(pd.to_numeric(column, errors="coerce").notna().any())


def _refuse_repeated_columns(table: Table, columns: Columns) -> None:
    used = (columns.target, columns.plot, columns.year, columns.region, columns.key, *sum(columns.predictors, ()))
    for column in filter(None, (*used, *columns.covariates)):
        if f"{column}.1" in table.rows.columns:  # what pandas calls the second one
            raise InputError(f"{table.name} has the column {column!r} more than once")


def numbers_of_column(table: Table, columns: Columns, name: str, nodata: Sequence[float]) -> "pd.Series[float]":
    """A column as float64, missing where it is empty or nodata.

    Raises:
        InputError: it has text, infinity or a number too large for single precision.
    """
    column = table.rows[name]
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    large = np.isfinite(numbers) & (numbers.abs() > LARGEST)
    _refuse(table, columns, name, large, "is not a finite number of single precision")
    no_number = (numbers.isna() & column.notna()) | ~(np.isfinite(numbers) | numbers.isna()) | column.map(type).eq(bool)
    _refuse(table, columns, name, no_number, "is not a finite number")
    return numbers.mask(numbers.isin(nodata))


def names_of(table: Table, column: str) -> "pd.Series[Any]":
    """A column of names, stripped of surrounding spaces.

    Raises:
        InputError: two names differ only in capitals, so that one plot or category would be taken for two.
    """
    names = table.rows[column].map(lambda name: name.strip() if isinstance(name, str) else name)
    seen: dict[str, str] = {}
    for name in names[names.notna()].astype(str).unique():
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"{table.name}, column {column!r}: {other!r} and {name!r} differ only in capitals")
    return names


def _refuse(table: Table, columns: Columns, name: str, wrong: "pd.Series[bool]", why: str) -> None:
    """Refuse a column with wrong values, naming the first one and its row.

    Raises:
        InputError: there is a wrong value.
    """
    if not wrong.any():
        return
    position = int(np.flatnonzero(wrong)[0])
    key = f" ({columns.key} {table.rows[columns.key].iloc[position]})" if columns.key and columns.key != name else ""
    # A spreadsheet's first data row is row 2.
    raise InputError(f"{table.name}, row {position + 2}{key}, column {name!r}: '{table.rows[name].iloc[position]}' {why}")


def _select(
    table: Table, columns: Columns, keys: pd.DataFrame, values: pd.DataFrame
) -> tuple["pd.Series[bool]", dict[str, int]]:
    """Which rows are used, and how many are dropped, by reason.

    Raises:
        InputError: no row is left.
    """
    frame = pd.concat([keys, values], axis=1)
    chosen = frame.notna().all(axis=1)
    dropped = {"missing value": int((~chosen).sum())}
    own = (columns.plot, columns.year, columns.region, columns.key)
    published = (getattr(published_grassland, role) for role in ("PLOT", "YEAR", "REGION", "KEY"))
    if own == tuple(published) and published_grassland.is_published(table.rows.columns):
        for reason, unwanted in published_grassland.left_out(keys).items():
            dropped[reason] = int((chosen & unwanted).sum())
            chosen &= ~unwanted
    if not chosen.any():
        empty = [column for column in frame.columns if frame[column].isna().all()]
        why = f"; its column {empty[0]!r} is empty" if empty else ""
        lost = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count)
        raise InputError(f"{table.name} has no complete row for {columns.target} (dropped: {lost or 'none'}){why}")
    return chosen, dropped


def _far_off(values: NDArray[np.float64]) -> tuple[int, float] | None:
    """Number of values more than `FAR_OFF` interquartile ranges outside the quartiles, and the furthest of them.

    Quartiles are those of the distinct values, so that a frequent nodata value does not shift them.
    """
    low, high = np.percentile(np.unique(values), (25, 75))
    beyond = np.maximum(low - values, values - high)
    count = int((beyond > FAR_OFF * (high - low)).sum())
    return (count, float(values.flat[beyond.argmax()])) if count and high > low else None


def _similar_column(table: Table, name: str) -> str:
    """End of a sentence about an absent column: the one that was probably meant, if any."""
    alike = [column for column in table.rows.columns if column.casefold() == name.strip().casefold() and column != name]
    return f"; there is {alike[0]!r}, which differs in spaces or capitals" if alike else ""


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of further ones."""
    every = list(names)
    more = len(every) - NAMES_LISTED
    return ", ".join(every[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def _as_ranges(steps: Sequence[int]) -> str:
    """Ascending whole numbers as "0 to 3, 5, 7 to 9"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def describe(table: Table, samples: Samples) -> str:
    """One line on what was read: rows, bands, steps, target, plots, years, regions, what was dropped and ignored."""
    columns, keys = samples.columns, samples.keys
    steps = f"{len(columns.steps)} step{'s' * (len(columns.steps) > 1)} ({_as_ranges(columns.steps)})"
    parts = [
        f"{table.name}, {len(samples.y)} rows used",
        f"{len(columns.bands)} band{'s' * (len(columns.bands) > 1)} ({listed(columns.bands)}) x {steps}",
        f"target {columns.target}",
        f"{keys['plot'].nunique()} plots" if columns.plot else "each row a plot",
        *(f"{keys[role].nunique()} {role}s" if role in keys else f"no {role}s" for role in ("year", "region")),
    ]
    if columns.covariates:
        kinds = [
            f"{name} ({'number' if values.dtype == np.float64 else f'{values.nunique()} categories'})"
            for name, values in samples.covariates.items()
        ]
        parts.append(f"covariates {', '.join(kinds)}")
    dropped = [f"{reason} ({count})" for reason, count in samples.dropped.items()]
    if samples.missing:
        most = sorted(samples.missing.items(), key=lambda item: -item[1])
        dropped[0] += f" in {listed(f'{name} {count}' for name, count in most)}"
    parts.append(f"dropped: {', '.join(dropped)}")
    ignored = f"{len(columns.ignored)} ({listed(columns.ignored)})" if columns.ignored else "none"
    return ", ".join(parts) + f", ignored columns: {ignored}"


def warnings_about(samples: Samples) -> list[str]:
    """Sentences about values far off and rows that repeat."""
    sentences = []
    far_off = [f"{band} {count} (such as {value:g})" for band, (count, value) in samples.far_off.items()]
    if far_off:
        sentences.append(
            f"Values more than {FAR_OFF} interquartile ranges beyond their band's or column's quartiles: "
            f"{', '.join(far_off)}; they are used as they are, nodata=... takes a number as missing"
        )
    if samples.repeated:
        sentences.append(f"Rows that repeat another in all that is used: {samples.repeated}")
    return sentences


def split(samples: Samples, procedure: str, seed: int, folds: int = FOLDS, fold_seed: int | None = None) -> list[Split]:
    """Cross-validation folds.

    `split_by_plot` is a GroupKFold over the plots, which sorts them by their number of rows, as published, or with a
    `fold_seed` deals them out at random; `split_by_observatory` tests on each region in turn, in order of first
    appearance, and `split_by_year` on each year. The validation part is a fifth of the training plots,
    drawn from the seed. No plot is on two sides of a fold, except in the training and test parts of `split_by_year`, which
    tests the same plots in another year.

    Raises:
        InputError: there are too few plots, regions or years, a plot in two regions, or too few rows in a fold.
    """
    plots = samples.keys["plot"].to_numpy()
    ids = np.arange(len(plots), dtype=np.int64)
    if procedure == "split_by_plot":
        if len(np.unique(plots)) < folds:
            raise InputError(
                f"plots in the table: {len(np.unique(plots))}; split_by_plot with folds={folds} needs at least {folds}"
            )
        grouping = GroupKFold(folds, shuffle=fold_seed is not None, random_state=fold_seed)
        outer = list(grouping.split(ids, groups=plots))
    else:
        role = "year" if procedure == "split_by_year" else "region"
        if role not in samples.keys:
            raise InputError(f"{procedure} needs the {role} of each row; {role}_column=... names its column")
        groups = samples.keys[role].to_numpy()
        regions = samples.keys.groupby("plot")[role].nunique()
        if role == "region" and regions.max() > 1:
            raise InputError(
                f"plot {regions.idxmax()!r} lies in {regions.max()} regions; {procedure} would train and test on it"
            )
        names = sorted(set(groups)) if role == "year" else list(dict.fromkeys(groups))
        if len(names) < 2:
            raise InputError(f"the table has one {role} ({names[0]}); {procedure} needs at least 2")
        outer = [(ids[groups != name], ids[groups == name]) for name in names]
    result = []
    for number, (rest, test) in enumerate(outer, start=1):
        if len(np.unique(plots[rest])) < 2:
            raise InputError(f"fold {number}: plots to train and validate on: {len(np.unique(plots[rest]))}; 2 are needed")
        inner = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=seed)
        train, validation = next(inner.split(rest, groups=plots[rest]))
        fold = Split(rest[train], rest[validation], test)
        targets = samples.y[fold.train]
        if len(targets) < 2 or np.ptp(targets) == 0:
            raise InputError(
                f"fold {number}: training rows: {len(targets)}, different target values among them: "
                f"{len(np.unique(targets))}; a varying target is needed"
            )
        if len(test) < 3:
            raise InputError(
                f"fold {number}: test rows: {len(test)}; 3 are needed, the r2 of fewer says nothing; fewer folds may help"
            )
        result.append(fold)
    return result
