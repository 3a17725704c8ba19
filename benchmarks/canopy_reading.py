"""Canopy training samples per second: slices of the cache against opening the GeoTIFFs for each sample, in one run.

    python -m benchmarks.canopy_reading [--root data/canopy] [--resolution 2.5] [--rounds 5]

Both ways draw random windows with the margin of a network and up to 12 images, in one process. The plain way opens
each image, the LiDAR and the mask and reads the window alone. All files are in the page cache after the first round,
which is not counted, so the figures are those of opening, decoding and copying, not of a disk.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from benchmarks.rates import compare_rates, rate_of
from datasets.canopy.cache import cache_patches
from datasets.canopy.catalogue import BORDER, PIXEL, SQUARE_SIZE, Patch, opened, read_catalogue, select
from datasets.canopy.demo import demo_root
from datasets.canopy.reference import at_resolution, drop_low_and_isolated
from datasets.canopy.tiles import CanopyPatches

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
        numbers = range(arguments.samples)

        def from_files(_: int) -> None:
            for number in numbers:
                plain_sample(patches[number % len(patches)], arguments.resolution, rng)

        def from_cache(round_number: int) -> None:
            for number in numbers:
                samples.sample(number % len(patches), round_number)

        dates = statistics.mean(min(DATES, len(patch.images)) for patch in patches)
        print(f"{len(patches)} patches, {dates:.1f} images a sample; cache filled in {built:.1f} s")
        ways = {"GeoTIFFs a sample": rate_of(len(numbers), from_files), "cache": rate_of(len(numbers), from_cache)}
        compare_rates(ways, arguments.rounds, "samples")
    print(f"peak resident memory: {1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
