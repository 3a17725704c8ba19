"""The step `statistics`, and the check of the whole folder, both by the code that `canopy` reads its tiles with."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.canopy.cache import cache_patches
from datasets.canopy.catalogue import BANDS, CONTEXTS, Catalogue, read_catalogue, select, select_disjoint
from datasets.canopy.inputs_squares import RECORDS
from datasets.canopy.tiles import STATISTICS_PATCHES, find_statistics
from utils.errors import InputError
from utils.runs import write_json

STATISTICS = "statistics.json"
RESOLUTION = 5.0  # m, of the output that a folder with heights of 1 m is checked for; 10 and 2.5 m read the same files


def check(out: Path, lidar_resolution: float, say: Callable[[str], None]) -> Catalogue:
    """Read the folder as `canopy` does and say what it would use.

    Raises:
        InputError: a file is not as it should be, or no image is left.
    """
    catalogue = _catalogue(out, lidar_resolution)
    for line in catalogue.report():
        say(line)
    for context in CONTEXTS:
        try:
            say(f"Squares that canopy uses for {context}: {select(catalogue, context)}")
        except InputError as error:
            say(f"canopy would refuse these data with its flags at their defaults: {error}")
    return catalogue


def _catalogue(out: Path, lidar_resolution: float) -> Catalogue:
    resolution = RESOLUTION if lidar_resolution == 1 else lidar_resolution
    return read_catalogue(out, resolution=resolution, lidar_resolution=lidar_resolution)


def write_statistics(out: Path, lidar_resolution: float, seed: int, simulated: bool, say: Callable[[str], None]) -> None:
    """Write medians and scales of the training pixels, those that `canopy statistics=data` computes with the same seed.

    Raises:
        InputError: there is no training square that canopy can use.
    """
    catalogue = _catalogue(out, lidar_resolution)
    patches = select_disjoint(catalogue)["training"].patches[:STATISTICS_PATCHES]
    with tempfile.TemporaryDirectory(prefix="statistics_", dir=out / RECORDS) as folder:
        resolution = RESOLUTION if lidar_resolution == 1 else lidar_resolution
        cached = cache_patches(patches, Path(folder), resolution=resolution, lidar_resolution=lidar_resolution, say=_silent)
        found = find_statistics(cached, "data", lidar_resolution, seed)
    bands: dict[str, Any] = {
        band: {"median": median, "scale": scale}
        for band, median, scale in zip(BANDS, found.band_median, found.band_scale, strict=True)
    }
    document = {
        "of": f"{len(patches)} training squares, an 8 x 8 block of each image and heights every 5 m",
        "scale": "(5th + 95th percentile) / 2",
        "bands_unit": "surface reflectance x 10 000",
        "bands": bands,
        "height_unit": "decimetres, without 0 and missing",
        "height": {"median": found.height_median, "scale": found.height_scale},
        "seed": seed,
        "simulated": simulated,
    }
    write_json(out / STATISTICS, document)
    say(f"Statistics of {len(patches)} training squares: median height {found.height_median / 10:.1f} m ({STATISTICS})")


def _silent(_: str) -> None:
    """What the cache has to say matters to nobody here."""
