"""Operation canopy-map: height maps of any size from a year of images, by the network of a finished canopy run.

Dates are chosen for each cell of a fixed grid, as Kalinicheva et al. choose them (THREASURE-Net, Remote Sensing of
Environment 2026); windows of computing are independent of the cells. An interrupted map resumes with the
windows that it lacks.
"""

import functools
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, NODATA, angle_channels
from datasets.canopy.cell_dates import (
    DATES_OUTPUT,
    UNKNOWN,
    MapInputs,
    chosen_angles,
    chosen_dates,
    pieces_of,
    remove_strips,
    within,
    write_dates,
)
from datasets.canopy.demo import demo_root
from datasets.canopy.image_series import ImageSeries, Limits, find_series, grown
from datasets.canopy.map_evaluation import score_map
from datasets.canopy.map_reference import RESAMPLINGS, UNITS, MapReference
from datasets.canopy.tiles import Statistics, standardise
from datasets.products import RESAMPLINGS as IMAGE_RESAMPLINGS
from models.threasure_net import QUERY_DAY, ThreasureNet, make_network
from utils import processes, rasters
from utils.canopy import maps
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
from utils.simulated import is_simulated

CHECKPOINTS = ("best", "second_best", "last")  # that the spread is over
# What a map depends on, beside model, images and area.
DATE_FLAGS = ("cell", "max_cloud", "max_dates", "max_missing", "min_dates", "min_valid")
IDENTITY_FLAGS = (*DATE_FLAGS, "delta_day", "precision", "resampling", "uncertainty", "window")

parser = FlagParser(prog="canopy_map.py", description=__doc__)
parser.flag("area", str, "all", "all, or the part to map: left,bottom,right,top in the images' grid, or a GeoJSON file")
parser.flag("cell", whole(16, 2048), 512, "side of a cell, whose pixels are mapped from the same dates, in image pixels")
parser.flag("delta_day", whole(-183, 182), 0, "days from 2 July to the day of the year that heights are mapped for")
parser.flag(
    "images", str, "simulated", "SAFE, Theia or STAC products or dated GeoTIFFs (folder, list or address), or simulated"
)
parser.flag("max_cloud", real(0, 100), 10, "percent, maximum share of cloud in an image of a cell")
parser.flag("max_dates", auto_or(whole(1)), "auto", "maximum number of images of a cell; auto: as in training")
parser.flag("max_missing", real(0, 100), 1, "percent, maximum share of pixels without data in an image of a cell")
parser.flag("min_dates", auto_or(whole(1)), "auto", "minimum number of clear dates of a pixel; auto: as in training")
parser.flag("min_valid", real(0, 100), 99, "percent, minimum share of clear land or water in an image of a cell")
parser.flag("precision", one_of("auto", "32", "bf16"), "auto", "32, bf16, or auto: bf16 if the hardware multiplies it")
parser.flag("reference", str, "none", "none, or folder or list of rasters of heights, to measure the map")
parser.flag("reference_resampling", one_of(*RESAMPLINGS), "auto", f"{', '.join(RESAMPLINGS)}; auto: max where finer")
parser.flag("reference_unit", one_of(*UNITS), "auto", "of the reference: dm, m, or auto: dm if whole numbers, else m")
parser.flag("resampling", one_of(*IMAGE_RESAMPLINGS), "nearest", "of bands of 20 m: nearest (as published) or bilinear")
parser.flag("run", str, "newest", "finished canopy run: id or its beginning, folder, or newest")
parser.flag("scheduler", str, "none", "none, or the address of a Dask scheduler, as tcp://host:8786")
parser.flag("uncertainty", yes_no, "no", "yes/no, a layer of the spread over checkpoints and over subsets of the dates")
parser.flag("window", whole(16), 256, "side of the windows that are computed at once, in image pixels")
parser.flag("workers", auto_or(whole(1)), "auto", "processes of one thread; auto: one a core, one alone on a GPU")
parser.flag("year", auto_or(whole(1900)), "auto", "year of the images; auto: all are of one")
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")


class Spec(NamedTuple):
    """What maps a window; hashable and small, for it travels with each.

    Attributes:
        inputs: images, area, cells.
        weights: files of weights; the map is of the first one's heights, the others add to the spread.
        day: day of the year that heights are mapped for.
        precision: 32 or bf16.
        device: as in the flag.
    """

    inputs: MapInputs
    weights: tuple[str, ...]
    day: int
    precision: str
    device: str


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
    images = images_of(flags["images"])
    settings = {"resampling": flags["resampling"], "bounds": rasters.degrees_of(flags["area"], called_from())}
    series = find_series(images, called_from(), flags["year"], record["angles"], say, **settings)
    simulated = any(is_simulated(Path(image.path)) for image in series.images)
    if simulated:
        say(f"The images are simulated: {images}")
    area = rasters.area_window(flags["area"], series.grid, called_from())
    net = network_of(record)
    outputs = height_outputs(net.factor, flags["uncertainty"])
    inputs = inputs_of(flags, series, area, net.reach)
    spec = Spec(inputs, weights, QUERY_DAY + flags["delta_day"], flags["precision"], device_name)
    identity: dict[str, Any] = {
        "run": run_folder.name,
        **{name: flags[name] for name in IDENTITY_FLAGS},
        "area": inputs.area,
    }
    identity |= {"weights_sha256": digest_of(weights), "images_sha256": series.digest()}
    rasters.begin_map(Path(), [DATES_OUTPUT, *outputs], identity)
    tags = {
        "model": f"THREASURE-Net, {record['resolution']:g} m",
        "run": run_folder.name,
        "weights_sha256": identity["weights_sha256"],
        "images": f"{len(series.images)} images of {series.images[0].date} to {series.images[-1].date}",
        "images_sha256": identity["images_sha256"],
        "day_of_year": str(spec.day + 1),
    }
    tags |= {"note": "simulated"} if simulated or record["simulated"] else {}
    reference = reference_of(flags, inputs.grid.finer(net.factor))  # refused, if need be, before anything is mapped
    started = time.perf_counter()
    windows = rasters.windows_of(inputs.grid, flags["window"])
    with rasters.workers(min(flags["workers"], len(windows)), inputs.scheduler) as run:
        write_dates(inputs, run, identity, tags)
        results = functools.partial(run, build_mapper, spec)
        rasters.write_map(Path(), inputs.grid, outputs, windows, results, identity, tags)
    remove_strips(inputs)
    seconds = time.perf_counter() - started
    scores = None if reference is None else score_map(inputs, spec.day, reference, tags)
    write_results(inputs, flags, tags, seconds, scores)


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
    """Replace auto by the values it stands for, in place."""
    for name in ("max_dates", "min_dates"):
        flags[name] = flags[name] or record["flags"][name]
    if flags["workers"] is None:
        flags["workers"] = 1 if device.type == "cuda" else len(os.sched_getaffinity(0))
    flags["precision"], lines = processes.resolve_precision(flags["precision"], device)
    for line in lines:
        say(line)


def images_of(images: str) -> str:
    """Where the images are: without any, those of a test square of the demo."""
    if images != "simulated":
        return images
    root = demo_root(project_folder() / "data")
    table = pd.read_parquet(sorted(root.glob("patches/*/*.parquet"))[0])
    square = table[table["context"] == "test"].iloc[0]
    return str(root / "patches" / square["tile_name"] / square["lidarhd_id"])


def inputs_of(flags: dict[str, Any], series: ImageSeries, area: Window, reach: int) -> MapInputs:
    """What the map is made from."""
    # Windows under way lie in two rows of windows at most, unless the map is narrow.
    kept = -(-(2 * flags["window"] + 4 * reach) // series.strip) + 2
    limits = Limits(*(flags[name] for name in Limits._fields))
    place = (area.row_off, area.col_off, area.height, area.width)
    scheduler = "" if flags["scheduler"] == "none" else flags["scheduler"]
    return MapInputs(series, place, flags["cell"], reach, limits, kept, str(Path.cwd()), scheduler)


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


class Dated(NamedTuple):
    """Images (date, band, row, column), days of the year (date,), and angle channels (date, 6) or None."""

    images: torch.Tensor
    days: torch.Tensor
    angles: torch.Tensor | None

    def every_other(self, first: int) -> "Dated":
        """Every other date from the first one, 0 or 1, on."""
        angles = None if self.angles is None else self.angles[first::2]
        return Dated(self.images[first::2], self.days[first::2], angles)


class Mapper:
    """Maps windows: height and, with several files of weights, its spread in dm; vegetation in %.

    The spread is the standard deviation over the maps of all files of weights and, by the first one, of every other of a
    cell's dates.
    """

    def __init__(self, spec: Spec) -> None:
        keep_freed_memory()
        self.spec, self.inputs, self.device = spec, spec.inputs, choose_device(spec.device)
        self.nets: list[ThreasureNet] = []
        for path in spec.weights:
            tensors, record = read_tensors(Path(path))
            net = network_of(record)
            net.load_state_dict(tensors)
            self.nets.append(net.to(self.device).eval())
        self.factor = self.nets[0].factor
        self.statistics = Statistics(**record["statistics"])
        self.reader = self.inputs.reader()
        self.chosen = chosen_dates(Path(self.inputs.folder))
        self.days = torch.from_numpy(self.inputs.series.days).to(self.device)
        self.angles = chosen_angles(Path(self.inputs.folder)) if record["angles"] else None

    def __call__(self, window: Window) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Height and spread (layer, row, column), vegetation (1, row, column), nodata where there are too few dates."""
        outer, limits = self.inputs.in_images(window), self.inputs.limits
        size = (self.factor * window.height, self.factor * window.width)
        height = np.full((min(len(self.nets), 2), *size), NODATA, np.int16)
        vegetation = np.full((1, *size), UNKNOWN, np.uint8)
        with rasterio.open(Path(self.inputs.folder) / DATES_OUTPUT.file) as raster:
            clear = raster.read(1, window=window) >= limits.min_dates
        for cell, piece in pieces_of(outer, self.inputs.cell):
            place = within(piece, outer)
            if not clear[place].any():
                continue
            heights, probability = self.map_piece(piece, cell)
            seen = sum((self.reader.bands(number, piece) != NODATA).all(0).astype(int) for number in self.chosen[cell])
            valid = (clear[place] & (seen >= limits.min_dates)).repeat(self.factor, 0).repeat(self.factor, 1)
            rows, columns = finer(place, self.factor)
            np.copyto(height[:, rows, columns], np.rint(heights).astype(np.int16), where=valid)
            np.copyto(vegetation[0, rows, columns], np.rint(100 * probability).astype(np.uint8), where=valid)
        return height, vegetation

    def map_piece(self, piece: Window, cell: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Height and spread in dm, vegetation as a probability, of a part of a cell from its images."""
        reach, numbers = self.inputs.reach, self.chosen[cell]
        aligned = aligned_to(piece, self.nets[0].alignment)
        around = grown(aligned, reach)
        images = np.stack([self.reader.extended_bands(number, around, reach) for number in numbers])
        shape = f"{piece.height} x {piece.width} pixels and {len(numbers)} dates"
        with explaining_out_of_memory(f"on {self.device} with a window of {shape}; lower window"):
            dated = Dated(torch.from_numpy(images).to(self.device), self.days[numbers], self.angles_of(cell))
            height, vegetation = self.predict(self.nets[0], dated)
            members = [height]
            if len(self.nets) > 1:
                members += [self.predict(net, dated)[0] for net in self.nets[1:]]
                halves = range(2) if len(numbers) > 1 else ()
                members += [self.predict(self.nets[0], dated.every_other(half))[0] for half in halves]
        if not bool(torch.isfinite(height).all()):
            raise InputError(f"{self.spec.weights[0]} gives heights that are not finite at row {piece.row_off}")
        layers = [height] if len(self.nets) == 1 else [height, torch.stack(members).std(0)]
        rows, columns = finer(within(piece, aligned), self.factor)
        return torch.stack(layers)[:, rows, columns].cpu().numpy(), vegetation[rows, columns].cpu().numpy()

    def angles_of(self, cell: str) -> torch.Tensor | None:
        """Angle channels of a cell's images, (date, 6), if the network sees them."""
        if self.angles is None:
            return None
        return torch.from_numpy(angle_channels(np.array(self.angles[cell]))).to(self.device)

    @torch.no_grad()
    def predict(self, net: ThreasureNet, dated: Dated) -> tuple[torch.Tensor, torch.Tensor]:
        """Height in dm and probability of vegetation, (row, column)."""
        angles = None if dated.angles is None else dated.angles[None]
        inputs = standardise(dated.images[None], angles, self.statistics)
        padding = torch.zeros(1, len(dated.days), dtype=torch.bool)
        dates = (dated.days[None], torch.tensor([self.spec.day], device=self.device), padding)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "bf16"):
            height, logit = net(inputs, *dates, cut=self.inputs.reach)
        return 10 * self.statistics.metres(height[0, 0].float()), torch.sigmoid(logit[0, 0].float())


def build_mapper(spec: Spec) -> Mapper:
    """What a worker builds once."""
    return Mapper(spec)


def finer(place: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    """Rows and columns of a map whose pixels are `factor` times finer."""
    rows, columns = place
    return slice(factor * rows.start, factor * rows.stop), slice(factor * columns.start, factor * columns.stop)


def aligned_to(window: Window, step: int) -> Window:
    """The smallest window around one whose edges are multiples of a step."""
    rows, columns = window.toslices()
    top, left = rows.start // step * step, columns.start // step * step
    return Window(left, top, -(-columns.stop // step) * step - left, -(-rows.stop // step) * step - top)


def reference_of(flags: dict[str, Any], grid: rasters.Grid) -> MapReference | None:
    """The reference heights on the map's grid, if there are any."""
    if flags["reference"] == "none":
        return None
    how = (flags["reference_unit"], flags["reference_resampling"])
    reference = MapReference(flags["reference"], called_from(), grid, *how)
    for note in reference.notes:
        say(f"Reference: {note}")
    return reference


def write_results(
    inputs: MapInputs, flags: dict[str, Any], tags: dict[str, str], seconds: float, scores: dict[str, Any] | None
) -> None:
    """Write the picture, the STAC item and metrics.json, and say what was mapped."""
    height, note = Path("height.tif"), f" ({tags['note']})" if "note" in tags else ""
    chosen = chosen_dates(Path())
    save_plot(maps.quick_look(height, f"{tags['model']}, {tags['images']}{note}"), Path("height.png"))
    dates = [image.date.isoformat() for image in inputs.series.images]
    maps.write_stac_item(Path("map.stac.json"), [height, Path("vegetation.tif"), Path("dates.tif")], dates, tags)
    mapped = maps.mapped_area(height)
    steps = maps.steps_between_cells(height, chosen, inputs.area, inputs.cell)
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
        "cells": {"count": len(chosen), "side_pixels": inputs.cell, "borders_with_other_dates": steps},
        "seconds": seconds,
        "units": "metres; nmae and mape fractions, gradient_difference m2, fine_structure_percent %",
        "test": scores,
        "versions": versions(),
    }
    write_json(Path("metrics.json"), document)
    say(
        f"Results: {Path.cwd()} (height.tif, vegetation.tif, dates.tif, height.png, dates.json, map.stac.json, metrics.json)"
    )


if __name__ == "__main__":
    # By the module's name, by which workers find its types: Guild runs a script within a `__main__` of its own.
    import canopy_map

    run_or_explain(canopy_map.main)
