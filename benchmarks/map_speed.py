"""Speed and memory of a map by operation predict, against the networks alone on tensors in memory, in one run.

    python -m benchmarks.map_speed [--side 192] [--rounds 3] [--sides 1024 4096]

The map is that of ResNet18T at its default flags in five folds, 16 GeoTIFFs of ten bands, by one worker of one thread: files
are read and written, series scaled, intervals and dissimilarities computed. The networks alone are the same five, in
batches of the size that suits them best. Both are measured in processor time, which other programs disturb least.

Memory is the most that a run of 1024 x 1024 pixels holds together with its two workers (PSS), with an MLP, which is quick.
Workers hold a window each, whatever the map; the run itself, which joins the windows, is measured alone on maps of growing
sides, and what a Sentinel-2 tile of 10 980 x 10 980 pixels would need if it grew on in proportion to the pixels.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import rasterio
import torch
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

import predict
from datasets.demo_rasters import simulate_images
from datasets.finished_run import read_trained
from datasets.published_grassland import BANDS
from datasets.series_rasters import find_rasters, windows_by_blocks
from models import make_network
from models.applied import RESULTS, prepare_area
from models.saved import load_folds
from utils import rasters
from utils.rasters import Grid
from utils.runs import project_folder, read_tensors

BATCHES = (128, 256, 512, 1024, 4096)
TILE_SIDE = 10_980
MEMORY_SIDE = 1024  # of a map whose workers have filled their caches


def run(script: str, folder: Path, **flags: object) -> float:
    """Run a script in a folder; the most memory that it and its processes held together, MB."""
    folder.mkdir()
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(project_folder() / script), *arguments]
    environ = {**os.environ, "PYTHONPATH": str(project_folder())}
    most = 0.0
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0.0
            for one in (own, *own.children(recursive=True)):
                try:
                    held += one.memory_full_info().pss / 1e6
                except psutil.Error:
                    continue  # it has just ended
            most = max(most, held)
            time.sleep(0.1)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    if process.returncode:
        sys.exit(errors)
    return most


def train(folder: Path, model: str) -> None:
    """A finished run of main on the simulated table; its networks need not be good."""
    run("main.py", folder, dataset="demo", model=model, epochs=1, warmup_epochs=0)


def write_rasters(folder: Path, side: int) -> None:
    """The simulated landscape, over and over, as 16 GeoTIFFs of ten bands."""
    folder.mkdir()
    profile = {"driver": "GTiff", "height": side, "width": side, "count": len(BANDS), "dtype": "uint16", "nodata": 0}
    profile |= {"crs": CRS.from_epsg(32632), "transform": Affine(10, 0, 500_000, 0, -10, 5_400_000)}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256}
    images = simulate_images()[:, :, :, 80:]  # without the swath's edge
    repeats = (1, -(-side // images.shape[2]), -(-side // images.shape[3]))
    for step, image in enumerate(images, start=1):
        with rasterio.open(folder / f"image_202006{step:02d}.tif", "w", **profile) as raster:
            raster.write(np.tile(image, repeats)[:, :side, :side])


def map_rate(run_folder: Path, images: Path, area: Path, folder: Path) -> float:
    """Pixels/s of processor time of a map by one worker of one thread, from loading the models to the written file."""
    trained = read_trained(run_folder)
    series, grid, _ = find_rasters(str(images), Path.cwd(), trained, "none", [])
    spec = predict.MapSpec(str(run_folder), str(area), 0.9, "cpu", series)
    windows = windows_by_blocks(series, grid, predict.parser.parse_flags([])["window"])
    started = time.process_time()
    with rasters.workers(1) as run:
        rasters.write_map(folder, grid, [predict.map_output("")], windows, partial(run, predict.build_mapper, spec), {}, {})
    return grid.height * grid.width / (time.process_time() - started)


def network_rate(folder: Path, pixels: int) -> dict[int, float]:
    """Pixels/s of processor time by batch size, of the five networks alone, one thread, tensors in memory."""
    networks = []
    for path in sorted(folder.glob("models/*.safetensors")):
        tensors, record = read_tensors(path)
        network = make_network(record["flags"]["model"], len(record["bands"]), len(record["steps"]), record["flags"])
        network.load_state_dict({name.removeprefix("member_1."): tensor for name, tensor in tensors.items()})
        networks.append(network.eval())
    x = torch.randn(pixels, 10, 16)
    rates = {}
    with torch.inference_mode():
        for batch in BATCHES:
            for network in networks:
                network(x[:batch])
            started = time.process_time()
            for part in x.split(batch):
                for network in networks:
                    network(part)
            rates[batch] = pixels / (time.process_time() - started)
    return rates


def measure_speed(folder: Path, side: int, rounds: int) -> None:
    """Print the rate of maps and that of the networks alone."""
    train(folder / "ResNet18T", "ResNet18T")
    write_rasters(folder / "rasters", side)
    torch.set_num_threads(1)
    area = folder / "applicability.safetensors"
    prepare_area(read_trained(folder / "ResNet18T"), load_folds(folder / "ResNet18T", torch.device("cpu")), area)
    maps, alone = [], []
    for number in range(1, rounds + 1):
        maps.append(map_rate(folder / "ResNet18T", folder / "rasters", area, folder / f"map_{number}"))
        rates = network_rate(folder / "ResNet18T", side**2 // 4)
        batch = max(rates, key=lambda size: rates[size])
        alone.append(rates[batch])
        print(f"round {number}: map {maps[-1]:.0f} pixels/s, networks alone {alone[-1]:.0f} (batches of {batch})")
    share = statistics.median(maps) / statistics.median(alone)
    print(f"{side} x {side} pixels, one thread: the map has {share:.0%} of the networks' throughput")


def write_alone(folder: Path, side: int) -> float:
    """Write a map whose pixels come at no cost; the most memory that this process held, MB."""
    layers = np.random.default_rng(0).normal(30, 5, (len(RESULTS), 256, 256)).round().astype(np.float32)
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 500_000, 0, -10, 5_400_000), side, side)

    def results(left: Iterable[Window]) -> Iterator[tuple[Window, tuple[NDArray[np.float32]]]]:
        for window in left:
            yield window, (layers[:, : window.height, : window.width],)

    rasters.write_map(folder, grid, [predict.map_output("")], rasters.windows_of(grid, 256), results, {}, {})
    # Not of getrusage, whose maximum a process inherits from the one that started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1e3


def measure_memory(folder: Path, side: int, sides: Sequence[int]) -> None:
    """Print the most memory that a map takes, by how much writing larger ones takes more, and what a tile would."""
    train(folder / "MLP", "MLP")
    write_rasters(folder / "images", side)
    most = run("predict.py", folder / "mlp", run=folder / "MLP", input=folder / "images", workers=2)
    print(f"{side} x {side} pixels, MLP, two workers: {most:.0f} MB at most")
    written = []
    for one in sides:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            written.append(pool.apply(write_alone, (folder / f"written_{one}", one)))
        print(f"{one} x {one} pixels, written alone: {written[-1]:.0f} MB at most")
    growth = max(0.0, (written[-1] - written[0]) / (sides[-1] ** 2 - sides[0] ** 2))
    tile = most + growth * (TILE_SIDE**2 - side**2)
    print(f"growth {growth * 1e6:.1f} MB a million pixels: {tile:.0f} MB for {TILE_SIDE} x {TILE_SIDE}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=192, help="pixels of a side of the map whose speed is measured")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of map and networks, 0 for none")
    parser.add_argument("--sides", type=int, nargs="*", default=(1024, 4096), help="of the maps that are written alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.rounds:
            measure_speed(Path(name), arguments.side, arguments.rounds)
        if arguments.sides:
            measure_memory(Path(name), MEMORY_SIDE, arguments.sides)


if __name__ == "__main__":
    main()
