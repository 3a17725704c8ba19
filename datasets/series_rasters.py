"""Rasters of satellite time series, to which a finished run of main is applied pixel by pixel.

A series is one GeoTIFF with a layer for each band and step, or one GeoTIFF a step with a layer for each band. All lie on one
grid and hold the units of the table that the run was trained on.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags
from rasterio.errors import RasterioError
from rasterio.windows import Window

from datasets.finished_run import Covariates, Trained, check_categories
from datasets.series_table import PREDICTOR, listed
from utils.errors import InputError
from utils.flags import names_in
from utils.rasters import Grid

RASTER_ENDINGS = (".tif", ".tiff", ".vrt", ".jp2", ".img")
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_]?(0[1-9]|1[0-2])[-_]?(0[1-9]|[12]\d|3[01])(?!\d)")


class Layer(NamedTuple):
    """A layer of a file; layers count from 1."""

    file: str
    number: int


class SeriesRasters(NamedTuple):
    """A raster of series; hashable and small, so that it travels to workers.

    Attributes:
        predictors: (band, step) layers.
        covariates: name to layer, or to the value of all pixels.
        nodata: further numbers that stand for missing values, beside what the files declare.
    """

    predictors: tuple[tuple[Layer, ...], ...]
    covariates: tuple[tuple[str, Layer | float | str], ...]
    nodata: tuple[float, ...]

    def digest(self) -> str:
        """Of which files, of what size and time, in which order; not of their pixels, whose reading would take long."""
        files = {layer.file for layers in self.predictors for layer in layers}
        files |= {one.file for _, one in self.covariates if isinstance(one, Layer)}
        states = [(Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in sorted(files)]
        numbers = [(Path(one.file).name, one.number) for layers in self.predictors for one in layers]
        return hashlib.sha256(repr((states, numbers, self.nodata)).encode()).hexdigest()


def is_raster_input(text: str, folder: Path) -> bool:
    """Whether an input is rasters: a folder, or names of raster files."""
    return (folder / text).is_dir() or all(Path(name).suffix.lower() in RASTER_ENDINGS for name in _names(text, folder))


def _names(text: str, folder: Path) -> list[str]:
    """Names in a list, or the only one, which may have spaces."""
    return [text] if (folder / text).exists() else names_in(text, "")


def find_rasters(
    text: str, folder: Path, trained: Trained, covariates: str, nodata: Sequence[float]
) -> tuple[SeriesRasters, Grid, list[str]]:
    """The layers of an input that hold the run's bands and steps, and its covariates.

    Bands are found by the layers' descriptions (`<band>_<step>` in one file, `<band>` in one a step) where any layer has
    one, else the layers are taken to be in the run's order. Files of a step each are in the order of the dates in
    their names; a list without dates keeps its own.

    Args:
        text: a GeoTIFF, a folder, or a list of files separated by spaces or commas.
        folder: that relative paths count from.
        trained: the run.
        covariates: name=value and name=raster of each covariate, separated by spaces or commas.
        nodata: further numbers that stand for missing values.

    Returns:
        The layers, their common grid, and what should be said of how they were read.

    Raises:
        InputError: files, layers, dates or covariates are not those of the run, or the grids differ.
    """
    bands, steps = trained.columns.bands, trained.columns.steps
    files, said = _files(text, folder, len(steps))
    grid = _grid_of(files[0])
    if len(files) == 1 and len(steps) > 1:
        wanted = [f"{band}_{step}" for step in steps for band in bands]
        numbers, by_name = _layers(files[0], wanted)
        predictors = [[Layer(str(files[0]), numbers[f"{band}_{step}"]) for step in steps] for band in bands]
        order = "the layers' descriptions" if by_name else f"the order {listed(wanted)}"
    else:
        found = [_layers(file, bands) for file in files]
        predictors = [[Layer(str(file), one[band]) for file, (one, _) in zip(files, found, strict=True)] for band in bands]
        order = "the layers' descriptions" if all(by_name for _, by_name in found) else f"the order {listed(bands)}"
    said.append(f"Bands and steps by {order}")
    others = _find_covariates(covariates, folder, trained)
    for file in [*files[1:], *(Path(one.file) for one in others.values() if isinstance(one, Layer))]:
        _refuse_other_grid(file, grid, files[0])
    return SeriesRasters(tuple(map(tuple, predictors)), tuple(others.items()), tuple(nodata)), grid, said


def _files(text: str, folder: Path, steps: int) -> tuple[list[Path], list[str]]:
    """The files in the order of the steps, and what should be said of it."""
    if (folder / text).is_dir():
        files = sorted(path for path in (folder / text).iterdir() if path.suffix.lower() in RASTER_ENDINGS)
    else:
        files = [folder / name for name in _names(text, folder)]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise InputError(f"{absent[0]} does not exist; a GeoTIFF, a folder or a list of GeoTIFFs is expected")
    if len(files) == 1:
        return files, []
    if len(files) != steps:
        raise InputError(f"input={text} holds {len(files)} rasters, but the run was trained on {steps} steps, a raster each")
    dates = ["-".join(match.groups()) if (match := DATE.search(file.name)) else "" for file in files]
    if not all(dates):
        if (folder / text).is_dir():
            raise InputError(
                f"{files[dates.index('')]} has no date in its name, such as 20240612 or 2024-06-12; a list in input=... "
                f"gives the order of files without dates"
            )
        return files, ["Rasters in the order of the list, for not all have a date in their name"]
    twice = next((date for date in dates if dates.count(date) > 1), None)
    if twice:
        raise InputError(f"input={text} has several rasters of {twice}; one a step is expected")
    ordered = sorted(zip(dates, files, strict=True))
    return [file for _, file in ordered], [
        f"{len(files)} rasters from {ordered[0][0]} to {ordered[-1][0]}, in the order of their dates"
    ]


def _open(file: Path) -> Any:
    try:
        return rasterio.open(file)
    except RasterioError as error:
        raise InputError(f"{file} cannot be read as a raster: {error}") from error


def _grid_of(file: Path) -> Grid:
    with _open(file) as raster:
        if raster.crs is None:
            raise InputError(f"{file} has no coordinate system")
        return Grid(raster.crs, raster.transform, raster.height, raster.width)


def _refuse_other_grid(file: Path, grid: Grid, first: Path) -> None:
    own = _grid_of(file)
    if own.crs != grid.crs:
        raise InputError(f"{file} is in {own.crs.to_string()}, {first.name} in {grid.crs.to_string()}; one grid is expected")
    size, expected = (own.width, own.height), (grid.width, grid.height)
    if size != expected or not own.transform.almost_equals(grid.transform, precision=1e-6 * abs(grid.transform.a)):
        raise InputError(
            f"{file} lies on another grid than {first.name}: {size[0]} x {size[1]} pixels of {own.transform.a:g} from "
            f"{own.transform.c:.10g} {own.transform.f:.10g}, not {expected[0]} x {expected[1]} of {grid.transform.a:g} from "
            f"{grid.transform.c:.10g} {grid.transform.f:.10g}"
        )


def _layers(file: Path, wanted: Sequence[str]) -> tuple[dict[str, int], bool]:
    """The number of each layer that is wanted, and whether by its description."""
    with _open(file) as raster:
        descriptions, count = raster.descriptions, raster.count
    if not any(descriptions):
        if count != len(wanted):
            raise InputError(
                f"{file} has {count} layers without descriptions, but the run was trained on {len(wanted)} of them "
                f"({listed(wanted)})"
            )
        return {name: number for number, name in enumerate(wanted, start=1)}, False
    named: dict[str, int] = {}
    for number, description in enumerate(descriptions, start=1):
        name = (description or "").strip()
        match = PREDICTOR.fullmatch(name) if name not in wanted else None
        name = f"{match[1]}_{int(match[2])}" if match else name
        if name in wanted and name in named:
            raise InputError(f"{file} has the layer {name!r} more than once")
        named[name] = number
    absent = [name for name in wanted if name not in named]
    if absent:
        raise InputError(
            f"{file} has no layer {listed(map(repr, absent))}, which the run was trained on; its layers are "
            f"{listed(name or 'one without a description' for name in named)}"
        )
    return {name: named[name] for name in wanted}, True


def _find_covariates(text: str, folder: Path, trained: Trained) -> dict[str, Layer | float | str]:
    given: dict[str, str] = {}
    for part in names_in(text, "none"):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"covariates: {part!r} is not name=value or name=raster.tif")
        given[name.strip()] = value.strip()
    unknown = [name for name in given if name not in trained.columns.covariates]
    if unknown:
        known = ", ".join(trained.columns.covariates) or "none"
        raise InputError(f"covariates: the run was not trained on {unknown[0]!r}; its covariates are: {known}")
    found: dict[str, Layer | float | str] = {}
    for name in trained.columns.covariates:
        if name not in given:
            what = "a category" if name in trained.categories else "a number or raster"
            raise InputError(
                f"the run was trained on the covariate {name!r}; covariates='{name}=...' with {what} is expected"
            )
        value = given[name]
        if name in trained.categories:
            check_categories(trained, name, [value], "covariates")
            found[name] = value
        elif Path(value).suffix.lower() in RASTER_ENDINGS:
            with _open(folder / value) as raster:
                if raster.count != 1:
                    raise InputError(f"{folder / value} has {raster.count} layers; a covariate is one")
            found[name] = Layer(str(folder / value), 1)
        else:
            try:
                found[name] = float(value)
            except ValueError:
                raise InputError(f"covariates: {name}={value} is neither a number nor a raster") from None
    return found


def windows_by_blocks(rasters: SeriesRasters, grid: Grid, size: int) -> list[Window]:
    """Windows of about `size` x `size` pixels, of whole rows where the file is stored by rows, so that each is read once."""
    with _open(Path(rasters.predictors[0][0].file)) as raster:
        height, width = raster.block_shapes[0]
    if width < grid.width:
        rows, columns = size, size
    else:
        rows, columns = max(1, size * size // grid.width // height) * height, grid.width
    return [
        Window(column, row, min(columns, grid.width - column), min(rows, grid.height - row))
        for row in range(0, grid.height, rows)
        for column in range(0, grid.width, columns)
    ]


class Pixels(NamedTuple):
    """The pixels of a window that have all values.

    Attributes:
        valid: (row, column) which they are.
        x: (pixel, band, step) float32.
        covariates: of the pixels.
    """

    valid: NDArray[np.bool_]
    x: NDArray[np.float32]
    covariates: Covariates


def read_pixels(rasters: SeriesRasters, window: Window, opened: dict[str, Any]) -> Pixels:
    """Read a window; pixels without a value in any layer are left out.

    Args:
        rasters: the series.
        window: of their grid.
        opened: the files that are open, by name, to which those are added that are not.

    Raises:
        InputError: a file cannot be read.
    """
    valid = np.ones((window.height, window.width), dtype=bool)
    steps = len(rasters.predictors[0])
    values = np.empty((len(rasters.predictors), steps, window.height, window.width), dtype=np.float32)
    places: dict[str, list[tuple[int, int, int]]] = {}
    for band, steps_of_band in enumerate(rasters.predictors):
        for step, layer in enumerate(steps_of_band):
            places.setdefault(layer.file, []).append((layer.number, band, step))
    for file, numbers in places.items():
        layers, missing = _read(file, [number for number, _, _ in numbers], window, opened, rasters.nodata)
        valid &= ~missing
        for data, (_, band, step) in zip(layers, numbers, strict=True):
            values[band, step] = data
    covariates: dict[str, NDArray[Any]] = {}
    for name, one in rasters.covariates:
        if isinstance(one, Layer):
            layers, missing = _read(one.file, [one.number], window, opened, rasters.nodata)
            valid &= ~missing
            covariates[name] = layers[0].astype(np.float64)
        else:
            covariates[name] = np.full(valid.shape, one)
    x = np.ascontiguousarray(values.reshape(-1, valid.size)[:, valid.ravel()].T)
    x = x.reshape(-1, len(rasters.predictors), steps)
    return Pixels(valid, x, {name: layer[valid] for name, layer in covariates.items()})


def _read(
    file: str, numbers: list[int], window: Window, opened: dict[str, Any], nodata: Sequence[float]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Layers (layer, row, column) of a file, and where any of them has no value."""
    try:
        raster = opened[file] if file in opened else opened.setdefault(file, rasterio.open(file))
        layers = raster.read(numbers, window=window)
        missing = np.zeros(layers.shape[1:], dtype=bool)
        if any(MaskFlags.per_dataset in flags for flags in raster.mask_flag_enums):
            missing |= raster.dataset_mask(window=window) == 0
    except RasterioError as error:
        raise InputError(f"{file} cannot be read, it may be truncated: {error}") from error
    declared = {raster.nodatavals[number - 1] for number in numbers} - {None}
    for value in {*declared, *nodata}:
        missing |= (layers == value).any(0)
    if np.issubdtype(layers.dtype, np.floating):
        missing |= ~np.isfinite(layers).all(0)
    return layers, missing
