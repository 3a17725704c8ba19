"""Reading LAS, LAZ and COPC files."""

from pathlib import Path

import laspy
import numpy as np
import pytest
from clouds import LAMBERT, forest, write_copc
from conftest import PROJECT
from laspy.vlrs.known import GeoKeyDirectoryVlr, GeoKeyEntryStruct
from numpy.typing import NDArray
from pyproj import CRS

from datasets.canopy.inputs_demo import write_laz
from datasets.products.point_clouds import Bounds, Points, read_header, read_points
from utils.errors import InputError

REAL = PROJECT.parent / "shared" / "data" / "lidarhd"
BOUNDS = (640_000.0, 6_503_900.0, 640_100.0, 6_504_000.0)


@pytest.fixture(scope="module")
def points() -> NDArray[np.float64]:
    return forest(639_990, 6_504_010, 120, 3000, seed=1)


def sorted_points(path: Path, bounds: Bounds = BOUNDS) -> NDArray[np.int64]:
    parts = list(read_points(read_header(path), bounds))
    joined = np.stack([np.concatenate(field) for field in zip(*parts, strict=True)], axis=1).astype(np.int64)
    return joined[np.lexsort(joined.T)]


def expected(points: NDArray[np.float64]) -> NDArray[np.int64]:
    left, _, _, top = BOUNDS
    mm = np.rint(1000 * np.stack([points[:, 0] - left, top - points[:, 1], points[:, 2]], axis=1)).astype(np.int64)
    inside = (mm[:, :2] >= 0).all(1) & (mm[:, :2] < 100_000).all(1)
    joined = np.concatenate([mm, points[:, 3:].astype(np.int64)], axis=1)[inside]
    return joined[np.lexsort(joined.T)]


def test_points_are_the_same_in_every_format_scale_and_offset(points: NDArray[np.float64], tmp_path: Path) -> None:
    wanted = expected(points)
    assert 1000 < len(wanted) < 3000
    for name, scale in (("a.las", 0.01), ("b.laz", 0.01), ("c.laz", 0.001)):
        write_laz(tmp_path / name, points, LAMBERT, scale=scale)
        assert np.array_equal(sorted_points(tmp_path / name), wanted)
    write_copc(tmp_path / "d.copc.laz", points)
    assert read_header(tmp_path / "d.copc.laz").copc
    assert np.array_equal(sorted_points(tmp_path / "d.copc.laz"), wanted)


def test_a_copc_file_gives_points_at_the_borders_of_its_parts_once(tmp_path: Path) -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 1100, 55.0), np.arange(0, 1100, 55.0)))
    points = np.stack([640_000 + x, 6_503_000 + y, np.full(x.size, 5.0), np.full(x.size, 2.0)], axis=1)
    write_copc(tmp_path / "grid.copc.laz", points)
    bounds = (639_999.0, 6_502_999.0, 641_101.0, 6_504_101.0)
    assert len(sorted_points(tmp_path / "grid.copc.laz", bounds)) == len(points)


def test_withheld_points_are_left_out(points: NDArray[np.float64], tmp_path: Path) -> None:
    withheld = np.arange(len(points)) % 3 == 0
    write_laz(tmp_path / "a.laz", points, LAMBERT, withheld=withheld)
    assert np.array_equal(sorted_points(tmp_path / "a.laz"), expected(points[~withheld]))


def test_the_header_says_where_when_and_in_which_system(points: NDArray[np.float64], tmp_path: Path) -> None:
    write_laz(tmp_path / "a.laz", points, LAMBERT)
    header = read_header(tmp_path / "a.laz")
    assert header.points == 3000 and header.day == "2023-06-13" and header.flight and not header.copc
    assert CRS.from_wkt(header.crs).to_epsg() == 2154
    assert header.bounds == pytest.approx((*points[:, :2].min(0), *points[:, :2].max(0)))


@pytest.mark.parametrize(
    ("crs", "given", "message"),
    [
        (None, None, "states no coordinate system; crs=EPSG:2154, say, tells it"),
        ("EPSG:2154", "EPSG:32631", "is in EPSG:2154, but crs=EPSG:32631 was given"),
        ("EPSG:4326", None, "is in EPSG:4326, not in metres on a map"),
        ("EPSG:2263", None, r"has coordinates in US survey foot"),
        ("EPSG:26918+6360", None, "has heights in US survey foot"),
        ("EPSG:26918+8228", None, "has heights in foot"),
    ],
)
def test_systems_other_than_metric_ones_are_refused(
    points: NDArray[np.float64], tmp_path: Path, crs: str | None, given: str | None, message: str
) -> None:
    write_laz(tmp_path / "a.laz", points, CRS.from_user_input(crs) if crs else None)
    with pytest.raises(InputError, match=f"a.laz {message}"):
        read_header(tmp_path / "a.laz", CRS.from_user_input(given) if given else None)


def test_a_system_may_be_given_and_heights_may_have_one(points: NDArray[np.float64], tmp_path: Path) -> None:
    write_laz(tmp_path / "a.laz", points, None)
    assert CRS.from_wkt(read_header(tmp_path / "a.laz", LAMBERT).crs) == LAMBERT
    write_laz(tmp_path / "b.laz", points, CRS.from_user_input("EPSG:2154+5720"))
    assert CRS.from_wkt(read_header(tmp_path / "b.laz", LAMBERT).crs).to_epsg() == 2154


@pytest.mark.parametrize(("key", "value", "message"), [(4099, 9003, "unit 9003"), (4096, 6360, "US survey foot")])
def test_feet_in_geotiff_keys_are_seen(
    points: NDArray[np.float64], tmp_path: Path, key: int, value: int, message: str
) -> None:
    header = laspy.LasHeader(version="1.2", point_format=3)
    header.scales = np.full(3, 0.01)
    keys = GeoKeyDirectoryVlr()
    keys.geo_keys_header.number_of_keys = 2
    keys.geo_keys = [GeoKeyEntryStruct(3072, 0, 1, 2154), GeoKeyEntryStruct(key, 0, 1, value)]
    header.vlrs.append(keys)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = points[:, :3].T
    cloud.write(tmp_path / "a.laz")
    with pytest.raises(InputError, match=message):
        read_header(tmp_path / "a.laz")


def test_what_is_no_whole_file_is_refused(points: NDArray[np.float64], tmp_path: Path) -> None:
    write_laz(tmp_path / "a.laz", points, LAMBERT)
    write_laz(tmp_path / "b.las", points, LAMBERT)
    (tmp_path / "text.laz").write_text("no points")
    for name in ("a.laz", "b.las"):
        content = (tmp_path / name).read_bytes()
        for share in (0.01, 0.5, 0.97):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(InputError, match=f"{name} .*truncated"):
                sorted_points(tmp_path / name)
    with pytest.raises(InputError, match=r"text.laz cannot be read as LAS, LAZ or COPC"):
        read_header(tmp_path / "text.laz")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real LiDAR files are absent")
def test_real_files() -> None:
    thinned = read_header(REAL / "Semis_2022_0906_6665_LA93_IGN69_ok.laz")
    assert (thinned.points, thinned.day, thinned.flight) == (64_572, "2022-07-28", True)
    dense = read_header(REAL / "test_data_77050_627755_LA93_IGN69.laz")
    assert CRS.from_wkt(dense.crs).to_epsg() == 2154 and dense.day == "2021-05-28"
    parts = list(read_points(dense, (770_500.0, 6_277_500.0, 770_560.0, 6_277_560.0)))
    assert isinstance(parts[0], Points)
    assert sum(len(part.up) for part in parts) == 84_524 - 11  # those on the lower edge are of the square below
