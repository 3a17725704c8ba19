"""The cache of canopy patches: content, reuse, sources that change, disks that are full."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rasterio
from canopy_root import NODATA, write_root, write_tif

from datasets.canopy import cache
from datasets.canopy.cache import CachedPatch, cache_patches, read_image, read_reference
from datasets.canopy.catalogue import Patch, read_catalogue, select
from datasets.canopy.reference import at_resolution
from utils.errors import InputError


class Fixed(NamedTuple):
    """A patch and a folder for its cache."""

    patch: Patch
    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"), squares={"0440_6740": "training"}, images=5, resolutions=(1.0, 5.0))


@pytest.fixture
def fixed(whole: Path, tmp_path: Path) -> Fixed:
    root = shutil.copytree(whole, tmp_path / "root")
    return Fixed(select(read_catalogue(root, resolution=5.0), "training").patches[0], tmp_path / "cache")


@pytest.fixture
def small_files(fixed: Fixed) -> Iterator[None]:
    """No file may grow beyond 100 kB, once the root is written."""
    assert fixed.patch.lidar.exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(fixed: Fixed, resolution: float = 5.0, said: list[str] | None = None) -> CachedPatch:
    said = [] if said is None else said
    return cache_patches([fixed.patch], fixed.folder, resolution=resolution, workers=1, say=said.append)[0]


def test_the_cache_holds_what_the_files_hold(fixed: Fixed) -> None:
    cached = fill(fixed)
    images, reference = np.load(cached.images), np.load(cached.reference)
    assert images.shape == (5, 10, 150, 150) and images.dtype == np.int16
    with rasterio.open(fixed.patch.images[3]) as raster:
        np.testing.assert_array_equal(images[3], raster.read())
    with rasterio.open(fixed.patch.lidar) as raster:
        height = raster.read(1)
    assert fixed.patch.mask is not None
    with rasterio.open(fixed.patch.mask) as raster:
        no_vegetation = (raster.read(1) == 1) | (height <= 0)
    expected, masked = at_resolution(height, no_vegetation, 1.0, 5.0)
    np.testing.assert_array_equal(reference[0], np.maximum(expected, 0))
    np.testing.assert_array_equal(reference[1], masked)
    assert cached.lidar_day == 26 and cached.days.tolist() == [40, 65, 90, 115, 140]


def test_cached_patches_are_not_read_again(fixed: Fixed, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = fill(fixed, said=said)
    assert said == [f"Reading 1 of 1 patches into {fixed.folder}, 0.00 GB."]
    read: list[Path] = []
    monkeypatch.setattr(cache, "read_image", read.append)
    again = fill(fixed, said=said)
    assert (again.images, again.reference) == (first.images, first.reference)
    # Another resolution needs another reference, but the same images.
    other = fill(fixed, 10.0, said)
    assert other.images == first.images and other.reference != first.reference
    assert len(said) == 2 and not read


@pytest.mark.parametrize("source", ["image", "lidar", "mask"])
def test_a_changed_source_is_read_again(fixed: Fixed, source: str) -> None:
    before = fill(fixed)
    path = {"image": fixed.patch.images[2], "lidar": fixed.patch.lidar, "mask": fixed.patch.mask}[source]
    assert path is not None
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = fill(fixed)
    assert (after.images != before.images, after.reference != before.reference) == (source == "image", source != "image")
    assert Path(after.images).exists() and Path(after.reference).exists()


@pytest.mark.parametrize("array", ["images", "reference"])
def test_a_truncated_array_is_written_again(fixed: Fixed, array: str) -> None:
    path = Path(getattr(fill(fixed), array))
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    fill(fixed)
    assert path.read_bytes() == content


def test_another_selection_of_images_is_read(fixed: Fixed) -> None:
    patch = fixed.patch
    fewer = Patch(**{**vars(patch), "images": patch.images[1:], "dates": patch.dates[1:]})
    assert fill(Fixed(fewer, fixed.folder)).images != fill(fixed).images


def test_heights_at_the_output_resolution_stay_as_they_are(fixed: Fixed) -> None:
    root = fixed.folder.parent / "root"
    patch = select(read_catalogue(root, resolution=5.0, lidar_resolution=5.0), "training").patches[0]
    cached = cache_patches([patch], fixed.folder, resolution=5.0, lidar_resolution=5.0)[0]
    with rasterio.open(patch.lidar) as raster:
        height = raster.read(1)
    assert height.shape == (200, 200) and patch.lidar.parent.name == "res_5"
    np.testing.assert_array_equal(np.load(cached.reference)[0], np.maximum(height, 0))
    # The mask is at 1 m: a pixel of 5 m is masked where all of it is.
    assert patch.mask is not None
    with rasterio.open(patch.mask) as raster:
        masked = raster.read(1).reshape(200, 5, 200, 5).all(axis=(1, 3))
    np.testing.assert_array_equal(np.load(cached.reference)[1], masked | (height <= 0))


def test_nodata_of_unsigned_files(tmp_path: Path) -> None:
    values = np.full((10, 150, 150), 40_000, np.uint16)
    values[:, 0, 0], values[:, 0, 1] = 65_535, 1200
    write_tif(tmp_path / "image.tif", values, 0, 0, 10, "EPSG:2154", nodata=65_535)
    image = read_image(tmp_path / "image.tif")
    assert image[0, 0, :3].tolist() == [NODATA, 1200, 32_767]


def test_heights_not_above_zero_are_masked_and_never_negative(tmp_path: Path) -> None:
    heights = np.full((1000, 1000), 30, np.int16)
    heights[0, :3] = (-1, 0, -9999)
    write_tif(tmp_path / "lidar.tif", heights, 440_000, 6_740_000, 1, "EPSG:2154")
    height, no_vegetation = read_reference(tmp_path / "lidar.tif", None, 1.0)
    assert height[0, :4].tolist() == [0, 0, 0, 30] and no_vegetation[0, :4].tolist() == [True, True, True, False]


def test_a_file_truncated_since_the_check_is_named(fixed: Fixed) -> None:
    path = fixed.patch.images[2]
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(InputError, match=f"{path} cannot be read as a GeoTIFF; it may be truncated"):
        fill(fixed)
    assert not list(fixed.folder.rglob("images*"))
    path.unlink()
    with pytest.raises(InputError, match=f"{path} cannot be read: No such file"):
        fill(fixed)


def test_too_little_disk_space_is_noticed_before_anything_is_read(fixed: Fixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"the cache needs 0.0 GB in .*, but only 0.0 GB are free there; choose another"):
        fill(fixed)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_leaves_nothing_behind(fixed: Fixed) -> None:
    with pytest.raises(InputError) as refused:
        fill(fixed)
    assert os.strerror(errno.EFBIG) in str(refused.value) and "\n" not in str(refused.value)
    assert [path for path in fixed.folder.rglob("*") if path.is_file()] == [fixed.folder / ".lock"]


def test_runs_that_share_a_folder_fill_it_once(fixed: Fixed) -> None:
    said: list[str] = []
    runs = [threading.Thread(target=fill, args=(fixed, 5.0, said)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sum("Reading 1 of" in line for line in said) == 1


def test_nodata_of_unsigned_lidar_is_not_vegetation(tmp_path: Path) -> None:
    heights = np.full((1000, 1000), 120, dtype=np.uint16)
    heights[0, :3] = 65535
    write_tif(tmp_path / "a.tif", heights, 440_000, 6_740_000, 1, "EPSG:2154", nodata=65535)
    height, no_vegetation = read_reference(tmp_path / "a.tif", None, 1.0)
    assert height.max() == 120 and no_vegetation.sum() == 3 and no_vegetation[0, :3].all()
