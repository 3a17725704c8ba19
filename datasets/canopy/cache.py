"""Canopy patches in memory-mapped arrays, so that a training sample is a slice of two files instead of a dozen GeoTIFFs.

    <folder>/<tile>/<patch>/images-<key>.npy      (date, band, row, column) int16, the selected images
    <folder>/<tile>/<patch>/reference-<key>.npy   (2, row, column) int16 at the output resolution: height in dm, and 1
                                                  where there is no tall vegetation
    <the same>.sha256                             of the array's bytes, written last: an array without it is made anew

The key is drawn from name, size and time of change of every source file and from what else the content depends on. A
file once written is thus right for ever: runs share a folder, and a changed source or another selection gives another
file. Files of keys no longer in use are left, since another run may be reading them; the folder may be deleted between
runs.
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
    """Where a patch lies in the cache, and what a sample needs besides.

    Attributes:
        name: tile/patch.
        images: file of (date, band, row, column) int16, reflectance x 10 000, `NODATA` where missing, 10 m, 1.5 km.
        reference: file of (2, row, column) int16 over the 1 km square: height >= 0 (dm) and 0/1 no tall vegetation.
        days: (date,) int64, day of year from 0.
        angles: (date, 6) float32, or None.
        lidar_day: day of year from 0.
        corner: easting and northing of the square's upper-left corner (m).
        lidar: source file of the heights.
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
    """Read each patch once into the cache; what is there already is not read again.

    Args:
        patches: the selected patches.
        folder: of the cache; runs may share it, and build it one at a time.
        resolution: of the output in m.
        lidar_resolution: of the LiDAR files in m.
        workers: threads that read; as many as processor cores if None.
        say: takes the line on what will be written, before it is.

    Raises:
        InputError: a source cannot be read, or the cache cannot be written, for a full disk say.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        cached = list(pool.map(lambda patch: _place(patch, folder, resolution, lidar_resolution), patches))
    if not _missing(patches, cached):
        return cached
    with _alone(folder, say):
        # Another run may have written them while this one waited.
        missing = _missing(patches, cached)
        size = sum(_size(patch, resolution) for patch, _ in missing)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"{folder} needs {size / GIGABYTE:.1f} GB for the cache, but {free / GIGABYTE:.1f} GB are free there; "
                f"give another folder"
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
    """sha256 of all that samples of these patches are made from: pixels, heights, masks, dates and angles.

    Raises:
        InputError: the cache has lost a patch.
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
    """Where a patch belongs in the cache, by its sources as they are now."""
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
    """A name for content read from these files with these settings.

    Raises:
        InputError: a file has gone since the root was checked.
    """
    try:
        stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in sources for stat in [path.stat()]]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([FORMAT, stats, settings]).encode()).hexdigest()[:16]


def _missing(patches: Sequence[Patch], cached: Sequence[CachedPatch]) -> list[tuple[Patch, CachedPatch]]:
    """The patches that are not all in the cache."""
    pairs = zip(patches, cached, strict=True)
    return [(patch, to) for patch, to in pairs if not (_is_whole(to.images) and _is_whole(to.reference))]


def _is_whole(array: str) -> bool:
    """Whether an array and its digest are there, the array as long as its header says."""
    try:
        np.load(array, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return Path(array).with_suffix(DIGEST).exists()


def _size(patch: Patch, resolution: float) -> int:
    """Bytes of a patch in the cache."""
    values = len(patch.images) * len(BANDS) * PATCH_SIZE**2 + 2 * round(SQUARE_SIZE * PIXEL / resolution) ** 2
    return values * np.dtype(np.int16).itemsize


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Build the cache while no other process does; a process that ends, however, lets go of it.

    Raises:
        InputError: the folder cannot be written to or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Waiting for another run that fills {folder}.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InputError(f"{folder} cannot be used for the cache: {error.strerror or error}") from error


def _write_patch(patch: Patch, to: CachedPatch, resolution: float, lidar_resolution: float) -> None:
    """Read a patch and write what the cache lacks of it."""
    if not _is_whole(to.images):
        _write_array(Path(to.images), np.stack([read_image(path) for path in patch.images]))
    if not _is_whole(to.reference):
        height, no_vegetation = read_reference(patch.lidar, patch.mask, lidar_resolution)
        height, no_vegetation = at_resolution(height, no_vegetation, lidar_resolution, resolution)
        _write_array(Path(to.reference), np.stack([height, no_vegetation.astype(np.int16)]))


def read_image(path: Path) -> NDArray[np.int16]:
    """One image: (band, row, column), reflectance x 10 000, `NODATA` where the file has its own nodata.

    Raises:
        InputError: the file cannot be read.
    """
    with opened(path) as raster:
        values = raster.read()
        # Reflectance stays far below the type's limit.
        image = np.minimum(values, np.iinfo(np.int16).max).astype(np.int16)
        if raster.nodata is not None:
            image[values == raster.nodata] = NODATA
    return image


def read_reference(lidar: Path, mask: Path | None, resolution: float) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Heights of a square and where there is no tall vegetation, at the LiDAR's resolution.

    Heights not above 0 and the file's own nodata become 0 and masked; the mask of tall vegetation adds to them, a
    coarser pixel of it where all of the pixel at 1 m is masked.

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
    """Write an array whole as .npy; written as bytes, since ndarray.tofile hides why it failed."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as beside, beside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    write_text(path.with_suffix(DIGEST), hashlib.sha256(array.data).hexdigest())
