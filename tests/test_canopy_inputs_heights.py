"""From points to heights, masks and contexts: cases worked by hand, and what must not depend on how things are cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from canopy_root import write_tif
from clouds import GROUND, LAMBERT, TREE, forest, slope, write_copc
from conftest import PROJECT
from numpy.typing import NDArray
from rasterio.crs import CRS

from datasets.canopy import inputs_heights
from datasets.canopy.inputs_contexts import LEFT_OUT, draw_contexts
from datasets.canopy.inputs_demo import write_laz
from datasets.canopy.inputs_heights import (
    BUFFER,
    MM,
    Cloud,
    cell_percentile,
    height_raster,
    sort_points,
    thinned,
    triangulated,
)
from datasets.canopy.inputs_lidar import (
    HeightSpec,
    build_edges,
    build_heights,
    edge_tasks,
    find_lidar,
    find_terrain,
    lidar_tasks,
)
from datasets.canopy.inputs_mask import fields_of
from datasets.canopy.inputs_squares import Square, area_of, squares_of
from datasets.canopy.reference import vegetation_mask
from datasets.products.point_clouds import Points
from utils.errors import InputError

SQUARE = Square("31TDL", 640, 6504)
CRS_2154 = CRS.from_epsg(2154)
REAL = PROJECT.parent / "shared" / "data" / "lidarhd"


def spec_of(out: Path, **changes: Any) -> HeightSpec:
    flags: dict[str, Any] = {
        "lidar_resolution": 1.0,
        "percentile": 95.0,
        "vegetation_classes": (3, 4, 5),
        "max_height": 70.0,
    }
    flags |= {"min_coverage": 0.0, "lidar_unit": "auto", "lidar_resampling": "auto"}
    return HeightSpec(str(out), CRS_2154.to_wkt(), **(flags | changes))


def heights_of(lidar: str, out: Path, terrain: str = "none", square: Square = SQUARE, **changes: Any) -> NDArray[np.int16]:
    """Heights of a square by the step lidar, in this process."""
    found, spec = find_lidar(lidar, Path(), None, None, print), spec_of(out, **changes)
    tasks = lidar_tasks([square], found, find_terrain(terrain, Path(), found.crs), spec)
    for task in edge_tasks(tasks):
        build_edges(str(out))(task.given)
    record = build_heights(spec)(tasks[0].given)
    with rasterio.open(out / record["files"][0]) as raster:
        assert (raster.crs, raster.nodata, raster.bounds) == (CRS_2154, -1, pytest.approx(square.bounds))
        return raster.read(1)


def cloud_of(points: Sequence[tuple[float, float, float, int]], resolution: float = 1.0) -> Cloud:
    """A cloud of points: metres from the square's upper-left corner, up, class."""
    east, south, up, classes = np.array(points).T
    first, second, third = (np.rint(MM * part).astype(np.int32) for part in (east + BUFFER, south + BUFFER, up))
    return sort_points([Points(first, second, third, classes.astype(np.uint8))], resolution, (3, 4, 5))


def test_percentiles_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    cell, values = rng.integers(0, 50, 400), rng.integers(0, 30_000, 400)
    cell[cell == 7] = 8
    for percentile in (0, 50, 95, 100):
        found = cell_percentile(cell, values, 50, percentile)
        for number in range(50):
            own = values[cell == number]
            assert (
                np.isnan(found[number]) if len(own) == 0 else found[number] == pytest.approx(np.percentile(own, percentile))
            )


def test_heights_of_a_cell_worked_by_hand() -> None:
    ground = [(x, y, 100.0, GROUND) for x in range(-40, 1041, 40) for y in range(-40, 1041, 40)]
    # A cell of three returns, and one beside it without which the three would be too lonely.
    near_one_another = [(10.5, 20.5, 100 + height, TREE) for height in (2.0, 4.0, 12.0)]
    near_one_another += [(12.5, 20.5, 100 + height, TREE) for height in (1.0, 2.0, 11.0, 12.0)]
    others = [
        (30.5, 20.5, 108.0, 6),  # a building
        (50.5, 20.5, 100.0, 9),  # water
        (70.5, 20.5, 112.0, 7),  # noise alone is no return
        (90.5, 20.5, 105.0, 1),  # unclassified
        (110.5, 20.5, 150.0, TREE),  # a bird
        (130.5, 20.5, 180.0, TREE),  # higher than any tree
        (150.5, 20.5, 99.0, 3),  # below the ground
        (150.6, 20.5, 99.0, 3),
        (150.7, 20.5, 99.0, 3),
    ]
    cloud = cloud_of(ground + near_one_another + others)
    heights, counts = height_raster(cloud, triangulated(thinned(cloud.ground)), 1.0, 95, 70)
    # Ranks 0, 1, 2 of 2, 4, 12 m: 95 % of the way is 0.9 between the second and the third.
    assert heights[20, 10] == round(10 * (4 + 0.9 * 8)) == 112
    assert [heights[20, column] for column in (30, 50, 70, 90, 110, 130, 150)] == [0, 0, -1, 0, 0, 0, 0]
    assert heights[0, 1] == -1 and heights[0, 0] == 0 and heights[40, 40] == 0
    assert counts == {"vegetation": 12, "outliers": 2, "without_ground": 0}


def test_ground_is_the_median_of_each_square_metre_and_a_plane_stays_one() -> None:
    several = [(5.2, 5.2, height, GROUND) for height in (3.0, 1.0, 2.0, 9.0)]
    assert thinned(cloud_of(several).ground).tolist() == [[5.2, 5.2, 2.0]]
    points = forest(640_000 - 50, 6_504_000 + 50, 1100, 20_000, seed=2)
    points = points[points[:, 3] == GROUND]
    local = [(x - 640_000, 6_504_000 - y, z, GROUND) for x, y, z, _ in points]
    terrain = triangulated(thinned(cloud_of(local).ground))
    x, y = np.meshgrid(640_000 + np.arange(1001.0), 6_504_000 - np.arange(1001.0))
    assert np.abs(terrain - slope(x, y)).max() < 0.02


def test_triangles_fill_the_same_nodes_as_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.interpolate import LinearNDInterpolator

    rng = np.random.default_rng(4)
    ground = np.column_stack([rng.uniform(-40, 530, (60, 2)), rng.uniform(0, 50, 60)])
    monkeypatch.setattr(inputs_heights, "BATCH", 5000)
    found = inputs_heights._block_terrain(ground, 501)
    steps = np.arange(501.0)
    expected = LinearNDInterpolator(ground[:, :2], ground[:, 2])(steps[None, :], steps[:, None])
    assert np.array_equal(np.isnan(found), np.isnan(expected)) and np.isfinite(expected).mean() > 0.8
    assert np.nanmax(np.abs(found - expected)) < 1e-6


def test_ground_far_from_any_point_is_unknown() -> None:
    ground = [(x, y, 10.0, GROUND) for x in range(0, 101, 5) for y in range(0, 101, 5)]
    cloud = cloud_of([*ground, *[(140.5, 50 + 0.1 * step, 15.0, TREE) for step in range(5)]])
    terrain = triangulated(thinned(cloud.ground))
    assert terrain[50, 140] == 10 and np.isnan(terrain[50, 151]) and np.isnan(terrain[500, 500])
    far = cloud_of([*ground, (200.5, 50.5, 15.0, TREE)])
    heights, counts = height_raster(far, terrain, 1.0, 95, 70)
    assert heights[50, 200] == -1 and counts["without_ground"] == 1


@pytest.fixture(scope="module")
def points() -> NDArray[np.float64]:
    """A square and what lies around it."""
    return forest(639_900, 6_504_100, 1200, 40_000, seed=5)


@pytest.fixture(scope="module")
def whole(points: NDArray[np.float64], tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.int16]:
    folder = tmp_path_factory.mktemp("whole")
    write_laz(folder / "all.laz", points, LAMBERT)
    return heights_of(str(folder / "all.laz"), folder)


def test_a_cloud_cut_in_four_gives_the_same_heights(
    points: NDArray[np.float64], whole: NDArray[np.int16], tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    for name, (x, y) in {"inner": (640_433.0, 6_503_611.5), "tiles": (640_000.0, 6_504_000.0)}.items():
        folder = tmp_path / name
        folder.mkdir()
        part = 2 * (points[:, 0] >= x) + (points[:, 1] > y)
        for number in range(4):
            own = rng.permutation(points[part == number])
            write_laz(folder / f"{number}.laz", own, LAMBERT, scale=(0.01, 0.001)[number % 2])
        found = heights_of(str(folder), folder)
        assert np.array_equal(found, whole), name
    assert (tmp_path / "tiles" / ".inputs" / "edges").is_dir()  # ground of the neighbours alone
    assert (whole > 0).any() and (whole == 0).any() and (whole == -1).any()


def test_copc_gives_the_same_heights(points: NDArray[np.float64], whole: NDArray[np.int16], tmp_path: Path) -> None:
    write_copc(tmp_path / "all.copc.laz", points)
    assert np.array_equal(heights_of(str(tmp_path / "all.copc.laz"), tmp_path), whole)


def test_a_terrain_model_takes_the_place_of_ground_points(
    points: NDArray[np.float64], whole: NDArray[np.int16], tmp_path: Path
) -> None:
    write_laz(tmp_path / "trees.laz", points[points[:, 3] == TREE], LAMBERT)
    x, y = np.meshgrid(639_800 + np.arange(0.5, 1400, 5), 6_504_200 - np.arange(0.5, 1400, 5))
    for name, lift in (("good.tif", 0.0), ("ellipsoid.tif", 45.0)):
        terrain = (slope(x, y) + lift).astype(np.float32)
        write_tif(tmp_path / name, terrain, 639_798, 6_504_202, 5, "EPSG:2154")
    found = heights_of(str(tmp_path / "trees.laz"), tmp_path, str(tmp_path / "good.tif"))
    trees = found > 0
    assert np.abs(found[trees].astype(int) - whole[trees]).max() <= 1 and trees.sum() > 5000
    write_laz(tmp_path / "all.laz", points, LAMBERT)
    with pytest.raises(InputError, match=r"ellipsoid.tif lies 45.0 m above the ground points of .*all.laz; both need"):
        heights_of(str(tmp_path / "all.laz"), tmp_path, str(tmp_path / "ellipsoid.tif"))


def test_heights_at_10_m_are_percentiles_of_all_returns_of_a_cell(points: NDArray[np.float64], tmp_path: Path) -> None:
    write_laz(tmp_path / "all.laz", points, LAMBERT)
    found = heights_of(str(tmp_path / "all.laz"), tmp_path, lidar_resolution=10.0)
    trees = points[points[:, 3] == TREE]
    column, row = np.floor((trees[:, 0] - 640_000) / 10), np.floor((6_504_000 - trees[:, 1]) / 10)
    above = trees[:, 2] - slope(trees[:, 0], trees[:, 1])
    inside = (column >= 1) & (column < 99) & (row >= 1) & (row < 99)
    cells, of_cell = np.unique(np.stack([row, column])[:, inside].astype(int), axis=1, return_inverse=True)
    full = np.flatnonzero(np.bincount(of_cell.ravel()) >= 4)
    assert len(full) > 100
    for number in full[:100]:
        expected = 10 * np.percentile(above[inside][of_cell.ravel() == number], 95)
        assert found[tuple(cells[:, number])] == pytest.approx(expected, abs=0.8)


def test_rasters_of_heights_of_any_grid_are_taken(tmp_path: Path) -> None:
    metres = np.full((110, 110), 12.3, np.float32)
    metres[:, 50:] = -9999
    write_tif(tmp_path / "chm_2023-06-13.tif", metres, 639_950, 6_504_050, 10, "EPSG:2154", nodata=-9999)
    found = heights_of(str(tmp_path / "chm_2023-06-13.tif"), tmp_path / "a")
    assert set(np.unique(found)) == {-1, 123} and found[500, 400] == 123 and found[500, 700] == -1
    with rasterio.open(tmp_path / "chm_2023-06-13.tif") as raster:
        degrees = rasterio.warp.calculate_default_transform(raster.crs, "EPSG:4326", 110, 110, *raster.bounds)
        profile = raster.profile | {"crs": "EPSG:4326", "transform": degrees[0], "width": degrees[1], "height": degrees[2]}
        with rasterio.open(tmp_path / "wgs_20230613.tif", "w", **profile) as there:
            rasterio.warp.reproject(rasterio.band(raster, 1), rasterio.band(there, 1))
    with pytest.raises(InputError, match="is in EPSG:4326, not in metres on a map"):
        find_lidar(str(tmp_path / "wgs_20230613.tif"), Path(), None, None, print)
    lidar = find_lidar(str(tmp_path / "wgs_20230613.tif"), Path(), CRS_2154, None, print)
    assert lidar.days == ("2023-06-13",)
    record = build_heights(spec_of(tmp_path))(lidar_tasks([SQUARE], lidar, [], spec_of(tmp_path))[0].given)
    with rasterio.open(tmp_path / record["files"][0]) as raster:
        assert raster.read(1)[500, 400] == 123


def test_rasters_in_feet_are_refused(tmp_path: Path) -> None:
    write_tif(tmp_path / "a_20230613.tif", np.ones((10, 10), np.float32), 640_000, 6_504_000, 10, "EPSG:2154")
    with rasterio.open(tmp_path / "a_20230613.tif", "r+") as raster:
        raster.units = ("ft",)
    with pytest.raises(InputError, match="has heights in ft"):
        find_lidar(str(tmp_path / "a_20230613.tif"), Path(), None, None, print)


def test_masks_of_coarser_pixels_keep_the_areas_of_the_rules() -> None:
    height = np.zeros((40, 40), np.int16)
    height[5:10, 5:10] = 100  # 25 pixels: at 1 m just large enough
    height[20:24, 20:24] = 100  # 16
    assert (vegetation_mask(height) == 0).sum() == 25
    assert (vegetation_mask(height, resolution=2.5) == 0).sum() == 41
    height[30, 30] = 100  # a single pixel of 5 m has the area
    assert (vegetation_mask(height, resolution=5.0) == 0).sum() == 42


def test_low_vegetation_on_fields_is_masked_from_shapes_as_from_a_raster(tmp_path: Path) -> None:
    grid = SQUARE.grid(CRS_2154, 1.0)
    shape = shapely.box(640_100, 6_503_700, 640_200, 6_503_800)
    frame = geopandas.GeoDataFrame(geometry=[shape], crs="EPSG:2154")
    frame.to_crs("EPSG:32631").to_file(tmp_path / "fields.gpkg")
    found = fields_of(str(tmp_path / "fields.gpkg"), grid)
    assert found.sum() == pytest.approx(10_000, abs=100) and found[250, 150] and not found[250, 250]
    codes = np.zeros((100, 100), np.uint8)
    codes[20:30, 10:20] = 7
    write_tif(tmp_path / "fields.tif", codes, 640_000, 6_504_000, 10, "EPSG:2154")
    of_raster = fields_of(str(tmp_path / "fields.tif"), grid)
    assert of_raster.sum() == 10_000 and (found ^ of_raster).sum() < 200
    height = np.full((1000, 1000), 30, np.int16)
    mask = vegetation_mask(height, of_raster)
    assert mask[250, 150] == 1 and mask[500, 500] == 0
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        frame.set_crs(None, allow_override=True).to_file(tmp_path / "lost.gpkg")
    with pytest.raises(InputError, match=r"lost.gpkg states no coordinate system"):
        fields_of(str(tmp_path / "lost.gpkg"), grid)


def test_squares_of_an_area(tmp_path: Path) -> None:
    # Points that end a centimetre before the next km, and an area of a polygon.
    bounds = [(640_000.0, 6_502_000.0, 641_999.99, 6_503_999.99)]
    assert squares_of(bounds, None) == [(640, 6503), (640, 6504), (641, 6503), (641, 6504)]
    rectangle = area_of("640000,6503000,641000,6504000", Path(), CRS_2154)
    assert squares_of(bounds, rectangle) == [(640, 6504)]
    triangle = geopandas.GeoSeries([shapely.Polygon([(640_100, 6_502_100), (640_900, 6_502_100), (640_100, 6_503_500)])])
    triangle.set_crs("EPSG:2154").to_crs("EPSG:4326").to_file(tmp_path / "area.geojson")
    assert squares_of(bounds, area_of("area.geojson", tmp_path, CRS_2154)) == [(640, 6503), (640, 6504)]
    with pytest.raises(InputError, match=r"area=.*missing.geojson is neither all or four numbers"):
        area_of("missing.geojson", tmp_path, CRS_2154)
    with pytest.raises(InputError, match="coordinates below 0"):
        squares_of([(-5_000, 0, -4_000, 900)], None)


def test_contexts_keep_their_distance() -> None:
    squares = [Square("31TDL", east, north) for east in range(640, 660) for north in range(6500, 6520)]
    shares = {"test": 15.0, "validation": 15.0}
    contexts, block = draw_contexts(squares, None, 1000.0, shares, seed=1)
    assert block in (4, 5)
    assert contexts == draw_contexts(squares, None, 1000.0, shares, seed=1)[0]
    assert contexts != draw_contexts(squares, None, 1000.0, shares, seed=2)[0]
    used = {square: context for square, context in contexts.items() if context != LEFT_OUT}
    for one, first in used.items():
        for other, second in used.items():
            if first != second:
                gap = [max(abs(apart) - 1, 0) for apart in (one.east - other.east, one.north - other.north)]
                assert gap[0] ** 2 + gap[1] ** 2 >= 1
    by_block: dict[tuple[int, int], set[str]] = {}
    for square, context in used.items():
        by_block.setdefault((square.east // block, (square.north - 1) // block), set()).add(context)
    assert all(len(found) == 1 for found in by_block.values())
    counts = [list(contexts.values()).count(name) for name in ("training", "validation", "test", LEFT_OUT)]
    assert sum(counts) == 400 and 60 <= counts[2] <= 90 and counts[0] >= 200 and 40 <= counts[1] <= 90 and counts[3] > 0


def test_a_buffer_worked_by_hand() -> None:
    row = [Square("31TDL", east, 6504) for east in range(640, 650)]
    contexts, _ = draw_contexts(row, 1, 1000.0, {"test": 10.0, "validation": 10.0}, seed=3)
    (test,) = [square.east for square, context in contexts.items() if context == "test"]
    assert all(contexts[Square("31TDL", east, 6504)] == LEFT_OUT for east in (test - 1, test + 1) if 640 <= east < 650)
    with pytest.raises(InputError, match=r"2 squares cannot be cut into blocks for training, validation and test"):
        draw_contexts(row[:2], None, 1000.0, {"test": 10.0, "validation": 10.0}, seed=3)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real LiDAR files are absent")
def test_a_real_thinned_tile(tmp_path: Path) -> None:
    square = Square("31TFL", 906, 6665)
    name = str(REAL / "Semis_2022_0906_6665_LA93_IGN69_ok.laz")
    found = heights_of(name, tmp_path, square=square, lidar_resolution=10.0)
    assert (found >= 0).mean() > 0.99 and 150 < np.median(found[found > 0]) < 250 and found.max() < 400
