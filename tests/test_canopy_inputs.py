"""Operation canopy-inputs from raw products to the metrics of canopy, and what it says of broken input."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from clouds import GROUND, LAMBERT, TREE, forest
from conftest import PROJECT, Ended, _in_process, environment, wait_for
from numpy.typing import NDArray
from pyproj import CRS as ProjCRS
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window
from test_guild import SHORT_CANOPY

from datasets.canopy import inputs_lidar
from datasets.canopy.catalogue import BANDS, NODATA
from datasets.canopy.inputs_demo import write_laz
from datasets.canopy.inputs_images import codes_of, quality_of
from datasets.canopy.inputs_squares import RECORDS
from datasets.products import CLEAR, CLOUD, MISSING, WATER, find_products
from datasets.products.demo_safe import write_safe
from datasets.products.demo_stac import write_stac
from datasets.products.demo_theia import write_theia
from datasets.products.point_clouds import PointFile, read_header
from utils.errors import InputError
from utils.rasters import Grid

UTM = CRS.from_epsg(32631)
SQUARES = (400, 402, 404, 406)  # km, at northing 5000
DATES = [date(2023, month, 15) for month in (2, 4, 6, 8, 10, 12)]
ANGLES = np.array([40.0, 160.0, 5.5, 100.0])
COARSE = ("lidar_resolution=5", "buffer=500", "workers=1")
Runner = Callable[..., Ended]


@pytest.fixture
def run_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run canopy_inputs.py in this process."""
    return _in_process("canopy_inputs", tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products of six dates, of SAFE, Theia and STAC, and points of four squares: products/, points/."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "points").mkdir()
    for number, east in enumerate(SQUARES):
        points = forest(1000 * east, 5_000_000, 1000, 60_000, seed=number)
        write_laz(folder / "points" / f"{east}.laz", points, ProjCRS.from_epsg(32631))
    grid = Grid(UTM, Affine(10, 0, 399_700, 0, -10, 5_000_300), 160, 760)
    rng = np.random.default_rng(7)
    trees = np.linspace(0, 1, 760) % 0.3 < 0.2
    for number, day in enumerate(DATES):
        spectrum = 300 * (1 + np.arange(10)) * rng.uniform(0.8, 1.2)
        image = np.where(trees, 0.8, 1.2) * spectrum[:, None, None] + rng.normal(0, 40, (10, 160, 760))
        states = np.full((160, 760), CLEAR, np.uint8)
        states[:, 220:260] = CLOUD if number == 1 else CLEAR
        states[:80, :120] = WATER
        image = image.astype(np.int16)
        if number == 2:
            states[:, 640:], image[:, :, 640:] = MISSING, NODATA
        others: dict[int, Callable[..., Path]] = {3: write_theia, 4: write_stac}
        write = others.get(number, write_safe)
        place = folder / "products" / ("catalogue" if write is write_stac else "")
        write(place, grid, day, image, states, ANGLES + np.array([0, 0, 0, number]))
    return folder


@pytest.fixture(scope="module")
def made(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiles, made by the script as users run it."""
    folder = tmp_path_factory.mktemp("made")
    flags = {"lidar": raw / "points", "products": raw / "products", "out": "tiles", "year": 2023}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    arguments += [part for flag in COARSE for part in (f"--{flag.split('=')[0]}", flag.split("=")[1])]
    command = [sys.executable, str(PROJECT / "canopy_inputs.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "tiles"


def places_of(raw: Path) -> tuple[str, ...]:
    return (f"lidar={raw / 'points'}", f"products={raw / 'products'}", "out=tiles", *COARSE)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and RECORDS not in path.parts and path.suffix in (".tif", ".csv", ".parquet")
    }


def test_from_raw_products_to_the_metrics_of_canopy(made: Path, run_canopy: Runner, tmp_path: Path) -> None:
    said = (made.parent / "stdout").read_text()
    assert "Squares with LiDAR: 4" in said and "Images: 23; left out: cut by the edge of the product (1)" in said
    assert "Squares that canopy uses for test: 1" in said and "simulated" not in said
    table = pd.read_parquet(made / "patches" / "31TDL" / "31TDL.parquet")
    assert table.groupby("lidarhd_id")["context"].nunique().eq(1).all() and len(table) == 23
    flags = SHORT_CANOPY | {"data": str(made), "resolution": "5", "lidar_resolution": "5", "min_dates": "4"}
    flags |= {"batch_size": "1", "accumulate": "1", "statistics": "data", "seed": "42"}
    done = run_canopy(*(f"{name}={value}" for name, value in flags.items()))
    assert done.returncode == 0, done.stderr
    assert "Sun and view angles: used; masks of tall vegetation: used" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["all"]["mae"] > 0 and not metrics["data"]["simulated"]
    found, ours = metrics["data"]["statistics"], json.loads((made / "statistics.json").read_text())
    assert [ours["bands"][band]["median"] for band in BANDS] == found["band_median"]
    assert (ours["height"]["median"], ours["height"]["scale"]) == (found["height_median"], found["height_scale"])


def test_images_are_the_pixels_of_the_products(made: Path, raw: Path) -> None:
    product = find_products(str(raw / "products"), Path())[1]
    name = "SENTINEL2A_20230415_31TDL_0402_5000"
    with rasterio.open(made / "patches" / "31TDL" / "0402_5000" / f"{name}.tif") as raster:
        assert raster.descriptions == BANDS and raster.bounds == (401_750, 4_998_750, 403_250, 5_000_250)
        assert np.array_equal(raster.read(), product.read(Window(205, 5, 150, 150)))
    with rasterio.open(made / "patches" / "31TDL" / "0402_5000" / f"{name}_mask.tif") as raster:
        assert np.array_equal(raster.read(1), codes_of(product.states(Window(205, 5, 150, 150))))
    row = pd.read_parquet(made / "patches" / "31TDL" / "31TDL.parquet").set_index("image_name").loc[f"{name}.tif"]
    assert (row["masked_pixels"], row["valid_pixels"]) == (pytest.approx(100 * 40 / 150, abs=1e-3), 100)


def test_angles_are_those_of_the_products(made: Path) -> None:
    rows = pd.read_csv(made / "angles" / "31TDL.csv")
    april = rows[rows["image_name"].str.contains("20230415") & (rows["patch_id"] == "0402_5000")].iloc[0]
    assert april[["sun_zenith", "sun_azimuth", "view_zenith", "view_azimuth"]].tolist() == [40, 160, 5.5, 101]
    assert (april["x"], april["y"]) == (4_999_500, 402_500)  # northing and easting, as published


def test_quality_worked_by_hand() -> None:
    states = np.full((10, 10), CLEAR, np.uint8)
    states[0], states[1, :5], states[2] = CLOUD, MISSING, WATER
    assert quality_of(states) == {"masked_pixels": 15, "valid_pixels": 95, "ratio_cloud": 10, "ratio_border": 5}
    assert np.unique(codes_of(states)).tolist() == [0, 15, 16, 255]


def test_steps_one_at_a_time_and_again_give_the_same_files(
    made: Path, raw: Path, run_inputs: Runner, tmp_path: Path
) -> None:
    for steps in ("lidar,mask", "contexts", "images", "angles,statistics"):
        done = run_inputs(*places_of(raw), f"steps={steps}")
        assert done.returncode == 0, done.stderr
    expected, found = contents(made), contents(tmp_path / "tiles")
    assert list(found) == list(expected) and len(found) > 50
    assert found == expected
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiles").rglob("*.tif")}
    lost = tmp_path / "tiles" / "lidar_mask" / "31TDL" / "lidar_mask_0402_5000_31TDL.tif"
    lost.unlink()
    done = run_inputs("out=tiles", *COARSE)  # what it is made from is known
    assert done.returncode == 0, done.stderr
    assert "Step lidar: 4 of 4 are done already" in done.stdout and "Step mask: 3 of 4" in done.stdout
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost}
    assert contents(tmp_path / "tiles") == expected
    assert run_inputs("out=tiles", *COARSE, "steps=lidar", "percentile=50").returncode == 0
    assert "pH50_0400_5000_2023-06-13.tif" in {path.name for path in (tmp_path / "tiles").rglob("*.tif")}


def test_a_killed_run_goes_on(raw: Path, made: Path, run_inputs: Runner, tmp_path: Path) -> None:
    arguments = [part for flag in places_of(raw) for part in (f"--{flag.split('=')[0]}", flag.split("=", 1)[1])]
    command = [sys.executable, str(PROJECT / "canopy_inputs.py"), *arguments]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), **quiet)
    wait_for(lambda: list((tmp_path / "tiles" / RECORDS).glob("images/*.json")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = run_inputs(*places_of(raw))
    assert done.returncode == 0, done.stderr
    assert "Step lidar: 4 of 4 are done already" in done.stdout
    assert contents(tmp_path / "tiles") == contents(made)


def test_height_rasters_and_another_grid(run_inputs: Runner, tmp_path: Path) -> None:
    """Heights in Lambert-93 while the products are in UTM."""
    for number, east in enumerate((640, 642, 644)):
        heights = np.random.default_rng(number).integers(20, 250, (200, 200)).astype(np.int16)
        path = tmp_path / "heights" / f"chm_{east}_20230701.tif"
        path.parent.mkdir(exist_ok=True)
        place = {"crs": "EPSG:2154", "transform": Affine(5, 0, 1000 * east, 0, -5, 6_504_000)}
        with rasterio.open(path, "w", driver="GTiff", height=200, width=200, count=1, dtype="int16", **place) as raster:
            raster.write(heights, 1)
    bounds = rasterio.warp.transform_bounds("EPSG:2154", UTM, 639_500, 6_502_500, 645_500, 6_504_500)
    left, top = (round(part / 20) * 20 for part in (bounds[0], bounds[3]))
    grid = Grid(UTM, Affine(10, 0, left, 0, -10, top), 220, 620)
    for day in DATES[:5]:
        image = np.full((10, 220, 620), 1000, np.int16)
        write_safe(tmp_path / "safe", grid, day, image, np.zeros((220, 620), np.uint8), ANGLES)
    done = run_inputs("lidar=heights", "products=safe", "out=tiles", "resampling=bilinear", *COARSE)
    assert done.returncode == 0, done.stderr
    assert "Images: 15" in done.stdout and "in EPSG:2154" in done.stdout
    with rasterio.open(next((tmp_path / "tiles" / "patches").rglob("*0642_6504.tif"))) as raster:
        assert raster.crs.to_epsg() == 2154 and (raster.read() == 1000).all()
    with rasterio.open(tmp_path / "tiles/lidar/31TDL/res_5/pH95_0642_6504_2023-07-01.tif") as raster:
        assert np.array_equal(raster.read(1), np.random.default_rng(1).integers(20, 250, (200, 200)))


def refused(done: Ended, *parts: str) -> None:
    """One sentence, exit code 2."""
    assert done.returncode == 2, done.stdout
    sentence = done.stderr.replace("\r", "\n").strip().splitlines()[-1].strip()
    assert sentence.startswith("canopy_inputs.py: ") and "Traceback" not in done.stderr
    for part in parts:
        assert part in sentence, sentence


def with_points(tmp_path: Path, points: NDArray[np.float64], crs: ProjCRS | None = LAMBERT) -> str:
    (tmp_path / "points").mkdir(exist_ok=True)
    write_laz(tmp_path / "points" / "a.laz", points, crs)
    return "lidar=points"


def test_points_that_cannot_be_used_are_refused(run_inputs: Runner, tmp_path: Path) -> None:
    points = forest(640_000, 6_504_000, 1000, 5000, seed=1)
    flags = ("tile=31TDL", "out=tiles", "steps=lidar", *COARSE)
    refused(run_inputs(with_points(tmp_path, points[points[:, 3] == TREE]), *flags), "no ground points: 1 (0640_6504")
    refused(run_inputs(with_points(tmp_path, points, None), *flags), "a.laz states no coordinate system")
    feet = with_points(tmp_path, points, ProjCRS.from_user_input("EPSG:26918+6360"))
    refused(run_inputs(feet, *flags), "a.laz has heights in US survey foot")
    refused(run_inputs(with_points(tmp_path, points, ProjCRS.from_epsg(4326)), *flags), "a.laz is in EPSG:4326")
    refused(run_inputs(with_points(tmp_path, points), *flags, "area=0,0,1000,1000"), "area=0,0,1000,1000 holds no LiDAR")
    refused(run_inputs(with_points(tmp_path, points), *flags, "crs=EPSG:4326"), "crs=EPSG:4326 is in EPSG:4326")
    small = with_points(tmp_path, points[points[:, 0] < 640_500])
    refused(run_inputs(small, *flags), "LiDAR covers less than min_coverage=90 %: 1")
    path = tmp_path / "points" / "a.laz"
    path.write_bytes(path.read_bytes()[:-2000])
    refused(run_inputs("lidar=points", *flags), "a.laz cannot be read as LAS, LAZ or COPC; it may be truncated")
    assert not list((tmp_path / "tiles").rglob("*.tif"))


def test_one_coordinate_system_may_be_written_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in IGN's files, of which some state codes and some a text; another system is refused."""
    systems = {"a": LAMBERT, "b": LAMBERT, "c": ProjCRS.from_epsg(32631)}
    for number, (name, crs) in enumerate(systems.items()):
        write_laz(tmp_path / f"{name}.laz", forest(640_000 + 1000 * number, 6_504_000, 1000, 100, seed=1), crs)

    def header(path: Path, given: ProjCRS | None) -> PointFile:
        read = read_header(path, given)
        return read._replace(crs=LAMBERT.to_wkt().replace("easting (X)", "easting")) if path.stem == "b" else read

    monkeypatch.setattr(inputs_lidar, "read_header", header)
    monkeypatch.chdir(tmp_path)
    assert header(Path("a.laz"), None).crs != header(Path("b.laz"), None).crs
    assert len(inputs_lidar.find_lidar("a.laz b.laz", tmp_path, None, None, print).points) == 2
    with pytest.raises(InputError, match=r"a\.laz is in RGF93 v1 / Lambert-93, but .*c\.laz in WGS 84 / UTM zone 31N"):
        inputs_lidar.find_lidar("a.laz b.laz c.laz", tmp_path, None, None, print)


def test_a_cloud_of_ground_and_the_rest_is_spoken_of(run_inputs: Runner, tmp_path: Path) -> None:
    points = forest(640_000, 6_504_000, 1000, 5000, seed=1)
    points[:, 3] = np.where(points[:, 3] == GROUND, 2, 1)
    flags = (with_points(tmp_path, points), "tile=31TDL", "out=tiles", "steps=lidar", *COARSE)
    done = run_inputs(*flags)
    assert done.returncode == 0 and "vegetation_classes=1 takes those" in done.stdout
    done = run_inputs(*flags, "vegetation_classes=1 3 4 5")
    assert done.returncode == 0 and "vegetation_classes" not in done.stdout


def test_places_and_flags_that_do_not_go_together_are_refused(raw: Path, run_inputs: Runner, tmp_path: Path) -> None:
    refused(run_inputs(f"lidar={raw / 'points'}", "out=tiles"), "products=... is missing")
    refused(run_inputs(f"products={raw / 'products'}", "out=tiles"), "lidar=... is missing")
    refused(run_inputs(*places_of(raw), "steps=images"), "4 squares, 31TDL_0400_5000 for example, have no heights")
    refused(run_inputs(*places_of(raw), "steps=lidar,photos"), "'photos' is not one of lidar, mask")
    (tmp_path / "file").write_text("")
    refused(run_inputs(*places_of(raw)[:2], "out=file/tiles"), "tiles cannot be written: Not a directory")
    lidar = with_points(tmp_path, forest(640_000, 6_504_000, 1000, 5000, seed=1))
    refused(run_inputs(lidar, places_of(raw)[1], "out=tiles"), "lie outside of the products")
    refused(run_inputs(*places_of(raw), "year=2019"), "no product is of 2019; there are 2023")


def test_a_full_disk_leaves_nothing_half_written(
    raw: Path, run_inputs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    refused(run_inputs(*places_of(raw), "steps=lidar"), "could not be written: No space left on device")
    assert not list((tmp_path / "tiles" / "lidar").rglob("*.*"))


def test_simulated_tiles_and_real_ones_are_kept_apart(raw: Path, run_inputs: Runner, tmp_path: Path) -> None:
    shutil.copytree(raw / "points", tmp_path / "drawn")
    (tmp_path / "drawn" / "SIMULATED.txt").write_text("")
    flags = ("tile=31TDL", "out=tiles", "steps=lidar", *COARSE)
    done = run_inputs("lidar=drawn", *flags)
    assert done.returncode == 0 and "The inputs are simulated" in done.stdout, done.stderr
    assert (tmp_path / "tiles" / "SIMULATED.txt").is_file()
    refused(run_inputs(f"lidar={raw / 'points'}", *flags), "holds simulated tiles")
