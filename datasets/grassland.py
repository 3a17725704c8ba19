"""The grassland table: plant diversity of plots beside their Sentinel-2 year.

One row is a plot in a year: three diversity indices and 160 predictors
`<band>_<step>`, surface reflectance x 10 000 of 10 bands at 16 time steps, bands
fastest within a step. The real table was published with Dieste et al., "ResNeTS",
IEEE JSTARS 2024 (Biodiversity Exploratories, BExIS accessions 30969 and 27386).
"""

import csv
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, GroupShuffleSplit

from datasets.demo_table import BANDS as BANDS
from datasets.demo_table import STUDY_VARIABLES as STUDY_VARIABLES
from datasets.demo_table import simulate_table
from utils.errors import InputError

STEPS = 16
PREDICTORS = [f"{band}_{step}" for step in range(STEPS) for band in BANDS]
KEYS = ["year", "ep", "yep", "explo"]
SPLIT_PROCEDURES = ("split_by_plot", "split_by_observatory")
FOLDS = 5
COLUMNS_NAMED = 5  # most absent columns that a refusal names
LARGEST = float(np.finfo(np.float32).max)  # networks compute in single precision

# Plots with trees, whose spectra are not those of grassland.
TREE_PLOTS = [f"AEG{n:02d}" for n in (7, 9, 25, 26, 27, 47, 48)] + [f"HEG{n:02d}" for n in (9, 21, 24, 43)]
# Plots of the Schorfheide whose 2018 records are outliers.
OUTLIERS_2018 = [f"SEG{n:02d}" for n in (8, 10, 11, 12, 16, 18, 19, 20, 31, 33, 35, 36, 38, 39, 40, 41, 44, 45, 46, 49, 50)]


class Table(NamedTuple):
    """A table as read: its rows, what to call it, and what it was read from."""

    rows: pd.DataFrame
    name: str
    sha256: str
    simulated: bool


class Samples(NamedTuple):
    """The rows an experiment uses; row ids are positions in these arrays.

    Attributes:
        keys: columns year, ep, yep, explo; one row a sample.
        x: (sample, band, step) float64, reflectance x 10 000.
        y: (sample,) float64, the study variable.
        dropped: why rows were left out, with their number.
    """

    keys: pd.DataFrame
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    dropped: dict[str, int]


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
    """Read an .xlsx, .csv or .parquet table and check its columns.

    Raises:
        InputError: the file is missing, cannot be read, or its columns or values are not those of a grassland table.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"{path} {what}; an .xlsx, .csv or .parquet table is expected, a relative path counts from where the command is "
            f"given"
        )
    # Without its engine named, pandas would ask for other packages where a file is not what its ending says.
    excel = functools.partial(pd.read_excel, engine="openpyxl")
    readers = {".xlsx": excel, ".csv": pd.read_csv, ".parquet": pd.read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} has the ending {path.suffix!r}; .xlsx, .csv or .parquet is expected")
    try:
        if path.suffix.lower() == ".csv":
            _refuse_short_lines(path)
        rows = reader(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in what reads it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "UTF-8 is expected" if isinstance(error, UnicodeDecodeError) else "it may be truncated or empty"
        raise InputError(f"{path} cannot be read as a {path.suffix} table, {hint}: {reason}") from error
    check_table(rows, path)
    return Table(rows, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), simulated=False)


def _refuse_short_lines(path: Path) -> None:
    """Refuse a csv with a line of too few fields, which pandas would fill with missing values.

    Raises:
        InputError: there is one, as where the file was cut.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        for fields in lines:
            if 0 < len(fields) < len(header):
                raise InputError(
                    f"{path}, line {lines.line_num} has {len(fields)} of {len(header)} fields; the file may be truncated"
                )


def _similar_column(rows: pd.DataFrame, name: str) -> str:
    """End of a sentence on a column that is absent: the one that was probably meant, if any."""
    alike = [column for column in map(str, rows.columns) if column.strip().casefold() == name.casefold()]
    return f"; there is {alike[0]!r}, which differs in spaces or capitals" if alike else ""


def check_table(rows: pd.DataFrame, path: Path) -> None:
    """Refuse a table that training would misread.

    Missing values pass: rows that have one are dropped later and counted.

    Raises:
        InputError: the columns are not told apart, one is absent or there twice, a value is no number, infinite or too
            large, a year is not whole, or a key appears twice.
    """
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(rows.columns) == 1 and separator in str(rows.columns[0]):
            raise InputError(f"{path} is separated by {name}; commas are expected, and points in numbers")
    required = [*KEYS, *PREDICTORS]
    missing = [column for column in required if column not in rows.columns]
    if missing:
        named = ", ".join(map(repr, missing[:COLUMNS_NAMED]))
        more = f" and {len(missing) - COLUMNS_NAMED} more" if len(missing) > COLUMNS_NAMED else ""
        raise InputError(
            f"{path} has no column {named}{more}; expected are {', '.join(KEYS)}, a study variable "
            f"and {len(PREDICTORS)} predictors {PREDICTORS[0]} to {PREDICTORS[-1]}{_similar_column(rows, missing[0])}"
        )
    present = [*required, *(name for name in STUDY_VARIABLES if name in rows.columns)]
    for column in present:
        if f"{column}.1" in rows.columns:  # what pandas calls the second one
            raise InputError(f"{path} has the column {column!r} more than once")
    for column in (name for name in present if name not in ("ep", "yep", "explo")):
        numbers = pd.to_numeric(rows[column], errors="coerce")
        wrong = (numbers.isna() & rows[column].notna()) | (numbers.abs() > LARGEST) | rows[column].map(type).eq(bool)
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            large = np.isfinite(numbers.iloc[position])
            # A spreadsheet's first data row is row 2.
            raise InputError(
                f"{path}, row {position + 2} (yep {rows['yep'].iloc[position]}), column {column!r}: "
                f"'{rows[column].iloc[position]}' is not a finite number{' of single precision' if large else ''}"
            )
    fractions = np.flatnonzero(pd.to_numeric(rows["year"]) % 1 > 0)
    if len(fractions):
        position = int(fractions[0])
        raise InputError(
            f"{path}, row {position + 2} (yep {rows['yep'].iloc[position]}), column 'year': "
            f"{rows['year'].iloc[position]} is not a whole year"
        )
    repeated = np.flatnonzero(rows["yep"].astype(str).duplicated() & rows["yep"].notna())
    if len(repeated):
        position = int(repeated[0])
        raise InputError(
            f"{path}, row {position + 2}: yep '{rows['yep'].iloc[position]}' appears more than once; "
            f"one row a plot and year is expected"
        )


def prepare(table: Table, study_variable: str) -> Samples:
    """Select the rows of an experiment, as published.

    Raises:
        InputError: the study variable's column is absent or no row is left.
    """
    if study_variable not in table.rows.columns:
        hint = _similar_column(table.rows, study_variable)
        others = [name for name in STUDY_VARIABLES if name in table.rows.columns]
        if others and not hint:
            hint = f"; it has {' and '.join(others)}"
        raise InputError(f"{table.name} has no column {study_variable!r}, the study variable asked for{hint}")
    rows = table.rows.sort_values("yep", kind="stable", key=lambda names: names.astype(str))
    numbers = ["year", study_variable, *PREDICTORS]
    rows = rows[[*KEYS, *numbers[1:]]].astype(dict.fromkeys(numbers, np.float64))
    empty = [column for column in rows.columns if rows[column].isna().all()]
    dropped = {}
    for reason, unwanted in (
        ("missing value", lambda frame: frame.isna().any(axis=1)),
        ("plot with trees", lambda frame: frame["ep"].isin(TREE_PLOTS)),
        ("outlier of 2018", lambda frame: (frame["year"] == 2018) & frame["ep"].isin(OUTLIERS_2018)),
    ):
        drop = unwanted(rows)
        dropped[reason] = int(drop.sum())
        rows = rows[~drop]
    # A spreadsheet may hold some names as numbers.
    rows = rows.astype({"year": np.int64, "ep": str, "yep": str, "explo": str})
    if rows.empty:
        why = f"; nothing is in its column {empty[0]!r}" if empty else ""
        raise InputError(f"{table.name} has no complete row for {study_variable}{why}")
    x = rows[PREDICTORS].to_numpy().reshape(-1, STEPS, len(BANDS)).transpose(0, 2, 1)
    return Samples(rows[KEYS].reset_index(drop=True), x, rows[study_variable].to_numpy(), dropped)


def split(samples: Samples, procedure: str, seed: int) -> list[Split]:
    """Cross-validation folds; no plot is on two sides of a fold.

    `split_by_plot` is a 5-fold GroupKFold over the plots; `split_by_observatory`
    tests on each observatory in turn, in order of first appearance. The
    validation part is a fifth of the training plots, drawn from the seed.

    Raises:
        InputError: too few plots or observatories, or a fold that cannot train or be tested.
    """
    plots = samples.keys["ep"].to_numpy()
    observatories = samples.keys["explo"].to_numpy()
    ids = np.arange(len(plots), dtype=np.int64)
    if procedure == "split_by_plot":
        if len(np.unique(plots)) < FOLDS:
            raise InputError(f"plots in the table: {len(np.unique(plots))}; split_by_plot needs at least {FOLDS}")
        outer = list(GroupKFold(FOLDS).split(ids, groups=plots))
    else:
        names = list(dict.fromkeys(observatories))
        if len(names) < 2:
            raise InputError(f"the table has one observatory ({names[0]}); split_by_observatory needs at least 2")
        outer = [(ids[observatories != name], ids[observatories == name]) for name in names]
    folds = []
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
            raise InputError(f"fold {number}: test rows: {len(test)}; 3 are needed, the r2 of fewer says nothing")
        folds.append(fold)
    return folds
