"""Operation canopy-map as a user meets it: heights that depend on no window, edges, dates, restart, errors."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import torch
from canopy_root import SPECTRUM, write_root, write_tif
from conftest import PROJECT, Ended, environment, wait_for
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform_bounds
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate
from scipy import ndimage
from test_guild import SHORT_CANOPY

from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, NODATA, angle_channels
from datasets.canopy.image_series import Limits, choose_dates, extended
from datasets.canopy.map_reference import MapReference
from datasets.canopy.reference import at_resolution, drop_low_and_isolated
from datasets.canopy.tiles import PUBLISHED, standardise
from datasets.products import CLEAR, CLOUD, MISSING, WATER
from models.threasure_net import QUERY_DAY, ThreasureNet, make_network
from utils.rasters import Grid
from utils.runs import read_tensors, write_json, write_tensors
from utils.seeds import INITIAL_WEIGHTS, generator_for
from utils.simulated import MARK

ROWS, COLUMNS = 70, 101  # image pixels
STEP = 45  # days between images
EASTING, NORTHING = 500_000, 6_500_000
FLAGS: dict[str, Any] = {"encoder": "rdn", "num_rdb": 1, "num_dense_layers": 2, "growth_channels": 8, "channels": 16}
FLAGS |= {"upsampling": "shuffle", "max_dates": 4, "min_dates": 2}
COMMON = ["cell=48", "window=32", "precision=32"]


def write_run(folder: Path, resolution: float = 5, angles: bool = True, **flags: Any) -> Path:
    """A finished canopy run, its weights random."""
    flags = FLAGS | {"resolution": resolution} | flags
    record = {"project": "test, operation canopy", "flags": flags, "resolution": resolution, "angles": angles}
    record |= {"simulated": False, "statistics": asdict(PUBLISHED)}
    for number, name in enumerate(("best", "second_best", "last")):
        net = make_network(flags, len(BANDS) + ANGLE_CHANNELS * angles)
        net.initialise(generator_for(7, INITIAL_WEIGHTS))
        with torch.no_grad():
            net.head.height.weight.mul_(10 + number)  # heights that differ from pixel to pixel, and by checkpoint
        write_tensors(folder / "models" / f"{name}.safetensors", net.state_dict(), record)
    write_json(folder / "metrics.json", {})
    return folder


def write_images(
    folder: Path, *, count: int = 7, masks: bool = True, angles: bool = True, size: tuple[int, int] = (ROWS, COLUMNS)
) -> list[Path]:
    """Dated images: the first with a cloud over the left, the second over the right cells, the third with a few missing
    pixels; a lake."""
    rng = np.random.default_rng(3)
    paths, rows = [], []
    ground = 3000 * ndimage.gaussian_filter(rng.normal(size=(10, *size)), (0, 4, 4))
    for number in range(count):
        day = date(2024, 3, 1) + timedelta(days=STEP * number)
        image = SPECTRUM[:, None, None] * rng.uniform(0.8, 1.2) + ground
        codes = np.zeros(size, np.uint8)
        codes[5:9, 5:9] = 16
        if number < 2:
            codes[10:30, 30 * number : 30 * number + 15 + 40 * number] = 6 + 8 * number
        if number == 2:
            image[:, 60:62, 60:63] = NODATA
            codes[60:62, 60:63] = 255
        path = folder / f"S2_{day:%Y%m%d}_test.tif"
        write_tif(path, image.astype(np.int16), EASTING, NORTHING, 10, "EPSG:2154", nodata=NODATA)
        if masks:
            write_tif(path.with_name(f"{path.stem}_mask.tif"), codes, EASTING, NORTHING, 10, "EPSG:2154")
        rows.append((path.name, 40.0 + number, 160.0, 5.0, 100.0 + number))
        paths.append(path)
    if angles:
        columns = ["image_name", "sun_zenith", "sun_azimuth", "view_zenith", "view_azimuth"]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "angles.csv", index=False)
    return paths


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Flags that name a run and images."""
    write_run(tmp_path / "run")
    write_images(tmp_path / "images")
    return ["run=run", "images=images", *COMMON]


def read(path: Path) -> NDArray[Any]:
    """All layers of a map."""
    with rasterio.open(path) as raster:
        return np.asarray(raster.read())


def clear_folder(folder: Path, into: str) -> Path:
    """Move a map out of the way of the next."""
    moved = folder / into
    moved.mkdir()
    for name in ("height.tif", "vegetation.tif", "dates.tif", "dates.json", "map.json", "metrics.json"):
        shutil.move(folder / name, moved / name)
    return moved


def plain_heights(folder: Path, paths: Sequence[Path], reach: int) -> NDArray[np.float32]:
    """Heights in dm, each cell cut from a forward pass over the whole raster with the cell's dates."""
    tensors, record = read_tensors(folder / "run" / "models" / "best.safetensors")
    net: ThreasureNet = make_network(record["flags"], len(BANDS) + ANGLE_CHANNELS * record["angles"]).eval()
    net.load_state_dict(tensors)
    document = json.loads((folder / "dates.json").read_text())
    result = np.zeros((net.factor * ROWS, net.factor * COLUMNS), np.float32)
    table = pd.read_csv(folder / "images" / "angles.csv")
    for cell, numbers in document["cells"].items():
        images = np.stack([read(paths[number]) for number in numbers]).astype(np.int16)
        # Missing pixels take the value before them in their row, and so does what lies beyond the edges.
        images[:, :, 60:62, 60:63] = np.where(
            images[:, :, 60:62, 60:63] == NODATA, images[:, :, 60:62, [59, 59, 63]], images[:, :, 60:62, 60:63]
        )
        padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
        degrees = table.iloc[numbers, 1:].to_numpy(np.float64)
        angles = torch.from_numpy(angle_channels(degrees))[None] if record["angles"] else None
        days = [(date(2024, 3, 1) + timedelta(days=STEP * number)).timetuple().tm_yday - 1 for number in numbers]
        with torch.no_grad():
            height, _ = net(
                standardise(torch.from_numpy(padded)[None], angles, PUBLISHED),
                torch.tensor([days]),
                torch.tensor([QUERY_DAY]),
                torch.zeros(1, len(days), dtype=torch.bool),
                cut=reach,
            )
        row, column = (48 * net.factor * int(part) for part in cell.split("_"))
        part = slice(row, row + 48 * net.factor), slice(column, column + 48 * net.factor)
        result[part] = (10 * PUBLISHED.metres(height))[0, 0].numpy()[part]
    return result


@pytest.mark.plots
def test_a_map_has_the_network_s_heights_up_to_the_edges(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    done = run_canopy_map(*inputs)
    assert done.returncode == 0, done.stderr
    paths = sorted(path for path in (tmp_path / "images").glob("*test.tif"))
    document = json.loads((tmp_path / "dates.json").read_text())
    assert document["images"] == [path.name for path in paths] and len(document["cells"]) == 6
    assert len({tuple(numbers) for numbers in document["cells"].values()}) > 1
    heights, expected = read(tmp_path / "height.tif")[0], plain_heights(tmp_path, paths, 8)
    dates, water, cloud, missing = read(tmp_path / "dates.tif")
    assert heights.shape == (140, 202) and (heights != NODATA).all() and expected.std() > 5
    assert np.abs(heights - expected).max() < 0.51
    assert (water[5:9, 5:9] == 100).all() and water[20, 50] == 0
    assert cloud[20, 5] == 14 and cloud[20, 31] == 14 and missing[60, 60] == 14 and missing[0, 0] == 0
    assert set(np.unique(dates)) == {3, 4}
    vegetation = read(tmp_path / "vegetation.tif")
    assert vegetation.max() <= 100

    with rasterio.open(tmp_path / "height.tif") as raster:
        assert raster.descriptions == ("height",) and raster.units == ("m",) and raster.scales == (0.1,)
        assert raster.nodata == NODATA and raster.dtypes == ("int16",) and raster.res == (5, 5)
        tags = raster.tags()
        assert tags["run"] == "run" and len(tags["weights_sha256"]) == len(tags["images_sha256"]) == 64
        assert tags["model"] == "THREASURE-Net, 5 m" and "note" not in tags
    for name in ("height.tif", "vegetation.tif", "dates.tif"):
        assert cog_validate(tmp_path / name, strict=True)[0]
    assert (tmp_path / "height.png").read_bytes().startswith(b"\x89PNG")
    item = pystac.Item.from_file(str(tmp_path / "map.stac.json"))
    assert set(item.assets) == {"height", "vegetation", "dates", "thumbnail"} and item.properties["proj:code"] == "EPSG:2154"
    assert item.bbox is not None and 0 < item.bbox[0] < item.bbox[2] < 2 and 45 < item.bbox[1] < item.bbox[3] < 46
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mapped_km2"] == pytest.approx(ROWS * COLUMNS / 1e4)
    assert f"[*] Mapped: {ROWS * COLUMNS / 1e4:.4f} km2" in done.stdout
    assert not (tmp_path / "blocks").exists() and not (tmp_path / "cells").exists()


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("resolution", [10, 2.5])
def test_windows_of_any_size_give_the_same_map(
    run_canopy_map: Callable[..., Ended],
    inputs: list[str],
    tmp_path: Path,
    precision: str,
    resolution: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.processes.fast_bf16", lambda _: True)
    write_run(tmp_path / "run", resolution)
    maps = []
    for window in (16, 37, 500):
        done = run_canopy_map(*inputs, f"precision={precision}", f"window={window}")
        assert done.returncode == 0, done.stderr
        maps.append(read(clear_folder(tmp_path, str(window)) / "height.tif").astype(int))
    for other in maps[1:]:
        difference = np.abs(other - maps[0])
        assert difference.max() <= 1 and (difference > 0).mean() < (0.001 if precision == "32" else 0.2)


def test_a_u_net_s_map_depends_on_no_window_either(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    """Its halvings must fall on the same pixels in each window, and it sees far."""
    write_run(tmp_path / "run", 10, encoder="unet", upsampling="interpolation", channels=8)
    maps = []
    for window in (40, 500):
        done = run_canopy_map(*inputs, f"window={window}", "cell=500", "max_dates=2", "min_dates=1")
        assert done.returncode == 0, done.stderr
        maps.append(read(clear_folder(tmp_path, str(window)) / "height.tif").astype(int))
    assert np.abs(maps[0] - maps[1]).max() <= 1 and (maps[0] != maps[1]).mean() < 0.001


def test_an_area_is_mapped_as_in_the_whole(run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path) -> None:
    assert run_canopy_map(*inputs).returncode == 0
    whole = clear_folder(tmp_path, "whole")
    area = f"area={EASTING + 301},{NORTHING - 595},{EASTING + 5000},{NORTHING - 99}"
    done = run_canopy_map(*inputs, area)
    assert done.returncode == 0, done.stderr
    assert "area" not in json.loads((tmp_path / "metrics.json").read_text())["tags"]
    for name, factor in (("height.tif", 2), ("vegetation.tif", 2), ("dates.tif", 1)):
        with rasterio.open(tmp_path / name) as raster:
            assert raster.bounds == (EASTING + 300, NORTHING - 600, EASTING + 1010, NORTHING - 90)
            part = read(whole / name)[:, 9 * factor : 60 * factor, 30 * factor :].astype(int)
            assert np.abs(raster.read() - part).max() <= 1


def test_every_pixel_with_enough_dates_is_mapped_whatever_the_orbit_covers(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    """Two orbits that overlap by a few columns, a strip of which no image has anything, and a corner seen once."""
    for number, path in enumerate(sorted((tmp_path / "images").glob("*test.tif"))):
        path.with_name(f"{path.stem}_mask.tif").unlink()
        with rasterio.open(path, "r+") as raster:
            image = raster.read()
            image[:, :, slice(60, None) if number % 2 else slice(0, 55)] = NODATA
            image[:, 65:] = NODATA
            image[:, :4, :4] = SPECTRUM[:, None, None] if number == 3 else NODATA
            raster.write(image)
    done = run_canopy_map(*inputs, "cell=500")
    assert done.returncode == 0, done.stderr
    mapped = read(tmp_path / "height.tif")[0, ::2, ::2] != NODATA
    expected = np.ones((ROWS, COLUMNS), bool)
    expected[65:] = expected[:4, :4] = False
    np.testing.assert_array_equal(mapped, expected)
    np.testing.assert_array_equal(read(tmp_path / "vegetation.tif")[0, ::2, ::2] != 255, expected)
    dates, water, cloud, missing = read(tmp_path / "dates.tif")
    assert (water == 255).all() and (cloud == 255).all() and (missing[65:] == 100).all() and dates[0, 0] <= 1
    assert f"[*] Mapped: {expected.sum() / 1e4:.4f} km2" in done.stdout


def test_steps_between_cells_of_other_dates_are_reported(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    assert run_canopy_map(*inputs, "uncertainty=yes").returncode == 0
    heights, spread = read(tmp_path / "height.tif").astype(float) / 10
    chosen = json.loads((tmp_path / "dates.json").read_text())["cells"]
    steps = []
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        here, rows, columns = chosen[f"{row}_{column}"], slice(96 * row, 96 * row + 96), slice(96 * column, 96 * column + 96)
        if column < 2 and chosen[f"{row}_{column + 1}"] != here:
            steps.append(np.abs(np.diff(heights[rows, 96 * column + 95 : 96 * column + 97], axis=1)).ravel())
        if row == 0 and chosen[f"1_{column}"] != here:
            steps.append(np.abs(np.diff(heights[95:97, columns], axis=0)).ravel())
    reported = json.loads((tmp_path / "metrics.json").read_text())["cells"]["borders_with_other_dates"]
    assert steps and reported["pixels"] == len(np.concatenate(steps))
    assert reported["across_m"] == pytest.approx(np.concatenate(steps).mean())
    # Chosen from other dates heights differ, and they do so where the spread is.
    assert reported["across_m"] > reported["beside_m"] > 0 and spread.min() >= 0 and spread.mean() > 0.1


def write_reference(path: Path, heights: NDArray[Any], crs: str, scale: float, **options: Any) -> None:
    """Heights of a map at 5 m, 0.5 m higher, as a reference of 1 m in the same grid or of 2.5 m in another one."""
    if crs == "EPSG:2154":
        write_tif(
            path, np.kron(scale * (heights + 0.5), np.ones((5, 5))).astype(np.int16), EASTING, NORTHING, 1, crs, **options
        )
        return
    source = Affine(5, 0, EASTING, 0, -5, NORTHING)
    left, _, _, top = transform_bounds("EPSG:2154", crs, EASTING, NORTHING - 5 * len(heights), EASTING + 1010, NORTHING)
    moved = np.full((400, 500), -9.0, np.float32)
    transform = Affine(2.5, 0, left, 0, -2.5, top)
    how = {"src_transform": source, "src_crs": "EPSG:2154", "dst_transform": transform, "dst_crs": crs, "dst_nodata": -9.0}
    reproject((scale * (heights + 0.5)).astype(np.float32), moved, resampling=Resampling.bilinear, **how)
    write_tif(path, moved, left, top, 2.5, crs, nodata=-9.0)


@pytest.mark.plots
def test_a_map_is_measured_against_references_of_any_grid(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    assert run_canopy_map(*inputs, "uncertainty=yes").returncode == 0
    heights, spread = read(tmp_path / "height.tif") / 10
    write_reference(tmp_path / "lidar.tif", heights, "EPSG:2154", 10, nodata=-1)
    done = run_canopy_map(*inputs, "uncertainty=yes", "reference=lidar.tif")
    assert done.returncode == 0, done.stderr
    assert "[*] Reference: about 1 m, in dm, brought to 5 m by max" in done.stdout
    document = json.loads((tmp_path / "metrics.json").read_text())["test"]
    total = document["scores"]["all"]
    assert total["pixels"] == total["pixels_with_reference"] == heights.size
    assert total["mae"] == pytest.approx(0.5, abs=1e-4) and total["bias"] == pytest.approx(-0.5, abs=1e-4)
    assert total["nmae"] == pytest.approx(np.mean(0.5 / (1.5 + heights)), rel=1e-3)
    assert total["tree_cover_iou"] == 1 and total["gradient_difference"] == pytest.approx(0, abs=1e-4)
    assert f"[*] nMAE: {total['nmae']:.4f}" in done.stdout and (tmp_path / "height_classes.png").exists()
    # 90 % of the ratios of half of the windows are below the factor.
    calibration = document["calibration"]
    assert (
        np.percentile(0.5 / np.maximum(spread, 0.05), 80) < calibration["factor"] < 11 and 0.8 < calibration["coverage"] < 1
    )
    with rasterio.open(tmp_path / "interval.tif") as raster:
        width = raster.scales[0] * raster.read(1)
        np.testing.assert_allclose(width, calibration["factor"] * np.maximum(spread, 0.05), atol=0.051)
    assert cog_validate(tmp_path / "interval.tif", strict=True)[0]

    write_reference(tmp_path / "other.tif", heights, "EPSG:32631", 1)
    done = run_canopy_map(*inputs, "uncertainty=yes", "reference=other.tif", "reference_resampling=bilinear")
    assert done.returncode == 0, done.stderr
    assert "[*] Reference: about 2.5 m, in m, brought to 5 m by bilinear" in done.stdout
    total = json.loads((tmp_path / "metrics.json").read_text())["test"]["scores"]["all"]
    assert total["bias"] == pytest.approx(-0.5, abs=0.1) and total["mae"] < 0.8
    assert 0.9 * heights.size < total["pixels"] <= heights.size


def test_a_reference_is_brought_to_the_map_as_in_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heights = np.where(rng.random((100, 150)) < 0.6, rng.integers(1, 200, (100, 150)), -1).astype(np.int16)
    heights[:30, :30] = -1
    heights[50:, 50:70] = rng.integers(0, 14, (50, 20))
    write_tif(tmp_path / "lidar.tif", heights, EASTING, NORTHING, 1, "EPSG:2154")
    for factor, resolution in ((10, 10.0), (5, 5.0)):
        grid = Grid(CRS.from_epsg(2154), Affine(factor, 0, EASTING, 0, -factor, NORTHING), 100 // factor, 150 // factor)
        found, masked = MapReference("lidar.tif", tmp_path, grid, "auto", "auto").heights_and_mask(
            Window(0, 0, grid.width, grid.height)
        )
        expected = at_resolution(np.maximum(heights, 0), heights <= 0, 1.0, resolution)
        _, expected_mask = drop_low_and_isolated(*expected)
        np.testing.assert_array_equal(masked, expected_mask)
        np.testing.assert_allclose(found[~masked], expected[0][~masked] / 10, rtol=1e-6)


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    """A map in a process of its own."""
    arguments = [part for text in flags for part in (f"--{text.split('=', 1)[0]}", text.split("=", 1)[1])]
    command = [sys.executable, str(PROJECT / "canopy_map.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_map_of_several_workers_goes_on_to_the_same_bytes(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    flags = [*inputs, "window=16"]
    killed = start(tmp_path, *flags, "workers=2")
    wait_for(lambda: list(tmp_path.glob("blocks/height/[0-9]*.npz")) or killed.poll() is not None)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob("blocks/height/[0-9]*.npz")) and not (tmp_path / "height.tif").exists()
    other = run_canopy_map(*flags, "delta_day=30")
    assert other.returncode == 2 and "delta_day=0" in other.stderr
    assert run_canopy_map(*flags).returncode == 0
    once = clear_folder(tmp_path, "killed")
    assert run_canopy_map(*flags).returncode == 0
    for name in ("height.tif", "vegetation.tif", "dates.tif"):
        assert read(once / name).tobytes() == read(tmp_path / name).tobytes()
    kept = (tmp_path / "height.tif").stat().st_mtime_ns
    assert run_canopy_map(*flags).returncode == 0 and (tmp_path / "height.tif").stat().st_mtime_ns == kept


def spoil(folder: Path, how: str) -> None:
    """Spoil the first image."""
    path = sorted((folder / "images").glob("*test.tif"))[0]
    image, options = read(path), {"nodata": NODATA}
    if how == "bands":
        write_tif(path, image[:9], EASTING, NORTHING, 10, "EPSG:2154", **options)
    elif how == "grid":
        write_tif(path, image, EASTING + 10, NORTHING, 10, "EPSG:2154", **options)
    elif how == "crs":
        write_tif(path, image, EASTING, NORTHING, 10, "EPSG:32631", **options)
    elif how == "degrees":
        write_tif(path, image, 2, 45, 0.0001, "EPSG:4326", **options)
    elif how == "pixels":
        write_tif(path, image, EASTING, NORTHING, 20, "EPSG:2154", **options)
    elif how == "float":
        write_tif(path, image.astype(np.float32), EASTING, NORTHING, 10, "EPSG:2154", **options)
    elif how == "date":
        path.rename(path.with_name("undated_test.tif"))
    elif how == "year":
        path.rename(path.with_name("S2_20230301_test.tif"))
    elif how == "names":
        with rasterio.open(path, "r+") as raster:
            raster.descriptions = ("B01", *BANDS[1:])
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "clouds":
        for mask in (folder / "images").glob("*_mask.tif"):
            with rasterio.open(mask, "r+") as raster:
                raster.write(np.full((1, ROWS, COLUMNS), 6, np.uint8))
    elif how == "angles":
        (folder / "images" / "angles.csv").unlink()
    elif how == "mask":
        write_tif(path.with_name(f"{path.stem}_mask.tif"), np.zeros((ROWS, 3), np.uint8), EASTING, NORTHING, 10, "EPSG:2154")
    elif how == "unfinished":
        (folder / "run" / "checkpoint.pt").touch()
    elif how == "other map":
        (folder / "height.tif").touch()
    elif how == "no images":
        shutil.rmtree(folder / "images")
        (folder / "images").mkdir()


@pytest.mark.parametrize(
    ("how", "flags", "expected"),
    [
        ("bands", [], "has 9 bands; the 10 that are known are expected, B2 B3"),
        ("grid", [], "has another grid (70 x 101 pixels from 500000 6500000) than"),
        ("crs", [], "but S2_20240301_test.tif in EPSG:32631"),
        ("degrees", [], "is in degrees; a grid in metres is expected"),
        ("pixels", [], "has pixels of 20 x 20 m, not 10 m, north up"),
        ("float", [], "is of type float32"),
        ("date", [], "undated_test.tif has no date in its name"),
        ("year", [], "the images are of 2023, 2024: year=... says which"),
        ("names", [], "has bands that are not known (B1)"),
        ("truncated", [], "S2_20240301_test.tif cannot be read"),
        ("clouds", [], "no pixel has min_dates=2 clear dates among the 7 images"),
        ("angles", [], "sees sun and view angles, but no image has them"),
        ("mask", [], "_mask.tif has another grid (70 x 3 pixels"),
        ("unfinished", [], "is no finished run of canopy"),
        ("other map", [], "height.tif exists and is of another map"),
        ("no images", [], "has none of SAFE or Theia products"),
        ("", ["images=nowhere"], "nowhere does not exist; a folder or a list of SAFE or Theia"),
        ("", ["year=2020"], "images=images: no product is of 2020; there are 2024"),
        ("", ["run=elsewhere"], "run=elsewhere: a folder, or the id of one run"),
        ("", ["area=0,0,1,1"], "holds no pixel"),
        ("", ["min_dates=8"], "no pixel has min_dates=8 clear dates among the 7 images"),
        ("", ["reference=nowhere.tif"], "reference: "),
        ("", ["reference=run"], "none of 0 files of heights touches the map"),
        ("", ["window=8"], "window: 8 is not a whole number of at least 16"),
        ("", ["scheduler=tcp://127.0.0.1:9"], "scheduler=tcp://127.0.0.1:9 cannot be reached"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_one_sentence(
    run_canopy_map: Callable[..., Ended],
    inputs: list[str],
    tmp_path: Path,
    how: str,
    flags: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.cluster.SECONDS_TO_CONNECT", 1)
    monkeypatch.setenv("GUILD_HOME", str(tmp_path / "guild"))
    spoil(tmp_path, how)
    done = run_canopy_map(*inputs, *flags)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("canopy_map.py: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "vegetation.tif").exists()


def test_borders_are_carried_on_into_what_is_missing() -> None:
    values = np.full((5, 6), NODATA, np.int16)
    values[1, 1:3], values[2, 4] = (1, 2), 3
    assert extended(values, 2).tolist() == [
        [1, 1, 2, 2, 2, 3],
        [1, 1, 2, 2, 2, 3],
        [1, 1, 3, 3, 3, 3],
        [1, 1, 3, 3, 3, 3],
        [NODATA, NODATA, 3, 3, 3, 3],
    ]


def test_dates_are_chosen_as_published_and_added_where_pixels_lack_them() -> None:
    limits = Limits(max_cloud=10, min_valid=99, max_missing=1, max_dates=4, min_dates=2)
    days = np.array([10, 44, 50, 140, 230, 320, 330])
    states = np.full((7, 20, 20), CLEAR, np.uint8)
    assert choose_dates(states, days, limits).tolist() == [1, 3, 4, 5]  # nearest days 45, 137, 228, 319; 44 before 50
    states[:, 0, 0] = WATER
    states[3, :1, :5] = CLOUD  # 1.25 %: not valid enough
    states[5, :1, :5] = MISSING
    assert choose_dates(states, days, limits).tolist() == [1, 2, 4, 6]
    # Shares count where the orbits reach at all.
    states = np.full((7, 20, 20), MISSING, np.uint8)
    states[:, :, :8] = CLEAR
    assert len(choose_dates(states, days, limits)) == 4
    states[:, :, 0] = CLOUD  # one column in eight: no image is within the limits
    assert len(choose_dates(states, days, limits)) == limits.min_dates
    states[:2, :, 0] = CLEAR
    assert {0, 1} <= set(choose_dates(states, days, limits).tolist())
    assert choose_dates(np.full((7, 20, 20), MISSING, np.uint8), days, limits).tolist() == []


def test_bands_named_in_another_order_and_angles_in_tags_are_understood(
    run_canopy_map: Callable[..., Ended], inputs: list[str], tmp_path: Path
) -> None:
    assert run_canopy_map(*inputs).returncode == 0
    first = clear_folder(tmp_path, "first")
    table = pd.read_csv(tmp_path / "images" / "angles.csv", index_col="image_name")
    (tmp_path / "images" / "angles.csv").unlink()
    for path in sorted((tmp_path / "images").glob("*test.tif")):
        image = read(path)
        write_tif(path, image[::-1], EASTING, NORTHING, 10, "EPSG:2154", nodata=NODATA)
        with rasterio.open(path, "r+") as raster:
            raster.descriptions = [name if name in ("B8A", "B11", "B12") else f"B0{name[1]}" for name in BANDS[::-1]]
            raster.update_tags(**{name.upper(): value for name, value in table.loc[path.name].items()})
    done = run_canopy_map(*inputs)
    assert done.returncode == 0, done.stderr
    assert "Bands of 7 images are in another order" in done.stdout
    assert read(tmp_path / "height.tif").tobytes() == read(first / "height.tif").tobytes()


def test_without_run_and_images_the_newest_run_maps_simulated_ones(
    run_canopy_map: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path / "root", squares={"0441_6741": "test"}, images=3)
    (root / MARK).touch()
    monkeypatch.setattr("canopy_map.demo_root", lambda _: root)
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    refused = run_canopy_map()
    assert refused.returncode == 2 and "`guild run canopy` makes one" in refused.stderr
    write_run(tmp_path / "runs" / "abc")
    done = run_canopy_map("precision=32")
    assert done.returncode == 0, done.stderr
    assert "[*] The images are simulated: " in done.stdout and "(simulated)" in done.stdout
    with rasterio.open(tmp_path / "height.tif") as raster:
        assert raster.shape == (300, 300) and raster.tags()["note"] == "simulated" and raster.tags()["run"] == "abc"


def test_the_worked_example_of_the_docs(
    run_canopy: Callable[..., Ended],
    run_canopy_map: Callable[..., Ended],
    small_tiles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its commands as they stand, the training short and of few tiles."""
    page = (PROJECT / "docs" / "canopy-map.md").read_text()
    (block,) = re.findall(r"## Worked example\n.*?```\n(.*?)```", page, flags=re.DOTALL)
    training, mapping, _ = ([word for word in line.split()[2:] if "=" in word] for line in block.splitlines())
    for script in ("canopy", "canopy_map"):
        monkeypatch.setattr(f"{script}.demo_root", lambda _: small_tiles)
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    run = tmp_path / "runs" / "abc"
    run.mkdir(parents=True)
    with monkeypatch.context() as there:
        there.chdir(run)
        short = [f"{name}={value}" for name, value in SHORT_CANOPY.items()]
        done = run_canopy(*training, *short, f"cache={tmp_path / 'cache'}")
        assert done.returncode == 0, done.stderr
    done = run_canopy_map(*mapping)
    assert done.returncode == 0, done.stderr
    with rasterio.open("height.tif") as raster:
        assert raster.descriptions == ("height", "spread") and raster.tags()["note"] == "simulated"
    (table,) = re.findall(r"## Results\n\n(.*?)\n\n", page, flags=re.DOTALL)
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == set(re.findall(r"`([\w.]+\.\w+)`", table)) - {"interval.tif"}


def test_help_explains_every_flag_with_its_default() -> None:
    import canopy_map

    said = canopy_map.parser.format_help()
    assert all(f"--{name} " in said for name in canopy_map.parser.types)
    assert said.count("(default:") + said.count("(default:\n") >= len(canopy_map.parser.types) - 1
