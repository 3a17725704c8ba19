"""Operation canopy-map: height maps of any size from a year of images, by the network of a finished canopy run.

Dates are chosen for each cell of a fixed grid, as Kalinicheva et al. choose them (THREASURE-Net, Remote Sensing of
Environment 2026); windows of computing are independent of the cells. A map that was interrupted goes on with the
windows that it lacks.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, NODATA, SIMULATED
from datasets.canopy.demo import demo_root
from datasets.canopy.image_series import (
    CLOUD,
    MISSING,
    WATER,
    ImageSeries,
    Limits,
    SeriesReader,
    choose_dates,
    find_series,
    grown,
)
from datasets.canopy.tiles import Statistics, standardise
from models.threasure_net import QUERY_DAY, ThreasureNet, make_network
from utils import processes, rasters
from utils.canopy import maps
from utils.cluster import cluster
from utils.errors import InputError
from utils.finished_runs import find_run
from utils.flags import FlagParser, auto_or, one_of, real, whole, yes_no
from utils.plots import save_plot
from utils.rasters import Layer, Output
from utils.runs import (
    add_to_label,
    called_from,
    choose_device,
    explaining_out_of_memory,
    keep_freed_memory,
    project_folder,
    read_tensors,
    run_or_explain,
    say,
    versions,
    write_json,
)

ALIGNMENT = 16  # image pixels that a window grows at most to fit a network's halvings
UNKNOWN = 255  # nodata of the layers of uint8
CHECKPOINTS = ("best", "second_best", "last")  # in use for the spread
CHOSEN = Path("dates.json")
CELLS = Path("cells")  # folder of the choices of single cells until all are there
# What a map depends on, beside model, images and area.
DATE_FLAGS = ("cell", "max_cloud", "max_dates", "max_missing", "min_dates", "min_valid")
IDENTITY_FLAGS = (*DATE_FLAGS, "delta_day", "precision", "uncertainty", "window")

DATES_OUTPUT = Output(
    "dates.tif",
    (Layer("dates"), Layer("water", "%"), Layer("cloud", "%"), Layer("no data", "%")),
    "uint8",
    UNKNOWN,
    resampling="nearest",
)

parser = FlagParser(prog="canopy_map.py", description=__doc__)
parser.flag("area", str, "all", "all, or the part to map: left,bottom,right,top in the images' grid, or a GeoJSON file")
parser.flag("cell", whole(16, 2048), 512, "side of a cell, whose pixels are mapped from the same dates, in image pixels")
parser.flag("delta_day", whole(-183, 182), 0, "days from 2 July to the day of the year that heights are mapped for")
parser.flag("images", str, "simulated", "folder or list of dated 10-band GeoTIFFs, or simulated")
parser.flag("max_cloud", real(0, 100), 10, "percent, maximum share of cloud in an image of a cell")
parser.flag("max_dates", auto_or(whole(1)), "auto", "maximum number of images of a cell; auto: as in training")
parser.flag("max_missing", real(0, 100), 1, "percent, maximum share of pixels without data in an image of a cell")
parser.flag("min_dates", auto_or(whole(1)), "auto", "minimum number of clear dates of a pixel; auto: as in training")
parser.flag("min_valid", real(0, 100), 99, "percent, minimum share of clear land or water in an image of a cell")
parser.flag("precision", one_of("auto", "32", "bf16"), "auto", "32, bf16, or auto: bf16 if the hardware multiplies it")
parser.flag("run", str, "newest", "finished canopy run: id or its beginning, folder, or newest")
parser.flag("scheduler", str, "none", "none, or the address of a Dask scheduler, as tcp://host:8786")
parser.flag("uncertainty", yes_no, "no", "yes/no, a layer of the spread over checkpoints and over subsets of the dates")
parser.flag("window", whole(16), 256, "side of the windows that are computed at once, in image pixels")
parser.flag("workers", auto_or(whole(1)), "auto", "processes of one thread; auto: one a core, one alone on a GPU")
parser.flag("year", auto_or(whole(1900)), "auto", "year of the images; auto: all are of one")
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")


class Spec(NamedTuple):
    """What workers need to know; hashable and small, for it travels with each window.

    Attributes:
        series: the images.
        area: first row and column, rows and columns that are mapped, in image pixels; windows count from its corner.
        cell: side of the cells in image pixels; they count from the images' corner.
        reach: image pixels around a window that its heights depend on.
        limits: of the images of a cell.
        weights: files of weights; the map is of the first one's heights, the others add to the spread.
        day: day of the year that heights are mapped for.
        precision: 32 or bf16.
        device: as in the flag.
        kept_strips: strips of an image that are kept (see `SeriesReader`).
        folder: of the map.
        on_cluster: whether workers are a Dask cluster's.
    """

    series: ImageSeries
    area: tuple[int, int, int, int]
    cell: int
    reach: int
    limits: Limits
    weights: tuple[str, ...]
    day: int
    precision: str
    device: str
    kept_strips: int
    folder: str
    on_cluster: bool

    def in_images(self, window: Window) -> Window:
        """A window of the map in pixels of the images."""
        return Window(window.col_off + self.area[1], window.row_off + self.area[0], window.width, window.height)


def main() -> None:
    """Choose the dates, map the heights, write what belongs to the map."""
    flags = parser.parse_flags()
    device_name = flags.pop("device")
    device = choose_device(device_name)
    changed = parser.changed(flags, ("area", "delta_day", "uncertainty", "precision"))
    run_folder = find_run("" if flags["run"] == "newest" else flags["run"], "canopy")
    weights = weights_of(run_folder, flags["uncertainty"])
    _, record = read_tensors(Path(weights[0]))
    resolve_auto_flags(flags, record, device)
    add_to_label(f"{flags['images']} by ", f"by {flags['run']}", changed)
    say(f"Run: {run_folder}, {record['resolution']:g} m{' (trained on simulated tiles)' if record['simulated'] else ''}")
    images, simulated = images_of(flags["images"])
    if simulated:
        say(f"The images are simulated: {images}")
    series = find_series(images, called_from(), flags["year"], record["angles"], say)
    area = rasters.area_window(flags["area"], series.grid, called_from())
    net = network_of(record)
    outputs = height_outputs(net.factor, flags["uncertainty"])
    spec = spec_of(flags, series, area, net.reach, weights, device_name)
    identity: dict[str, Any] = {"run": run_folder.name, **{name: flags[name] for name in IDENTITY_FLAGS}, "area": spec.area}
    identity |= {"weights_sha256": digest_of(weights), "images_sha256": series.digest()}
    rasters.begin_map(Path(), [DATES_OUTPUT, *outputs], identity)
    tags = {
        "model": f"THREASURE-Net, {record['resolution']:g} m",
        "run": run_folder.name,
        "weights_sha256": identity["weights_sha256"],
        "images": f"{len(series.images)} images of {series.images[0].day} to {series.images[-1].day}",
        "images_sha256": identity["images_sha256"],
        "day_of_year": str(spec.day + 1),
    }
    tags |= {"note": "simulated"} if simulated or record["simulated"] else {}
    started = time.perf_counter()
    grid = series.grid.part(area)
    windows = rasters.windows_of(grid, flags["window"])
    with rasters.workers(min(flags["workers"], len(windows)), flags["scheduler"] if spec.on_cluster else "") as run:
        write_dates(spec, run, identity, tags)
        rasters.write_map(Path(), grid, outputs, windows, functools.partial(run, build_mapper, spec), identity, tags)
    remove_strips(spec, flags["scheduler"])
    write_results(spec, flags, tags, time.perf_counter() - started)


def weights_of(run: Path, several: bool) -> tuple[str, ...]:
    """Files of the best weights and, if `several`, of the other kept checkpoints."""
    paths = [run / "models" / f"{name}.safetensors" for name in CHECKPOINTS[: len(CHECKPOINTS) if several else 1]]
    if not paths[0].is_file():
        raise InputError(f"{run} has no {paths[0].relative_to(run)}, which its training leaves when it ends")
    return tuple(str(path) for path in paths if path.is_file())


def digest_of(paths: Sequence[str]) -> str:
    """sha256 of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def resolve_auto_flags(flags: dict[str, Any], record: dict[str, Any], device: torch.device) -> None:
    """Replace auto by the values in force, in place."""
    for name in ("max_dates", "min_dates"):
        flags[name] = flags[name] or record["flags"][name]
    if flags["workers"] is None:
        flags["workers"] = 1 if device.type == "cuda" else len(os.sched_getaffinity(0))
    flags["precision"], lines = processes.resolve_precision(flags["precision"], device)
    for line in lines:
        say(line)


def images_of(images: str) -> tuple[str, bool]:
    """Where the images are, and whether they are simulated: without any, those of a test square of the demo."""
    if images != "simulated":
        place = (called_from() / images).resolve()
        return images, any((folder / SIMULATED).exists() for folder in (place, *place.parents[:3]))
    root = demo_root(project_folder() / "data")
    table = pd.read_parquet(sorted(root.glob("patches/*/*.parquet"))[0])
    square = table[table["context"] == "test"].iloc[0]
    return str(root / "patches" / square["tile_name"] / square["lidarhd_id"]), True


def spec_of(
    flags: dict[str, Any], series: ImageSeries, area: Window, reach: int, weights: tuple[str, ...], device: str
) -> Spec:
    """What workers need to know."""
    # Windows under way lie in two rows of windows at most, unless the map is narrow.
    kept = -(-(2 * flags["window"] + 4 * reach) // series.strip) + 2
    return Spec(
        series,
        (area.row_off, area.col_off, area.height, area.width),
        flags["cell"],
        reach,
        Limits(*(flags[name] for name in Limits._fields)),
        weights,
        QUERY_DAY + flags["delta_day"],
        flags["precision"],
        device,
        kept,
        str(Path.cwd()),
        flags["scheduler"] != "none",
    )


def height_outputs(factor: int, spread: bool) -> list[Output]:
    """The files of heights and of vegetation."""
    layers = [Layer("height", "m", 0.1), *([Layer("spread", "m", 0.1)] if spread else [])]
    vegetation = Layer("probability of tall vegetation", "", 0.01)
    return [
        Output("height.tif", tuple(layers), "int16", NODATA, factor),
        Output("vegetation.tif", (vegetation,), "uint8", UNKNOWN, factor),
    ]


def network_of(record: dict[str, Any]) -> ThreasureNet:
    """The network of a file of weights, not initialised."""
    return make_network(record["flags"], len(BANDS) + ANGLE_CHANNELS * record["angles"])


def pieces_of(window: Window, cell: int) -> Iterator[tuple[str, Window]]:
    """The parts of a window in each cell, with the cell's name; in pixels of the images."""
    for row in range(window.row_off // cell, -(-(window.row_off + window.height) // cell)):
        for column in range(window.col_off // cell, -(-(window.col_off + window.width) // cell)):
            yield f"{row}_{column}", window.intersection(Window(column * cell, row * cell, cell, cell))


def within(window: Window, outer: Window) -> tuple[slice, slice]:
    """Rows and columns of a window counted from another's corner."""
    return Window(window.col_off - outer.col_off, window.row_off - outer.row_off, window.width, window.height).toslices()


def strips_folder(spec: Spec) -> Path:
    """Where the workers of a machine keep strips of images."""
    if not spec.on_cluster:
        return Path(spec.folder) / rasters.BLOCKS / "strips"
    from distributed import get_worker

    # Beside the folders of single workers, so that those of a machine share it.
    return Path(get_worker().local_directory).parent / f"canopy_map_{hashlib.sha256(spec.folder.encode()).hexdigest()[:12]}"


def remove_strips(spec: Spec, scheduler: str) -> None:
    """Remove them, on all machines."""
    if not spec.on_cluster:
        shutil.rmtree(rasters.BLOCKS, ignore_errors=True)
        return
    with cluster(scheduler) as client:
        client.run(lambda: shutil.rmtree(strips_folder(spec), ignore_errors=True))


def reader_of(spec: Spec) -> SeriesReader:
    """What reads the images for the area."""
    columns = spec.area[1] - 2 * spec.reach - ALIGNMENT, spec.area[1] + spec.area[3] + 2 * spec.reach + ALIGNMENT
    return SeriesReader(spec.series, strips_folder(spec), columns, spec.kept_strips)


Choice = dict[str, Any]


def build_chooser(spec: Spec) -> Callable[[Window], tuple[NDArray[np.uint8], Choice]]:
    """What finds the dates of a cell's part in the area: the layers of `DATES_OUTPUT` and the cell's choice."""
    reader = reader_of(spec)
    grid, images = spec.series.grid, spec.series.images
    with_mask = np.array([image.mask is not None for image in images])

    def choose(window: Window) -> tuple[NDArray[np.uint8], Choice]:
        part = spec.in_images(window)
        ((name, _),) = pieces_of(part, spec.cell)
        row, column = (spec.cell * int(number) for number in name.split("_"))
        cell = Window(column, row, spec.cell, spec.cell)
        around = grown(cell, spec.reach).intersection(Window(0, 0, grid.width, grid.height))
        states = np.stack([reader.states(number, around) for number in range(len(images))])
        chosen = choose_dates(states, spec.series.days, spec.limits)
        inner = states[:, *within(part, around)]
        clear = (inner != CLOUD) & (inner != MISSING)
        layers = np.full((len(DATES_OUTPUT.layers), part.height, part.width), UNKNOWN, np.uint8)
        layers[0] = np.minimum(clear[chosen].sum(0), UNKNOWN - 1)
        seen = clear[with_mask].sum(0)
        np.copyto(layers[1], percent((inner[with_mask] == WATER).sum(0), np.maximum(seen, 1)), where=seen > 0)
        if with_mask.any():
            layers[2] = percent((inner[with_mask] == CLOUD).sum(0), with_mask.sum())
        layers[3] = percent((inner == MISSING).sum(0), len(images))
        mapped = int((layers[0] >= spec.limits.min_dates).sum())
        return layers, {"cell": name, "images": chosen.tolist(), "pixels": mapped}

    return choose


def percent(part: NDArray[Any], whole_of: Any) -> NDArray[np.uint8]:
    """Shares in whole percent."""
    return np.rint(100 * part / whole_of).astype(np.uint8)


def write_dates(spec: Spec, run: rasters.Run, identity: dict[str, Any], tags: dict[str, str]) -> None:
    """Choose the dates of all cells: write dates.tif and dates.json.

    Raises:
        InputError: no pixel has enough dates.
    """
    if CHOSEN.exists():
        return
    area = Window(spec.area[1], spec.area[0], spec.area[3], spec.area[2])
    cells = [
        Window(part.col_off - area.col_off, part.row_off - area.row_off, part.width, part.height)
        for _, part in pieces_of(area, spec.cell)
    ]

    def layers_of(windows: Iterable[Window]) -> Iterator[tuple[Window, Sequence[NDArray[np.uint8]]]]:
        for window, (layers, choice) in run(build_chooser, spec, windows):
            write_json(CELLS / f"{choice['cell']}.json", choice)  # before the block, which a restart takes as done
            yield window, [layers]

    rasters.write_map(
        Path(), spec.series.grid.part(area), [DATES_OUTPUT], cells, layers_of, identity, tags, "Choosing dates..."
    )
    choices = [json.loads((CELLS / f"{name}.json").read_text(encoding="utf-8")) for name, _ in pieces_of(area, spec.cell)]
    if not any(choice["pixels"] for choice in choices):
        raise InputError(
            f"no pixel has min_dates={spec.limits.min_dates} clear dates among the {len(spec.series.images)} images; where "
            f"cloud or missing data is the reason, dates.tif shows"
        )
    names = [Path(image.path).name for image in spec.series.images]
    write_json(CHOSEN, {"images": names, "cells": {choice["cell"]: choice["images"] for choice in choices}})
    shutil.rmtree(CELLS)


def build_mapper(spec: Spec) -> Callable[[Window], tuple[NDArray[np.int16], NDArray[np.uint8]]]:
    """What maps a window: height and, with several files of weights, spread in dm; vegetation in %."""
    keep_freed_memory()
    device = choose_device(spec.device)
    nets: list[ThreasureNet] = []
    for path in spec.weights:
        tensors, own_record = read_tensors(Path(path))
        net = network_of(own_record)
        net.load_state_dict(tensors)
        nets.append(net.to(device).eval())
    _, record = read_tensors(Path(spec.weights[0]))
    statistics = Statistics(**record["statistics"])
    factor, alignment = nets[0].factor, nets[0].alignment
    reader = reader_of(spec)
    chosen: dict[str, list[int]] = json.loads((Path(spec.folder) / CHOSEN).read_text(encoding="utf-8"))["cells"]
    days = torch.from_numpy(spec.series.days).to(device)
    angles = torch.from_numpy(spec.series.angle_channels).to(device) if record["angles"] else None

    @torch.no_grad()
    def predict(net: ThreasureNet, images: torch.Tensor, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Height in dm and probability of vegetation, (row, column), of images (date, band, row, column)."""
        inputs = standardise(images[None], None if angles is None else angles[numbers][None], statistics)
        padding = torch.zeros(1, len(numbers), dtype=torch.bool)
        dates = (days[numbers][None], torch.tensor([spec.day], device=device), padding)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
            height, logit = net(inputs, *dates, cut=spec.reach)
        return 10 * statistics.metres(height[0, 0].float()), torch.sigmoid(logit[0, 0].float())

    def map_piece(piece: Window, numbers: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Height and spread, vegetation, and which image pixels have enough dates."""
        aligned = aligned_to(piece, alignment)
        around = grown(aligned, spec.reach)
        images = np.stack([reader.extended_bands(number, around, spec.reach) for number in numbers])
        advice = f"on {device} with a window of {piece.height} x {piece.width} pixels and {len(numbers)} dates; lower window"
        with explaining_out_of_memory(advice):
            on_device = torch.from_numpy(images).to(device)
            height, vegetation = predict(nets[0], on_device, numbers)
            heights = [height]
            if len(nets) > 1:
                heights += [predict(net, on_device, numbers)[0] for net in nets[1:]]
            if len(nets) > 1 and len(numbers) > 1:
                heights += [predict(nets[0], on_device[half::2], numbers[half::2])[0] for half in range(2)]
        if not bool(torch.isfinite(height).all()):
            raise InputError(
                f"{spec.weights[0]} gives heights that are not finite at row {piece.row_off} column {piece.col_off}"
            )
        layers = [height] if len(nets) == 1 else [height, torch.stack(heights).std(0)]
        rows, columns = (slice(factor * part.start, factor * part.stop) for part in within(piece, aligned))
        seen = sum((reader.bands(number, piece) != NODATA).all(0).astype(int) for number in numbers)
        enough = np.asarray(seen >= spec.limits.min_dates)
        return torch.stack(layers)[:, rows, columns].cpu().numpy(), vegetation[rows, columns].cpu().numpy(), enough

    def map_window(window: Window) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        outer = spec.in_images(window)
        size = (factor * window.height, factor * window.width)
        height = np.full((min(len(nets), 2), *size), NODATA, np.int16)
        vegetation = np.full((1, *size), UNKNOWN, np.uint8)
        with rasterio.open(Path(spec.folder) / DATES_OUTPUT.file) as raster:
            mapped = raster.read(1, window=window) >= spec.limits.min_dates
        for cell, piece in pieces_of(outer, spec.cell):
            if not mapped[within(piece, outer)].any():
                continue
            heights, probability, enough = map_piece(piece, chosen[cell])
            valid = (enough & mapped[within(piece, outer)]).repeat(factor, 0).repeat(factor, 1)
            rows, columns = (slice(factor * part.start, factor * part.stop) for part in within(piece, outer))
            np.copyto(height[:, rows, columns], np.rint(heights).astype(np.int16), where=valid)
            np.copyto(vegetation[0, rows, columns], np.rint(100 * probability).astype(np.uint8), where=valid)
        return height, vegetation

    return map_window


def aligned_to(window: Window, step: int) -> Window:
    """The smallest window around one whose edges are multiples of a step."""
    rows, columns = window.toslices()
    top, left = rows.start // step * step, columns.start // step * step
    return Window(left, top, -(-columns.stop // step) * step - left, -(-rows.stop // step) * step - top)


def write_results(spec: Spec, flags: dict[str, Any], tags: dict[str, str], seconds: float) -> None:
    """Write the picture, the STAC item and metrics.json, and say what was mapped."""
    height, note = Path("height.tif"), f" ({tags['note']})" if "note" in tags else ""
    chosen = json.loads(CHOSEN.read_text(encoding="utf-8"))["cells"]
    save_plot(maps.quick_look(height, f"{tags['model']}, {tags['images']}{note}"), Path("height.png"))
    dates = [image.day for image in spec.series.images]
    maps.write_stac_item(Path("map.stac.json"), [height, Path("vegetation.tif"), Path("dates.tif")], dates, tags)
    mapped = maps.mapped_area(height)
    steps = maps.steps_between_cells(height, chosen, spec.area, spec.cell)
    say(f"Mapped: {mapped:.4f} km2{note}")
    say(f"Throughput: {mapped / seconds:.4g} km2/s")
    say(f"Cells: {len(chosen)}, of {min(map(len, chosen.values()))} to {max(map(len, chosen.values()))} dates")
    if steps["pixels"]:
        say(
            f"Where neighbouring cells have other dates, heights step by {steps['across_m']:.2f} m, and by "
            f"{steps['beside_m']:.2f} m a pixel beside it"
        )
    document = {
        "flags": flags,
        "tags": tags,
        "mapped_km2": mapped,
        "cells": {"count": len(chosen), "side_pixels": spec.cell, "borders_with_other_dates": steps},
        "seconds": seconds,
        "versions": versions(),
    }
    write_json(Path("metrics.json"), document)
    say(
        f"Results: {Path.cwd()} (height.tif, vegetation.tif, dates.tif, height.png, dates.json, map.stac.json, metrics.json)"
    )


if __name__ == "__main__":
    run_or_explain(main)
