"""Operation series-inputs as its users see it: table, rasters, what main and predict make of them, refusals."""

import datetime
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from conftest import PROJECT, Ended, Runner
from numpy.typing import NDArray
from own_table import run_in
from rasterio import Affine
from rasterio.crs import CRS

import main
import predict
from datasets.place_series import demo
from datasets.place_series.from_products import pixels_of
from datasets.products import BANDS, CLEAR, CLOUD
from datasets.products.demo_safe import write_safe
from datasets.series_table import prepare, read_table
from utils.rasters import Grid

SIZE = 40
WEST = Grid(CRS.from_epsg(32631), Affine(10, 0, 500_000, 0, -10, 5_000_000), SIZE, SIZE)
EAST = Grid(CRS.from_epsg(32631), Affine(10, 0, 500_200, 0, -10, 5_000_000), SIZE, SIZE)  # half of it in both
FAR = Grid(CRS.from_epsg(32632), Affine(10, 0, 500_000, 0, -10, 5_000_000), SIZE, SIZE)
FIRST = datetime.date(2023, 4, 1)  # day 91
DATES = [FIRST + datetime.timedelta(days=25 * number) for number in range(7)]
SEASON = ("start=91", "end=241", "steps=6", "max_gap=60")
STEPS = np.linspace(91, 241, 6)
B4, B8 = BANDS.index("B4"), BANDS.index("B8")
ANGLES = np.array([40.0, 150.0, 5.0, 100.0])


class Made(NamedTuple):
    """Products of three tiles and what the western one shows: (date, band, row, column) and (date, row, column)."""

    folder: Path
    values: NDArray[np.int16]
    clear: NDArray[np.bool_]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("products")
    values = rng.integers(200, 4000, (len(DATES), len(BANDS), SIZE, SIZE)).astype(np.int16)
    # Clouds as wide as the pixels of 20 m in which products have them.
    clear = (rng.uniform(size=(len(DATES), SIZE // 2, SIZE // 2)) < 0.7).repeat(2, 1).repeat(2, 2)
    clear[:, :4, :4] = False
    for date, image, sky in zip(DATES, values, clear, strict=True):
        write_safe(folder, WEST, date, image, np.where(sky, CLEAR, CLOUD).astype(np.uint8), ANGLES, tile="31TDL")
    for tile, grid in (("31TEL", EAST), ("32TNR", FAR)):
        for date in DATES[::2]:
            write_safe(
                folder, grid, date, np.full_like(values[0], 1000), np.full((SIZE, SIZE), CLEAR, np.uint8), ANGLES, tile=tile
            )
    return Made(folder, values, clear)


def pixel_points(pixels: list[tuple[int, int]], **columns: Any) -> geopandas.GeoDataFrame:
    """Points a little off the centres of pixels (row, column) of the western tile."""
    x = [WEST.transform.c + 10 * column + 6.5 for _, column in pixels]
    y = [WEST.transform.f - 10 * row - 2.5 for row, _ in pixels]
    names = [f"p{row}_{column}" for row, column in pixels]
    return geopandas.GeoDataFrame({"plot": names, **columns}, geometry=geopandas.points_from_xy(x, y), crs=WEST.crs.to_wkt())


def by_hand(made: Made, row: int, column: int, band: int) -> NDArray[np.float64]:
    """The interpolated series of a pixel."""
    clear = made.clear[:, row, column]
    days = np.array([date.timetuple().tm_yday for date in DATES])
    return np.interp(STEPS, days[clear], made.values[clear, band, row, column])


def read_stack(folder: Path) -> NDArray[np.float32]:
    """(step, band, row, column)."""
    layers = []
    for path in sorted(folder.glob("*.tif")):
        with rasterio.open(path) as raster:
            layers.append(raster.read())
    return np.stack(layers)


@pytest.mark.parametrize("method", ["interpolate", "composite"])
def test_the_rows_of_points_are_the_pixels_of_the_stack(
    made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path, method: str
) -> None:
    pixels = [(row, column) for row in range(0, SIZE, 3) for column in range(0, 18, 3)]
    pixel_points(pixels).to_crs("EPSG:4326").to_file(tmp_path / "places.geojson")
    bands = ("bands=red nir=B8 swir1", "indices=ndvi=(nir-red)/(nir+red)", "area=500000 4999600 500400 5000000", "block=16")
    flags = ("places=places.geojson", f"products={made.folder}", "out=out/table.csv", f"method={method}", *SEASON, *bands)
    done = run_series_inputs(*flags)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("plot")
    stack = read_stack(tmp_path / "out" / "table_stack_2023")
    assert stack.shape == (6, 4, SIZE, SIZE)
    names = [f"{band}_{step}" for step in range(1, 7) for band in ("red", "nir", "swir1", "ndvi")]
    left_out = 0
    for row, column in pixels:
        name, pixel = f"p{row}_{column}", stack[:, :, row, column]
        if name in table.index:
            np.testing.assert_array_equal(table.loc[name, names].to_numpy(np.float32), pixel.ravel())
            assert table.loc[name, "clear_dates"] == made.clear[:, row, column].sum()
            if method == "interpolate":
                np.testing.assert_allclose(pixel[:, 0], by_hand(made, row, column, B4), rtol=1e-6)
                np.testing.assert_allclose(pixel[:, 1], by_hand(made, row, column, B8), rtol=1e-6)
        else:
            left_out += 1
            assert np.isnan(pixel).all()
    assert 4 <= left_out < len(pixels) / 2 and len(table) == len(pixels) - left_out
    assert f"[*] Left out: {left_out} (" in done.stdout and "no clear date: 4" in done.stdout
    assert set(table["tile"]) == {"31TDL"} and set(table["pixels"]) == {1}


def test_a_polygon_is_the_mean_of_its_clear_pixels(
    made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path
) -> None:
    shapes = {
        "round": shapely.Point(500_103, 4_999_877).buffer(48),
        "sliver": shapely.box(500_151, 4_999_751, 500_154, 4_999_754),  # holds no centre of a pixel
        "bowtie": shapely.Polygon([(500_020, 4_999_703), (500_120, 4_999_803), (500_120, 4_999_703), (500_020, 4_999_803)]),
        "parts": shapely.MultiPolygon(
            [shapely.box(500_010, 4_999_610, 500_030, 4_999_630), shapely.box(500_070, 4_999_610, 500_080, 4_999_630)]
        ),
    }
    frame = geopandas.GeoDataFrame({"plot": list(shapes)}, geometry=list(shapes.values()), crs="EPSG:32631")
    frame.to_file(tmp_path / "places.gpkg")
    done = run_series_inputs(
        "places=places.gpkg", f"products={made.folder}", "out=table.parquet", "bands=B4", "min_clear=40", *SEASON
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "table.parquet").set_index("plot")
    column, row = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    centres = shapely.points(500_005 + 10.0 * column, 4_999_995 - 10.0 * row)
    days = np.array([date.timetuple().tm_yday for date in DATES])
    for name, shape in shapes.items():
        inside = shapely.contains(shapely.make_valid(shape), centres)
        if name == "sliver":
            inside[24, 15] = True
        clear = made.clear[:, inside]
        used = clear.sum(1) >= np.maximum(1, 0.4 * inside.sum())
        if name not in table.index:
            assert np.diff([91, *days[used], 241]).max() > 60
            continue
        means = [image[B4][inside][sky].mean() for image, sky in zip(made.values[used], clear[used], strict=True)]
        assert table.loc[name, "pixels"] == inside.sum() and table.loc[name, "clear_dates"] == used.sum()
        np.testing.assert_allclose(
            table.loc[name, [f"B4_{n}" for n in range(1, 7)]].to_numpy(float), np.interp(STEPS, days[used], means), rtol=1e-5
        )
    assert {"round", "bowtie"} <= set(table.index)


def test_a_large_place_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shapely.Point(500_190, 4_999_810).buffer(170)
    ((row, column, whole),) = pixels_of(shape, WEST)
    monkeypatch.setattr("datasets.place_series.from_products.CELL", 16)
    joined = np.zeros((SIZE, SIZE), dtype=bool)
    parts = pixels_of(shape, WEST)
    for top, left, mask in parts:
        assert top // 16 == (top + len(mask) - 1) // 16 and left // 16 == (left + mask.shape[1] - 1) // 16
        joined[top : top + len(mask), left : left + mask.shape[1]] |= mask
    assert len(parts) > 4
    np.testing.assert_array_equal(joined[row : row + len(whole), column : column + whole.shape[1]], whole)
    assert joined.sum() == whole.sum()


def test_places_of_several_tiles_and_years(made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    west = pixel_points([(20, 5), (20, 30), (20, 50), (20, 90)], Year=2023, cover_2=[1, 2, 3, 4]).to_crs("EPSG:4326")
    far = geopandas.GeoDataFrame(
        {"plot": ["far", "old"], "Year": [2023, 2019]},
        geometry=geopandas.points_from_xy([500_105] * 2, [4_999_805] * 2),
        crs="EPSG:32632",
    )
    cut = geopandas.GeoDataFrame(
        {"plot": ["cut"], "Year": [2023]}, geometry=[shapely.box(499_950, 4_999_800, 500_050, 4_999_900)], crs="EPSG:32631"
    )
    places = pd.concat([west, far.to_crs("EPSG:4326"), cut.to_crs("EPSG:4326")])
    places.to_file(tmp_path / "places.gpkg")
    done = run_series_inputs(
        "places=places.gpkg", f"products={made.folder}", "out=table.csv", "bands=B4", *SEASON[:3], "max_gap=200"
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv").set_index("plot")
    # The second one lies in two tiles, and is read from the one with more dates.
    assert table["tile"].to_dict() == {"p20_5": "31TDL", "p20_30": "31TDL", "p20_50": "31TEL", "far": "32TNR"}
    assert table.loc["p20_30", "clear_dates"] == made.clear[:, 20, 30].sum() and table.loc["far", "clear_dates"] == 4
    assert "Left out: 3 (outside of the products: 1, not wholly in one tile: 1, year without products: 1)" in done.stdout
    assert "Column cover_2 is carried as cover-2" in done.stdout and "cover-2" in table
    samples = prepare(read_table(tmp_path / "table.csv"), "cover-2", plot_column="plot")
    assert (
        samples.columns.bands == ("B4",) and samples.columns.steps == (1, 2, 3, 4, 5, 6) and samples.columns.year == "year"
    )


def test_products_of_one_tile_and_date_count_once(
    made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = tmp_path / "products"
    shutil.copytree(made.folder, folder)
    double = np.full_like(made.values[0], 1000)
    sky = np.full((SIZE, SIZE), CLEAR, np.uint8)
    write_safe(folder, WEST, DATES[3], double, sky, ANGLES, tile="31TDL", sensor="SENTINEL2B")
    chosen = [(row, column) for row in range(6, SIZE, 5) for column in range(6, 18, 5)]
    pixel_points(chosen).to_file(tmp_path / "places.gpkg")
    season = ("start=164", "end=168", "steps=5")
    done = run_series_inputs("places=places.gpkg", "products=products", "out=table.csv", "bands=B4", *season, "max_gap=60")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv").set_index("plot")
    day = DATES[3].timetuple().tm_yday
    for row, column in chosen:
        value, clear = float(made.values[3, B4, row, column]), made.clear[3, row, column]
        expected = (value + 1000) / 2 if clear else 1000
        assert table.loc[f"p{row}_{column}", f"B4_{day - 163}"] == pytest.approx(expected)
    assert set(table["clear_dates"]) == {1}


def test_the_record_says_how_the_table_was_made(made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    pixel_points([(10, 10), (20, 10)]).to_file(tmp_path / "places.gpkg")
    flags = (
        "places=places.gpkg",
        f"products={made.folder}",
        "out=table.csv",
        "bands=nir=B8A red",
        "indices=d=nir-red",
        *SEASON,
    )
    assert run_series_inputs(*flags).returncode == 0
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["bands"] == {"nir": "B8A", "red": "B4"} and record["indices"] == {"d": "nir-red"}
    assert record["step_days"] == [91, 121, 151, 181, 211, 241] and record["step_dates"]["2023"][0] == "2023-04-01"
    assert record["rules"] == {"method": "interpolate", "steps": 6, "start": 91, "end": 241, "window": 30.0, "max_gap": 60}
    assert len(record["products"]) == 15 and record["products"][0].startswith("S2A_MSIL2A_20230401")
    assert record["simulated"] is False and record["unit"] == "reflectance x 10 000"
    assert record["sha256"] == read_table(tmp_path / "table.csv").sha256
    first = (tmp_path / "table.csv").read_bytes()
    again = run_series_inputs(*(f"{name}={value}" for name, value in record["flags"].items() if value is not None))
    assert again.returncode == 0 and (tmp_path / "table.csv").read_bytes() == first


def test_workers_give_the_same_table_and_stack(made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    pixel_points([(10, 10), (20, 10)]).to_file(tmp_path / "places.gpkg")
    for workers in (1, 2):
        flags = (f"out={workers}/table.csv", f"workers={workers}", "bands=B4", "area=500000 4999800 500200 5000000", *SEASON)
        done = run_series_inputs("places=places.gpkg", f"products={made.folder}", *flags)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1" / "table.csv").read_bytes() == (tmp_path / "2" / "table.csv").read_bytes()
    one, two = (read_stack(tmp_path / name / "table_stack_2023") for name in "12")
    np.testing.assert_array_equal(one, two)
    kept = run_series_inputs("places=none", f"products={made.folder}", *flags)
    assert kept.returncode == 0 and "is complete and kept" in kept.stdout
    other = run_series_inputs("places=none", f"products={made.folder}", *flags, "max_gap=61")
    assert other.returncode == 2 and "max_gap=60, but max_gap=61 was given" in other.stderr


def test_wrong_input_is_refused_in_a_sentence(made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    inside, products = pixel_points([(10, 10)]), f"products={made.folder}"
    inside.to_file(tmp_path / "places.gpkg")
    pixel_points([(10, 300)]).to_file(tmp_path / "away.gpkg")
    pixel_points([(1, 1), (2, 2)]).to_file(tmp_path / "cloudy.gpkg")
    inside.rename(columns={"plot": "tile"}).to_file(tmp_path / "own.gpkg")
    (tmp_path / "plain.csv").write_text("x,y\n500005,4999995\n")
    (tmp_path / "mine.csv").write_text("precious")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())

    def refused(expected: str, *flags: str) -> None:
        done = run_series_inputs(*SEASON, *flags)
        assert done.returncode == 2, done.stdout
        assert re.search(expected, done.stderr), done.stderr
        assert len(done.stderr.splitlines()[-1]) > 20 and "Traceback" not in done.stderr
        assert sorted(tmp_path.iterdir()) == before

    refused("plain.csv has no coordinate system; crs=", products, "places=plain.csv")
    refused("no place lies in the products .31TDL, 31TEL, 32TNR.: outside of the products: 1", products, "places=away.gpkg")
    refused("no row is left for series.csv .left out: no clear date: 2.", products, "places=cloudy.gpkg")
    refused(
        "no product lies in the season of any year; their dates are from",
        products,
        "places=places.gpkg",
        "start=10",
        "end=20",
    )
    refused("no product is of 2018", products, "places=places.gpkg", "years=2019")
    refused("'thermal' is not a band of the products", products, "places=places.gpkg", "indices=x=thermal/nir")
    refused("own.gpkg has a column 'tile', which the table of series gets itself", products, "places=own.gpkg")
    refused("holds no pixel", products, "places=none", "area=0 0 10 10")
    refused("leave nothing to write", products, "places=none")
    refused("steps=6: the season from start=91 to end=95 has 5 days", products, "places=places.gpkg", "end=95")
    refused("file/table.csv cannot be written: ", products, "places=places.gpkg", "out=file/table.csv")
    refused("mine.csv exists and was not written by series-inputs", products, "places=places.gpkg", "out=mine.csv")
    refused("other.json exists and was not written by series-inputs", products, "places=places.gpkg", "out=other.csv")
    refused("has the ending '.gpkg'; .csv, .tsv, .parquet is expected", products, "places=places.gpkg", "out=table.gpkg")
    refused("area=all is for products", "observations=long.csv", "area=all")
    refused("long.csv does not exist", "observations=long.csv")


def test_a_product_that_breaks_leaves_nothing(made: Made, run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "products")
    pixel_points([(10, 10)]).to_file(tmp_path / "places.gpkg")
    image = next(
        next((tmp_path / "products").glob(f"*_{DATES[4]:%Y%m%d}T*_T31TDL_*")).glob("GRANULE/*/IMG_DATA/R10m/*_B04_10m.jp2")
    )
    image.write_bytes(image.read_bytes()[:-600])
    done = run_series_inputs("places=places.gpkg", "products=products", "out=out/table.csv", "bands=B4", "area=all", *SEASON)
    assert done.returncode == 2 and "_B04_10m.jp2 is truncated" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_long_table_becomes_a_table_for_main(run_series_inputs: Callable[..., Ended], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dates = [f"2023-{month:02d}-{day:02d}" for month in range(3, 11) for day in (1, 11, 21)]
    rows = [
        {
            "site": f"s{n}",
            "date": date,
            "B4": 500 + 10 * n + rng.normal(),
            "B8": 3000.0,
            "cloud": int(rng.uniform() < 0.3),
            "biomass": 10 * n,
        }
        for n in range(12)
        for date in dates
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "long.csv", index=False)
    done = run_series_inputs("observations=long.csv", "out=table.tsv", "indices=ndvi=(B8-B4)/(B8+B4), one=1/(B8-B8)")
    assert done.returncode == 2 and "band or index without a value: 12" in done.stderr
    done = run_series_inputs("observations=long.csv", "out=table.tsv", "indices=ndvi=(B8-B4)/(B8+B4)", "max_gap=120")
    assert done.returncode == 0, done.stderr
    assert "[*] Rows: 12" in done.stdout and "clouds cloud" in done.stdout
    samples = prepare(read_table(tmp_path / "table.tsv"), "biomass", plot_column="site")
    assert samples.columns.bands == ("B4", "B8", "ndvi") and samples.x.shape == (12, 3, 16)
    order = [int(name[1:]) for name in samples.keys["plot"]]
    np.testing.assert_allclose(samples.x[:, 0].mean(1), 500 + 10.0 * np.array(order), atol=2)


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (PROJECT / "docs" / "series-inputs.md").read_text()
    (example,) = re.findall(r"## Worked example\n.*?```\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(line, comments=True)[2:] for line in example.splitlines()]
    assert [words[0] for words in commands] == ["series-inputs", "main", "predict"]
    monkeypatch.setattr(demo, "EVERY", 4)
    monkeypatch.setattr(demo, "GRID", demo.GRID._replace(height=100, width=120))
    import series_inputs

    monkeypatch.setattr("series_inputs.project_folder", lambda: tmp_path)
    modules = {"series-inputs": series_inputs, "main": main, "predict": predict}
    for operation, *flags in commands:
        with monkeypatch.context() as patch:
            flags = [re.sub(r"=(\w+/)", rf"={tmp_path}/\1", flag) for flag in flags]
            flags += [f"run={tmp_path / 'main'}"] if operation == "predict" else []
            flags += [] if operation == "main" else ["workers=1"]
            patch.chdir(tmp_path)
            run_in(tmp_path / operation, modules[operation], *flags)
    said = capsys.readouterr().out
    assert "The products are simulated" in said
    for label in ("Rows", "Rasters", "R2 mean", "Pixels"):  # of all that is made from them
        assert re.search(rf"^\[\*\] {label}: .*\(simulated\)$", said, re.MULTILINE), label
    # The map at the centres of the plots is close to what the table gives.
    with rasterio.open(tmp_path / "predict" / "map.tif") as raster:
        mapped = raster.read(1)
    assert np.isfinite(mapped).mean() > 0.8


def test_the_script_explains_itself(run_script: Runner) -> None:
    done = run_script("series_inputs.py", "places=nowhere.gpkg", "products=nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere" in done.stderr.splitlines()[-1]
