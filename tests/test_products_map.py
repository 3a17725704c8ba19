"""Maps from products are those from dated GeoTIFFs of the same images; the simulated year of products."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import Ended
from numpy.typing import NDArray
from products import ANGLES, COLUMNS, GRID, ROWS, image, states
from rasterio.windows import Window
from test_canopy_map import read, write_run

from datasets.canopy.catalogue import PATCH_SIZE
from datasets.canopy.cell_dates import MapInputs, angles_of_cells
from datasets.canopy.image_series import Limits, find_series
from datasets.products import CLOUD, MISSING, NODATA, demo, find_products
from datasets.products.demo_safe import write_safe
from datasets.products.demo_stac import write_stac
from datasets.products.demo_theia import write_theia
from datasets.products.safe import SafeProduct
from datasets.products.stac import StacProduct
from datasets.products.theia import TheiaProduct
from utils.rasters import Grid
from utils.simulated import MARK

FLAGS = ["cell=16", "window=16", "precision=32", "max_cloud=100", "min_valid=0", "max_missing=100"]
VIEW_ZENITH = np.array([0.0, 0, 1, 0])


def sun_moved_by(degrees: int) -> NDArray[np.float64]:
    """The angles with another sun zenith."""
    return ANGLES + np.array([degrees, 0, 0, 0])


def write_products(folder: Path) -> None:
    """Five images as products of all kinds."""
    for number in range(5):
        day = datetime.date(2023, 4 + number, 16)
        values = image(number, low=200)
        angles = sun_moved_by(number)
        if number == 0:
            write_safe(folder, GRID, day, values, states(), angles, zipped=True)
        elif number == 1:
            write_safe(folder, GRID, day, values, states(), angles, offset=None, baseline="03.00")
        elif number == 2:
            write_theia(folder, GRID, day, values, states(), angles)
        elif number == 3:
            write_stac(folder / "catalogue", GRID, day, values, states(), angles)
        else:
            write_safe(folder, GRID, day, values, states(), angles)


def write_geotiffs(folder: Path) -> None:
    """The same as dated GeoTIFFs."""
    folder.mkdir()
    profile = {"driver": "GTiff", "crs": GRID.crs, "transform": GRID.transform, "height": ROWS, "width": COLUMNS}
    rows = []
    for number in range(5):
        name = f"S2_2023{4 + number:02d}16"
        with rasterio.open(folder / f"{name}.tif", "w", count=10, dtype="int16", nodata=NODATA, **profile) as raster:
            raster.write(image(number, low=200))
        with rasterio.open(folder / f"{name}_mask.tif", "w", count=1, dtype="uint8", **profile) as raster:
            raster.write(np.array([0, 16, 6, 255], np.uint8)[states()], 1)
        rows.append([name, *sun_moved_by(number)])
    columns = ["image_name", "sun_zenith", "sun_azimuth", "view_zenith", "view_azimuth"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "angles.csv", index=False)


def test_a_map_from_products_is_that_from_geotiffs_of_the_same_images(
    run_canopy_map: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    write_products(tmp_path / "products")
    write_geotiffs(tmp_path / "geotiffs")
    maps = {}
    for kind in ("products", "geotiffs"):
        (tmp_path / f"map_{kind}").mkdir()
        monkeypatch.chdir(tmp_path / f"map_{kind}")
        done = run_canopy_map("run=../run", f"images=../{kind}", *FLAGS)
        assert done.returncode == 0, done.stderr
        assert "Images: 5 of 2023, 5 with a mask" in done.stdout
        maps[kind] = [read(Path(name)) for name in ("height.tif", "vegetation.tif", "dates.tif")]
        document = json.loads(Path("dates.json").read_text())
        maps[kind] += [np.array(list(document[part].values())) for part in ("cells", "angles")]
    assert (maps["products"][0] != NODATA).any()
    for ours, theirs in zip(maps["products"], maps["geotiffs"], strict=True):
        assert np.array_equal(ours, theirs)
    # Nothing was lost on the way: the cloud leaves its pixels no date, and the first rows have none.
    dates = maps["products"][2][0]
    assert (dates[states() == CLOUD] == 0).all() and (dates[states() == MISSING] == 0).all() and dates.max() == 3


def test_each_cell_has_the_angles_at_its_middle(tmp_path: Path) -> None:
    grid = Grid(GRID.crs, GRID.transform, 520, 16)
    nodes = np.broadcast_to(ANGLES[:, None, None], (4, 3, 2)) + VIEW_ZENITH[:, None, None] * np.arange(3.0)[:, None]
    values = np.full((10, *grid[2:]), 500, np.int16)
    write_safe(tmp_path / "images", grid, datetime.date(2023, 6, 1), values, np.zeros(grid[2:], np.uint8), nodes)
    series = find_series("images", tmp_path, None, True, lambda _: None)
    inputs = MapInputs(series, (0, 0, *grid[2:]), 512, 8, Limits(10, 99, 1, 4, 1), 4, str(tmp_path), "")
    # The middle of the first cell lies 2.6 km from the corner, that of what is left of the second 5.2 km: past a node.
    found = angles_of_cells(inputs, {"0_0": [0], "1_0": [0]})
    assert found == {"0_0": [ANGLES.tolist()], "1_0": [(ANGLES + VIEW_ZENITH).tolist()]}


def test_masks_are_read_once_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_products(tmp_path / "images")
    series = find_series("images", tmp_path, None, True, lambda _: None)
    inputs = MapInputs(series, (0, 0, ROWS, COLUMNS), 16, 8, Limits(10, 99, 1, 4, 1), 4, str(tmp_path), "")
    windows: list[Window] = []
    whole = series.images[1].states(Window(0, 0, COLUMNS, ROWS))
    read_states = SafeProduct.states

    def noted(self: SafeProduct, window: Window) -> NDArray[np.uint8]:
        windows.append(window)
        return read_states(self, window)

    monkeypatch.setattr(SafeProduct, "states", noted)
    reader = inputs.reader()
    parts = [[reader.states(1, Window(left, top, 16, 8)) for left in (0, 16)] for top in (0, 8, 16)]
    assert np.array_equal(np.block(parts), whole) and len(windows) == 1
    outside = reader.states(1, Window(-4, 20, 8, 8))
    assert (outside[:, :4] == MISSING).all() and (outside[4:] == MISSING).all()
    assert np.array_equal(outside[:4, 4:], whole[20:, :4])


def test_the_simulated_year_has_products_of_all_kinds_and_the_truth_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACROSS", 1), ("SIDE", PATCH_SIZE), ("DATES", 5)):
        monkeypatch.setattr(demo, name, value)
    folder = demo.demo_products(tmp_path)
    assert demo.demo_products(tmp_path) == folder and (folder / MARK).exists()
    products = find_products("products", folder)
    kinds = [type(product) for product in products]
    assert kinds == [SafeProduct, SafeProduct, TheiaProduct, StacProduct, SafeProduct]
    assert {product.grid for product in products} == {products[0].grid} and {product.tile for product in products} == {
        "31TDL"
    }
    whole = Window(0, 0, products[0].grid.width, products[0].grid.height)
    middle = np.array([[demo.CORNER[0] + 750, demo.CORNER[1] - 750]])
    for product in products:
        bands, seen = product.read(whole), product.states(whole)
        assert np.array_equal((bands == NODATA).any(0) & (seen != MISSING), np.zeros(seen.shape, bool))
        if (seen < CLOUD).mean() > 0.5:
            assert 1000 < np.median(bands[6][seen < CLOUD]) < 4500  # near infrared
            assert np.median(bands[2][seen < CLOUD]) < 1500  # red
        assert np.isfinite(product.angles(middle, demo.LAMBERT_93)).all()
    heights, ground = read(folder / "heights.tif"), read(folder / "ground.tif")
    assert heights.shape == (1, 1500, 1500) and ground.shape == (1, 750, 750)
    assert 200 < np.percentile(heights, 99) < 450  # decimetres
