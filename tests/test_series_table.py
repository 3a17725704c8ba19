"""Reading, selecting, splitting and standardising tables of series, the published one and others."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.model_inputs import channels, standardise
from datasets.published_grassland import BANDS, PREDICTORS, STUDY_VARIABLES
from datasets.series_table import (
    FOLDS,
    Samples,
    Table,
    demo_table,
    describe,
    prepare,
    read_table,
    split,
)
from utils.errors import InputError


@pytest.fixture(scope="module")
def demo() -> Table:
    return demo_table()


def with_rows(table: Table, rows: pd.DataFrame) -> Table:
    return table._replace(rows=rows)


@pytest.mark.parametrize(
    ("variable", "mean", "sd", "by_plot", "by_observatory"),
    [
        ("SpecRichness", 30.879, 10.608, "c608b7d9a50650f7", "6acd87b6d57ae8e2"),
        ("Shannon", 2.1216, 0.47824, "21abee2753d94192", "cd620d83145c1214"),
        ("Simpson", 0.81274, 0.10656, "21abee2753d94192", "cd620d83145c1214"),
    ],
)
def test_rows_and_splits_of_the_real_table(
    real_table: Path, variable: str, mean: float, sd: float, by_plot: str, by_observatory: str
) -> None:
    samples = prepare(read_table(real_table), variable)
    assert len(samples.y) == 497
    assert samples.y.mean() == pytest.approx(mean, rel=1e-4)
    assert samples.y.std(ddof=1) == pytest.approx(sd, rel=1e-4)
    for procedure, expected in (("split_by_plot", by_plot), ("split_by_observatory", by_observatory)):
        digest = hashlib.sha256()
        for fold in split(samples, procedure, seed=42):
            for ids in fold:
                digest.update(ids.astype("<i8").tobytes())
        assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize("procedure", ["split_by_plot", "split_by_observatory"])
@pytest.mark.parametrize("seed", [0, 42])
def test_no_plot_is_on_two_sides_of_a_fold(demo: Table, procedure: str, seed: int) -> None:
    samples = prepare(demo, "Shannon")
    folds = split(samples, procedure, seed)
    plots = samples.keys["plot"].to_numpy()
    for fold in folds:
        sides = [set(plots[ids]) for ids in fold]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert sorted(np.concatenate(fold)) == list(range(len(plots)))
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(plots)))


def test_the_seed_changes_only_the_validation_part(demo: Table) -> None:
    samples = prepare(demo, "Simpson")
    for one, other in zip(split(samples, "split_by_plot", 1), split(samples, "split_by_plot", 2), strict=True):
        assert np.array_equal(one.test, other.test)
        assert not np.array_equal(one.validation, other.validation)


def test_selection_counts_what_it_drops(demo: Table) -> None:
    rows = demo.rows.sample(frac=1, random_state=0)
    kept = rows["ep"] == "AEG01"
    rows.loc[kept & (rows["year"] == 2019), "red_7"] = np.nan
    samples = prepare(with_rows(demo, rows), "SpecRichness")
    assert list(samples.keys["key"]) == sorted(samples.keys["key"])
    assert samples.dropped["missing value"] == 2
    assert not set(samples.keys["plot"]) & {"AEG07", "HEG43"}
    assert "SEG08" not in set(samples.keys.query("year == 2018")["plot"])
    assert "SEG08" in set(samples.keys.query("year != 2018")["plot"])
    one = rows.set_index("yep").loc[samples.keys["key"].iloc[3]]
    assert samples.x[3, BANDS.index("swir1"), 11] == one["swir1_11"]
    assert len(samples.y) + sum(samples.dropped.values()) == len(rows)


@pytest.mark.parametrize("ending", [".xlsx", ".csv", ".parquet"])
def test_all_formats_give_the_same_rows(demo: Table, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"mine{ending}"
    rows = demo.rows.head(60)
    {".xlsx": rows.to_excel, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[ending](path, index=False)
    table = read_table(path)
    assert not table.simulated
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(prepare(table, "Shannon").x, prepare(with_rows(demo, rows), "Shannon").x)


def test_names_may_be_numbers_in_a_spreadsheet(demo: Table, tmp_path: Path) -> None:
    rows = demo.rows.head(300).astype({"yep": object, "ep": object, "explo": object, "year": object})
    rows.loc[rows.index[:50], ["ep", "explo"]] = 12
    rows.loc[rows.index[:50], "yep"] = range(50)
    rows.loc[rows["year"] == 2018, "year"] = "2018"
    rows.to_excel(tmp_path / "numbers.xlsx", index=False)
    samples = prepare(read_table(tmp_path / "numbers.xlsx"), "Shannon")
    assert {"0", "49"} < set(samples.keys["key"]) and "12" in set(samples.keys["region"])
    assert (
        samples.dropped["outlier of 2018"]
        == prepare(with_rows(demo, demo.rows.head(300)), "Shannon").dropped["outlier of 2018"]
    )
    assert len(split(samples, "split_by_plot", 42)) == FOLDS and len(split(samples, "split_by_observatory", 42)) >= 2


def break_text(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.astype({"nir_3": object}).replace({"nir_3": {rows["nir_3"].iloc[5]: "cloudy"}})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda rows: rows.drop(columns="nirb_4"), r"10 bands .* x 16 steps has holes: no column 'nirb_4'; bands="),
        (lambda rows: rows.rename(columns={"ep": "plot"}), r"no column 'ep', which gives the plot .*plot_column=none makes"),
        (lambda rows: rows.rename(columns={"red_3": " Red_3"}), "no column 'Red_0', .*; there is 'red_0', which differs"),
        (lambda rows: rows.drop(columns=PREDICTORS[:7]), r"steps has holes: no column 'blue_0', .*'nirb_0' and 2 more; "),
        (lambda rows: rows.drop(columns=PREDICTORS), r"has no predictors: numbers in columns <band>_<step>, such as B02_1"),
        (lambda rows: rows.assign(red_03=1.0), "the columns 'red_3' and 'red_03' are the same band and step"),
        (break_text, r"row 7 \(yep .*\), column 'nir_3': 'cloudy' is not a finite number"),
        (lambda rows: rows.assign(red_0=rows["red_0"].where(rows.index != 2, np.inf)), "row 4 .*'red_0': 'inf' is not"),
        (lambda rows: pd.concat([rows, rows.head(1)]), "row 42, column 'yep': .* appears more than once"),
        (lambda rows: rows.assign(year="in 2018"), "row 2 .*column 'year': 'in 2018' is not"),
        (lambda rows: rows.assign(year=rows["year"] + 0.5), r"row 2 .*column 'year': '\d+\.5' is not a whole year"),
        (lambda rows: rows.assign(red_0=True), "holes: no column 'red_0'; .*; 'red_0' has no numbers"),
        (lambda rows: rows.assign(red_0=rows["red_0"].where(rows.index != 2, 1e300)), "row 4 .* finite number of single"),
        (lambda rows: pd.concat([rows, rows["red_0"]], axis=1), "has the column 'red_0' more than once"),
    ],
)
def test_a_broken_table_is_refused_in_one_sentence(demo: Table, tmp_path: Path, broken: object, said: str) -> None:
    path = tmp_path / "broken.csv"
    broken(demo.rows.head(40)).to_csv(path, index=False)  # type: ignore[operator]
    with pytest.raises(InputError, match=said) as caught:
        prepare(read_table(path), "Shannon")
    assert path.name in str(caught.value)


def test_files_that_are_not_tables_are_refused(demo: Table, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_table(tmp_path / "absent.xlsx")
    (tmp_path / "table.txt").write_text("a")
    with pytest.raises(InputError, match=r"ending '.txt'"):
        read_table(tmp_path / "table.txt")
    (tmp_path / "text.xlsx").write_text("no zip file")
    with pytest.raises(InputError, match=r"cannot be read as a \.xlsx table"):
        read_table(tmp_path / "text.xlsx")
    whole = tmp_path / "whole.xlsx"
    demo.rows.head(20).to_excel(whole, index=False)
    (tmp_path / "cut.xlsx").write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(InputError, match="may be truncated or empty"):
        read_table(tmp_path / "cut.xlsx")
    with zipfile.ZipFile(tmp_path / "other.xlsx", "w") as archive:
        archive.writestr("readme", "a zip file, but no workbook")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "other.xlsx")
    (tmp_path / "old.xlsx").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600))  # .xls, or protected by a password
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "old.xlsx")
    content = bytearray(whole.read_bytes())
    with zipfile.ZipFile(whole) as archive:
        sheet = archive.getinfo("xl/worksheets/sheet1.xml").header_offset
    for seed in range(10):
        damaged = content.copy()
        start = sheet + 200 + int(np.random.default_rng(seed).integers(5000))
        damaged[start : start + 40] = bytes(40)
        (tmp_path / "damaged.xlsx").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            read_table(tmp_path / "damaged.xlsx")
    text = demo.rows.head(20).to_csv(index=False)
    (tmp_path / "cut.csv").write_text(text[: len(text) * 3 // 4])
    with pytest.raises(InputError, match=r"line 16 has \d+ of 167 fields, separated by commas; the file may"):
        read_table(tmp_path / "cut.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "cut.parquet")
    with pytest.raises(InputError, match="is a folder; an"):
        read_table(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="may be truncated or empty"):
        read_table(tmp_path / "empty.csv")


@pytest.mark.parametrize(
    ("ending", "separator", "decimal", "encoding"),
    [
        (".csv", ";", ",", "utf-8"),
        (".csv", ";", ",", "cp1252"),
        (".csv", ";", ".", "utf-8-sig"),
        (".csv", "\t", ",", "utf-16"),
        (".tsv", "\t", ".", "utf-8"),
    ],
)
def test_tables_of_other_spreadsheets_are_read(
    demo: Table, tmp_path: Path, ending: str, separator: str, decimal: str, encoding: str
) -> None:
    path = tmp_path / f"mine{ending}"
    rows = demo.rows.head(60).rename(columns={"ep": "Fläche"}).assign(Höhe=410.5)
    rows.to_csv(path, index=False, sep=separator, decimal=decimal, encoding=encoding)
    samples = prepare(read_table(path), "Shannon", plot_column="Fläche", covariates=["Höhe"])
    expected = prepare(with_rows(demo, demo.rows.head(60)), "Shannon")
    assert set(samples.keys["plot"]) >= set(expected.keys["plot"]) and (samples.covariates["Höhe"] == 410.5).all()
    one = samples.keys["key"].tolist().index(expected.keys["key"].iloc[0])
    np.testing.assert_array_equal(samples.x[one], expected.x[0])


def test_a_named_sheet_is_read(demo: Table, tmp_path: Path) -> None:
    path = tmp_path / "mine.xlsx"
    with pd.ExcelWriter(path) as workbook:
        pd.DataFrame({"note": ["no data"]}).to_excel(workbook, sheet_name="readme", index=False)
        demo.rows.head(30).to_excel(workbook, sheet_name="plots", index=False)
    table = read_table(tmp_path / "mine.xlsx#plots")
    assert table.name == "mine.xlsx#plots" and len(table.rows) == 30
    with pytest.raises(InputError, match="has no sheet 'absent'; it has readme, plots"):
        read_table(tmp_path / "mine.xlsx#absent")


def own_table(bands: tuple[str, ...] = ("B02", "B8A"), steps: tuple[int, ...] = (1, 2, 10), count: int = 40) -> Table:
    """A researcher's table: no year, region or key, columns in another order."""
    rng = np.random.default_rng(0)
    series = {f"{band}_{step}": rng.uniform(0, 1, count) for step in reversed(steps) for band in bands}
    first = {"site": [f"AEG{number % 20:02d}" for number in range(count)], "biomass_g_m2": rng.uniform(50, 900, count)}
    return Table(pd.DataFrame(first | series | {"note": "seen", "height": 1.5}), "own.csv", "", simulated=False)


def prepare_own(table: Table, **options: object) -> Samples:
    return prepare(table, "biomass_g_m2", plot_column="site", **options)  # type: ignore[arg-type]


def test_predictors_are_discovered_in_any_order() -> None:
    table = own_table()
    samples = prepare_own(table)
    assert samples.columns.bands == ("B02", "B8A") and samples.columns.steps == (1, 2, 10)
    assert samples.columns.ignored == ("note", "height") and samples.columns.year is None
    np.testing.assert_array_equal(samples.x[3, 1], table.rows.loc[3, ["B8A_1", "B8A_2", "B8A_10"]].to_numpy(np.float64))
    assert samples.keys["key"].tolist()[:2] == [2, 3] and list(samples.keys) == ["key", "plot"]
    # Nothing is dropped for a plot's name in a table that is not the published one.
    assert samples.dropped == {"missing value": 0} and "AEG07" in set(samples.keys["plot"])
    assert describe(table, samples) == (
        "own.csv, 40 rows used, 2 bands (B02, B8A) x 3 steps (1 to 2, 10), target biomass_g_m2, 20 plots, no years, "
        "no regions, dropped: missing value (0), ignored columns: 2 (note, height)"
    )


def test_band_names_with_underscores_and_other_numbered_columns() -> None:
    table = own_table(bands=("S2_B02", "VV"), steps=(-1, 0, 7))
    rows = table.rows.assign(biomass_2019=3.0, remark_1="text")
    samples = prepare_own(table._replace(rows=rows))
    assert samples.columns.bands == ("S2_B02", "VV") and samples.columns.steps == (-1, 0, 7)
    assert set(samples.columns.ignored) == {"note", "height", "biomass_2019", "remark_1"}
    assert prepare(table._replace(rows=rows), "biomass_2019", plot_column="site").y[0] == 3.0


def test_spaces_around_names_do_not_make_other_plots() -> None:
    table = own_table()
    table.rows.loc[3, "site"] += " "
    table.rows["use"] = ["hay", " hay"] * 20
    samples = prepare_own(table, covariates=["use"])
    assert samples.keys["plot"].nunique() == 20 and samples.covariates["use"].unique().tolist() == ["hay"]
    table.rows.loc[3, "site"] = "aeg03"
    with pytest.raises(InputError, match=r"column 'site': '\w+' and '\w+' differ only in capitals"):
        prepare_own(table)


def test_no_step_of_a_series_is_left_out_silently() -> None:
    table = own_table(bands=("ndvi",), steps=(0, 1, 2))
    for flags in ({"covariates": ["ndvi_1"]}, {}):
        with pytest.raises(InputError, match=r"=ndvi_1: it is one of the predictors, of the band 'ndvi'"):
            prepare(table, "biomass_g_m2" if flags else "ndvi_1", plot_column="site", **flags)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"column 'ndvi_1': it has no numbers, unlike the other"):
        prepare_own(table._replace(rows=table.rows.assign(ndvi_1="cloudy")))
    with pytest.raises(InputError, match=r"no complete row .*; its column 'ndvi_1' is empty"):
        prepare_own(table._replace(rows=table.rows.assign(ndvi_1=np.nan)))


def test_repeated_rows_and_missing_values_are_reported() -> None:
    table = own_table()
    rows = pd.concat([table.rows, table.rows.head(2)], ignore_index=True)
    rows.loc[5:7, "B02_1"] = np.nan
    samples = prepare_own(table._replace(rows=rows))
    assert samples.repeated == 2 and "missing value (3) in B02_1 3," in describe(table, samples)


def test_a_plot_in_two_regions_is_refused(demo: Table) -> None:
    rows = demo.rows.copy()
    rows.loc[0, "explo"] = "SCH"
    samples = prepare(with_rows(demo, rows), "Shannon")
    with pytest.raises(InputError, match="plot 'AEG01' lies in 2 regions; split_by_observatory would train and test on it"):
        split(samples, "split_by_observatory", 42)


def test_a_table_without_rows() -> None:
    table = own_table()
    with pytest.raises(InputError, match=r"own\.csv has no rows below its column names"):
        prepare_own(table._replace(rows=table.rows.head(0)))


def test_some_of_the_bands_and_steps_can_be_selected() -> None:
    table = own_table(bands=("B02", "B03", "B04"), steps=tuple(range(36)))
    samples = prepare_own(table, bands=["B04", "B02"], steps=range(3, 21))
    assert samples.columns.bands == ("B02", "B04") and samples.x.shape == (40, 2, 18)
    np.testing.assert_array_equal(samples.x[:, 1, 0], table.rows["B04_3"])
    holed = table._replace(rows=table.rows.drop(columns=["B03_7", "B04_30"]))
    with pytest.raises(InputError, match=r"3 bands .* x 36 steps has holes: no column 'B03_7', 'B04_30'; bands="):
        prepare_own(holed)
    assert prepare_own(holed, bands=["B02", "B03"], steps=range(8, 36)).x.shape == (40, 2, 28)


def test_each_row_can_be_a_plot() -> None:
    with pytest.raises(InputError, match=r"no column 'ep', .*; plot_column=... names .*\(columns with text: site, note\)"):
        prepare(own_table(), "biomass_g_m2")
    samples = prepare(own_table(), "biomass_g_m2", plot_column="none")
    assert samples.keys["plot"].nunique() == 40 and "each row a plot" in describe(own_table(), samples)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"year_column": "jahr"}, "no column 'jahr', which gives the year of a row; year_column=... names another"),
        ({"region_column": "Site"}, "no column 'Site', which gives the region of a row; there is 'site', which differs"),
        ({"covariates": ["slope"]}, "no column 'slope', named in covariates"),
        ({"covariates": ["biomass_g_m2"]}, "covariates=biomass_g_m2: the study variable cannot be an input, too"),
    ],
)
def test_absent_columns_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare_own(own_table(), **options)


def test_an_unknown_study_variable_is_answered_with_the_possible_ones() -> None:
    with pytest.raises(
        InputError, match=r"no column 'Shannon', the requested .*; columns with numbers .*: biomass_g_m2, height$"
    ):
        prepare(own_table(), "Shannon", plot_column="site")
    with pytest.raises(InputError, match=r"'seen' is not a number, as the .* must be; columns with"):
        prepare(own_table(), "note", plot_column="site")


def test_nodata_is_missing_and_outliers_are_reported() -> None:
    table = own_table()
    rows = table.rows
    rows.loc[:14, "B02_2"] = -9999.0
    rows.loc[20, "biomass_g_m2"] = -9999.0
    rows["slope"] = [*range(39), -9999]
    kept = prepare_own(table, covariates=["slope"])
    assert kept.far_off == {"B02": (15, -9999.0), "biomass_g_m2": (1, -9999.0), "slope": (1, -9999.0)} and len(kept.y) == 40
    samples = prepare_own(table, nodata=[-9999.0])
    assert samples.dropped == {"missing value": 16} and samples.far_off == {} and samples.x.min() >= 0


def test_the_bands_of_the_published_table_are_not_far_off(real_table: Path) -> None:
    assert prepare(read_table(real_table), "SpecRichness").far_off == {}


def test_covariates_are_scaled_and_coded_by_training_rows_alone() -> None:
    table = own_table()
    rows = table.rows.assign(elevation=np.arange(40.0), use=["hay"] * 20 + ["pasture"] * 15 + ["fallow"] * 5)
    samples = prepare_own(table._replace(rows=rows), covariates=["elevation", "use"])
    train = np.arange(30)
    inputs = standardise(samples, train)
    number, use = inputs.record["covariates"]
    assert number == {"name": "elevation", "mean": 14.5, "sd": pytest.approx(np.arange(30).std())}
    assert use["categories"] == ["fallow", "hay", "pasture"] and use["categories_in_training"] == ["hay", "pasture"]
    np.testing.assert_allclose(inputs.covariates[:, 0], (np.arange(40) - 14.5) / np.arange(30).std(), rtol=1e-6)
    assert inputs.covariates[:, 1].max() == 0 and inputs.covariates[[0, 25], 2:].tolist() == [[1, 0], [0, 1]]
    seen = channels(inputs)
    assert seen.shape == (40, 2 + 4, 3) and (np.ptp(seen[:, 2:], axis=2) == 0).all()
    assert inputs.record["value_range"]["B02"] == [samples.x[train, 0].min(), samples.x[train, 0].max()]


def test_folds_by_year_and_another_number_of_folds(demo: Table) -> None:
    samples = prepare(demo, "Shannon")
    years = samples.keys["year"].to_numpy()
    folds = split(samples, "split_by_year", 42)
    assert [set(years[fold.test]) for fold in folds] == [{2017}, {2018}, {2019}, {2020}]
    plots = samples.keys["plot"].to_numpy()
    for fold in folds:
        assert not set(years[fold.test]) & set(years[np.concatenate([fold.train, fold.validation])])
        assert not set(plots[fold.train]) & set(plots[fold.validation])
    assert len(split(samples, "split_by_plot", 42, folds=3)) == 3
    with pytest.raises(InputError, match=r"split_by_year needs the year of each row; year_column=\.\.\. names"):
        split(prepare_own(own_table()), "split_by_year", 42)


def test_splits_that_cannot_train_are_refused(demo: Table) -> None:
    few = demo.rows[demo.rows["ep"].isin(["AEG01", "AEG02", "HEG01"])]
    with pytest.raises(InputError, match=f"plots in the table: 3; split_by_plot with folds={FOLDS} needs at least {FOLDS}"):
        split(prepare(with_rows(demo, few), "Shannon"), "split_by_plot", 42)
    one = demo.rows[demo.rows["explo"] == "ALB"]
    with pytest.raises(InputError, match=r"one region \(ALB\); split_by_observatory needs at least 2"):
        split(prepare(with_rows(demo, one), "Shannon"), "split_by_observatory", 42)
    constant = demo.rows.assign(Shannon=1.0)
    with pytest.raises(InputError, match=r"fold 1: training rows: \d+, different target values among them: 1;"):
        split(prepare(with_rows(demo, constant), "Shannon"), "split_by_plot", 42)
    with pytest.raises(InputError, match=r"no complete row for Shannon .*; its column 'region' is empty"):
        prepare(with_rows(demo, demo.rows.assign(explo=None)), "Shannon")
    tiny = demo.rows.drop_duplicates("ep").head(12)
    with pytest.raises(InputError, match="fold 1: test rows: 2; 3 are needed"):
        split(prepare(with_rows(demo, tiny), "Shannon"), "split_by_plot", 42)
    with pytest.raises(InputError, match=r"no column 'Simpson', .*; columns with numbers .*: SpecRichness, Shannon$"):
        prepare(with_rows(demo, demo.rows.drop(columns="Simpson")), "Simpson")
    with pytest.raises(InputError, match=r"no column 'Simpson', .*; there is 'simpson'"):
        prepare(with_rows(demo, demo.rows.rename(columns={"Simpson": "simpson"})), "Simpson")


def test_predictor_columns_run_bands_fastest(demo: Table) -> None:
    assert [column for column in demo.rows.columns if column in set(PREDICTORS)] == PREDICTORS
    assert PREDICTORS[:11] == [*(f"{band}_0" for band in BANDS), "blue_1"]
    assert set(STUDY_VARIABLES) <= set(demo.rows.columns)
