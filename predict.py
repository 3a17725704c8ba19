"""Operation predict: a finished run of main applied to the rows of a table, or to rasters pixel by pixel.

Predictions are means over the run's folds and ensemble members, with their spread, an interval that is to cover 90 % of
new plots (CV+, Barber et al. 2021), and the dissimilarity from the training samples, which tells where the figures of the
run's cross-validation can be expected (Meyer and Pebesma 2021).
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from tqdm import tqdm

from datasets.demo_rasters import simulate_rasters
from datasets.demo_table import simulate_table
from datasets.finished_run import SAMPLES, NewRows, Trained, read_trained, rows_like
from datasets.plot_context import rows_of_plots
from datasets.published_grassland import target_of
from datasets.series_rasters import (
    SeriesRasters,
    find_rasters,
    is_raster_input,
    read_pixels,
    windows_by_blocks,
)
from datasets.series_table import Table, listed, read_table
from models import knows_plots
from models.applied import RESULTS, Applied, apply, load, prepare_area
from models.saved import SavedFold, load_folds, predictive_sd
from utils import rasters
from utils.applied_plots import intervals, quick_look
from utils.errors import InputError
from utils.finished_runs import find_run
from utils.flags import FlagParser, auto_or, names_in, real, real_list, whole
from utils.metrics import score
from utils.plots import save_plot
from utils.rasters import Grid, Layer, Output
from utils.runs import (
    a_new_run,
    add_to_label,
    called_from,
    choose_device,
    digest_of_files,
    finished_before,
    project_folder,
    read_tensors,
    run_or_explain,
    say,
    say_where_results_are,
    versions,
    whole_file,
    write_json,
)
from utils.simulated import is_simulated

AREA = Path("applicability.safetensors")
SIMULATED, SIMULATED_RASTERS = "simulated", "simulated_rasters"
SIMULATED_ROWS, SIMULATED_SEED = 150, 2025  # of another table than that of dataset=demo
ROWS_AT_ONCE = 4096
MIN_OBSERVATIONS = 3  # r2 of fewer says nothing
HARDLY_ANY = 0.05  # of rows or pixels inside the area of applicability
GDAL_CACHE = 64  # MB of a worker

parser = FlagParser(prog="predict.py", description=__doc__)
parser.flag(
    "covariates",
    str,
    "none",
    "rasters alone: name=value or name=raster.tif of each covariate of the run; spaces or commas between, or none",
)
parser.flag(
    "input",
    str,
    SIMULATED,
    "table (.xlsx, .csv, .tsv, .parquet) with the run's bands and steps; GeoTIFF with a layer a band and step; folder or "
    "list of GeoTIFFs, one a step; simulated (rows) or simulated_rasters",
)
parser.flag("level", real(0, 1, above=True, below=True), 0.9, "share of new plots that the interval is to cover")
parser.flag(
    "nodata",
    lambda text: text if text == "auto" else real_list(text),
    "auto",
    "numbers that stand for missing values beside those that rasters declare, or none; auto: as in the run",
)
parser.flag("run", str, "newest", "finished run of main: its id, the id's beginning, a folder, or newest")
parser.flag("scheduler", str, "none", "none, or the address of a Dask scheduler, as tcp://host:8786, for rasters")
parser.flag("window", whole(16), 256, "side of the windows of rasters that are computed at once, in pixels")
parser.flag(
    "workers", auto_or(whole(1)), "auto", "processes of one thread, for rasters; auto: one a core, one alone on a GPU"
)
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")


class MapSpec(NamedTuple):
    """What a worker needs to know of a map; hashable and small."""

    run: str
    area: str
    level: float
    device: str
    rasters: SeriesRasters


def main() -> None:
    """Read the run and the input, predict, write."""
    flags = parser.parse_flags()
    device = choose_device(flags.pop("device"))
    refuse_folders_of_others()
    if finished_before(flags):
        return
    folder = find_run("" if flags["run"] == "newest" else flags["run"], "main")
    trained, folds = read_trained(folder), load_folds(folder, device)
    nodata = trained.flags["nodata"] if flags["nodata"] == "auto" else flags["nodata"]
    missing = [float(number) for number in names_in(nodata, "none")]
    add_to_label("predict ", "", [f"run {folder.name[:8]}"])
    say(f"Run: {folder.name}, {describe_run(trained, folds)}")
    name = simulated_rasters() if flags["input"] == SIMULATED_RASTERS else flags["input"]
    if is_raster_input(name, called_from()):
        results = predict_map(flags, name, trained, folds, missing, device)
    else:
        results = predict_table(flags, name, trained, folds, missing, device)
    run = {"folder": folder.name, "model": trained.flags["model"], "study_var": trained.columns.target}
    common = {"operation": "predict", "flags": flags, "run": run, "device": str(device), "versions": versions()}
    write_json(Path("metrics.json"), {**common, **results})
    files = ("predictions.csv", "predictions.parquet", "map.tif", "scatter.png", "map.png")
    say_where_results_are([name for name in files if Path(name).exists()])


def refuse_folders_of_others() -> None:
    """Refuse to write into the folder of another run.

    Raises:
        InputError: it is one.
    """
    for name in ("models", "metrics.json", "predictions.csv"):
        if not Path(name).exists():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(Path("metrics.json").read_text(encoding="utf-8"))["operation"] == "predict":
                return
        raise InputError(f"{Path(name).absolute()} exists and is of another run; start {a_new_run()}")


def describe_run(trained: Trained, folds: Sequence[SavedFold]) -> str:
    """One line on the run that is applied."""
    members = len(folds[0].members)
    return (
        f"{trained.flags['model']} of {trained.columns.target}, {len(folds)} folds x {members} "
        f"member{'s' * (members > 1)}, trained on {trained.table}, {len(np.unique(trained.plots))} plots"
    )


def predict_table(
    flags: Mapping[str, Any],
    name: str,
    trained: Trained,
    folds: list[SavedFold],
    nodata: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """Predict the rows of a table and write what belongs to them; what metrics.json is to say of it.

    Raises:
        InputError: the table cannot be read or does not fit the run.
    """
    if names_in(flags["covariates"], "none"):
        raise InputError(f"covariates={flags['covariates']} is for rasters; a table has its covariates in columns")
    if Path(rasters.IDENTITY).exists():
        raise InputError(f"{Path(rasters.IDENTITY).absolute()} exists and is of another run; start {a_new_run()}")
    table = load_table(name, trained)
    rows = rows_like(table, trained, nodata)
    say(f"Table: {describe_rows(table, rows)}")
    if knows_plots(trained.flags):
        for line in describe_context(trained, rows):
            say(line)
    area = prepare_area(trained, folds, AREA)
    say(describe_area(area))
    predictions = predict_rows(load(trained.folder, AREA, flags["level"], device), rows, knows_plots(trained.flags))
    summary = report(trained, table, predictions)
    write_table(predictions, trained, table, summary, flags["level"])
    return {
        "table": {"name": table.name, "sha256": table.sha256, "simulated": table.simulated},
        "rows": {"used": len(rows.x), "dropped": rows.dropped},
        "summary": summary,
        "area_of_applicability": area,
    }


def load_table(name: str, trained: Trained) -> Table:
    """The table that the flag `input` names.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if name != SIMULATED:
        return read_table(called_from() / name)
    rows = simulate_table(SIMULATED_SEED).sample(SIMULATED_ROWS, random_state=SIMULATED_SEED).sort_index()
    if not {one for step in trained.columns.predictors for one in step} | {*trained.columns.covariates} <= {*rows.columns}:
        raise InputError(
            f"the simulated rows have other columns than {trained.folder.name} was trained on; input=... names a table or "
            f"rasters of the bands {listed(trained.columns.bands)}"
        )
    say("The rows are simulated, of other plots than those of dataset=demo; input=... names a table or rasters")
    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()
    return Table(rows, f"{SIMULATED_ROWS} simulated rows", digest, simulated=True)


def describe_rows(table: Table, rows: NewRows) -> str:
    """One line on what was read."""
    observed = "no observations"
    if rows.observed is not None:
        observed = f"{int(np.isfinite(rows.observed).sum())} with an observation"
    dropped = f", {rows.dropped} dropped for a missing predictor or covariate" if rows.dropped else ""
    return f"{table.name}, {len(rows.x)} rows, {observed}{dropped}"


def describe_context(trained: Trained, rows: NewRows) -> list[str]:
    """Sentences on rows that lack something of what the models know of a row's surroundings."""
    told = []
    plots = rows.names.get("plot", np.full(len(rows.x), ""))
    if "plot" in trained.names and (alone := int((rows_of_plots(plots) == 1).sum())):
        told.append(
            f"Rows of plots with a single row: {alone} of {len(rows.x)}; their own series stands for the mean over the "
            f"plot's years, so that less is known of them"
        )
    for role in ("region", "year"):
        if role not in trained.names:
            continue
        unknown = int((~np.isin(rows.names.get(role, np.full(len(rows.x), "")), trained.names[role])).sum())
        if unknown:
            told.append(
                f"Rows of a {role} that the run does not know: {unknown} of {len(rows.x)}; its effect is unknown, too"
            )
    return told


def describe_area(area: Mapping[str, Any]) -> str:
    """One line on the area of applicability."""
    importance = area["importance"]
    total = sum(importance.values())
    if not total:
        return f"Area of applicability: dissimilarity up to {area['threshold']:.3f}; no band matters, all weigh the same"
    most = sorted(importance, key=lambda name: -importance[name])
    shares = [f"{name} {importance[name] / total:.0%}" for name in most]
    return f"Area of applicability: dissimilarity up to {area['threshold']:.3f}, weighted by importance: {listed(shares)}"


def say_what_unit(trained: Trained) -> None:
    """Name the likeliest reason why everything is unlike the training samples."""
    band, values = trained.columns.bands[0], trained.x[:, 0]
    say(
        f"Hardly anything is like the training samples; are the values in the unit of the run's table, where {band} lies "
        f"between {values.min():g} and {values.max():g}?"
    )


def predict_rows(applied: Applied, rows: NewRows, together: bool) -> pd.DataFrame:
    """A row a sample: its keys, the observation if there are any, and what the run says.

    Args:
        applied: the run.
        rows: to predict.
        together: whether all rows of a plot must be seen at once.
    """
    parts = []
    at_once = len(rows.x) if together else ROWS_AT_ONCE
    with tqdm(total=len(rows.x), desc="Predicting...", unit="row") as bar:
        for start in range(0, len(rows.x), at_once):
            part = slice(start, start + at_once)
            covariates = {name: values[part] for name, values in rows.covariates.items()}
            names = {role: values[part] for role, values in rows.names.items()}
            parts.append(apply(applied, rows.x[part], covariates, names))
            bar.update(parts[-1].shape[1])
    results = dict(zip(RESULTS, np.concatenate(parts, axis=1), strict=True))
    predictions = rows.keys if rows.observed is None else rows.keys.assign(observed=rows.observed)
    sd = predictive_sd(applied.folds, rows.x, rows.covariates, rows.names)
    if sd is not None:
        results["predicted_sd"] = sd
    return predictions.assign(**results).astype({"inside": np.int64})


def report(trained: Trained, table: Table, predictions: pd.DataFrame) -> dict[str, float]:
    """Print what the predictions are like, and how they agree with observations; the figures by name."""
    note = " (simulated)" if table.simulated else ""
    summary = {"inside": float(predictions["inside"].mean()), "mean": float(predictions["mean"].mean())}
    say(f"Inside: {summary['inside']:.4f} of the rows lie in the area of applicability{note}")
    if summary["inside"] < HARDLY_ANY:
        say_what_unit(trained)
    if not np.isfinite(predictions["upper"]).all():
        say("The run has too few plots for an interval of that level; its ends are infinite")
    known = predictions.dropna(subset=["observed"]) if "observed" in predictions else predictions[:0]
    if len(known) < MIN_OBSERVATIONS:
        return summary
    seen = int((known["dissimilarity"] == 0).sum())
    if seen:
        say(
            f"{seen} rows with an observation are samples of the run: some of its models were trained on them, so that the "
            f"figures below flatter; the run's own are those of unseen plots"
        )
    scores = score(known["observed"].to_numpy(), known["mean"].to_numpy())._asdict()
    summary |= {**scores, "coverage": float(known["observed"].between(known["lower"], known["upper"]).mean())}
    for name in (*scores, "coverage"):
        say(f"{name.upper() if name != 'coverage' else 'Coverage'}: {summary[name]:.4f}{note}")
    return summary


def write_table(
    predictions: pd.DataFrame, trained: Trained, table: Table, summary: Mapping[str, float], level: float
) -> None:
    """Write predictions.csv and .parquet, and the scatter plot where there are observations."""
    with whole_file(Path("predictions.csv")) as csv, whole_file(Path("predictions.parquet")) as parquet:
        predictions.to_csv(csv, index=False, float_format="%.9g")
        predictions.to_parquet(parquet, index=False)
    if "r2" in summary:
        known = predictions.dropna(subset=["observed"])
        title = f"{trained.flags['model']}, {trained.columns.target}, {table.name}"
        save_plot(
            intervals(known, level, summary, title, target_of(trained.columns.target, trained.flags["unit"])),
            Path("scatter.png"),
        )


def simulated_rasters() -> str:
    """The folder of the simulated rasters, which are made where they are not there."""
    folder = project_folder() / "data" / "demo_rasters"
    simulate_rasters(folder)
    say(f"The rasters are simulated: {folder}; input=... names your own")
    return str(folder)


def predict_map(
    flags: Mapping[str, Any],
    name: str,
    trained: Trained,
    folds: list[SavedFold],
    nodata: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """Predict the pixels of rasters and write the map; what metrics.json is to say of it.

    Raises:
        InputError: the rasters cannot be read or do not fit the run, or the folder has another map.
    """
    if knows_plots(trained.flags):
        raise InputError(
            f"{trained.folder} is a run of {trained.flags['model']}, which reads the other years of a row's plot, its "
            f"region and year: it predicts the rows of a table, not rasters; a run of another model makes a map"
        )
    series, grid, said = find_rasters(name, called_from(), trained, flags["covariates"], nodata)
    say(f"Rasters: {grid.width} x {grid.height} pixels of {grid.transform.a:g}, {grid.crs.to_string()}. {'. '.join(said)}")
    simulated = flags["input"] == SIMULATED_RASTERS or is_simulated(Path(series.predictors[0][0].file))
    output = map_output("" if trained.flags["unit"] == "auto" else trained.flags["unit"])
    identity = {
        "run": trained.folder.name if flags["run"] == "newest" else flags["run"],
        "run_sha256": digest_of_files([*sorted(trained.folder.glob("models/*.safetensors")), trained.folder / SAMPLES]),
        **{flag: flags[flag] for flag in ("input", "covariates", "level", "nodata")},
        "input_sha256": series.digest(),
    }
    rasters.begin_map(Path(), [output], identity)
    # A resumed map uses the same area of applicability.
    area = read_tensors(AREA)[1] if AREA.exists() else prepare_area(trained, folds, AREA)
    say(describe_area(area))
    spec = MapSpec(str(trained.folder.resolve()), str(AREA.resolve()), flags["level"], str(device), series)
    windows = windows_by_blocks(series, grid, flags["window"])
    tags = {name: str(value) for name, value in identity.items()}
    tags |= {"model": trained.flags["model"], "study_var": trained.columns.target, "threshold": str(area["threshold"])}
    count = flags["workers"] or (1 if device.type == "cuda" else torch.get_num_threads())
    started = time.perf_counter()
    with rasters.workers(count, "" if flags["scheduler"] == "none" else flags["scheduler"]) as run:
        rasters.write_map(Path(), grid, [output], windows, functools.partial(run, build_mapper, spec), identity, tags)
    seconds = time.perf_counter() - started
    summary = summarise(trained, Path(output.file), grid, seconds, " (simulated)" if simulated else "")
    title = f"{trained.flags['model']}, {Path(name).name}{' (simulated)' if simulated else ''}"
    target = target_of(trained.columns.target, trained.flags["unit"])
    save_plot(quick_look(Path(output.file), title, target, area["threshold"], flags["level"]), Path("map.png"))
    return {"input": {**identity, "simulated": simulated}, "summary": summary, "area_of_applicability": area}


def map_output(unit: str) -> Output:
    """The map's file: a layer for each result, of which the first four are in the target's unit."""
    layers = tuple(Layer(name, unit if name in ("mean", "spread", "lower", "upper") else "") for name in RESULTS)
    return Output("map.tif", layers, "float32", np.nan)


def build_mapper(spec: MapSpec) -> Callable[[Window], tuple[NDArray[np.float32]]]:
    """What a worker computes a window by: the layers (result, row, column), nan where a pixel has no values."""
    applied = load(Path(spec.run), Path(spec.area), spec.level, torch.device(spec.device))
    opened: dict[str, Any] = {}

    def compute(window: Window) -> tuple[NDArray[np.float32]]:
        with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE):
            pixels = read_pixels(spec.rasters, window, opened)
        layers = np.full((len(RESULTS), window.height, window.width), np.nan, dtype=np.float32)
        if len(pixels.x):
            layers[:, pixels.valid] = apply(applied, pixels.x, pixels.covariates)
        return (layers,)

    return compute


def summarise(trained: Trained, path: Path, grid: Grid, seconds: float, note: str) -> dict[str, float]:
    """Print what a map is like; the figures by name."""
    mapped, inside, total = 0, 0.0, 0.0
    with rasterio.open(path) as raster:
        for _, window in raster.block_windows(1):
            mean, is_inside = raster.read([RESULTS.index("mean") + 1, RESULTS.index("inside") + 1], window=window)
            known = ~np.isnan(mean)
            mapped += int(known.sum())
            inside += float(is_inside[known].sum(dtype=np.float64))
            total += float(mean[known].sum(dtype=np.float64))
    pixels = grid.height * grid.width
    say(f"Pixels: {mapped} of {pixels} have all values and are mapped{note}")
    if not mapped:
        return {"pixels": 0, "seconds": seconds}
    say(f"Mean: {total / mapped:.4f}{note}")
    say(f"Inside: {inside / mapped:.4f} of the pixels lie in the area of applicability{note}")
    if inside < HARDLY_ANY * mapped:
        say_what_unit(trained)
    return {"pixels": mapped, "mean": total / mapped, "inside": inside / mapped, "seconds": seconds}


if __name__ == "__main__":
    # By the module's name, by which workers find its types: Guild runs a script within a `__main__` of its own.
    import predict

    run_or_explain(predict.main)
