"""Products as their producers hand them out: what is read of each kind, and what is refused."""

import datetime
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
import pytest
import rasterio
import rasterio.warp
from conftest import PROJECT
from products import ANGLES, COLUMNS, DAY, GRID, ROWS, WHOLE, image, states
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from datasets.products import BANDS, CLEAR, CLOUD, MISSING, NODATA, WATER, find_products
from datasets.products.angles import AngleGrids, esa_angles, filled, mean_over_bands
from datasets.products.demo_safe import JP2, write_safe, zip_folder
from datasets.products.demo_theia import write_theia
from datasets.products.packages import open_package, parse_xml
from datasets.products.safe import STATES_OF_CLASSES, read_grid
from utils.errors import InputError

SHARED = [folder / "shared" for folder in (PROJECT, *PROJECT.parents)]
REAL = next(filter(Path.exists, SHARED), PROJECT) / "data" / "sentinel2"


def refused(products: str, folder: Path, years: tuple[int, ...] = ()) -> str:
    """The sentence that products are refused with."""
    with pytest.raises(InputError) as caught:
        find_products(products, folder, years, lambda _: None)
    return str(caught.value)


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAFE product as a folder; tests that change it copy it."""
    return write_safe(tmp_path_factory.mktemp("safe"), GRID, DAY, image(), states(), ANGLES)


@pytest.fixture(scope="module")
def theia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product of Theia as a folder; tests that change it copy it."""
    return write_theia(tmp_path_factory.mktemp("theia"), GRID, DAY, image(), states(), ANGLES, quantification=5000)


@pytest.fixture
def copied(safe: Path, theia: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the products."""
    return lambda kind: Path(
        shutil.copytree({"safe": safe, "theia": theia}[kind], tmp_path / {"safe": safe, "theia": theia}[kind].name)
    )


def edit(path: Path, pattern: str, new: str, count: int = 0) -> None:
    """Replace a pattern in a text file, where it must be."""
    text, found = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=count)
    assert found, pattern
    path.write_text(text, encoding="utf-8")


def one(folder: Path, pattern: str) -> Path:
    """The file of a pattern."""
    (path,) = folder.rglob(pattern)
    return path


def test_a_safe_product_is_read_in_reflectance_whether_folder_or_archive(safe: Path, copied: Callable[[str], Path]) -> None:
    archive = zip_folder(copied("safe"))
    for place in (safe, archive):
        (product,) = find_products(place.name, place.parent)
        assert (product.name, product.date, product.tile, product.sensor) == (place.name, DAY, "31TDL", "SENTINEL2A")
        assert product.grid == GRID and product.baseline == "05.09"
        assert np.array_equal(product.read(WHOLE), image())
        assert np.array_equal(product.states(WHOLE), states())
        angles = product.angles(np.array([[400_000, 5_000_000], [1, 1]]), GRID.crs)
        assert angles[0].tolist() == ANGLES.tolist() and np.isnan(angles[1]).all()


def test_windows_are_those_of_the_whole_and_have_no_data_beyond_it(safe: Path) -> None:
    (product,) = find_products(safe.name, safe.parent)
    for resampling in ("nearest", "bilinear"):
        whole = product.read(WHOLE, resampling=resampling)
        part = product.read(Window(-3, 5, 18, ROWS), ["B11", "B3"], resampling)
        assert np.array_equal(part[:, :-5, 3:], whole[[BANDS.index("B11"), BANDS.index("B3")], 5:, :15])
        assert (part[:, :, :3] == NODATA).all() and (part[:, -5:] == NODATA).all()
    outside = product.states(Window(COLUMNS, 0, 4, 4))
    assert outside.shape == (4, 4) and (outside == MISSING).all()
    assert (product.read(Window(500, 500, 3, 2)) == NODATA).all()


def test_bilinear_resampling_weighs_what_has_data(tmp_path: Path) -> None:
    values = np.full((10, ROWS, COLUMNS), 1000, np.int16)
    values[BANDS.index("B5"), :, 4:6], values[BANDS.index("B5"), :, 6:8] = 2000, NODATA
    write_safe(tmp_path, GRID, DAY, values, states(), ANGLES)
    (product,) = find_products(".", tmp_path)
    row = product.read(WHOLE, ["B5"], "bilinear")[0, 10]
    # Centres of 10 m pixels lie a quarter of a 20 m pixel from those of 20 m; the missing pixel takes no part.
    assert row[:10].tolist() == [1000, 1000, 1000, 1250, 1750, 2000, NODATA, NODATA, 1000, 1000]
    assert (product.read(WHOLE, ["B2"], "bilinear") == 1000).all()


@pytest.mark.parametrize(
    ("year", "offset", "quantification"), [(2018, -1000, 10_000), (2023, None, 10_000), (2020, -500, 5000)], ids=str
)
def test_offset_and_quantification_are_those_of_the_xml_whatever_the_date(
    tmp_path: Path, year: int, offset: int | None, quantification: int
) -> None:
    day = datetime.date(year, 6, 16)
    place = write_safe(tmp_path, GRID, day, image(), states(), ANGLES, offset=offset, quantification=quantification)
    (product,) = find_products(".", tmp_path)
    assert np.abs(product.read(WHOLE).astype(int) - image()).max() <= 10_000 / quantification / 2
    # Reflectance x 10 000 = (number + offset) x 10 000 / quantification.
    with rasterio.open(one(place, "*_B08_10m.jp2")) as raster:
        number = int(raster.read(1)[9, 9])
    assert product.read(WHOLE, ["B8"])[0, 9, 9] == (number + (offset or 0)) * 10_000 / quantification


def test_each_band_has_its_own_offset(copied: Callable[[str], Path]) -> None:
    place = copied("safe")
    edit(place / "MTD_MSIL2A.xml", '(band_id="8">)-1000', r"\g<1>-1200")  # number 8 is B8A
    (product,) = find_products(place.name, place.parent)
    change = product.read(WHOLE).astype(int) - image()
    expected = np.where(np.array(BANDS) == "B8A", -200, 0)
    assert (change[:, 2:] == expected[:, None, None]).all() and (change[:, :2] == 0).all()


def test_dark_pixels_below_the_offset_stay_apart_from_missing_ones(tmp_path: Path) -> None:
    values = np.full((10, ROWS, COLUMNS), -999, np.int16)
    write_safe(tmp_path, GRID, DAY, values, states(), ANGLES)
    (product,) = find_products(".", tmp_path)
    assert (product.read(WHOLE) == -999).all()


def test_the_scene_classification_says_what_is_seen() -> None:
    expected = [MISSING, MISSING, CLEAR, CLOUD, CLEAR, CLEAR, WATER, CLEAR, CLOUD, CLOUD, CLOUD, CLOUD]
    assert STATES_OF_CLASSES[:12].tolist() == expected and (STATES_OF_CLASSES[12:] == MISSING).all()


def write_around_real(real: Path, folder: Path) -> Path:
    """A product around a real one's XML, its size cut to that of `GRID`, all numbers 1500, but 0 in the first two rows."""
    place = folder / real.name
    for path in real.rglob("*.xml"):
        (place / path.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.relative_to(real))
    tile = one(place, "MTD_TL.xml")
    for pixels, cut in ((10980, 1), (5490, 2)):
        edit(tile, f"<NROWS>{pixels}", f"<NROWS>{ROWS // cut}")
        edit(tile, f"<NCOLS>{pixels}", f"<NCOLS>{COLUMNS // cut}")
    grid = read_grid(parse_xml(tile.read_bytes(), str(tile), "Level-2A_Tile_ID"), str(tile))
    listed = re.findall(r"<IMAGE_FILE>(.*?)</IMAGE_FILE>", (place / "MTD_MSIL2A.xml").read_text())
    for name in listed:
        band, size = name.rsplit("_", 2)[1:]
        if f"{band}_{size}" in ("B02_10m", "B03_10m", "B04_10m", "B08_10m", "SCL_20m") or size == "20m":
            factor = int(size[:2]) // 10
            values = np.full((1, ROWS // factor, COLUMNS // factor), 6 if band == "SCL" else 1500, np.uint16)
            values[:, : 2 // factor] = 0
            path = place / f"{name}.jp2"
            path.parent.mkdir(parents=True, exist_ok=True)
            profile = {"crs": grid.crs, "transform": grid.transform @ Affine.scale(factor), "count": 1, "dtype": np.uint16}
            with rasterio.open(path, "w", height=values.shape[1], width=values.shape[2], **profile, **JP2) as raster:
                raster.write(values)
    return place


@pytest.mark.parametrize(
    ("pattern", "reflectance", "baseline", "day", "tile", "sensor"),
    [
        ("S2A_*.SAFE", 500, "05.09", datetime.date(2023, 8, 21), "01KAB", "SENTINEL2A"),
        ("S2B_*.SAFE", 1500, "02.14", datetime.date(2021, 1, 22), "22HBD", "SENTINEL2B"),
    ],
    ids=["with offset", "without"],
)
def test_real_metadata_of_both_generations_is_understood(
    tmp_path: Path, pattern: str, reflectance: int, baseline: str, day: datetime.date, tile: str, sensor: str
) -> None:
    real = next(REAL.glob(pattern), None)
    if real is None:
        pytest.skip("the real metadata is absent")
    write_around_real(real, tmp_path)
    (product,) = find_products(".", tmp_path)
    assert (product.baseline, product.date, product.tile, product.sensor) == (baseline, day, tile, sensor)
    bands = product.read(WHOLE)
    assert (bands[:, 2:] == reflectance).all() and (bands[:, :2] == NODATA).all()
    seen = product.states(WHOLE)
    assert (seen[2:] == WATER).all() and (seen[:2] == MISSING).all()


def real_tiles() -> list[Path]:
    """The tile metadata of real products."""
    return sorted(REAL.rglob("MTD_TL.xml"))


def stated(root: Element, path: str) -> list[float]:
    """Mean zenith and azimuth that a file states below a path, the mean of all that are there."""
    names = ("ZENITH_ANGLE", "AZIMUTH_ANGLE")
    found = [[float(one.findtext(name) or "nan") for name in names] for one in root.iterfind(f".//{path}")]
    return np.mean(found, axis=0).tolist()


@pytest.mark.skipif(not real_tiles(), reason="the real metadata is absent")
@pytest.mark.parametrize("path", real_tiles(), ids=lambda path: path.parent.name)
def test_angles_are_within_a_degree_of_the_means_that_each_real_file_states(path: Path) -> None:
    kind = "Level-2A_Tile_ID" if path.parent != REAL else "Level-1C_Tile_ID"
    root = parse_xml(path.read_bytes(), str(path), kind)
    grid = read_grid(root, str(path))
    angles = esa_angles(root, grid.crs, (grid.transform.c, grid.transform.f), str(path))
    assert angles.values.shape == (4, 23, 23) and angles.step == (5000, 5000) and np.isfinite(angles.values).all()
    # ESA averages azimuths as numbers, so that of a tile below the orbit, seen from both sides, is of neither: compared are
    # means of the same kind.
    means = angles.values.mean((1, 2))
    assert means[:2] == pytest.approx(stated(root, "Mean_Sun_Angle"), abs=1)
    assert means[2:] == pytest.approx(stated(root, "Mean_Viewing_Incidence_Angle"), abs=1)
    points = np.array([[grid.transform.c + 12_000, grid.transform.f - 7000]])
    assert angles.at(points, grid.crs)[0] == pytest.approx(angles.values[:, 1, 2], abs=0.051)


def test_azimuths_are_averaged_as_vectors_and_gaps_take_the_nearest_node() -> None:
    nan = np.nan
    bands = np.array([[[[4.0, nan]], [[350.0, nan]]], [[[6.0, 8.0]], [[20.0, 90.0]]]])
    zenith, azimuth = mean_over_bands(bands)
    assert zenith.tolist() == [[5.0, 8.0]] and azimuth[0] == pytest.approx([5.0, 90.0])
    assert filled(np.array([[1.0, nan, nan, 4.0]])).tolist() == [[1.0, 1.0, 4.0, 4.0]]
    assert np.isnan(filled(np.full((2, 2), nan))).all()


def test_a_point_has_the_angles_of_its_cell_s_upper_left_node_after_it_is_transformed() -> None:
    values = np.arange(4 * 23 * 23, dtype=np.float64).reshape(4, 23, 23) / 10
    grids = AngleGrids(CRS.from_epsg(32631), (399_960, 5_000_040), (5000, 5000), values)
    points = np.array([[399_961, 5_000_039], [404_959, 4_995_041], [404_961, 4_995_039], [399_900, 5_000_039]])
    found = grids.at(points, grids.crs)
    assert found[:3].tolist() == pytest.approx(np.array([values[:, 0, 0], values[:, 0, 0], values[:, 1, 1]]))
    assert np.isnan(found[3]).all()
    # In Lambert-93 the same points have other eastings and northings, each of which depends on both.
    there = np.array(rasterio.warp.transform("EPSG:32631", "EPSG:2154", *points.T.tolist())).T
    assert np.array_equal(grids.at(there, CRS.from_epsg(2154)), found, equal_nan=True)


def test_view_angles_of_the_first_detector_with_a_value_win() -> None:
    def grids(name: str, zenith: str, azimuth: str, **attributes: str) -> str:
        attribute = "".join(f' {key}="{value}"' for key, value in attributes.items())
        parts = (("Zenith", zenith), ("Azimuth", azimuth))
        steps = "<COL_STEP>5000</COL_STEP><ROW_STEP>5000</ROW_STEP>"
        inner = "".join(f"<{part}>{steps}<Values_List><VALUES>{row}</VALUES></Values_List></{part}>" for part, row in parts)
        return f"<{name}{attribute}>{inner}</{name}>"

    view = "Viewing_Incidence_Angles_Grids"
    text = grids("Sun_Angles_Grid", "30 30 30", "150 150 150")
    text += grids(view, "2 4 NaN", "100 100 NaN", bandId="1", detectorId="5")
    text += grids(view, "NaN 9 6", "NaN 200 110", bandId="1", detectorId="6")
    root = parse_xml(f"<Level-2A_Tile_ID>{text}</Level-2A_Tile_ID>".encode(), "x", "Level-2A_Tile_ID")
    values = esa_angles(root, GRID.crs, (0, 0), "x").values
    assert values[2].tolist() == [[2, 4, 6]] and values[3, 0] == pytest.approx([100, 100, 110])


def test_a_product_of_theia_is_read_with_its_own_quantification_masks_and_angles(
    theia: Path, copied: Callable[[str], Path]
) -> None:
    archive = zip_folder(copied("theia"))
    for place in (theia, archive):
        (product,) = find_products(place.name, place.parent)
        assert (product.name, product.date, product.tile, product.sensor) == (place.name, DAY, "31TDL", "SENTINEL2A")
        assert product.grid == GRID
        bands = product.read(WHOLE)
        assert np.abs(bands.astype(int) - image()).max() <= 1  # steps of 2
        assert np.array_equal(bands == NODATA, image() == NODATA)
        assert np.array_equal(product.states(WHOLE), states())
        assert product.angles(np.array([[400_000, 5_000_000]]), GRID.crs)[0].tolist() == ANGLES.tolist()


@pytest.mark.parametrize(
    ("mask", "code", "state"),
    [
        ("CLM", 1, CLOUD),
        ("CLM", 8, CLOUD),
        ("CLM", 128, CLOUD),
        ("MG2", 1, WATER),
        ("MG2", 2, CLOUD),
        ("MG2", 4, CLOUD),
        ("MG2", 5, CLOUD),
        ("MG2", 16, CLOUD),
        ("EDG", 1, MISSING),
    ],
    ids=str,
)
def test_bits_of_theia_s_masks(copied: Callable[[str], Path], mask: str, code: int, state: int) -> None:
    place = copied("theia")
    with rasterio.open(one(place, f"*_{mask}_R1.tif"), "r+") as raster:
        codes = raster.read()
        codes[0, 22, 2] = code
        raster.write(codes)
    (product,) = find_products(place.name, place.parent)
    expected = states()
    expected[22, 2] = state
    assert np.array_equal(product.states(WHOLE), expected)


def test_masks_of_20_m_stand_in_for_those_of_10_m(copied: Callable[[str], Path]) -> None:
    place = copied("theia")
    for path in place.rglob("*_R1.tif"):
        path.unlink()
    (product,) = find_products(place.name, place.parent)
    assert np.array_equal(product.states(WHOLE), states())


def test_of_versions_of_an_image_the_latest_is_used_and_years_are_chosen(tmp_path: Path) -> None:
    for baseline in ("05.09", "05.10"):
        write_safe(tmp_path, GRID, DAY, image(), states(), ANGLES, baseline=baseline)
    write_safe(tmp_path, GRID, datetime.date(2022, 6, 16), image(), states(), ANGLES)
    lines: list[str] = []
    products = find_products(".", tmp_path, (), lines.append)
    assert [(product.date.year, product.baseline) for product in products] == [(2022, "05.09"), (2023, "05.10")]
    assert len(lines) == 1 and "1, S2A_MSIL2A_20230616T105031_N0509" in lines[0]
    assert [product.date.year for product in find_products(".", tmp_path, [2022])] == [2022]
    assert "there are 2022, 2023" in refused(".", tmp_path, (2019,))
    names = ",".join(product.name for product in products)
    assert find_products(names, tmp_path) == products


def _truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _rewrite(path: Path, grid_change: Callable[[dict[str, object]], None]) -> None:
    with rasterio.open(path) as raster:
        profile, values = dict(raster.profile), raster.read()
    grid_change(profile)
    profile |= {"driver": "JP2OpenJPEG", "quality": "100", "reversible": "yes"} if path.suffix == ".jp2" else {}
    profile = {
        key: value for key, value in profile.items() if key not in ("blockxsize", "blockysize", "tiled", "interleave")
    }
    path.unlink()
    for beside in path.parent.glob(f"{path.name}.aux.xml"):
        beside.unlink()
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(values[:, : profile["height"], : profile["width"]])  # type: ignore[misc]


def _move(profile: dict[str, object]) -> None:
    profile["transform"] = Affine(10, 0, 300_000, 0, -10, 5_000_040)


def _other_zone(profile: dict[str, object]) -> None:
    profile["crs"] = CRS.from_epsg(32632)


def _shorten(profile: dict[str, object]) -> None:
    profile["height"] = ROWS // 2 - 2


SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "band": ("safe", lambda place: one(place, "*_B08_10m.jp2").unlink(), r"has no GRANULE.*_B08_10m.jp2, which its MTD"),
    "classes": ("safe", lambda place: one(place, "*_SCL_20m.jp2").unlink(), r"has no .*_SCL_20m.jp2"),
    "cut": ("safe", lambda place: _truncate(one(place, "*_B11_20m.jp2")), r"_B11_20m.jp2 is truncated"),
    "no jp2": ("safe", lambda place: one(place, "*_B03_10m.jp2").write_bytes(b"GIF89a" * 9), r"_B03_10m.jp2 is no JP2 file"),
    "no xml": ("safe", lambda place: (place / "MTD_MSIL2A.xml").unlink(), r"has no MTD_MSIL2A.xml$"),
    "level 1": (
        "safe",
        lambda place: (place / "MTD_MSIL2A.xml").rename(place / "MTD_MSIL1C.xml"),
        r"has no MTD_MSIL2A.xml but MTD_MSIL1C.xml: it is of Level-1C",
    ),
    "other xml": (
        "safe",
        lambda place: edit(one(place, "MTD_TL.xml"), "Level-2A_Tile_ID", "Level-1C_Tile_ID"),
        r"MTD_TL.xml is XML of another kind: its root is Level-1C_Tile_ID",
    ),
    "cut xml": ("safe", lambda place: _truncate(one(place, "MTD_TL.xml")), r"MTD_TL.xml is no XML that can be read"),
    "entity": (
        "safe",
        lambda place: edit(place / "MTD_MSIL2A.xml", r"\?>", '?><!DOCTYPE a [<!ENTITY b "c">]>', 1),
        r"MTD_MSIL2A.xml is no XML that can be read",
    ),
    "no quantification": (
        "safe",
        lambda place: edit(place / "MTD_MSIL2A.xml", "BOA_QUANTIFICATION_VALUE", "OTHER"),
        r"MTD_MSIL2A.xml has no BOA_QUANTIFICATION_VALUE",
    ),
    "some offsets": (
        "safe",
        lambda place: edit(place / "MTD_MSIL2A.xml", '<BOA_ADD_OFFSET band_id="3">-1000</BOA_ADD_OFFSET>', ""),
        r"has a BOA_ADD_OFFSET of some bands, but none of B4",
    ),
    "no number": (
        "safe",
        lambda place: edit(place / "MTD_MSIL2A.xml", '(band_id="3">)-1000', r"\1much"),
        r"BOA_ADD_OFFSET is much, a number",
    ),
    "place": (
        "safe",
        lambda place: _rewrite(one(place, "*_B04_10m.jp2"), _move),
        r"_B04_10m.jp2 has another grid \(24 x 32 pixels from 300000 5000040 of 10 m",
    ),
    "zone": (
        "safe",
        lambda place: _rewrite(one(place, "*_B12_20m.jp2"), _other_zone),
        r"_B12_20m.jp2 has another grid .*EPSG:32632",
    ),
    "angles": (
        "safe",
        lambda place: edit(one(place, "MTD_TL.xml"), "<VALUES>31.5 31.5</VALUES>", "<VALUES>31.5</VALUES>", 1),
        r"MTD_TL.xml: a grid of angles",
    ),
    "zip": ("safe", lambda place: _truncate(zip_folder(place)), r"\.zip is no zip archive, or a truncated one"),
    "theia band": ("theia", lambda place: one(place, "*_FRE_B8A.tif").unlink(), r"has no band B8A, corrected for slopes"),
    "theia mask": ("theia", lambda place: shutil.rmtree(place / "MASKS"), r"has no mask CLM"),
    "theia cut": ("theia", lambda place: _truncate(one(place, "*_FRE_B6.tif"), 0.05), r"_FRE_B6.tif of .* cannot be read"),
    "theia level": ("theia", lambda place: edit(one(place, "*_ALL.xml"), ">L2A<", ">L3A<"), r"is of level L3A; L2A"),
    "theia grid": ("theia", lambda place: _rewrite(one(place, "*_FRE_B5.tif"), _shorten), r"_FRE_B5.tif has another grid"),
    "theia place": ("theia", lambda place: edit(one(place, "*_ALL.xml"), "399960", "499960"), r"says ULX 499960"),
    "theia angles": (
        "theia",
        lambda place: edit(one(place, "*_ALL.xml"), "Sun_Angles_Grids", "Other"),
        r"_MTD_ALL.xml has no grid of sun angles",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_product_is_whole_or_refused_in_one_sentence(copied: Callable[[str], Path], how: str) -> None:
    kind, spoil, expected = SPOILT[how]
    place = copied(kind)
    spoil(place)
    said = refused(".", place.parent)
    assert re.search(expected, said), said
    assert place.stem in said and "\n" not in said


def test_what_is_no_product_is_refused(tmp_path: Path) -> None:
    assert "nowhere does not exist; a folder or a list of SAFE or Theia" in refused("nowhere", tmp_path)
    assert "has none of SAFE or Theia products" in refused(".", tmp_path)
    (tmp_path / "sheet.zip").write_bytes(zip_folder_of(tmp_path / "sheet").read_bytes())
    assert re.search(r"sheet.zip is none of SAFE or Theia", refused("sheet.zip", tmp_path))


def zip_folder_of(folder: Path) -> Path:
    """An archive of something else."""
    folder.mkdir()
    (folder / "sheet.xml").write_text("<a/>")
    return zip_folder(folder)


def test_names_of_an_archive_count_from_what_holds_all(copied: Callable[[str], Path]) -> None:
    place = copied("safe")
    names = open_package(place).names
    assert open_package(zip_folder(place)).names == names


@pytest.fixture
def geotiffs(tmp_path: Path) -> Path:
    """Dated images of 10 bands, one with a mask."""
    profile = {"driver": "GTiff", "crs": GRID.crs, "transform": GRID.transform, "height": ROWS, "width": COLUMNS}
    for day in ("20230616", "20240616"):
        with rasterio.open(
            tmp_path / f"S2B_{day}_31TDL.tif", "w", count=10, dtype="int16", nodata=NODATA, **profile
        ) as raster:
            raster.write(image())
    codes = np.array([0, 16, 6, 255], np.uint8)[states()]
    with rasterio.open(tmp_path / "S2B_20230616_31TDL_mask.tif", "w", count=1, dtype="uint8", **profile) as raster:
        raster.write(codes, 1)
    (tmp_path / "angles.csv").write_text(
        "image_name,sun_zenith,sun_azimuth,view_zenith,view_azimuth\nS2B_20230616_31TDL,30,150,5,100\n"
    )
    return tmp_path


def test_dated_geotiffs_are_products_as_well(geotiffs: Path) -> None:
    first, second = find_products(".", geotiffs)
    assert (first.date, first.tile, first.sensor, first.grid) == (DAY, "31TDL", "SENTINEL2B", GRID)
    assert np.array_equal(first.read(WHOLE), image()) and np.array_equal(first.states(WHOLE), states())
    assert first.masked and not second.masked
    assert np.unique(second.states(WHOLE)).tolist() == [CLEAR, MISSING]
    points = np.zeros((2, 2))
    assert first.angles(points, GRID.crs).tolist() == [[30, 150, 5, 100]] * 2
    assert np.isnan(second.angles(points, GRID.crs)).all()
    assert find_products(".", geotiffs, [2024]) == [second]
