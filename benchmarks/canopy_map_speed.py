"""Speed and memory of canopy-map, against window by window with the same network written plainly, in one run.

    python -m benchmarks.canopy_map_speed [--window 256] [--windows 2] [--rounds 2] [--skip_memory]

Simulated images, 12 dates with masks, deflated GeoTIFFs of 10 bands; the network of 5 m with random weights. The plain way
opens each image for each window, feeds `benchmarks.plain_threasure_net` with window and margin in float32, and cuts the
margin from its output. Ours is the operation's worker, which reads strips once. Both map the same windows, rounds
alternate, and pixels are counted per second of processor time of one thread, which other programs disturb least; workers
share nothing but the strips.

Memory is that of all processes together (proportional set size): while the operation with two workers maps 2 and then 6
windows of images as wide as a Sentinel-2 tile, which gives the growth, and while the map of a whole tile is put together
from its blocks.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rasterio
import torch
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from benchmarks.plain_threasure_net import PlainThreasureNet
from benchmarks.rates import compare_rates, rate_of
from canopy_map import Spec, build_mapper, height_outputs
from datasets.canopy.catalogue import NODATA, angle_channels
from datasets.canopy.cell_dates import MapInputs, write_dates
from datasets.canopy.image_series import ImageSeries, Limits, find_series, grown
from datasets.canopy.tiles import PUBLISHED, standardise
from models.threasure_net import QUERY_DAY, make_network
from utils import rasters
from utils.runs import keep_freed_memory, write_json, write_tensors
from utils.seeds import INITIAL_WEIGHTS, generator_for

DATES, TILE = 12, 10_980
FEW, MORE = 2, 6  # windows mapped for the growth of memory
FLAGS: dict[str, Any] = {"encoder": "rdn", "num_rdb": 5, "num_dense_layers": 5, "growth_channels": 24, "channels": 64}
FLAGS |= {"upsampling": "shuffle", "resolution": 5, "max_dates": DATES, "min_dates": 5}
ANGLES = {"SUN_ZENITH": 40, "SUN_AZIMUTH": 150, "VIEW_ZENITH": 5, "VIEW_AZIMUTH": 100}


def write_images(folder: Path, rows: int, columns: int) -> None:
    """Simulated images and masks."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    part = rng.integers(0, 400, (10, 256, 256)) + np.array([PUBLISHED.band_median]).T[..., None].astype(int)
    whole = np.tile(part, (1, -(-rows // 256), -(-columns // 256)))[:, :rows, :columns].astype(np.int16)
    grid = {"crs": CRS.from_epsg(32631), "transform": Affine(10, 0, 500_000, 0, -10, 4_900_000)}
    profile: dict[str, Any] = {**grid, "height": rows, "width": columns, "compress": "deflate", "driver": "GTiff"}
    profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256}
    for month in range(1, DATES + 1):
        path = folder / f"S2_2024{month:02d}15.tif"
        with rasterio.open(path, "w", count=10, dtype="int16", nodata=NODATA, predictor=2, zlevel=1, **profile) as raster:
            raster.write(whole)
            raster.update_tags(**ANGLES)
        with rasterio.open(folder / f"{path.stem}_mask.tif", "w", count=1, dtype="uint8", **profile) as raster:
            raster.write(np.zeros((1, rows, columns), np.uint8))


def write_run(folder: Path) -> Path:
    """A finished run of random weights, spread as a trained network's."""
    net = make_network(FLAGS, 16)
    net.initialise(generator_for(0, INITIAL_WEIGHTS))
    record = {"project": "benchmark, operation canopy", "flags": FLAGS, "resolution": 5, "angles": True}
    record |= {"simulated": True, "statistics": asdict(PUBLISHED)}
    write_tensors(folder / "models" / "best.safetensors", net.state_dict(), record)
    write_json(folder / "metrics.json", {})
    return folder / "models" / "best.safetensors"


def plain_window(net: PlainThreasureNet, series: ImageSeries, window: Window, margin: int) -> NDArray[np.float32]:
    """Heights of a window: open each image, read the window and its margin, and compute all of it."""
    around, images = grown(window, margin), []
    for image in series.images:
        with rasterio.open(image.path) as raster:
            images.append(raster.read(window=around, boundless=True, fill_value=NODATA))
    angles = torch.from_numpy(angle_channels(series.angles(np.array([[0.0, 0.0]]))[:, 0]))
    inputs = standardise(torch.from_numpy(np.stack(images))[None], angles[None], PUBLISHED)
    dates = torch.from_numpy(series.days)[None], torch.tensor([QUERY_DAY]), torch.zeros(1, DATES, dtype=torch.bool)
    with torch.no_grad():
        height, _ = net(inputs, *dates, margin)
    return PUBLISHED.metres(height)[0, 0].numpy()


def compare_speed(folder: Path, side: int, count: int, rounds: int) -> None:
    """Print the pixels a second of each way."""
    write_images(folder / "images", side, count * side)
    weights = write_run(folder / "run")
    series = find_series("images", folder, None, True, lambda _: None)
    reach, plain = make_network(FLAGS, 16).reach, PlainThreasureNet(16)
    plain.eval()
    inputs = MapInputs(series, (0, 0, *series.grid[2:]), 512, reach, Limits(10, 99, 1, DATES, 5), 99, str(folder), "")
    windows = rasters.windows_of(series.grid, side)

    def plainly(_: int) -> None:
        for window in windows:
            plain_window(plain, series, window, reach)

    def mapped(run: rasters.Run, spec: Spec, _: int) -> None:
        for _window in run(build_mapper, spec, windows):
            pass

    pixels = count * side**2
    ways = {"plain, float32": rate_of(pixels, plainly, time.process_time)}
    with rasters.workers(1) as run:
        write_dates(inputs, run, {}, {})
        for precision in ("32", "bf16"):
            spec = Spec(inputs, (str(weights),), QUERY_DAY, precision, "cpu")
            ways[f"canopy-map, {precision}"] = rate_of(pixels, functools.partial(mapped, run, spec), time.process_time)
        compare_rates(ways, rounds, "pixels")


def peak_memory(process: "psutil.Popen[bytes]") -> float:
    """GB that a process and its children have together at most until it ends."""
    peak = 0.0
    while process.poll() is None:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, total / 1e9)
        time.sleep(0.1)
    assert process.returncode == 0
    return peak


def measure_memory(folder: Path, side: int) -> None:
    """Print the memory of mapping and its growth, and that of putting a whole tile together."""
    write_images(folder / "wide", side, TILE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    peaks = {}
    for count in (FEW, MORE):
        there = folder / f"map_{count}"
        there.mkdir()
        flags = {"run": folder / "run", "images": folder / "wide", "workers": 2, "window": side, "device": "cpu"}
        flags |= {"area": f"500000,{4_900_000 - 10 * side},{500_000 + count * 10 * side},4900000"}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        script = str(Path(__file__).resolve().parent.parent / "canopy_map.py")
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        peaks[count] = peak_memory(psutil.Popen([sys.executable, script, *arguments], cwd=there, **quiet))
        print(f"mapping {count} windows: {peaks[count]:.2f} GB at most")
    growth, all_windows = (peaks[MORE] - peaks[FEW]) / (MORE - FEW), (-(-TILE // side)) ** 2
    print(f"growth: {1000 * growth:.1f} MB a window; a tile has {all_windows}")
    started, peak = time.perf_counter(), [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], psutil.Process().memory_full_info().pss / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    put_together(folder / "tile", side)
    done.set()
    watcher.join()
    print(f"writing the blocks and files of a whole tile: {peak[0]:.2f} GB at most, {time.perf_counter() - started:.0f} s")


def put_together(folder: Path, side: int) -> None:
    """Write the map of a whole tile from heights that cost nothing."""
    folder.mkdir()
    grid = rasters.Grid(CRS.from_epsg(32631), Affine(10, 0, 500_000, 0, -10, 4_900_000), TILE, TILE)
    height = np.random.default_rng(0).normal(150, 3, (1, 2 * side, 2 * side)).astype(np.int16)
    vegetation = np.full(height.shape, 90, np.uint8)

    def blocks(windows: Any) -> Iterator[tuple[Window, list[NDArray[Any]]]]:
        for window in windows:
            rows, columns = 2 * window.height, 2 * window.width
            yield window, [height[:, :rows, :columns], vegetation[:, :rows, :columns]]

    rasters.write_map(folder, grid, height_outputs(2, False), rasters.windows_of(grid, side), blocks, {}, {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=256, help="side of a window in image pixels")
    parser.add_argument("--windows", type=int, default=2, help="windows a round")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds of each way")
    parser.add_argument("--skip_memory", action="store_true", help="measure speed alone")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(f"One thread, {DATES} dates, windows of {arguments.window} x {arguments.window} pixels")
        compare_speed(Path(folder), arguments.window, arguments.windows, arguments.rounds)
        if not arguments.skip_memory:
            measure_memory(Path(folder), arguments.window)


if __name__ == "__main__":
    main()
