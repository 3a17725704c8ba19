"""The simulated canopy tiles: the real layout, whole or not at all, and seasons, shadows and heights as in nature."""

import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from numpy.typing import NDArray

from datasets.canopy import demo
from datasets.canopy.catalogue import BANDS
from datasets.canopy.demo import CONTEXT_OF_SQUARE, TILES, Landscape, Square, Task, demo_root, sun_angles
from utils.errors import InputError

QUALITY = ["masked_pixels", "valid_pixels", "ratio_cloud", "ratio_border"]
IMAGE_COLUMNS = ["index", "lidarhd_id", "context", "lidar_date", "lidar_name", "s2_date", "sensor", "tile_name"]
IMAGE_COLUMNS += ["image_name", "mask_name", *QUALITY]
ANGLE_COLUMNS = ["patch_id", "image_name", "x", "y", "sun_zenith", "sun_azimuth", "view_zenith", "view_azimuth"]
TILE = "31TDL"
PUBLISHED_MEDIAN = np.array([271, 538, 389, 921, 2333, 2758, 2995, 3101, 1853, 905])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tile of the default seed."""
    return demo_root(tmp_path_factory.mktemp("demo"), small=True, processes=1)


@pytest.fixture(scope="module")
def images(root: Path) -> pd.DataFrame:
    """The table of its images."""
    return pd.read_parquet(root / "patches" / TILE / f"{TILE}.parquet")


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    """What stands in the first square of the small tile."""
    square = demo._place_square(0, 0, "training", 2024, small=True)
    return demo.draw_landscape(square.forest_share, np.random.default_rng(square.seed))


def read(path: Path) -> NDArray[Any]:
    """All bands of a raster."""
    with rasterio.open(path) as file:
        return np.asarray(file.read())


def usable(images: pd.DataFrame) -> pd.DataFrame:
    """The images that the published selection keeps."""
    return images[(images["masked_pixels"] <= 50) & (images["valid_pixels"] >= 100)]


def files_of(root: Path) -> dict[str, bytes]:
    """Content by path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_tables_have_the_real_columns(root: Path, images: pd.DataFrame) -> None:
    assert list(images.columns) == IMAGE_COLUMNS
    assert images.groupby("lidarhd_id")["context"].first().value_counts().to_dict() == {
        "training": 2,
        "validation": 1,
        "test": 1,
    }
    assert set(images["sensor"]) == {"SENTINEL2A", "SENTINEL2B"} and (images["tile_name"] == TILE).all()
    masks = pd.read_parquet(root / "lidar_mask" / TILE / f"mask_{TILE}.parquet")
    assert list(masks.columns) == ["lidar_id", "lidar_mask_name", "tile", "valid_whole", "valid_crop"]
    assert sorted(masks["lidar_id"]) == sorted(images["lidarhd_id"].unique())
    assert list(pd.read_csv(root / "angles" / f"{TILE}.csv").columns) == ANGLE_COLUMNS


def test_the_files_are_those_of_the_tables(root: Path, images: pd.DataFrame) -> None:
    for row in images.itertuples():
        day = row.s2_date.replace("-", "")
        assert row.image_name == f"{row.sensor}_{day}_{TILE}_{row.lidarhd_id}.tif"
        assert row.lidar_name == f"pH95_{row.lidarhd_id}_{row.lidar_date}.tif"
        assert abs((date.fromisoformat(row.s2_date) - date.fromisoformat(row.lidar_date)).days) <= 366
    patches = images["lidarhd_id"].unique()
    expected = {f"patches/{TILE}/{row.lidarhd_id}/{row.image_name}" for row in images.itertuples()}
    expected |= {f"lidar/{TILE}/res_1/{name}" for name in images["lidar_name"]}
    expected |= {f"lidar_mask/{TILE}/lidar_mask_{patch}_{TILE}.tif" for patch in patches}
    expected |= {f"patches/{TILE}/{TILE}.parquet", f"lidar_mask/{TILE}/mask_{TILE}.parquet"}
    expected |= {f"angles/{TILE}.csv", "SIMULATED.txt"}
    assert set(files_of(root)) == expected


def test_rasters_are_georeferenced_as_their_names_say(root: Path, images: pd.DataFrame) -> None:
    """Sizes, types, Lambert-93 grids and nodata."""
    for row in images.itertuples():
        east, north = (1000 * int(part) for part in row.lidarhd_id.split("_"))
        with rasterio.open(root / "patches" / TILE / row.lidarhd_id / row.image_name) as file:
            assert (file.count, file.height, file.width) == (10, 150, 150) and set(file.dtypes) == {"int16"}
            assert file.crs.to_epsg() == 2154 and file.res == (10, 10) and file.nodata == -10000
            assert tuple(file.bounds)[::3] == (east - 250, north + 250)
        with rasterio.open(root / "lidar" / TILE / "res_1" / row.lidar_name) as file:
            assert file.shape == (1000, 1000) and file.dtypes == ("int16",) and file.nodata == -1
            assert file.crs.to_epsg() == 2154 and file.res == (1, 1) and tuple(file.bounds)[::3] == (east, north)
    for path in (root / "lidar_mask" / TILE).glob("*.tif"):
        with rasterio.open(path) as file:
            assert file.shape == (1000, 1000) and file.dtypes == ("uint8",) and file.crs.to_epsg() == 2154


def test_masks_table_counts_tall_vegetation(root: Path) -> None:
    for row in pd.read_parquet(root / "lidar_mask" / TILE / f"mask_{TILE}.parquet").itertuples():
        mask = read(root / "lidar_mask" / TILE / row.lidar_mask_name)[0]
        assert row.valid_whole == pytest.approx(100 * (mask == 0).mean(), abs=0.01)
        assert row.valid_crop == pytest.approx(100 * (mask[180:820, 180:820] == 0).mean(), abs=0.01)
        assert row.valid_crop >= 10


def test_real_flaws_are_simulated(root: Path, images: pd.DataFrame) -> None:
    """Cloudy images, an orbit's edge, a missing row of angles; and still enough images of every patch."""
    assert (images["masked_pixels"] > 50).any()
    cut = images[images["ratio_border"] > 0]
    assert len(cut) > 0
    for row in images.itertuples():
        nodata = read(root / "patches" / TILE / row.lidarhd_id / row.image_name) == -10000
        assert 100 * nodata.mean() == pytest.approx(row.ratio_border, abs=1e-3)
        assert row.valid_pixels == pytest.approx(100 - row.ratio_border, abs=1e-3)
        np.testing.assert_array_equal(nodata.any(axis=0), nodata.all(axis=0))
    angles = pd.read_csv(root / "angles" / f"{TILE}.csv")
    assert len(angles) == len(images) - 1 and set(angles["image_name"]) < set(images["image_name"])
    assert (usable(images).groupby("lidarhd_id").size() >= 6).all()


def test_images_of_a_date_share_sun_and_view(root: Path) -> None:
    angles = pd.read_csv(root / "angles" / f"{TILE}.csv")
    day = angles["image_name"].str.split("_").str[1]
    assert (angles.groupby(day)[ANGLE_COLUMNS[4:]].nunique() == 1).all(axis=None)
    first = angles.iloc[0]
    east, north = (1000 * int(part) for part in first["patch_id"].split("_"))
    assert first["x"] == north - 500 and first["y"] == east + 500


def test_the_square_of_fields_has_too_little_vegetation(tmp_path: Path) -> None:
    """The first training square of each full tile has too little tall vegetation in its middle."""
    for tile in range(len(TILES)):
        square = demo._place_square(tile, 0, CONTEXT_OF_SQUARE[0], 2024, small=False)
        assert demo._make_patch(Task(tmp_path, square, [])).mask["valid_crop"] < 10


@pytest.mark.parametrize("tile", range(len(TILES)))
def test_patches_do_not_overlap_squares_of_others(tile: int) -> None:
    """Patches reach 250 m beyond their squares; contexts stay apart by more than that."""
    squares = [
        demo._place_square(tile, position, context, 2024, False) for position, context in enumerate(CONTEXT_OF_SQUARE)
    ]
    assert {square.context for square in squares} == {"training", "validation", "test"}

    def apart(one: Square, other: Square) -> bool:
        return max(abs(one.east - other.east), abs(one.north - other.north)) >= 1.25

    assert all(apart(one, other) for one in squares for other in squares if one is not other)


def test_heights_are_realistic(root: Path, images: pd.DataFrame) -> None:
    tall = []
    for name in images["lidar_name"].unique():
        height = read(root / "lidar" / TILE / "res_1" / name)[0]
        mask = read(root / "lidar_mask" / TILE / f"lidar_mask_{name[5:14]}_{TILE}.tif")[0]
        assert height.min() == -1 and 200 < height.max() < 450
        assert 0.1 < (height == 0).mean() < 0.9 and (height == -1).mean() < 0.1
        tall.append(height[mask == 0])
    heights = np.concatenate(tall)
    low, high = np.quantile(heights, [0.1, 0.9])
    assert low < 80 and 180 < high < 330


def test_reflectances_are_realistic(root: Path, images: pd.DataFrame) -> None:
    """Band medians within a factor of those published for France."""
    clear = images[(images["masked_pixels"] < 5) & (images["valid_pixels"] == 100)]
    pixels = [read(root / "patches" / TILE / row.lidarhd_id / row.image_name) for row in clear.itertuples()]
    ratio = np.median(np.concatenate([image.reshape(10, -1) for image in pixels], axis=1), axis=1) / PUBLISHED_MEDIAN
    assert (ratio > 0.6).all() and (ratio < 1.6).all()


def ndvi_of(landscape: Landscape, day: int, where: NDArray[np.bool_]) -> float:
    """Mean vegetation index of 10 m pixels on a day, without air and noise."""
    acquisition = demo.Acquisition(
        day,
        "",
        *sun_angles(day),
        4.0,
        104.0,
        np.ones(10),
        np.zeros(10),
        cloud_cover=0.0,
        cloud_seed=(0,),
        last_easting=np.inf,
    )
    surface = next(demo.surfaces_of(landscape, [acquisition]))
    red, infrared = surface[..., BANDS.index("B4")], surface[..., BANDS.index("B8")]
    return float(((infrared - red) / (infrared + red))[where].mean())


def test_broadleaves_lose_their_leaves_and_conifers_do_not(landscape: Landscape) -> None:
    border = demo.FRINGE // demo.CELL
    cover = [
        (crowns[border:-border, border:-border].reshape(150, 5, 150, 5) > 0).mean(axis=(1, 3))
        for crowns in (landscape.broadleaf, landscape.conifer)
    ]
    broadleaf, conifer = (share > 0.85 for share in cover)
    assert broadleaf.sum() > 200 and conifer.sum() > 200
    winter, spring, summer = 10, 90, 190
    assert ndvi_of(landscape, summer, broadleaf) > ndvi_of(landscape, winter, broadleaf) + 0.3
    assert ndvi_of(landscape, spring, broadleaf) == pytest.approx(ndvi_of(landscape, winter, broadleaf), abs=0.1)
    assert ndvi_of(landscape, summer, conifer) == pytest.approx(ndvi_of(landscape, winter, conifer), abs=0.1)


@pytest.mark.parametrize(("day", "zenith"), [(171, 25.7), (354, 70.4)])
def test_sun_is_in_the_south_east(day: int, zenith: float) -> None:
    """High at midsummer, low at midwinter, east of south."""
    sun_zenith, sun_azimuth = sun_angles(day)
    assert sun_zenith == pytest.approx(zenith, abs=1.0) and 140 < sun_azimuth < 170


@pytest.mark.parametrize("day", [171, 354])
def test_shadows_fall_north_as_long_as_the_sun_is_low(day: int) -> None:
    """A wood of 20 m shades height / tan(elevation) of the ground behind it and none before it."""
    crowns = np.zeros((100, 100), dtype=np.float32)
    crowns[60:70, 20:80] = 20.0
    nothing = np.zeros_like(crowns)
    landscape = Landscape(nothing, nothing.astype(np.int64), nothing, crowns, nothing[:, None])
    zenith, azimuth = sun_angles(day)
    direct = demo._sunlit(landscape, day, zenith, azimuth)
    assert (direct[70:] == 1).all()
    shaded = (direct[:60, 50] < 0.5).sum() * demo.CELL
    # Crowns let sun through their tops: half of it at half the depth of full shade.
    length = (20.0 - demo.SHADE_DEPTH / 2) * np.tan(np.deg2rad(zenith)) * -np.cos(np.deg2rad(azimuth))
    assert shaded == pytest.approx(length, abs=2 * demo.CELL)


def test_files_do_not_depend_on_the_number_of_processes(root: Path, tmp_path: Path) -> None:
    """Two squares made again, each in a process of its own, are those that one process made."""
    contexts = demo.SMALL_CONTEXT_OF_SQUARE
    squares = [demo._place_square(0, position, context, 2024, small=True) for position, context in enumerate(contexts)]
    acquisitions = demo.draw_acquisitions(squares, (2024, 0), demo.SMALL_DATES)
    rows = list(demo._make_patches([Task(tmp_path, square, acquisitions) for square in squares[:2]], processes=2))
    assert [made.mask["lidar_id"] for made in rows] == [square.patch for square in squares[:2]]
    again, before = files_of(tmp_path), files_of(root)
    assert len(again) > 2 * demo.SMALL_DATES
    assert all(content == before[name] for name, content in again.items())


def test_another_seed_is_another_landscape(landscape: Landscape) -> None:
    other = demo.draw_landscape(demo.WOODED, np.random.default_rng((1, 0, 0)))
    assert np.corrcoef(other.height.ravel(), landscape.height.ravel())[0, 1] < 0.3


def test_finished_tiles_are_not_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_simulate", lambda *_: pytest.fail("made again"))
    assert demo_root(root.parent, small=True) == root
    assert [path.name for path in root.parent.iterdir()] == [root.name]


@pytest.mark.parametrize(("error", "raised"), [(OSError(28, "No space left on device"), InputError), (KeyError(), KeyError)])
def test_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def fail(root: Path, *_: Any) -> None:
        (root / "patches").mkdir()
        raise error

    monkeypatch.setattr(demo, "_simulate", fail)
    with pytest.raises(raised, match="could not be written to .*: No space left" if raised is InputError else None):
        demo_root(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_make_the_tiles_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both make the files; who comes second finds the first's in place."""
    together = threading.Barrier(2)

    def write(root: Path, *_: Any) -> None:
        together.wait(timeout=10)
        (root / "file").write_text("whole")
        time.sleep(0.05)

    monkeypatch.setattr(demo, "_simulate", write)
    roots: list[Path] = []
    threads = [threading.Thread(target=lambda: roots.append(demo_root(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(roots) == 2 and roots[0] == roots[1] and (roots[0] / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [roots[0]]
