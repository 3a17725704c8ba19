"""Operation series-inputs: places and satellite products, or a long table of them, to the table of series that main reads.

For each place and year the clear pixels of each date are averaged and brought to regular steps, by linear interpolation over
time or by composites. The same series of every pixel of an area can be written as rasters for predict: table and rasters
share each rule.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import torch

from datasets.place_series.bands import REFLECTANCE, Channels, choose_channels
from datasets.place_series.demo import demo_inputs
from datasets.place_series.from_products import (
    StackSpec,
    Tile,
    build_stacker,
    homes_of,
    observe,
    tile_for,
    tiles_of,
    years_of,
)
from datasets.place_series.long_table import read_long
from datasets.place_series.places import read_places
from datasets.place_series.regular import METHODS, Rules
from datasets.place_series.rows import (
    CLEAR_DATES,
    ENDINGS,
    WIDEST_GAP,
    YEAR,
    Observed,
    Records,
    Rows,
    check_table,
    describe_left_out,
    each_year,
    make_rows,
    new_names,
    write_rows,
)
from datasets.products import BANDS, find_products
from utils import rasters
from utils.errors import InputError
from utils.flags import FlagParser, auto_or, numbers_of, one_of, real, step_ranges, whole
from utils.rasters import Grid, Layer, Output, Run
from utils.runs import (
    add_to_label,
    called_from,
    project_folder,
    refuse_other_flags,
    run_or_explain,
    say,
    versions,
    whole_file,
    write_json,
    write_text,
)
from utils.simulated import MARK as SIMULATED_MARK
from utils.simulated import is_simulated

SIMULATED, NONE = "simulated", "none"
UNIT = "reflectance x 10 000"
# Pixels times bands. Of JPEG 2000, 6 million take a second of a core, and a worker takes 3 seconds to start.
WORTH_WORKERS = 40e6
STACK_FLAGS = ("area", "bands", "end", "indices", "max_gap", "method", "resampling", "start", "steps", "window")

parser = FlagParser(prog="series_inputs.py", description=__doc__)
parser.flag(
    "area", str, NONE, "of rasters for predict: none, all, left,bottom,right,top in a tile's grid, or a GeoJSON file"
)
parser.flag("bands", str, "all", "all, or names such as B4 or red, or name=band as in nir=B8A; spaces or commas between")
parser.flag("block", whole(16), 512, "side of the windows of rasters that are computed at once, in pixels")
parser.flag(
    "cloud_column", str, "auto", "of observations: SCL, QA60, or a number that is larger than max_cloud; auto or none"
)
parser.flag("crs", str, "auto", "coordinate system of the places, such as EPSG:32632; auto: as their file says")
parser.flag("date_column", str, "auto", "of observations: the date of a row; auto guesses")
parser.flag("end", whole(1, 366), 270, "last day of the season, day of the year")
parser.flag("indices", str, NONE, "none, or name=formula as in ndvi=(nir-red)/(nir+red); commas between; + - * / ( ) alone")
parser.flag("max_cloud", real(0), 0, "largest value of cloud_column that is clear")
parser.flag("max_gap", whole(1), 60, "days of the season without a clear date; a wider gap leaves the place or pixel out")
parser.flag("method", one_of(*METHODS), "interpolate", "interpolate (linearly over time) or composite (medians of windows)")
parser.flag("min_clear", real(0, 100), 50, "percent of a polygon's pixels that must be clear for a date to count")
parser.flag("observations", str, NONE, "none, or a long table (.csv, .tsv, .xlsx, .parquet) instead of products and places")
parser.flag("out", str, "auto", "table to write (.csv, .tsv, .parquet); auto: series.csv in the run's folder")
parser.flag("places", str, SIMULATED, "vector file or table with x, y or lon, lat; none, for rasters alone; or simulated")
parser.flag("plot_column", str, "auto", "names the places; auto guesses, none numbers them")
parser.flag("products", str, SIMULATED, "folder or list of products, a STAC catalogue or API; or simulated")
parser.flag("resampling", one_of("nearest", "bilinear"), "nearest", "of bands of 20 m to 10 m: nearest or bilinear")
parser.flag("start", whole(1, 366), 90, "first day of the season, day of the year; after end: of the year before")
parser.flag("steps", whole(2), 16, "number of steps, evenly from start to end")
parser.flag("window", auto_or(real(1)), "auto", "days of a composite; auto: from one step to the next")
parser.flag("workers", auto_or(whole(1)), "auto", "processes of one thread; auto: one a core, one alone for small products")
parser.flag("year_column", str, "auto", "year that a row of places is of; auto: year, where there is one; none: all years")
parser.flag("years", step_ranges, "all", "years or ranges, such as 2019-2021; all that the dates have")


class Inputs(NamedTuple):
    """What the table is made from.

    Attributes:
        records: that a row is wanted for.
        observed: clear observations of their places.
        channels: bands and indices.
        lacking: (index,) values that divide by zero.
        left_out: records, by reason.
        source: names and digests, for the table's record.
    """

    records: Records
    observed: list[Observed]
    channels: Channels
    lacking: Sequence[int]
    left_out: dict[str, int]
    source: dict[str, Any]


def main() -> None:
    """Read, make regular, write, check."""
    flags = parser.parse_flags()
    rules = rules_of(flags)
    simulated = flags["observations"] == NONE and flags["products"] == SIMULATED
    out = output_of(flags, simulated)
    refuse_what_cannot_be_written(out)
    add_to_label("series-inputs", "", parser.changed(flags, ("places", "observations", "method", "steps", "indices")))
    if flags["places"] == NONE and flags["area"] == NONE and flags["observations"] == NONE:
        raise InputError("places=none and area=none leave nothing to write; places=... makes a table, area=... rasters")
    if flags["observations"] != NONE:
        write_table(out, from_long_table(flags, rules), rules, flags, simulated)
        return
    if simulated:
        flags |= simulated_inputs(flags)
    tiles, channels, years = products_of(flags, rules)
    simulated = simulated or any(is_simulated(Path(product.path)) for tile in tiles for product in tile.products)
    with rasters.workers(flags["workers"] or worthwhile_workers(tiles, channels)) as run:
        if flags["places"] != NONE:
            write_table(out, from_products(flags, rules, tiles, channels, years, run), rules, flags, simulated)
        if flags["area"] != NONE:
            write_stacks(out, flags, tiles, channels, rules, years, " (simulated)" if simulated else "", run)


def worthwhile_workers(tiles: Sequence[Tile], channels: Channels) -> int:
    """One a core, but one alone where all that could be read takes less time than the workers' own start."""
    pixels = sum(tile.grid.height * tile.grid.width * len(tile.products) for tile in tiles)
    return torch.get_num_threads() if pixels * len(channels.sources) > WORTH_WORKERS else 1


def rules_of(flags: Mapping[str, Any]) -> Rules:
    """The rules of the series.

    Raises:
        InputError: the season is too short for its steps.
    """
    rules = Rules(**{name: flags[name] for name in Rules._fields} | {"window": flags["window"] or 0})
    first, last = rules.season(2001)
    days = last - first + 1
    if days < rules.steps:
        raise InputError(f"steps={rules.steps}: the season from start={rules.start} to end={rules.end} has {days} days")
    return rules if rules.window else rules._replace(window=(last - first) / (rules.steps - 1))


def output_of(flags: Mapping[str, Any], simulated: bool) -> Path:
    """The table's path.

    Raises:
        InputError: its ending is of no table.
    """
    if flags["out"] == "auto":
        return Path("simulated_series.csv" if simulated else "series.csv").absolute()
    out = called_from() / flags["out"]
    if out.suffix.lower() not in ENDINGS:
        raise InputError(f"out={flags['out']} has the ending {out.suffix!r}; {', '.join(ENDINGS)} is expected")
    return out


def refuse_what_cannot_be_written(out: Path) -> None:
    """Refuse, before anything is computed, a folder that cannot be written to and a table of someone else.

    Raises:
        InputError: it is one.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; another out=... is expected") from error
    if (out.exists() or record_of(out).exists()) and not is_ours(record_of(out)):
        other = out if out.exists() else record_of(out)
        raise InputError(f"{other} exists and was not written by series-inputs; another out=... is expected")


def is_ours(record: Path) -> bool:
    """Whether a file is the record of a table of this operation."""
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["operation"] == "series-inputs")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def record_of(out: Path) -> Path:
    """The path of a table's record."""
    return out.with_suffix(".json")


def simulated_inputs(flags: Mapping[str, Any]) -> dict[str, str]:
    """The simulated products, and the places in them unless there are others."""
    products, places = demo_inputs(project_folder() / "data")
    say(f"The products are simulated: {products}; products=... and places=... name your own")
    return {"products": str(products)} | ({"places": str(places)} if flags["places"] == SIMULATED else {})


def from_long_table(flags: Mapping[str, Any], rules: Rules) -> Inputs:
    """What a long table has.

    Raises:
        InputError: it cannot be read, or a flag is for products.
    """
    for name in ("area", "places", "products"):
        if flags[name] not in (NONE, SIMULATED):
            raise InputError(f"{name}={flags[name]} is for products; observations={flags['observations']} is a long table")
    names = ("bands", "indices", "plot_column", "date_column", "cloud_column", "max_cloud")
    options = {name: flags[name] for name in names}
    long = read_long(called_from() / flags["observations"], rules, numbers_of(flags["years"]), **options)
    say(f"Observations: {long.table.name}, {len(long.observed.dates)} dates of {len(long.observed.places)} places")
    for line in long.said:
        say(line)
    source = {"observations": {"name": long.table.name, "sha256": long.table.sha256}}
    records = with_new_names(long.records, long.channels, rules, (YEAR, CLEAR_DATES, WIDEST_GAP), long.table.name)
    return Inputs(records, [long.observed], long.channels, long.lacking.tolist(), {}, source)


def with_new_names(records: Records, channels: Channels, rules: Rules, own: Sequence[str], source: str) -> Records:
    """Records with other names for columns that main would take for bands, which are said.

    Raises:
        InputError: a column has the name of one that the table gets.
    """
    new = new_names(records.columns, channels.names, rules.steps, own, source)
    for name, other in new.items():
        say(f"Column {name} is carried as {other}, or main would take it for a band and step")
    name = records.name_column
    return records._replace(columns=records.columns.rename(columns=new), name_column=new.get(name, name))


def products_of(flags: Mapping[str, Any], rules: Rules) -> tuple[list[Tile], Channels, list[int]]:
    """The products by tile, bands and indices, and the years.

    Raises:
        InputError: there is no product of those years, or a band is unknown.
    """
    channels = choose_channels(flags["bands"], flags["indices"], BANDS, REFLECTANCE, "the products")
    years = numbers_of(flags["years"])
    # A season may begin in the year before, and reach beyond its ends.
    calendar = {year + more for year in years for more in (-1, 0, 1)}
    products = find_products(flags["products"], called_from(), calendar, say, bounds=bounds_of(flags))
    years = years or years_of(products, rules)
    tiles = tiles_of(products, rules, years)
    if not tiles:
        dates = [product.date for product in products]
        raise InputError(
            f"no product lies in the season of {' '.join(map(str, years)) or 'any year'}; their dates are "
            f"{f'from {min(dates)} to {max(dates)}' if dates else 'of other years'}"
        )
    count, names = sum(len(tile.products) for tile in tiles), ", ".join(tile.name for tile in tiles)
    say(f"Products: {count} of {names}, years {years[0]} to {years[-1]}")
    return tiles, channels, years


def bounds_of(flags: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """West, south, east, north of the places in degrees, which a catalogue on the web is asked for; None for files."""
    if "://" not in flags["products"] or flags["places"] == NONE:
        return None
    places = read_places(called_from() / flags["places"], flags["plot_column"], flags["year_column"], flags["crs"])
    west, south, east, north = (float(one) for one in shapely.total_bounds(places.on("EPSG:4326")))
    return west, south, east, north


def from_products(
    flags: Mapping[str, Any], rules: Rules, tiles: Sequence[Tile], channels: Channels, years: Sequence[int], run: Run
) -> Inputs:
    """What the products have of the places.

    Raises:
        InputError: the places cannot be read, or lie outside.
    """
    path = called_from() / flags["places"]
    places = read_places(path, flags["plot_column"], flags["year_column"], flags["crs"])
    say(f"Places: {places.source}, {len(places.geometry)} by column {places.name_column}, {places.crs.name}")
    own_years, columns = None, places.columns
    if places.year_column:
        own_years, columns = columns[places.year_column].to_numpy(np.int64), columns.drop(columns=places.year_column)
    records = each_year(columns, places.name_column, own_years, years)
    records = with_new_names(records, channels, rules, (YEAR, CLEAR_DATES, WIDEST_GAP, "pixels", "tile"), places.source)
    home, left_out = homes_of(places, tiles)
    if (home < 0).all():
        names = ", ".join(tile.name for tile in tiles)
        raise InputError(f"{path}: no place lies in the products ({names}): {describe_left_out(left_out)}")
    if own_years is not None:
        left_out["year without products"] = int((~np.isin(own_years, years) & (home >= 0)).sum())
    else:
        left_out = {reason: count * len(years) for reason, count in left_out.items()}
    observed, lacking = observe(places, home, tiles, channels, flags["resampling"], flags["min_clear"], run)
    source = {
        "places": {
            "name": places.source,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        },
        "products": [product.name for tile in tiles for product in tile.products],
    }
    return Inputs(records, observed, channels, lacking.tolist(), left_out, source)


def write_table(out: Path, inputs: Inputs, rules: Rules, flags: Mapping[str, Any], simulated: bool) -> None:
    """Make the rows, say what they are, write and check them, with the record of how they were made beside them.

    Raises:
        InputError: no row is left, or the table cannot be written.
    """
    for index, count in zip(inputs.channels.indices, inputs.lacking, strict=True):
        if count:
            say(f"Index {index.name}: {count} values of a place and date divide by zero and are left out")
    rows = make_rows(inputs.records, inputs.observed, inputs.channels.names, rules)
    left_out = {**inputs.left_out, **rows.left_out}
    if rows.table.empty:
        raise InputError(
            f"no row is left for {out.name} (left out: {describe_left_out(left_out)}); max_gap={rules.max_gap} days and the "
            f"season from start={rules.start} to end={rules.end} may be changed"
        )
    with whole_file(record_of(out)) as record, whole_file(out) as beside:
        write_rows(beside, rows.table)
        digest = check_table(beside, inputs.channels.names, rules.steps, len(rows.table))
        document = describe(out, inputs, rules, rows, flags) | {
            "sha256": digest,
            "left_out": left_out,
            "simulated": simulated,
        }
        record.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    report(out, inputs, rows, left_out, " (simulated)" if simulated else "")


def describe(out: Path, inputs: Inputs, rules: Rules, rows: Rows, flags: Mapping[str, Any]) -> dict[str, Any]:
    """How the table was made, so that it can be made again."""
    channels, years = inputs.channels, [int(year) for year in np.unique(rows.table[YEAR])]
    return {
        "operation": "series-inputs",
        "table": out.name,
        "rows": len(rows.table),
        "bands": dict(channels.bands),
        "indices": {index.name: index.formula for index in channels.indices},
        "unit": UNIT if "products" in inputs.source else "as in the observations",
        "unit_in_formulas": "reflectance" if "products" in inputs.source else "as in the observations",
        "rules": rules._asdict(),
        "step_days": rules.step_days(years[0]).tolist(),
        "step_dates": {str(year): [str(date) for date in rules.step_dates(year)] for year in years},
        **inputs.source,
        "flags": dict(flags),
        "versions": versions(),
    }


def report(out: Path, inputs: Inputs, rows: Rows, left_out: Mapping[str, int], note: str) -> None:
    """Print what the table is like and what to do with it."""
    name = inputs.records.name_column
    say(f"Rows: {len(rows.table)}{note}")
    say(f"Left out: {sum(left_out.values())} ({describe_left_out(left_out)})")
    clear, gap = rows.table[CLEAR_DATES].astype(float).mean(), rows.table[WIDEST_GAP].max()
    say(f"Clear dates: {clear:.1f} a row, widest gap {gap:.0f} days")
    say(f"Bands: {' '.join(inputs.channels.names)}")
    say(f"Results: {out} and {record_of(out).name}")
    say(f"Next: `guild run dataset={out} plot_column={name} study_var=...`")


def write_stacks(
    out: Path,
    flags: Mapping[str, Any],
    tiles: Sequence[Tile],
    channels: Channels,
    rules: Rules,
    years: Sequence[int],
    note: str,
    run: Run,
) -> None:
    """Write the series of every pixel of the area: of each tile and year a folder with a GeoTIFF for each step.

    Raises:
        InputError: the area lies outside, or a folder has another stack or cannot be written.
    """
    window_of = functools.partial(rasters.area_window, flags["area"], folder=called_from())
    chosen = list(tiles) if flags["area"] == "all" else [tile_for(tiles, window_of)]
    for tile in chosen:
        for year in years:
            of_year = tiles_of(tile.products, rules, [year])
            if not of_year:
                say(f"Rasters of {year}: no product of {tile.name} lies in the season")
                continue
            folder = out.with_name("_".join([out.stem, "stack", str(year), *([tile.name] if len(chosen) > 1 else [])]))
            area = window_of(tile.grid)
            spec = StackSpec(of_year[0].products, (area.row_off, area.col_off), rules, year, channels, flags["resampling"])
            write_stack(folder, flags, tile.grid.part(area), spec, note, run)


def write_stack(folder: Path, flags: Mapping[str, Any], grid: Grid, spec: StackSpec, note: str, run: Run) -> None:
    """Write a stack, whole or not at all; one that was interrupted goes on.

    Raises:
        InputError: the folder has another stack or cannot be written.
    """
    rules, channels, year = spec.rules, spec.channels, spec.year
    names = [(product.name, str(product.date)) for product in spec.products]
    identity = {name: flags[name] for name in STACK_FLAGS} | {"year": year}
    identity |= {"products_sha256": hashlib.sha256(repr(names).encode()).hexdigest()}
    if folder.exists():
        path = folder / rasters.IDENTITY
        if not path.exists():
            raise InputError(f"{folder} exists and is no stack of series-inputs; another out=... is expected")
        refuse_other_flags(path, json.loads(path.read_text(encoding="utf-8")), identity)
        say(f"Rasters: {folder} is complete and kept; remove it to compute it again")
        return
    units = [UNIT] * len(channels.bands) + [""] * len(channels.indices)
    layers = tuple(Layer(name, unit) for name, unit in zip(channels.names, units, strict=True))
    outputs = [Output(f"{date:%Y%m%d}.tif", layers, "float32", np.nan) for date in rules.step_dates(year)]
    tags = {name: str(value) for name, value in identity.items()} | ({"note": "simulated"} if note else {})
    beside = folder.with_name(f".{folder.name}.partial")
    results = functools.partial(run, build_stacker, spec)
    windows = rasters.windows_of(grid, flags["block"])
    rasters.write_map(beside, grid, outputs, windows, results, identity, tags, f"Series of {year}...")
    document = {**identity, "rules": rules._asdict(), "bands": list(channels.names), "products": [name for name, _ in names]}
    write_json(beside / "series.json", document)
    if note:
        write_text(beside / SIMULATED_MARK, "Made from simulated products; nothing here was measured.\n")
    beside.rename(folder)
    say(f"Rasters: {folder}, {len(outputs)} steps x {len(layers)} bands, {grid.width} x {grid.height} pixels{note}")
    say(f"Next: `guild run predict input={folder}` with a run that was trained on the table")


if __name__ == "__main__":
    run_or_explain(main)
