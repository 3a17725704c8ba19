"""Canopy training samples per second: slices of the cache against opening the GeoTIFFs for each sample, in one run.

    python -m benchmarks.canopy_reading [--root data/canopy] [--resolution 2.5] [--rounds 5]

Both ways draw random windows with the margin of a network and up to 12 images, in one process. The plain way opens
each image, the LiDAR and the mask and reads the window alone. Rounds alternate, and medians are reported. All files
are in the page cache after the first round, which is not counted, so the figures are those of opening, decoding and
copying, not of a disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from datasets.canopy_cache import cache_patches
from datasets.canopy_catalogue import BORDER, PIXEL, SQUARE_SIZE, Patch, opened, read_catalogue, select
from datasets.canopy_reference import at_resolution, drop_low_and_isolated
from datasets.canopy_tiles import CanopyPatches
from datasets.demo_tile import demo_root

WINDOW, MARGIN, DATES = 64, 32, 12


def plain_sample(patch: Patch, resolution: float, rng: np.random.Generator) -> None:
    """Read a random window of a patch from its files."""
    nearest = MARGIN - BORDER
    row, column = (int(place) for place in rng.integers(nearest, SQUARE_SIZE - WINDOW - nearest, 2, endpoint=True))
    dates = np.sort(rng.choice(len(patch.images), min(DATES, len(patch.images)), replace=False))
    side = WINDOW + 2 * MARGIN
    images = []
    for date in dates:
        with opened(patch.images[date]) as raster:
            images.append(raster.read(window=Window(column + BORDER - MARGIN, row + BORDER - MARGIN, side, side)))
    np.stack(images)
    metres = round(PIXEL)
    square = Window(column * metres, row * metres, WINDOW * metres, WINDOW * metres)
    with opened(patch.lidar) as raster:
        height = raster.read(1, window=square)
    no_vegetation = height <= 0
    if patch.mask is not None:
        with opened(patch.mask) as raster:
            no_vegetation |= raster.read(1, window=square) != 0
    height, no_vegetation = drop_low_and_isolated(*at_resolution(height, no_vegetation, 1.0, resolution))
    np.where(no_vegetation, 0, height).astype(np.float32)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="canopy tiles; the simulated ones if not given")
    parser.add_argument("--resolution", type=float, default=2.5, help="of the output in m: 10, 5 or 2.5")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way")
    parser.add_argument("--samples", type=int, default=40, help="samples a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or demo_root(Path(folder) / "demo")
        patches, _ = select(read_catalogue(root, resolution=arguments.resolution), "training")
        started = time.perf_counter()
        cached = cache_patches(patches, Path(folder) / "cache", resolution=arguments.resolution)
        built = time.perf_counter() - started
        samples = CanopyPatches(
            cached, training=True, resolution=arguments.resolution, window=WINDOW, margin=MARGIN, max_dates=DATES
        )
        rng = np.random.default_rng(0)
        ways: dict[str, Callable[[int, int], object]] = {
            "GeoTIFFs a sample": lambda index, _: plain_sample(patches[index], arguments.resolution, rng),
            "cache": samples.sample,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(arguments.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                for number in range(arguments.samples):
                    way(number % len(patches), round_number)
                if round_number > 0:  # the first round warms up
                    rates[name].append(arguments.samples / (time.perf_counter() - started))
    plain = statistics.median(rates["GeoTIFFs a sample"])
    dates = statistics.mean(min(DATES, len(patch.images)) for patch in patches)
    print(f"{len(patches)} patches, {dates:.1f} images a sample, {arguments.rounds} rounds; cache filled in {built:.1f} s")
    print(f"{'':<20} {'median':>8} {'min':>8} {'max':>8} {'x plain':>8}   samples/s")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<20} {median:>8.1f} {min(values):>8.1f} {max(values):>8.1f} {median / plain:>8.1f}")


if __name__ == "__main__":
    main()
