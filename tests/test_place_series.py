"""Series of places: the arithmetic by hand, formulas, places files, long tables."""

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from numpy.typing import NDArray

from datasets.place_series.bands import ALIASES, choose_channels, parse
from datasets.place_series.long_table import read_long
from datasets.place_series.places import read_places
from datasets.place_series.regular import Rules, days_from, regular_series
from datasets.place_series.rows import each_year, make_rows, new_names
from utils.errors import InputError

BANDS = tuple(group[0] for group in ALIASES if group[0] not in ("B1", "B9"))
NAN = np.nan


def rules(**changes: Any) -> Rules:
    """Five steps: days 100, 110, 120, 130, 140."""
    return Rules("interpolate", 5, 100, 140, 10, 20)._replace(**changes)


def column(*values: float) -> NDArray[np.float32]:
    """(date, 1 band, 1 pixel)."""
    return np.array(values, dtype=np.float32)[:, None, None]


@pytest.mark.parametrize(
    ("days", "values", "expected"),
    [
        ((100, 140), (0, 40), (0, 10, 20, 30, 40)),
        ((90, 110, 150), (0, 20, 60), (10, 20, 30, 40, 50)),  # dates beyond the season count
        ((105, 115, 135), (5, 15, 35), (5, 10, 20, 30, 35)),  # the nearest before the first and after the last
        ((100, 110, 120, 140), (0, NAN, 20, 40), (0, 10, 20, 30, 40)),
        ((79, 105, 161), (999, 7, 999), (7, 7, 7, 7, 7)),  # further than max_gap off
        ((120,), (NAN,), (NAN,) * 5),
    ],
)
def test_interpolation_by_hand(days: tuple[int, ...], values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    regular = regular_series(np.array(days), column(*values), rules(), 2023)
    np.testing.assert_allclose(regular.series[:, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("days", "values", "expected"),
    [
        # Windows are 95 <= day < 105 and so on.
        ((95, 104, 105, 111, 119, 130, 140), (1, 3, 4, 6, 8, 9, 2), (2, 5, 8, 9, 2)),
        ((100, 101, 102, 140), (0, 9, 1, 31), (1, 8.5, 16, 23.5, 31)),  # empty windows from their neighbours
        ((94, 110, 145), (99, 5, 99), (5, 5, 5, 5, 5)),
    ],
)
def test_composites_by_hand(days: tuple[int, ...], values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    regular = regular_series(np.array(days), column(*values), rules(method="composite"), 2023)
    np.testing.assert_allclose(regular.series[:, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("days", "gap", "clear"),
    [
        ((100, 140), 40, 2),
        ((110, 125), 15, 2),  # 10 to the first, 15 between, 15 to the end
        ((120,), 20, 1),
        ((121,), 21, 1),  # from the season's start
        ((85, 119, 155), 21, 1),  # dates beyond the season do not widen a gap, and do not count
        ((), 40, 0),
    ],
)
def test_gaps_by_hand(days: tuple[int, ...], gap: int, clear: int) -> None:
    regular = regular_series(np.array(days, dtype=np.int64), np.ones((len(days), 1, 1), np.float32), rules(), 2023)
    assert regular.widest_gap.tolist() == [gap] and regular.clear_dates.tolist() == [clear]
    assert regular.complete(20).tolist() == [gap <= 20]


@pytest.mark.parametrize("method", ["interpolate", "composite"])
def test_every_pixel_has_the_series_that_it_has_alone(method: str) -> None:
    rng = np.random.default_rng(0)
    days = np.sort(rng.choice(np.arange(85, 155), 12, replace=False))
    values = rng.uniform(0, 1, (12, 3, 40)).astype(np.float32)
    values[rng.uniform(size=values.shape) < 0.4] = NAN
    together = regular_series(days, values, rules(method=method), 2023)
    for pixel in range(40):
        alone = regular_series(days, values[:, :, [pixel]], rules(method=method), 2023)
        for every, one in zip(together, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(every)[..., [pixel]], one)
    # An independent reckoning of the interpolation and its gaps.
    if method == "interpolate":
        for pixel, band in ((0, 0), (17, 2)):
            clear = np.isfinite(values[:, band, pixel])
            expected = np.interp(rules().step_days(2023), days[clear], values[clear, band, pixel])
            np.testing.assert_allclose(together.series[:, band, pixel], expected, rtol=1e-6)


def test_a_season_may_begin_in_the_year_before() -> None:
    winter = rules(start=305, end=91)
    assert [str(date) for date in winter.step_dates(2024)][:: len(winter.step_dates(2024)) - 1] == [
        "2023-11-01",
        "2024-03-31",
    ]
    assert days_from(np.array(["2023-12-31", "2024-02-29"], "datetime64[D]"), 2024).tolist() == [0, 60]


def test_indices_are_computed_from_any_names_of_bands() -> None:
    formulas = "ndvi=(nir-red)/(nir+red), evi=2.5*(B08-B04)/(B8 + 6*red - 7.5*-(-blue) + 1); half = B11/2"
    channels = choose_channels("red nir=B8A", formulas, BANDS, 1e-4, "the products")
    assert channels.names == ("red", "nir", "ndvi", "evi", "half") and channels.sources == ("B2", "B4", "B8", "B8A", "B11")
    values = np.array([500, 1000, 3000, 4000, 2000], np.float32)[None, :, None]
    computed, lacking = channels.compute(values)
    # nir was given the meaning B8A, B8 keeps its own.
    expected = [1000, 4000, 0.6, 2.5 * 0.2 / (0.3 + 0.6 - 0.375 + 1), 0.1]
    np.testing.assert_allclose(computed[0, :, 0], expected, rtol=1e-6)
    assert lacking.tolist() == [0, 0, 0]


def test_a_division_by_zero_is_left_out_and_counted() -> None:
    channels = choose_channels("B4", "ndvi=(nir-red)/(nir+red)", BANDS, 1e-4, "the products")
    computed, lacking = channels.compute(np.array([[[0, 10, NAN]], [[0, 30, 5]]], np.float32).transpose(1, 0, 2))
    np.testing.assert_allclose(computed[0, 1], [NAN, 0.5, NAN])
    assert lacking.tolist() == [1]


@pytest.mark.parametrize(
    ("bands", "indices", "expected"),
    [
        ("B4 B13", "none", "bands=B4 B13: 'B13' is not a band of the products; there are B2, B3, B4, B5, B6 and 5 more"),
        ("B4", "x=nir+thermal", "indices: x=nir.thermal: 'thermal' is not a band of the products"),
        ("B4", "x=nir**2", r"'nir\*\*2' has 'nir \*\* 2'|'nir\*\*2' has 'Pow'"),
        ("B4", "x=abs(nir)", r"'abs\(nir\)' has 'abs\(nir\)'; numbers, names of bands, \+ - \* / and parentheses"),
        ("B4", "x=nir.T", r"'nir.T' has 'nir.T'"),
        ("B4", "x=__import__('os').system('true')", "has"),
        ("B4", "x=(nir-red", r"'\(nir-red' is no formula"),
        ("B4", "x=nir+1e999", "has '1e309'"),
        ("B4", "x=nir+" + "-" * 3000 + "red", "no formula|too long"),
        ("B4", "x=2*3", "names no band"),
        ("B4", "nir-red", "is not name=formula"),
        ("B4 red=B4 RED=B8", "none", "'red' appears more than once"),
        ("B4 ndvi=B8", "ndvi=nir-red", "'ndvi' appears more than once"),
    ],
)
def test_wrong_bands_and_formulas_are_refused(bands: str, indices: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        choose_channels(bands, indices, BANDS, 1e-4, "the products")
    assert "\n" not in str(refused.value)


def test_parse_accepts_arithmetic_alone() -> None:
    for text in ("a", "-a/2.5e-1", "((a))+b*+3"):
        parse(text)
    for text in ("a if b else c", "a<b", "[a]", "a@b", "a//b", "'a'", "True*a", "a:=1", "lambda: a", "1j*a", "", "a;b"):
        with pytest.raises(InputError):
            parse(text)


def points(count: int = 3, **columns: Any) -> geopandas.GeoDataFrame:
    """Points in UTM 31N."""
    geometry = geopandas.points_from_xy(500_005 + 10 * np.arange(count), np.full(count, 5_000_005.0))
    return geopandas.GeoDataFrame({"site": [f"s{n}" for n in range(count)], **columns}, geometry=geometry, crs="EPSG:32631")


@pytest.mark.parametrize("name", ["places.gpkg", "places.geojson", "places.shp", "places.parquet"])
def test_places_are_read_from_vector_files(tmp_path: Path, name: str) -> None:
    frame = points(year=[2020, 2021, 2021]).to_crs("EPSG:4326" if name.endswith("json") else "EPSG:32631")
    frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_file(tmp_path / name)
    places = read_places(tmp_path / name, "auto", "auto", "auto")
    assert (places.name_column, places.year_column) == ("site", "year")
    assert list(places.columns) == ["site", "year"]
    np.testing.assert_allclose(shapely.get_x(places.on("EPSG:32631")), [500_005, 500_015, 500_025], atol=1e-3)


def test_places_are_read_from_tables_of_coordinates(tmp_path: Path) -> None:
    (tmp_path / "degrees.csv").write_text("Lon;Lat;plot\n2,5;45,5;a\n2,6;45,6;b\n")
    places = read_places(tmp_path / "degrees.csv", "auto", "auto", "auto")
    assert places.crs.to_epsg() == 4326 and shapely.get_y(places.geometry).tolist() == [45.5, 45.6]
    (tmp_path / "metres.csv").write_text("x,y,cover\n500005,5000005,3\n500015,5000005,4\n")
    places = read_places(tmp_path / "metres.csv", "auto", "auto", "EPSG:32631")
    assert places.name_column == "place" and places.columns["place"].tolist() == [1, 2]
    frame = points()
    frame.to_file(tmp_path / "layers.gpkg", layer="first")
    frame.iloc[:2].to_file(tmp_path / "layers.gpkg", layer="second")
    assert len(read_places(tmp_path / "layers.gpkg#second", "auto", "auto", "auto").geometry) == 2
    with pytest.raises(InputError, match=r"has the layers first, second; layers.gpkg#first reads the first one"):
        read_places(tmp_path / "layers.gpkg", "auto", "auto", "auto")


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    def refused(frame: geopandas.GeoDataFrame | str, expected: str, crs: str = "auto", plot_column: str = "auto") -> None:
        path = tmp_path / ("places.csv" if isinstance(frame, str) else "places.parquet")
        if isinstance(frame, str):
            path.write_text(frame)
        else:
            frame.to_parquet(path)
        with pytest.raises(InputError, match=expected) as error:
            read_places(path, plot_column, "auto", crs)
        assert "\n" not in str(error.value)

    frame = points()
    refused("x,y\n1000,2000\n", "places.csv has no coordinate system; crs=... names it, such as crs=EPSG:32632")
    refused("x,y\n500000,5000000\n", "is in degrees .* but has coordinates such as 500000 5000000", crs="EPSG:4326")
    refused("x,y\n2.5,45.5\n", "has coordinates like degrees, such as 2.5 45.5; crs=EPSG:4326", crs="EPSG:32631")
    refused("x,y\n2.5,north\n", "row 2: its coordinates x and y are not two numbers", crs="EPSG:4326")
    refused("a,b\n1,2\n", "has no columns x and y, or lon and lat; its columns are a, b")
    refused("x,y\n1,2\n", "crs=EPSG:1 is no coordinate system", crs="EPSG:1")
    refused("lon,lat,plot\n1,2,a\n3,4,a\n", "has two places of the name 'a' in column 'plot'; year_column=")
    refused("lon,lat,plot,year\n1,2,a,2020\n3,4,a,2020\n", "has two places of the name 'a in 2020'")
    refused("lon,lat,plot,year\n1,2,a,soon\n", "row 1, column 'year': 'soon' is no year")
    refused("lon,lat,plot\n1,2,a\n", "has no column 'stand', named in plot_column", plot_column="stand")
    refused("lon,lat,plot\n1,2,a\n3,4,\n", "row 2 has no name in column 'plot'")
    refused(frame.set_geometry([shapely.Point(), *frame.geometry[1:]], crs=frame.crs), "place 1 has an empty geometry")
    refused(frame.set_geometry([*frame.geometry[:2], None], crs=frame.crs), "place 3 has an empty geometry")
    refused(frame.set_geometry(frame.buffer(1).boundary), "place 1 is a LineString; points or polygons are expected")
    for name, expected in (("none.gpkg", "none.gpkg does not exist"), ("places.txt", "cannot be read as a vector file")):
        (tmp_path / "places.txt").write_text("no vector file")
        with pytest.raises(InputError, match=expected):
            read_places(tmp_path / name, "auto", "auto", "auto")


def test_columns_that_main_would_take_for_bands_get_another_name() -> None:
    columns = pd.DataFrame(
        {"site": ["a"], "cover_3": [1], "biomass_2019": [2.0], "ph_10": [1], "ph_20": [2], "B4_99": ["x"]}
    )
    new = new_names(columns, ["B4", "B8"], 5, ("year",), "places.csv")
    assert new == {"cover_3": "cover-3", "ph_10": "ph-10", "ph_20": "ph-20", "B4_99": "B4-99"}
    with pytest.raises(InputError, match="has a column 'b4_1', which the table of series gets itself"):
        new_names(pd.DataFrame({"b4_1": [1]}), ["B4"], 5, (), "places.csv")


def test_a_row_is_of_its_own_year_or_of_all() -> None:
    columns = pd.DataFrame({"site": ["a", "a", "b"]})
    own = each_year(columns, "site", np.array([2020, 2021, 2019]), [2020, 2021])
    assert (
        own.years.tolist() == [2020, 2021] and own.places.tolist() == [0, 1] and own.columns["site"].tolist() == ["a", "a"]
    )
    every = each_year(columns.iloc[1:], "site", None, [2020, 2021])
    assert every.years.tolist() == [2020, 2020, 2021, 2021] and every.places.tolist() == [0, 1, 0, 1]


def long(path: Path, **flags: Any) -> pd.DataFrame:
    """The rows that a long table gives."""
    defaults: dict[str, Any] = {
        "bands": "all",
        "indices": "none",
        "plot_column": "auto",
        "date_column": "auto",
        "cloud_column": "auto",
    }
    read = read_long(path, rules(max_gap=30), [], **(defaults | {"max_cloud": 0.0} | flags))
    return make_rows(read.records, [read.observed], read.channels.names, rules(max_gap=30)).table


EARTH_ENGINE = """system:index,B4,B8,SCL,MSK_CLDPRB,plot,cover,.geo
20230410T104619_20230410T105221_T31TDL_0000,100,1000,4,0,p1,hay,"{""type"":""Point""}"
20230510T104619_20230510T105221_T31TDL_0000,400,4000,5,0,p1,hay,"{""type"":""Point""}"
20230510T104619_20230510T105224_T31TDL_0000,600,6000,5,0,p1,hay,"{""type"":""Point""}"
20230430T104619_20230430T105221_T31TDL_0000,9999,9999,9,90,p1,hay,"{""type"":""Point""}"
20230520T104619_20230520T105221_T31TDL_0000,,,4,0,p1,hay,"{""type"":""Point""}"
20230430T104619_20230430T105221_T31TDL_0001,300,3000,4,2,p2,pasture,"{""type"":""Point""}"
"""


def test_an_export_of_earth_engine(tmp_path: Path) -> None:
    (tmp_path / "gee.csv").write_text(EARTH_ENGINE)
    table = long(tmp_path / "gee.csv", indices="ndvi=(nir-red)/(nir+red)")
    assert list(table)[:6] == ["plot", "year", "cover", "clear_dates", "widest_gap", "B4_1"]
    assert table["plot"].tolist() == ["p1", "p2"] and table["clear_dates"].tolist() == [2, 1]
    # Day 100 is 10 April, day 130 is 10 May, of which the two rows are averaged.
    np.testing.assert_allclose(
        table.loc[0, [f"B4_{step}" for step in range(1, 6)]].to_numpy(float), [100, 233.3333, 366.6667, 500, 500], rtol=1e-6
    )
    np.testing.assert_allclose(table[[f"ndvi_{step}" for step in range(1, 6)]], 9 / 11, rtol=1e-6)


def test_an_export_of_sits(tmp_path: Path) -> None:
    header = "longitude,latitude,start_date,end_date,label,cube,Index,NDVI,EVI,CLOUD"
    rows = [f"-55.1,-15.2,2023-01-01,2023-12-31,Soy,S2,2023-04-{day},0.{day},0.3,{day == 28:d}" for day in (12, 20, 28)]
    (tmp_path / "sits.csv").write_text("\n".join([header, *rows, *(row.replace("-55.1", "-55.3") for row in rows)]))
    table = long(tmp_path / "sits.csv")
    assert table["place"].tolist() == ["-55.100000 -15.200000", "-55.300000 -15.200000"]
    assert table["label"].tolist() == ["Soy", "Soy"] and table["clear_dates"].tolist() == [2, 2]
    np.testing.assert_allclose(table["NDVI_1"], 0.12, rtol=1e-6)
    np.testing.assert_allclose(table["NDVI_5"], 0.20, rtol=1e-6)


def test_dates_in_other_forms_and_flags_for_columns(tmp_path: Path) -> None:
    days = ["2023-04-10", "2023-05-10"]
    forms = {
        "date": days,
        "time": [f"{day}T10:46:19Z" for day in days],
        "system:time_start": [pd.Timestamp(day).value // 10**6 + 38_000_000 for day in days],
        "when": [20230410, 20230510],
    }
    for name, dates in forms.items():
        frame = pd.DataFrame({"id": ["a", "a"], name: dates, "tall": [1.0, 4.0], "hazy": ["no", "yes"]})
        frame.to_parquet(tmp_path / "long.parquet")
        flags: dict[str, Any] = {
            "bands": "h=tall",
            "date_column": "when" if name == "when" else "auto",
            "cloud_column": "none",
        }
        np.testing.assert_allclose(long(tmp_path / "long.parquet", **flags)["h_3"], 3, rtol=1e-6)
        flags["cloud_column"] = "hazy"
        with pytest.raises(InputError, match="no column has the name of a band of Sentinel-2"):
            long(tmp_path / "long.parquet", **(flags | {"bands": "all"}))
        assert long(tmp_path / "long.parquet", **flags).empty  # a gap of 40 days is left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plot,B4\na,1\n", "has no column of dates, such as date; date_column="),
        ("B4,date\n1,2023-04-10\n", "has no column that names the places; plot_column="),
        ("plot,date,B4\na,yesterday,1\n", "row 2, column 'date': 'yesterday' is no date such as 2023-06-12"),
        ("plot,date,B4\na,2023-04-10,1\na,2023-04-11,dark\n", "row 3, column 'B4': 'dark' is not a finite number"),
        ("plot,date,B4,SCL\na,2023-04-10,1,4.5\n", "column 'SCL': 4.5 is no code but a mean of several"),
        ("plot,date,B4\na,2023-12-10,1\n", "no date lies in the season of any year; dates are from 2023-12-10"),
        ("plot,date,B4\n", "has no rows below its column names"),
    ],
)
def test_wrong_long_tables_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "long.csv").write_text(text)
    with pytest.raises(InputError, match=expected) as refused:
        long(tmp_path / "long.csv")
    assert "\n" not in str(refused.value)
