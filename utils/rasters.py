"""Maps of any size, window by window, on the cores of one machine or on a Dask cluster, to cloud-optimised GeoTIFFs.

An operation says what one window holds; everything that two operations do alike with windows is here:

    def build(spec):                         once in each worker: load the model that the spec names
        return lambda window: (array, ...)   (layer, row, column) of each output

    with workers(count, scheduler) as run:
        write_map(folder, grid, outputs, windows_of(grid, 512), partial(run, build, spec), identity, tags)

A window's arrays are kept in a file of its own as soon as they are there. A map that was killed, at whatever moment, goes
on with the windows that it lacks, to the same pixels. `map.json` says what a folder's map is made from; a folder with
the map of something else is refused.
"""

import contextlib
import ctypes
import errno
import functools
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.features
import rasterio.shutil
import rasterio.warp
import torch
from numpy.typing import NDArray
from rasterio import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.windows import Window
from tqdm import tqdm

from utils.cluster import cluster
from utils.errors import InputError
from utils.runs import a_new_run, how_to_resume, refuse_other_flags, whole_file, write_json

IDENTITY = "map.json"
BLOCKS = "blocks"  # folder of the windows that are done
TILE = 512  # pixels of a side of the tiles in the GeoTIFFs
GDAL_CACHE = 256  # MB
AHEAD = 2  # windows submitted for each worker
EDGE = 1e-6  # pixels that an area's edge may be off
PR_SET_PDEATHSIG = 1  # of sys/prctl.h

Task = Any
Build = Callable[[Any], Callable[[Task], Any]]


class Grid(NamedTuple):
    """A raster's pixels: coordinate system, upper-left corner and pixel size, rows, columns."""

    crs: CRS
    transform: Affine
    height: int
    width: int

    def finer(self, factor: int) -> "Grid":
        """The grid with each pixel cut in `factor` x `factor`."""
        return Grid(self.crs, self.transform @ Affine.scale(1 / factor), self.height * factor, self.width * factor)

    def part(self, window: Window) -> "Grid":
        """The grid of a window."""
        corner = Affine.translation(window.col_off, window.row_off)
        return Grid(self.crs, self.transform @ corner, window.height, window.width)


class Layer(NamedTuple):
    """A band of a map: its name, what it says, the unit after multiplying by the scale."""

    name: str
    unit: str = ""
    scale: float = 1.0


class Output(NamedTuple):
    """A GeoTIFF of a map.

    Attributes:
        file: its name.
        layers: its bands.
        dtype: of all of them.
        nodata: value of pixels without one; None if all have one.
        factor: pixels along a pixel of the map's grid.
        resampling: of the overviews: average, or mode or nearest for classes and counts.
    """

    file: str
    layers: tuple[Layer, ...]
    dtype: str
    nodata: float | None
    factor: int = 1
    resampling: str = "average"


Run = Callable[[Build, Any, Iterable[Task]], Iterator[tuple[Task, Any]]]
"""What `workers` gives: tasks with their results as they come, by the function that each worker builds from the spec."""


def windows_of(grid: Grid, size: int) -> list[Window]:
    """Windows of `size` x `size` pixels from the upper-left corner on, row by row; the last ones may be smaller."""
    corners = itertools.product(range(0, grid.height, size), range(0, grid.width, size))
    return [Window(column, row, min(size, grid.width - column), min(size, grid.height - row)) for row, column in corners]


def area_window(area: str, grid: Grid, folder: Path) -> Window:
    """The pixels of a grid that an area touches.

    Args:
        area: `all`; left, bottom, right and top in the grid's coordinates, separated by commas or spaces; or a GeoJSON
            file (longitude and latitude, as RFC 7946 has it), of which the rectangle around all is taken.
        grid: the grid.
        folder: that a relative path counts from.

    Raises:
        InputError: the area is neither, or lies outside.
    """
    if area == "all":
        return Window(0, 0, grid.width, grid.height)
    try:
        left, bottom, right, top = (float(part) for part in area.replace(",", " ").split())
    except ValueError:
        left, bottom, right, top = _bounds_of_geojson(folder / area, grid.crs)
    to_pixels = ~grid.transform
    (first, start), (last, end) = to_pixels * (left, top), to_pixels * (right, bottom)
    columns = max(0, math.floor(first + EDGE)), min(grid.width, math.ceil(last - EDGE))
    rows = max(0, math.floor(start + EDGE)), min(grid.height, math.ceil(end - EDGE))
    if columns[0] >= columns[1] or rows[0] >= rows[1]:
        there = " ".join(f"{part:.0f}" for part in rasterio.transform.array_bounds(grid.height, grid.width, grid.transform))
        raise InputError(
            f"area={area} ({left:.0f} {bottom:.0f} {right:.0f} {top:.0f}) holds no pixel; left, bottom, right, top within "
            f"{there} ({grid.crs.to_string()}) are expected"
        )
    return Window(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])


def degrees_of(area: str, folder: Path) -> tuple[float, float, float, float] | None:
    """West, south, east and north of an area in degrees, if it is a GeoJSON file, whatever the grid.

    Raises:
        InputError: the file is none.
    """
    return _bounds_of_geojson(folder / area, CRS.from_epsg(4326)) if (folder / area).is_file() else None


def _bounds_of_geojson(path: Path, crs: CRS) -> tuple[float, float, float, float]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return rasterio.warp.transform_bounds("EPSG:4326", crs, *rasterio.features.bounds(document))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RasterioError) as error:
        raise InputError(
            f"area={path.name} is neither all nor four numbers (left, bottom, right, top) nor a GeoJSON file: {error}"
        ) from error


@contextlib.contextmanager
def workers(count: int, scheduler: str = "") -> Iterator[Run]:
    """Workers of one thread each: `count` processes of this machine, this process alone if 1, or a Dask cluster's.

    The threads are one each so that a window's arithmetic, and with it the last bit of its result, is the same whoever
    computes it. Functions and specs travel to other processes: functions by name, from a module or script of this
    project; specs must be hashable and small (the path of a model, not the model). Of a Dask cluster, whose machines must
    see the same files and have this project on their PYTHONPATH, the windows of a worker that dies are done again by
    another.

    Args:
        count: processes of this machine, without effect on a cluster.
        scheduler: address of a Dask scheduler, as tcp://host:8786, or nothing.

    Raises:
        InputError: the cluster cannot be reached or has no worker, or a worker of this machine was ended.
    """
    if scheduler:
        with _cluster(scheduler) as run:
            yield run
    elif count == 1:
        threads = torch.get_num_threads()
        try:
            yield lambda build, spec, tasks: ((task, _do(_name(build), spec, task)) for task in tasks)
        finally:
            _built.cache_clear()
            torch.set_num_threads(threads)
    else:
        # Not forked: libraries loaded here may hold threads, which a fork would leave half alive.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
        try:
            yield functools.partial(_bounded, pool, lambda: AHEAD * count)
        except BrokenProcessPool as error:
            raise InputError(
                f"the system ended a worker, probably because memory ran out; resume with fewer workers or a smaller "
                f"window: {how_to_resume()}"
            ) from error
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(scheduler: str) -> Iterator[Run]:
    from distributed import KilledWorker

    with cluster(scheduler) as client:
        try:
            limit = lambda: AHEAD * max(1, sum(client.nthreads().values()))  # noqa: E731
            yield functools.partial(_bounded, client.get_executor(pure=False), limit)
        except KilledWorker as error:
            raise InputError(
                f"several workers of {scheduler} died of the same window, probably because memory ran out; resume with a "
                f"smaller window or more memory: {how_to_resume()}"
            ) from error


def _bounded(
    pool: Executor, limit: Callable[[], int], build: Build, spec: Any, tasks: Iterable[Task]
) -> Iterator[tuple[Task, Any]]:
    """Results as they come, with no more than `limit()` tasks under way at once."""
    left, waiting, name = iter(tasks), dict[Future[Any], Task](), _name(build)
    while True:
        for task in itertools.islice(left, max(0, limit() - len(waiting))):
            waiting[pool.submit(_do, name, spec, task)] = task
        if not waiting:
            return
        for done in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(done), done.result()


def _begin_worker(run: int) -> None:
    # The run decides what an interrupt means; when it is gone, however it ended, so is this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != run:
        os._exit(1)


_building = threading.Lock()


def _name(build: Build) -> str:
    """Module and name of a function, of a script under the name that it is imported by."""
    module = build.__module__ if build.__module__ != "__main__" else Path(inspect.getfile(build)).stem
    return f"{module}:{build.__qualname__}"


@functools.lru_cache(maxsize=2)
def _built(name: str, spec: Any) -> Callable[[Task], Any]:
    torch.set_num_threads(1)
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(spec)


def _do(name: str, spec: Any, task: Task) -> Any:
    with _building:  # a worker of a cluster may have several threads
        function = _built(name, spec)
    return function(task)


def begin_map(folder: Path, outputs: Sequence[Output], identity: Mapping[str, Any]) -> None:
    """Make a folder that of a map, or see that it is.

    Args:
        folder: of the outputs.
        outputs: to be written.
        identity: what the map's pixels depend on: flags, and digests of the model and of the inputs.

    Raises:
        InputError: the folder has a map of another identity, or a file in the place of an output.
    """
    path = folder / IDENTITY
    if path.exists():
        refuse_other_flags(path.absolute(), json.loads(path.read_text(encoding="utf-8")), identity)
        return
    present = [output.file for output in outputs if (folder / output.file).exists()]
    if present:
        raise InputError(f"{folder / present[0]} exists and is of another map; remove it, or start {a_new_run()}")
    shutil.rmtree(folder / BLOCKS, ignore_errors=True)  # nobody knows of which map
    write_json(path, identity)


def write_map(
    folder: Path,
    grid: Grid,
    outputs: Sequence[Output],
    windows: Sequence[Window],
    results: Callable[[Iterable[Window]], Iterable[tuple[Window, Sequence[NDArray[Any]]]]],
    identity: Mapping[str, Any],
    tags: Mapping[str, str],
    label: str = "Mapping...",
) -> None:
    """Write the outputs of a map that are not there yet.

    Args:
        folder: where to.
        grid: of the windows.
        outputs: the files.
        windows: that cover the grid.
        results: computes windows: each with an array (layer, row, column) for each output.
        identity: what the map's pixels depend on: flags, and digests of the model and of the inputs.
        tags: of the files.
        label: of the progress bar.

    Raises:
        InputError: the folder has another map, or cannot be written to, for a full disk say.
    """
    begin_map(folder, outputs, identity)
    missing = [output for output in outputs if not (folder / output.file).exists()]
    blocks = folder / BLOCKS / Path(outputs[0].file).stem
    if missing:
        left = [window for window in windows if not _block(blocks, window).exists()]
        with tqdm(total=len(windows), initial=len(windows) - len(left), desc=label, unit="window") as bar:
            for window, arrays in results(left):
                _write_block(_block(blocks, window), window, outputs, arrays)
                bar.update()
        for output in missing:
            _write_output(folder / output.file, grid, output, outputs.index(output), windows, blocks, tags)
    shutil.rmtree(blocks, ignore_errors=True)
    with contextlib.suppress(OSError):  # those of another map of this folder may be there
        blocks.parent.rmdir()


def _block(blocks: Path, window: Window) -> Path:
    return blocks / f"{window.row_off}_{window.col_off}_{window.height}_{window.width}.npz"


def _write_block(path: Path, window: Window, outputs: Sequence[Output], arrays: Sequence[NDArray[Any]]) -> None:
    for output, array in zip(outputs, arrays, strict=True):
        expected = (len(output.layers), window.height * output.factor, window.width * output.factor)
        assert (array.shape, array.dtype.name) == (expected, output.dtype), (output.file, array.shape, array.dtype)
    with whole_file(path) as beside:
        np.savez_compressed(beside, *arrays)


def _write_output(
    path: Path, grid: Grid, output: Output, number: int, windows: Sequence[Window], blocks: Path, tags: Mapping[str, str]
) -> None:
    """Join the blocks in a tiled GeoTIFF, and that translated into a cloud-optimised one, whole."""
    factor, fine, tiled = output.factor, grid.finer(output.factor), blocks / output.file
    profile: dict[str, Any] = fine._asdict() | {"dtype": output.dtype, "nodata": output.nodata, "count": len(output.layers)}
    profile |= {"compress": "deflate", "zlevel": 1, "tiled": True, "blockxsize": TILE, "blockysize": TILE}
    cog = {"driver": "COG", "compress": "DEFLATE", "predictor": "YES", "blocksize": TILE, "bigtiff": "IF_SAFER"}
    tiled.unlink(missing_ok=True)
    with whole_file(path) as beside, _gdal_errors(), rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE):
        with rasterio.open(tiled, "w", driver="GTiff", bigtiff="IF_SAFER", **profile) as raster:
            for window in tqdm(windows, f"Writing {output.file}...", unit="window", leave=False):
                place = Window(*(factor * part for part in window.flatten()))
                with np.load(_block(blocks, window)) as arrays:
                    raster.write(arrays[f"arr_{number}"], window=place)
            raster.descriptions = [layer.name for layer in output.layers]
            raster.units = [layer.unit for layer in output.layers]
            raster.scales = [layer.scale for layer in output.layers]
            raster.update_tags(**tags)
        rasterio.shutil.copy(tiled, beside, overview_resampling=output.resampling, **cog)
        with rasterio.open(beside) as raster:
            # What it could not write as it closed the file, GDAL does not say: that shows in reading.
            for _, window in raster.block_windows(1):
                raster.read(window=window)
    tiled.unlink()


@contextlib.contextmanager
def _gdal_errors() -> Iterator[None]:
    """A block that writes files by GDAL, whose several errors become one that says what mostly is the matter."""
    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        raise OSError(errno.EIO, f"the disk may be full ({error})") from error
