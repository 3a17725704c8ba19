"""Reading, selecting and splitting the grassland table."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.grassland import (
    BANDS,
    FOLDS,
    PREDICTORS,
    SPLIT_PROCEDURES,
    STUDY_VARIABLES,
    Table,
    demo_table,
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
    for procedure, expected in zip(SPLIT_PROCEDURES, (by_plot, by_observatory), strict=True):
        digest = hashlib.sha256()
        for fold in split(samples, procedure, seed=42):
            for ids in fold:
                digest.update(ids.astype("<i8").tobytes())
        assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize("procedure", SPLIT_PROCEDURES)
@pytest.mark.parametrize("seed", [0, 42])
def test_no_plot_is_on_two_sides_of_a_fold(demo: Table, procedure: str, seed: int) -> None:
    samples = prepare(demo, "Shannon")
    folds = split(samples, procedure, seed)
    plots = samples.keys["ep"].to_numpy()
    for fold in folds:
        sides = [set(plots[ids]) for ids in fold]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert sorted(np.concatenate(fold)) == list(range(len(plots)))
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(plots)))


def test_the_seed_moves_the_validation_part_only(demo: Table) -> None:
    samples = prepare(demo, "Simpson")
    for one, other in zip(split(samples, "split_by_plot", 1), split(samples, "split_by_plot", 2), strict=True):
        assert np.array_equal(one.test, other.test)
        assert not np.array_equal(one.validation, other.validation)


def test_selection_counts_what_it_drops(demo: Table) -> None:
    rows = demo.rows.sample(frac=1, random_state=0)
    kept = rows["ep"] == "AEG01"
    rows.loc[kept & (rows["year"] == 2019), "red_7"] = np.nan
    samples = prepare(with_rows(demo, rows), "SpecRichness")
    assert list(samples.keys["yep"]) == sorted(samples.keys["yep"])
    assert samples.dropped["missing value"] == 2
    assert not set(samples.keys["ep"]) & {"AEG07", "HEG43"}
    assert "SEG08" not in set(samples.keys.query("year == 2018")["ep"])
    assert "SEG08" in set(samples.keys.query("year != 2018")["ep"])
    one = rows.set_index("yep").loc[samples.keys["yep"].iloc[3]]
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
    assert {"0", "49"} < set(samples.keys["yep"]) and "12" in set(samples.keys["explo"])
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
        (lambda rows: rows.drop(columns="nirb_4"), "has no column 'nirb_4'"),
        (lambda rows: rows.rename(columns={"yep": "key"}), "has no column 'yep'.* to \\w+$"),
        (lambda rows: rows.rename(columns={"red_3": " Red_3"}), "has no column 'red_3'.*; there is ' Red_3', which"),
        (lambda rows: rows.drop(columns=PREDICTORS[:7]), "has no column 'blue_0', .*'nirb_0' and 2 more; expected are"),
        (break_text, r"row 7 \(yep .*\), column 'nir_3': 'cloudy' is not a finite number"),
        (lambda rows: rows.assign(red_0=rows["red_0"].where(rows.index != 2, np.inf)), "row 4 .*'red_0': 'inf' is not"),
        (lambda rows: pd.concat([rows, rows.head(1)]), "yep .* appears more than once"),
        (lambda rows: rows.assign(year="in 2018"), "row 2 .*column 'year': 'in 2018' is not"),
        (lambda rows: rows.assign(year=rows["year"] + 0.5), r"row 2 .*column 'year': \d+\.5 is not a whole year"),
        (lambda rows: rows.assign(red_0=True), "row 2 .*column 'red_0': 'True' is not a finite number"),
        (lambda rows: rows.assign(red_0=rows["red_0"].where(rows.index != 2, 1e300)), "row 4 .* finite number of single"),
        (lambda rows: pd.concat([rows, rows["red_0"]], axis=1), "has the column 'red_0' more than once"),
    ],
)
def test_a_broken_table_is_refused_in_one_sentence(demo: Table, tmp_path: Path, broken: object, said: str) -> None:
    path = tmp_path / "broken.csv"
    broken(demo.rows.head(40)).to_csv(path, index=False)  # type: ignore[operator]
    with pytest.raises(InputError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_tables(demo: Table, tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match=r"line 16 has \d+ of 167 fields; the file may be truncated"):
        read_table(tmp_path / "cut.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "cut.parquet")
    with pytest.raises(InputError, match="is a folder; an"):
        read_table(tmp_path)
    demo.rows.head(20).to_csv(tmp_path / "wide.csv", encoding="utf-16", index=False)
    with pytest.raises(InputError, match=r"cannot be read as a \.csv table, UTF-8 is expected"):
        read_table(tmp_path / "wide.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="may be truncated or empty"):
        read_table(tmp_path / "empty.csv")


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_without_commas_is_named_as_such(demo: Table, tmp_path: Path, separator: str, name: str) -> None:
    path = tmp_path / "german.csv"
    demo.rows.head(5).to_csv(path, index=False, sep=separator, decimal=",")
    with pytest.raises(InputError, match=rf"german\.csv is separated by {name}; commas are expected"):
        read_table(path)


def test_splits_that_cannot_train_are_refused(demo: Table) -> None:
    few = demo.rows[demo.rows["ep"].isin(["AEG01", "AEG02", "HEG01"])]
    with pytest.raises(InputError, match=f"plots in the table: 3; split_by_plot needs at least {FOLDS}"):
        split(prepare(with_rows(demo, few), "Shannon"), "split_by_plot", 42)
    one = demo.rows[demo.rows["explo"] == "ALB"]
    with pytest.raises(InputError, match=r"one observatory \(ALB\)"):
        split(prepare(with_rows(demo, one), "Shannon"), "split_by_observatory", 42)
    constant = demo.rows.assign(Shannon=1.0)
    with pytest.raises(InputError, match=r"fold 1: training rows: \d+, different target values among them: 1;"):
        split(prepare(with_rows(demo, constant), "Shannon"), "split_by_plot", 42)
    with pytest.raises(InputError, match="no complete row for Shannon; nothing is in its column 'red_0'"):
        prepare(with_rows(demo, demo.rows.assign(red_0=np.nan)), "Shannon")
    tiny = demo.rows.drop_duplicates("ep").head(12)
    with pytest.raises(InputError, match="fold 1: test rows: 2; 3 are needed"):
        split(prepare(with_rows(demo, tiny), "Shannon"), "split_by_plot", 42)
    with pytest.raises(InputError, match=r"no column 'Simpson', .*; it has SpecRichness and Shannon$"):
        prepare(with_rows(demo, demo.rows.drop(columns="Simpson")), "Simpson")
    with pytest.raises(InputError, match=r"no column 'Simpson', .*; there is 'simpson '"):
        prepare(with_rows(demo, demo.rows.rename(columns={"Simpson": "simpson "})), "Simpson")


def test_predictor_columns_run_bands_fastest(demo: Table) -> None:
    assert [column for column in demo.rows.columns if column in set(PREDICTORS)] == PREDICTORS
    assert PREDICTORS[:11] == [*(f"{band}_0" for band in BANDS), "blue_1"]
    assert set(STUDY_VARIABLES) <= set(demo.rows.columns)
