"""Training, validation and test samples of canopy tiles, the statistics to standardise them and digests of their content."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets.canopy.cache import cache_patches, content_digest
from datasets.canopy.catalogue import BANDS, NODATA, Catalogue, read_catalogue, select_disjoint
from datasets.canopy.tiles import CanopyPatches, Statistics, find_statistics
from utils.errors import InputError


class Splits(NamedTuple):
    """The data of a run.

    Attributes:
        training: samples with random windows and dates.
        validation: samples with central windows and evenly spaced dates.
        test: the same.
        statistics: to standardise inputs and target with.
        catalogue: of the tiles.
        digests: sha256 of the content of each context's samples.
    """

    training: CanopyPatches
    validation: CanopyPatches
    test: CanopyPatches
    statistics: Statistics
    catalogue: Catalogue
    digests: dict[str, str]

    @property
    def margin(self) -> int:
        """Image pixels by which the input extends beyond the window on each side."""
        return self.training.margin

    def description(self) -> dict[str, Any]:
        """The data's entries in `metrics.json`."""
        return {
            "sha256": self.digests,
            "simulated": self.catalogue.simulated,
            "angles": self.catalogue.with_angles,
            "mask": self.catalogue.with_mask,
            "statistics": asdict(self.statistics),
        }

    def input_record(self) -> dict[str, Any]:
        """What the metadata of weights says about input and target, for those who use them."""
        description = self.description()
        return {
            "bands": BANDS,
            "margin": self.margin,
            "predictor_unit": f"surface reflectance x 10 000, nodata {NODATA}",
            "target_unit": "decimetres, 95th percentile of LiDAR heights",
            "data_sha256": description.pop("sha256"),
            **description,
        }


def load_splits(
    root: Path,
    cache: Path,
    tiles: Sequence[str],
    log: Callable[[str], None],
    *,
    angles: str,
    mask: str,
    resolution: float,
    lidar_resolution: float,
    limits: Mapping[str, float],
    batch_size: int,
    accumulate: int,
    window: int,
    margin: int,
    max_dates: int,
    statistics: str,
    seed: int,
) -> Splits:
    """Check the tiles, select squares and images, and read them into the cache.

    Args:
        root: folder in the layout of `datasets.canopy.catalogue`.
        cache: folder of the cache.
        tiles: names of tiles; all if empty.
        log: called with messages for the user.
        angles: whether to use sun and view angles: yes, no, or auto.
        mask: the same for the masks of tall vegetation.
        resolution: pixel size of the output in m.
        lidar_resolution: pixel size of the LiDAR files in m.
        limits: arguments of `select`.
        batch_size: windows in a batch.
        accumulate: batches in an optimiser step; training needs at least one step.
        window: side of the target in image pixels.
        margin: image pixels by which the input extends beyond the window on each side.
        max_dates: maximum number of images in a sample.
        statistics: `choice` of `find_statistics`.
        seed: of all random draws.

    Raises:
        InputError: the tiles cannot be used, too few squares are left, the window does not fit, or a context has no tall
            vegetation.
    """
    catalogue = read_catalogue(
        root, tiles, resolution=resolution, lidar_resolution=lidar_resolution, angles=angles, mask=mask
    )
    for line in catalogue.report():
        log(line)
    selected = select_disjoint(catalogue, **limits)
    for context, selection in selected.items():
        log(f"Squares for {context}: {selection}")
    squares = len(selected["training"].patches)
    if squares < batch_size * accumulate:
        raise InputError(
            f"{squares} training squares do not fill one step of batch_size={batch_size} x accumulate={accumulate}; "
            f"lower these flags"
        )
    samples_of = partial(
        CanopyPatches,
        resolution=resolution,
        lidar_resolution=lidar_resolution,
        window=window,
        margin=margin,
        max_dates=max_dates,
        seed=seed,
    )
    samples_of([], training=True)  # raises an error before anything is read if the window does not fit
    patches = [patch for selection in selected.values() for patch in selection.patches]
    cached = iter(cache_patches(patches, cache, resolution=resolution, lidar_resolution=lidar_resolution, say=log))
    samples = {
        context: samples_of(list(islice(cached, len(selection.patches))), training=context == "training")
        for context, selection in selected.items()
    }
    for context, one in samples.items():
        if not one.any_vegetation():
            raise InputError(
                f"{root}: no selected {context} square has tall vegetation (a height above 0 that is not masked)"
            )
    found = find_statistics(samples["training"].patches, statistics, lidar_resolution, seed)
    log(f"Statistics for standardisation: {found.source}")
    digests = {context: content_digest(one.patches) for context, one in samples.items()}
    return Splits(**samples, statistics=found, catalogue=catalogue, digests=digests)
