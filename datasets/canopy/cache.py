"""Canopy patches as memory-mapped arrays: a training sample is a slice of two files instead of a dozen GeoTIFFs.

    <folder>/<tile>/<patch>/images-<key>.npy      (date, band, row, column) int16, the selected images
    <folder>/<tile>/<patch>/reference-<key>.npy   (2, row, column) int16 at the output resolution: height in dm, and 1
                                                  where there is no tall vegetation
    <the same>.sha256                             of the array's bytes, written last: an array without it is written again

The key is a hash of the name, size and modification time of every source file and of everything else that the content
depends on. A file is therefore never outdated: runs share the folder, and a changed source or another selection gives
another file. Files with keys that are no longer used stay, since another run may be reading them; the folder may be
deleted between runs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from datasets.canopy.catalogue import BANDS, NODATA, PATCH_SIZE, PIXEL, SQUARE_SIZE, Patch, opened
from datasets.canopy.reference import at_resolution
from utils.errors import InputError
from utils.runs import whole_file, write_text

FORMAT = 3  # raised when the content of the files changes
DIGEST = ".sha256"
GIGABYTE = 1e9


class CachedPatch(NamedTuple):
    """The files of a patch in the cache, and what else a sample needs.

    Attributes:
        name: tile/patch.
        images: file of (date, band, row, column) int16, reflectance x 10 000, `NODATA` where missing; 1.5 km at 10 m.
        reference: file of (2, row, column) int16 of the 1 km square: height >= 0 (dm), and 1 where there is no tall
            vegetation.
        days: (date,) int64, day of year from 0.
        angles: (date, 6) float32, or None.
        lidar_day: day of year from 0.
        corner: easting and northing of the square's upper-left corner (m).
        lidar: original file of the heights.
    """

    name: str
    images: str
    reference: str
    days: NDArray[np.int64]
    angles: NDArray[np.float32] | None
    lidar_day: int
    corner: tuple[float, float]
    lidar: str


def cache_patches(
    patches: Sequence[Patch],
    folder: Path,
    *,
    resolution: float,
    lidar_resolution: float = 1.0,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> list[CachedPatch]:
    """Read the patches that are not yet in the cache into it.

    Args:
        patches: the selected patches.
        folder: of the cache; runs may share it, and fill it one after the other.
        resolution: pixel size of the output in m.
        lidar_resolution: pixel size of the LiDAR files in m.
        workers: number of threads; that of the processor cores if None.
        say: called with messages for the user.

    Raises:
        InputError: a source cannot be read, or the cache cannot be written, for example because the disk is full.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        cached = list(pool.map(lambda patch: _place(patch, folder, resolution, lidar_resolution), patches))
    if not _missing(patches, cached):
        return cached
    with _alone(folder, say):
        # Another run may have written them while this one was waiting.
        missing = _missing(patches, cached)
        size = sum(_size(patch, resolution) for patch, _ in missing)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"the cache needs {size / GIGABYTE:.1f} GB in {folder}, but only {free / GIGABYTE:.1f} GB are free there; "
                f"choose another folder with cache=..."
            )
        say(f"Reading {len(missing)} of {len(patches)} patches into {folder}, {size / GIGABYTE:.2f} GB.")
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_write_patch, patch, to, resolution, lidar_resolution) for patch, to in missing]
            try:
                for job in tqdm(as_completed(jobs), "Reading the patches...", len(jobs), unit="patch"):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return cached


def content_digest(patches: Sequence[CachedPatch]) -> str:
    """sha256 of everything that the samples of these patches are made of: pixels, heights, masks, dates and angles.

    Raises:
        InputError: a patch has been deleted from the cache.
    """
    digest = hashlib.sha256()
    for patch in patches:
        try:
            content = [Path(array).with_suffix(DIGEST).read_text() for array in (patch.images, patch.reference)]
        except OSError as error:
            raise InputError(f"{patch.name} is gone from the cache ({error}); start the run again to fill it") from error
        digest.update(json.dumps([patch.name, *content, patch.days.tolist(), patch.lidar_day]).encode())
        digest.update(b"" if patch.angles is None else patch.angles.tobytes())
    return digest.hexdigest()


def _place(patch: Patch, folder: Path, resolution: float, lidar_resolution: float) -> CachedPatch:
    """The files of a patch in the cache, named after the present state of its sources."""
    reference = [patch.lidar] if patch.mask is None else [patch.lidar, patch.mask]
    beside = folder / patch.tile / patch.name
    return CachedPatch(
        name=f"{patch.tile}/{patch.name}",
        images=str(beside / f"images-{_key(patch.images)}.npy"),
        reference=str(beside / f"reference-{_key(reference, resolution, lidar_resolution)}.npy"),
        days=pd.DatetimeIndex(patch.dates).dayofyear.to_numpy(np.int64) - 1,
        angles=patch.angles,
        lidar_day=pd.Timestamp(patch.lidar_date).dayofyear - 1,
        corner=patch.corner,
        lidar=str(patch.lidar),
    )


def _key(sources: Sequence[Path], *settings: float) -> str:
    """The key of content that is read from these files with these settings.

    Raises:
        InputError: a file has been deleted since it was checked.
    """
    try:
        stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in sources for stat in [path.stat()]]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([FORMAT, stats, settings]).encode()).hexdigest()[:16]


def _missing(patches: Sequence[Patch], cached: Sequence[CachedPatch]) -> list[tuple[Patch, CachedPatch]]:
    """The patches that are not completely in the cache."""
    pairs = zip(patches, cached, strict=True)
    return [(patch, to) for patch, to in pairs if not (_is_whole(to.images) and _is_whole(to.reference))]


def _is_whole(array: str) -> bool:
    """Whether an array and its digest exist, the array as long as its header says."""
    try:
        np.load(array, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return Path(array).with_suffix(DIGEST).exists()


def _size(patch: Patch, resolution: float) -> int:
    """Bytes that a patch takes in the cache."""
    values = len(patch.images) * len(BANDS) * PATCH_SIZE**2 + 2 * round(SQUARE_SIZE * PIXEL / resolution) ** 2
    return values * np.dtype(np.int16).itemsize


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the cache; the system releases it when the process ends, whatever the reason.

    Raises:
        InputError: the folder cannot be written to or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Waiting for another run that is filling {folder}.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InputError(f"{folder} cannot be used for the cache: {error.strerror or error}") from error


def _write_patch(patch: Patch, to: CachedPatch, resolution: float, lidar_resolution: float) -> None:
    """Read a patch and write those of its files that are not in the cache."""
    if not _is_whole(to.images):
        _write_array(Path(to.images), np.stack([read_image(path) for path in patch.images]))
    if not _is_whole(to.reference):
        height, no_vegetation = read_reference(patch.lidar, patch.mask, lidar_resolution)
        height, no_vegetation = at_resolution(height, no_vegetation, lidar_resolution, resolution)
        _write_array(Path(to.reference), np.stack([height, no_vegetation.astype(np.int16)]))


def read_image(path: Path) -> NDArray[np.int16]:
    """Read an image: (band, row, column), reflectance x 10 000, `NODATA` where the file has its own nodata value.

    Raises:
        InputError: the file cannot be read.
    """
    with opened(path) as raster:
        values = raster.read()
        # Larger values than int16 holds are no reflectances.
        image = np.minimum(values, np.iinfo(np.int16).max).astype(np.int16)
        if raster.nodata is not None:
            image[values == raster.nodata] = NODATA
    return image


def read_reference(lidar: Path, mask: Path | None, resolution: float) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Read the heights of a square and where there is no tall vegetation, at the resolution of the LiDAR file.

    Heights of 0 and below and the file's nodata value become 0 and are masked, as are the pixels that the mask file marks.
    Of a mask at 1 m beside coarser heights, a coarse pixel is marked where all of its pixels are.

    Returns:
        Two arrays (row, column): dm, and True where there is no tall vegetation.

    Raises:
        InputError: a file cannot be read.
    """
    with opened(lidar) as raster:
        values = raster.read(1)
        if raster.nodata is not None:
            values[values == raster.nodata] = 0
        height = np.clip(values, 0, np.iinfo(np.int16).max).astype(np.int16)
    no_vegetation = height == 0
    if mask is not None:
        with opened(mask) as raster:
            given = raster.read(1) != 0
        if given.shape != height.shape:
            _, given = at_resolution(np.zeros_like(given), given, 1.0, resolution)
        no_vegetation |= given
    return height, no_vegetation


def _write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, completely or not at all; as bytes, since ndarray.tofile hides why it failed."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as beside, beside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    write_text(path.with_suffix(DIGEST), hashlib.sha256(array.data).hexdigest())
