"""The catalogue of canopy tiles: what it finds wrong, what it refuses, what it selects."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from canopy_root import BANDS, NODATA, edit_table, write_root, write_tif

from datasets.canopy.catalogue import Catalogue, angle_channels, read_catalogue, select, select_disjoint
from utils.errors import InputError

TABLE = "patches/30TXT/30TXT.parquet"
MASKS = "lidar_mask/30TXT/mask_30TXT.parquet"
ANGLES = "angles/30TXT.csv"
IMAGE = "patches/30TXT/0440_6740/SENTINEL2B_20240210_30TXT_0440_6740.tif"
LIDAR = "lidar/30TXT/res_1/pH95_0440_6740_2024-01-27.tif"
MASK = "lidar_mask/30TXT/lidar_mask_0440_6740_30TXT.tif"
CORNER = (440_000, 6_740_000)
BLANK = np.zeros((10, 150, 150), np.int16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with nothing wrong: two squares of six images."""
    return write_root(tmp_path_factory.mktemp("root"), squares={"0440_6740": "training", "0441_6740": "test"}, images=6)


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "root"))


def findings(catalogue: Catalogue) -> dict[str, int]:
    return {finding.what: finding.count for finding in catalogue.findings}


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_complete_tiles_are_read_without_a_finding(whole: Path) -> None:
    catalogue = read_catalogue(whole, ["30TXT"], resolution=2.5)
    assert catalogue.findings == [] and catalogue.with_angles and catalogue.with_mask
    assert catalogue.crs["30TXT"].to_epsg() == 2154
    patches, dropped = select(catalogue, "training")
    assert dropped == {} and [patch.name for patch in patches] == ["0440_6740"]
    patch = patches[0]
    assert patch.corner == CORNER and patch.lidar == whole / LIDAR and patch.mask == whole / MASK
    assert patch.images[0] == whole / IMAGE and str(patch.dates[0]) == "2024-02-10" and len(patch.images) == 6
    assert np.all(np.diff(patch.dates) == np.timedelta64(25, "D"))
    assert str(patch.lidar_date) == "2024-01-27"
    assert patch.angles is not None and patch.angles.shape == (6, 6)


def test_any_projected_coordinate_system_in_metres_is_accepted(tmp_path: Path) -> None:
    write_root(tmp_path, squares={"0700_4500": "training"}, images=5, crs="EPSG:32631", angles=False, mask=False)
    catalogue = read_catalogue(tmp_path, resolution=10.0)
    assert not catalogue.with_angles and not catalogue.with_mask and catalogue.crs["30TXT"].to_epsg() == 32631
    patches, _ = select(catalogue, "training")
    assert patches[0].angles is None and patches[0].mask is None


def test_missing_files_are_left_out_and_counted(root: Path) -> None:
    (root / IMAGE).unlink()
    (root / LIDAR.replace("0440", "0441")).unlink()
    catalogue = read_catalogue(root, resolution=5.0)
    assert findings(catalogue) == {"LiDAR file missing, square left out": 1, "image missing, left out": 1}
    assert len(catalogue.rows) == 5 and "res_1/pH95_0441" in str(catalogue.findings[0])


def test_a_square_without_a_mask_is_left_out_if_masks_are_used(root: Path) -> None:
    (root / MASK).unlink()
    edit_table(root / MASKS, lidar_id=["0440_6740", "0440_6740"])
    found = findings(read_catalogue(root, resolution=5.0, mask="no"))
    assert found == {}
    with pytest.raises(InputError, match="none of the files that its tables name"):
        read_catalogue(root, resolution=5.0)


def test_rows_that_cannot_be_used_are_left_out_and_counted(root: Path) -> None:
    rows = pd.read_parquet(root / TABLE)
    dates = ["no day", *rows["s2_date"][1:]]
    rows = rows.assign(s2_date=dates)
    extra = rows.iloc[[1, 1]].assign(context=["training", "trial"])
    pd.concat([rows, extra]).to_parquet(root / TABLE)
    angles = pd.read_csv(root / ANGLES)
    pd.concat([angles, angles.iloc[[3]], angles.iloc[[4]].assign(image_name="another.tif")]).to_csv(root / ANGLES)
    edit_table(root / TABLE, context=[*rows["context"], "training", "training"])
    found = findings(read_catalogue(root, resolution=5.0))
    assert found == {
        "30TXT.parquet: s2_date not a date, row left out": 1,
        "30TXT.parquet: duplicate row of an image, row left out": 2,
        "30TXT.csv: duplicate row of an image, left out": 1,
        "30TXT.csv: angles of an unknown image, left out": 2,
    }
    edit_table(root / TABLE, context="training", lidarhd_id="corner")
    with pytest.raises(InputError, match=r"no usable image:\n  14 x 30TXT.parquet: lidarhd_id not <km>_<km>"):
        read_catalogue(root, resolution=5.0)


def test_rows_without_names_are_left_out_and_counted(root: Path) -> None:
    rows = pd.read_parquet(root / TABLE).astype({"image_name": object, "lidar_name": object, "lidarhd_id": object})
    for place, column in enumerate(("image_name", "lidar_name", "lidarhd_id")):
        rows.loc[place, column] = None
    rows.to_parquet(root / TABLE)
    found = findings(read_catalogue(root, resolution=5.0))
    assert found["30TXT.parquet: lidarhd_id, image_name or lidar_name missing, row left out"] == 3
    rows.iloc[:0].to_parquet(root / TABLE)
    with pytest.raises(InputError, match=r"30TXT.parquet has no rows"):
        read_catalogue(root, resolution=5.0)


@pytest.mark.parametrize("values", [["20240210"], [20240210], [pd.Timestamp("2024-02-10")], ["2024-02-10T10:50:00Z"]])
def test_dates_may_be_text_numbers_or_times(root: Path, values: list[object]) -> None:
    edit_table(root / TABLE, s2_date=values * 12)
    catalogue = read_catalogue(root, resolution=5.0)
    assert str(catalogue.rows["date"][0].date()) == "2024-02-10"
    assert select(catalogue, "training").patches


def image(values: np.ndarray = BLANK, dx: float = 0, **options: object) -> Callable[[Path], None]:
    """Replace an image."""
    crs = str(options.pop("crs", "EPSG:2154"))
    east, north = CORNER[0] - 250 + dx, CORNER[1] + 250
    return lambda root: write_tif(root / IMAGE, values, east, north, 10, crs, **options)


def bands_in_order(root: Path, order: tuple[str, ...]) -> None:
    import rasterio

    with rasterio.open(root / IMAGE, "r+") as raster:
        raster.descriptions = order


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (image(BLANK[:9]), "1 x image of 9 bands, not 10: patches/30TXT/0440_6740/SENTINEL2B_20240210"),
        (image(BLANK[:, :140]), "image of 140 x 150 pixels, not 150 x 150"),
        (image(BLANK.astype(np.float32)), "image of type float32, not int16, uint16"),
        (image(crs="EPSG:32630"), "coordinate system other than that of"),
        (image(crs="EPSG:4326"), "image without a projected coordinate system in metres"),
        (image(dx=1), "image whose upper-left corner or pixel size is not that of its patch"),
        (lambda root: bands_in_order(root, BANDS[::-1]), "bands in the order B12 B11"),
        (lambda root: cut(root / IMAGE, 0.9), "1 x image truncated: patches/30TXT/0440_6740/SENTINEL2B_20240210"),
        (lambda root: cut(root / IMAGE, 0.0001), "image that cannot be read as a GeoTIFF"),
        (lambda root: cut(root / LIDAR, 0.5), "lidar truncated"),
        (
            lambda root: write_tif(root / MASK, np.ones((500, 500), np.uint8), *CORNER, 1, "EPSG:2154"),
            "mask of 500 x 500 pixels, not 1000 x 1000",
        ),
        (
            lambda root: edit_table(root / TABLE, context=["training"] * 5 + ["test"] * 7),
            "square in more than one context: 0440_6740",
        ),
        (
            lambda root: edit_table(
                root / TABLE, context=["training"] * 5 + ["test"] * 7, lidarhd_id=["0440_6740"] * 5 + ["440_6740"] * 7
            ),
            "square in more than one context: 0440_6740, 440_6740",
        ),
    ],
)
def test_files_that_do_not_match_the_layout_are_refused_by_name(
    root: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(InputError) as refused:
        read_catalogue(root, resolution=5.0)
    assert message in str(refused.value)


def test_the_list_of_findings_is_short(root: Path) -> None:
    for path in (root / "patches/30TXT/0440_6740").glob("*.tif"):
        cut(path, 0.5)
    (root / LIDAR.replace("0440", "0441")).unlink()
    with pytest.raises(InputError) as refused:
        read_catalogue(root, resolution=5.0)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3 and lines[1].startswith("  6 x image truncated: ") and lines[1].endswith(", ...")
    assert lines[1].count(".tif") == 3 and "LiDAR file missing" in lines[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tiles": ["31TCJ"]}, "no tile 31TCJ; present: 30TXT"),
        ({"resolution": 4.0}, "resolution 4 m is not one of 10, 5, 2.5"),
        ({"lidar_resolution": 5.0}, "no LiDAR at 5 m (res_5); resolutions present: 1"),
        ({"lidar_resolution": 2.5}, "2.5 m is neither 1 m nor that of the output, 5 m"),
        ({"angles": "always"}, "angles=always is not one of auto, yes, no"),
    ],
)
def test_invalid_arguments_are_refused(whole: Path, flags: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_catalogue(whole, **{"resolution": 5.0, **flags})  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_missing_tables(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; a folder of tiles is expected"):
        read_catalogue(tmp_path / "nowhere", resolution=5.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no table patches/<tile>/<tile>.parquet"):
        read_catalogue(tmp_path / "empty", resolution=5.0)
    shutil.copytree(root / "patches/30TXT", root / "patches/31TCJ")
    (root / "patches/31TCJ/30TXT.parquet").rename(root / "patches/31TCJ/31TCJ.parquet")
    shutil.copytree(root / "lidar/30TXT", root / "lidar/31TCJ")
    found = findings(read_catalogue(root, resolution=5.0))
    assert found == {f"table missing, so {flag}=auto is resolved to no": 1 for flag in ("angles", "mask")}
    for flag in ("angles", "mask"):
        with pytest.raises(InputError, match=f"{flag}=yes needs .*31TCJ.*, which does not exist"):
            read_catalogue(root, resolution=5.0, **{flag: "yes"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("table", "column"), [(TABLE, "s2_date"), (MASKS, "valid_crop"), (ANGLES, "view_zenith")])
def test_a_table_without_a_column(root: Path, table: str, column: str) -> None:
    path = root / table
    if path.suffix == ".csv":
        pd.read_csv(path).drop(columns=column).to_csv(path)
    else:
        pd.read_parquet(path).drop(columns=column).to_parquet(path)
    with pytest.raises(InputError, match=f"{path.name} has no column {column}; expected columns"):
        read_catalogue(root, resolution=5.0)
    cut(root / TABLE, 0.5)
    with pytest.raises(InputError, match="may be truncated"):
        read_catalogue(root, resolution=5.0)


def test_the_published_selection(root: Path) -> None:
    rows = pd.read_parquet(root / TABLE)
    edit_table(
        root / TABLE,
        masked_pixels=[50.0, 50.1, *rows["masked_pixels"][2:]],
        valid_pixels=[100.0, 100.0, 99.9, *rows["valid_pixels"][3:]],
        # A day of year that is near, a year that is not; in reverse order of the rows.
        s2_date=["2024-12-01", "2024-11-01", "2024-10-01", "2023-01-26", "2025-01-27", "2025-01-28", *rows["s2_date"][6:]],
    )
    catalogue = read_catalogue(root, resolution=5.0)
    patches, dropped = select(catalogue, "training", min_dates=3)
    assert [str(date) for date in patches[0].dates] == ["2023-01-26", "2024-12-01", "2025-01-27"]
    assert dropped == {
        "images with masked_pixels above 50": 1,
        "images with valid_pixels below 100": 1,
        "images more than 366 days from the LiDAR": 1,
    }
    with pytest.raises(InputError, match="no usable square of context 'training'; left out: images with masked"):
        select(catalogue, "training")
    assert len(select(catalogue, "training", max_masked=60, min_valid=90).patches[0].dates) == 5
    with pytest.raises(InputError, match=r"no square of context 'validation'; present: training \(1 squares\), test"):
        select(catalogue, "validation")


def test_images_without_valid_angles_are_left_out_if_angles_are_used(root: Path) -> None:
    angles = pd.read_csv(root / ANGLES)
    angles.loc[0, "view_zenith"] = np.nan
    angles.loc[2, "view_zenith"], angles.loc[3, "sun_azimuth"] = -9999, np.inf
    angles.drop(index=1).to_csv(root / ANGLES)
    patches, dropped = select(read_catalogue(root, resolution=5.0), "training", min_dates=2)
    assert dropped == {"images without sun or view angles": 4} and len(patches[0].images) == 2
    assert len(select(read_catalogue(root, resolution=5.0, angles="no"), "training").patches[0].images) == 6


def test_squares_with_little_vegetation_are_left_out_if_masks_are_used(root: Path) -> None:
    edit_table(root / MASKS, valid_crop=[9.9, 10.0])
    catalogue = read_catalogue(root, resolution=5.0)
    assert len(select(catalogue, "test").patches) == 1
    assert select(catalogue, "training", min_vegetation=9).dropped == {}
    with pytest.raises(InputError, match=r"squares with valid_crop below 10 \(1\)"):
        select(catalogue, "training")
    assert len(select(read_catalogue(root, resolution=5.0, mask="no"), "training").patches) == 1


def test_a_square_in_two_tiles_is_in_one_context_only(tmp_path: Path) -> None:
    """Tiles overlap, and one table does not know the contexts of another."""
    root = write_root(tmp_path, images=5)
    shared = {"441_6741": "training", "0440_6741": "training", "0440_6740": "validation", "0441_6740": "training"}
    alone = {"0450_6740": "training", "0452_6740": "validation", "0454_6740": "test"}
    write_root(root, tile="31TDM", squares=shared | alone, images=5, seed=2)
    selected = select_disjoint(read_catalogue(root, resolution=5.0), min_dates=5)
    names = {context: [f"{patch.tile}/{patch.name}" for patch in patches] for context, (patches, _) in selected.items()}
    assert list(names) == ["test", "validation", "training"]
    assert names["test"] == ["30TXT/0441_6741", "31TDM/0454_6740"]
    assert names["validation"] == ["30TXT/0440_6741", "31TDM/0440_6740", "31TDM/0452_6740"]
    # The same square twice in one context hurts nobody.
    assert names["training"] == ["30TXT/0441_6740", "31TDM/0441_6740", "31TDM/0450_6740"]
    assert str(selected["training"]) == "3; left out: squares used for test or validation in another tile (3)"
    assert str(selected["validation"]) == "3"


def test_tiles_in_different_coordinate_systems_share_no_squares(tmp_path: Path) -> None:
    root = write_root(tmp_path, squares={"0440_6740": "training", "0441_6740": "validation"}, images=5)
    write_root(root, tile="31TDM", squares={"0440_6740": "test"}, images=5, crs="EPSG:32631")
    selected = select_disjoint(read_catalogue(root, resolution=5.0))
    assert all(len(selection.patches) == 1 and not selection.dropped for selection in selected.values())


def test_a_context_left_without_squares_by_others_is_refused(tmp_path: Path) -> None:
    root = write_root(tmp_path, squares={"0440_6740": "training", "0441_6740": "validation"}, images=5)
    write_root(root, tile="31TDM", squares={"0440_6740": "test"}, images=5)
    with pytest.raises(InputError, match="every training square is also a test or validation square in another tile"):
        select_disjoint(read_catalogue(root, resolution=5.0))


def test_angle_channels() -> None:
    channels = angle_channels(np.array([[60.0, 90.0, 0.0, 180.0], [12.3456, 200.0, 7.0, 45.0]]))
    np.testing.assert_allclose(channels[0], [0.5, 0, 1, 1, -1, 0], atol=1e-7)
    np.testing.assert_allclose(channels[1], [0.9769, -0.9397, -0.342, 0.9925, 0.7071, 0.7071], atol=1e-7)
    assert channels.dtype == np.float32 and NODATA == -10000
