"""Canopy samples: windows, dates, masks, batches, standardisation and its statistics."""

import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canopy_root import NODATA, SPECTRUM, write_root, write_tif
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.canopy.cache import CachedPatch, cache_patches
from datasets.canopy.catalogue import read_catalogue, select
from datasets.canopy.reference import drop_low_and_isolated
from datasets.canopy.tiles import PUBLISHED, Batch, CanopyPatches, collate, find_statistics, in_metres, standardise
from utils.errors import InputError

SQUARES = {f"{km:04d}_6740": "training" for km in (440, 441, 442)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"), squares=SQUARES, images=6)


@pytest.fixture(scope="module")
def patches(root: Path) -> list[CachedPatch]:
    return cached(root, 2.5)


def cached(root: Path, resolution: float, **flags: Any) -> list[CachedPatch]:
    catalogue = read_catalogue(root, resolution=resolution, **flags)
    return cache_patches(select(catalogue, "training").patches, root / "cache", resolution=resolution, workers=1)


def training(patches: list[CachedPatch], **flags: Any) -> CanopyPatches:
    return CanopyPatches(patches, **{"training": True, "resolution": 2.5, "margin": 32, "seed": 7, **flags})


def test_shapes_and_units_of_a_batch(patches: list[CachedPatch]) -> None:
    samples = training(patches)
    batch = collate([samples.sample(index, 0) for index in range(3)])
    assert batch.images.shape == (3, 6, 10, 128, 128) and batch.images.dtype == torch.int16
    assert batch.angles is not None and batch.angles.shape == (3, 6, 6) and batch.angles.dtype == torch.float32
    assert batch.days.tolist() == [[40, 65, 90, 115, 140, 165]] * 3 and batch.lidar_day.tolist() == [26] * 3
    assert batch.height.shape == batch.no_vegetation.shape == (3, 1, 256, 256)
    assert batch.height.dtype == torch.float32 and batch.no_vegetation.dtype == torch.bool
    assert batch.padding.dtype == torch.bool and not batch.padding.any()
    assert batch.names == ("30TXT/0440_6740", "30TXT/0441_6740", "30TXT/0442_6740")
    assert batch.corner.dtype == torch.float64


def test_images_and_heights_cover_the_same_area(tmp_path: Path) -> None:
    """Images hold their own column and row, heights (at 1 m) those of the image pixel that they lie in."""
    root = write_root(tmp_path, squares={"0440_6740": "training"}, images=5, mask=False)
    rows, columns = np.indices((150, 150))
    image = np.stack([columns, rows, *[columns] * 8]).astype(np.int16)
    for path in (root / "patches").rglob("*.tif"):
        write_tif(path, image, 439_750, 6_740_250, 10, "EPSG:2154")
    square = image[0, 25:125, 25:125] * 100 + image[1, 25:125, 25:125]
    lidar = next((root / "lidar").rglob("*.tif"))
    write_tif(lidar, square.repeat(10, 0).repeat(10, 1), 440_000, 6_740_000, 1, "EPSG:2154")
    for resolution, factor in ((10.0, 1), (5.0, 2), (2.5, 4)):
        patches = cached(root, resolution)
        for margin in (24, 32):
            samples = training(patches, resolution=resolution, margin=margin)
            for epoch in range(20):
                sample = samples.sample(0, epoch)
                inner = sample.images[0, :, margin:-margin, margin:-margin].astype(np.int64)
                np.testing.assert_array_equal(sample.height[::factor, ::factor], inner[0] * 100 + inner[1])
                np.testing.assert_array_equal(sample.height[::factor], sample.height[factor - 1 :: factor])
                corner = (439_750 + 10 * inner[0, 0, 0], 6_740_250 - 10 * inner[1, 0, 0])
                assert sample.corner == corner


@pytest.mark.parametrize(("margin", "reach"), [(0, (0, 36)), (25, (0, 36)), (32, (7, 29)), (43, (18, 18))])
def test_random_windows_extend_as_far_as_the_margin_allows(
    patches: list[CachedPatch], margin: int, reach: tuple[int, int]
) -> None:
    samples = training(patches[:1], margin=margin, lidar_resolution=2.5, max_dates=1)
    corners = np.array([samples.sample(0, epoch).corner for epoch in range(400)])
    for offset in ((corners[:, 0] - 440_000) / 10, (6_740_000 - corners[:, 1]) / 10):
        assert (offset.min(), offset.max()) == reach and set(offset) == set(range(reach[0], reach[1] + 1))


@pytest.mark.parametrize("flags", [{"margin": 44}, {"window": 101, "margin": 0}, {"margin": -1}, {"max_dates": 0}])
def test_a_window_that_does_not_fit_is_refused(patches: list[CachedPatch], flags: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"does not fit|max_dates=0"):
        training(patches, **flags)


def test_validation_takes_the_central_window_and_evenly_spaced_dates(patches: list[CachedPatch]) -> None:
    samples = training(patches, training=False, max_dates=4)
    first, later = samples.sample(1, 0), samples.sample(1, 5)
    # Four of six: 0, 1.67, 3.33 and 5, truncated. Rounded they would be 0, 2, 3 and 5.
    assert first.corner == (441_180, 6_739_820) and first.days.tolist() == [40, 65, 115, 165]
    np.testing.assert_array_equal(first.images, later.images)
    assert first.images.shape == (4, 10, 128, 128)
    np.testing.assert_array_equal(first.images, np.load(patches[1].images)[[0, 1, 3, 5], :, 11:139, 11:139])


def test_training_draws_dates_in_order_and_angles_with_them(patches: list[CachedPatch]) -> None:
    samples = training(patches, max_dates=4)
    drawn = [samples.sample(0, epoch) for epoch in range(30)]
    assert all(np.all(np.diff(sample.days) > 0) and len(sample.days) == 4 for sample in drawn)
    assert len({tuple(sample.days) for sample in drawn}) > 5
    assert {day for sample in drawn for day in sample.days} == {40, 65, 90, 115, 140, 165}
    assert drawn[0].angles is not None and drawn[0].angles.shape == (4, 6)


def same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def test_samples_do_not_depend_on_workers_or_order(patches: list[CachedPatch]) -> None:
    samples = training(patches, max_dates=4)
    keys = [(index, epoch) for epoch in (0, 1) for index in (2, 0, 1)]
    here = [collate([samples[key]]) for key in reversed(keys)][::-1]
    # Batches keep their order whatever worker makes them.
    loader = DataLoader(samples, sampler=keys, collate_fn=collate, num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
    assert all(same(one, other) for one, other in zip(here, loader, strict=True))
    moved = pickle.loads(pickle.dumps(samples))  # noqa: S301 -- as the loader sends it to a spawned worker
    assert same(here[0], collate([moved[keys[0]]]))
    assert not same(here[0], here[3]), "another epoch, another window"
    other_seed = training(patches, max_dates=4, seed=8)
    assert not same(here[0], collate([other_seed[keys[0]]]))


def test_the_height_of_masked_pixels_is_zero_in_training_and_test(patches: list[CachedPatch]) -> None:
    whole = np.load(patches[0].reference)[:, 72:328, 72:328]
    height, no_vegetation = drop_low_and_isolated(whole[0], whole[1] != 0)
    tested = training(patches, training=False).sample(0, 0)
    trained = training(patches, margin=43).sample(0, 0)  # no room to move: the central window
    for sample in (tested, trained):
        np.testing.assert_array_equal(sample.height, np.where(no_vegetation, 0, height))
        np.testing.assert_array_equal(sample.no_vegetation, no_vegetation)
    assert no_vegetation.any() and not no_vegetation.all() and (height[no_vegetation] > 0).any()


def test_heights_at_the_output_resolution_are_not_filtered(tmp_path: Path) -> None:
    root = write_root(tmp_path, squares={"0440_6740": "training"}, images=5, resolutions=(5.0,), mask=False)
    catalogue = read_catalogue(root, resolution=5.0, lidar_resolution=5.0)
    flags: dict[str, float] = {"resolution": 5.0, "lidar_resolution": 5.0}
    patches = cache_patches(select(catalogue, "training").patches, root / "cache", workers=1, say=[].append, **flags)  # type: ignore[arg-type]
    sample = CanopyPatches(patches, training=False, **flags).sample(0, 0)  # type: ignore[arg-type]
    low = (sample.height > 0) & (sample.height < 15)
    assert low.any() and not sample.no_vegetation[low].any()


def test_dates_are_padded_to_the_longest(patches: list[CachedPatch]) -> None:
    long, short = training(patches).sample(0, 0), training(patches, max_dates=2).sample(1, 0)
    batch = collate([short, long])
    assert batch.padding.tolist() == [[False] * 2 + [True] * 4, [False] * 6]
    assert torch.equal(batch.images[0, :2], torch.from_numpy(short.images)) and (batch.images[0, 2:] == NODATA).all()
    assert batch.angles is not None and not batch.angles[0, 2:].any() and not batch.days[0, 2:].any()


def test_no_file_stays_mapped_after_a_sample(patches: list[CachedPatch]) -> None:
    kept = [training(patches).sample(index, 0) for index in range(3)]
    gc.collect()
    assert len(kept) == 3 and "reference-" not in Path("/proc/self/maps").read_text()
    assert "images-" not in Path("/proc/self/maps").read_text()


def test_a_deleted_cache_is_named(patches: list[CachedPatch]) -> None:
    gone = [patches[0]._replace(images="/nowhere/images.npy")]
    with pytest.raises(InputError, match=r"30TXT/0440_6740 is gone from the cache .*/nowhere/images.npy"):
        training(gone).sample(0, 0)


def test_standardise() -> None:
    images = torch.full((1, 2, 10, 2, 2), 20_000, dtype=torch.int16)
    images[0, 0] = torch.tensor(PUBLISHED.band_median, dtype=torch.int16)[:, None, None]
    images[0, 1, :, 0, 0], images[0, 1, :, 0, 1] = NODATA, -5
    angles = torch.arange(12.0).reshape(1, 2, 6)
    x = standardise(images, angles, PUBLISHED)
    assert x.shape == (1, 2, 16, 2, 2) and x.dtype == torch.float32
    assert not x[0, 0, :10].any() and not x[0, 1, :10, 0, 0].any()
    assert x[0, 1, 0, 0, 1] == pytest.approx(-271 / 496.5) and x[0, 1, 9, 1, 1] == pytest.approx((15_000 - 905) / 1363)
    assert torch.equal(x[..., 10:, 1, 1], angles) and torch.equal(x[..., 10:, 0, 0], angles)
    assert torch.equal(standardise(images, None, PUBLISHED), x[:, :, :10])


def test_statistics_are_the_published_ones_unless_the_data_differ(patches: list[CachedPatch], tmp_path: Path) -> None:
    assert all(find_statistics(patches, choice, 1.0, 0) is PUBLISHED for choice in ("auto", "published"))
    own = find_statistics(patches, "data", 1.0, 0)
    assert own.source == "training pixels" and own == find_statistics(patches, "data", 1.0, 0)
    np.testing.assert_allclose(own.band_median, SPECTRUM, rtol=0.25)
    other = write_root(tmp_path, squares={"0440_6740": "training"}, images=5, spectrum=SPECTRUM * 2, mask=False)
    found = find_statistics(cached(other, 10.0), "auto", 1.0, 0)
    assert found.source == "training pixels"
    np.testing.assert_allclose(found.band_median, 2 * SPECTRUM, rtol=0.25)
    with pytest.raises(InputError, match="statistics=mine is not one of auto, published, data"):
        find_statistics(patches, "mine", 1.0, 0)


def test_statistics_leave_out_nodata_and_ground(tmp_path: Path) -> None:
    root = write_root(tmp_path, squares={"0440_6740": "training"}, images=5, mask=False)
    image = np.full((10, 150, 150), 1000, np.int16)
    image[:, ::2] = NODATA
    for path in (root / "patches").rglob("*.tif"):
        write_tif(path, image, 439_750, 6_740_250, 10, "EPSG:2154", nodata=NODATA)
    heights = np.full((1000, 1000), -1, np.int16)
    heights[:, 500:] = 200
    write_tif(next((root / "lidar").rglob("*.tif")), heights, 440_000, 6_740_000, 1, "EPSG:2154")
    found = find_statistics(cached(root, 10.0), "data", 1.0, 0)
    assert found.band_median == found.band_scale == (1000.0,) * 10
    assert found.height_median == found.height_scale == 200.0


def test_heights_are_converted_there_and_back() -> None:
    decimetres = torch.tensor([0.0, 113.0, 251.5])
    standardised = PUBLISHED.standardise_height(decimetres)
    torch.testing.assert_close(standardised, torch.tensor([-113 / 138.5, 0.0, 1.0]))
    torch.testing.assert_close(PUBLISHED.metres(standardised), in_metres(decimetres))
    assert PUBLISHED.metres(torch.tensor(-2.0)) == 0 and in_metres(torch.tensor(25.0)) == 2.5
