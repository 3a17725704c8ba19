"""Operation predict on tables: what it leaves, from the run's folder alone, and how it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Ended
from own_table import OWN, RESULTS, SHORT, own_rows, run_in
from PIL import Image

import main
from datasets.finished_run import read_trained, rows_like
from datasets.series_table import read_table
from models.saved import load_folds, permutation_importance, predict_fold
from utils.metrics import score
from utils.runs import CHECKPOINT


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of each model on the same own table, whose file lies beside it."""
    folder = tmp_path_factory.mktemp("runs")
    own_rows(1).to_csv(folder / "own.csv", index=False)

    def run(model: str) -> Path:
        if not (folder / model).exists():
            members = 1 if model in ("Ridge", "GaussianProcess") else 2
            flags = (f"dataset={folder / 'own.csv'}", f"model={model}", f"ensemble_count={members}", *OWN, *SHORT)
            run_in(folder / model, main, *flags)
        return folder / model

    return run


@pytest.mark.parametrize("model", ["MLP", "FCN", "Ridge", "GaussianProcess", "Rocket"])
def test_each_row_with_its_own_folds_models_gives_back_the_runs_predictions(runs: Callable[[str], Path], model: str) -> None:
    folder = runs(model)
    own = read_table(folder.parent / "own.csv")
    trained = read_trained(folder)
    rows = rows_like(own, trained, [])
    predictions = pd.read_csv(folder / "predictions.csv").set_index("key")
    assert len(predictions) == len(rows.x) == 80
    again = []
    for number, fold in enumerate(load_folds(folder, torch.device("cpu")), start=1):
        chosen = np.isin(rows.keys["key"], predictions.index[predictions["fold"] == number])
        covariates = {name: values[chosen] for name, values in rows.covariates.items()}
        members = predict_fold(fold, rows.x[chosen], covariates)
        columns = {"predicted": members.mean(0), "predicted_sd": members.std(0)}
        again.append(pd.DataFrame(columns, index=rows.keys["key"][chosen]))
    # The members' spread is a difference of like numbers.
    for name, tolerance in (("predicted", 1e-6), ("predicted_sd", 1e-3)):
        expected = predictions[name].sort_index()
        np.testing.assert_allclose(pd.concat(again)[name].sort_index(), expected, rtol=tolerance, atol=1e-5)
    # What is kept of the samples is what the table has, in the order of predictions.csv.
    order = [list(rows.keys["key"]).index(key) for key in predictions.index]
    np.testing.assert_array_equal(trained.x, rows.x[order].astype(np.float32))
    for name, values in rows.covariates.items():
        assert (trained.covariates[name] == values[order]).all()


@pytest.mark.plots
def test_a_table_with_observations_gets_predictions_figures_and_a_picture(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    new = own_rows(2)
    new.loc[3, "ndvi_2"] = np.nan
    new.loc[5, "biomass"] = np.nan
    new.loc[7, "B8A_1":"B8A_5"] = 30.0  # unlike any sample
    new["cloud"] = "no"
    new.sample(frac=1, axis=1, random_state=1).to_csv(tmp_path / "new.csv", index=False)
    done = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}")
    assert done.returncode == 0, done.stderr
    assert "[*] Run: Ridge, Ridge of biomass, 3 folds x 1 member, trained on own.csv, 40 plots" in done.stdout
    assert "new.csv, 79 rows, 78 with an observation, 1 dropped for a missing predictor or covariate" in done.stdout
    assert "weighted by importance: B02 " in done.stdout and "are samples of the run" not in done.stdout
    folder = tmp_path / "predict"
    predictions = pd.read_csv(folder / "predictions.csv")
    assert [*predictions] == ["key", "plot", "observed", *RESULTS]
    assert set(predictions["key"]) == {*range(2, 82)} - {5}
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "predictions.parquet"), predictions, check_dtype=False)
    rows = predictions.set_index("key")
    assert (rows["lower"] < rows["mean"]).all() and (rows["mean"] < rows["upper"]).all() and (rows["spread"] > 0).all()
    assert rows["inside"].mean() > 0.5
    threshold = json.loads((folder / "metrics.json").read_text())["area_of_applicability"]["threshold"]
    assert ((rows["dissimilarity"] <= threshold) == rows["inside"]).all()
    known = rows.dropna()
    assert len(known) == 78
    summary = json.loads((folder / "metrics.json").read_text())["summary"]
    for name, value in score(known["observed"].to_numpy(), known["mean"].to_numpy())._asdict().items():
        assert summary[name] == pytest.approx(value, rel=1e-6)
        assert f"[*] {name.upper()}: {value:.4f}\n" in done.stdout
    assert summary["coverage"] == pytest.approx(known["observed"].between(known["lower"], known["upper"]).mean())
    with Image.open(folder / "scatter.png") as picture:
        assert picture.width > 500
    assert not list(folder.rglob("*partial*"))

    again = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}")
    assert again.returncode == 0 and "This run is complete" in again.stdout
    other = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}", "level=0.5")
    assert other.returncode == 2 and "of a run with level=0.9, but level=0.5 was given" in other.stderr


def test_unknown_targets_keys_and_plots_are_no_hindrance(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    own_rows(2).drop(columns=["biomass", "site"]).to_parquet(tmp_path / "new.parquet")
    done = run_predict(f"run={runs('MLP')}", f"input={tmp_path / 'new.parquet'}")
    assert done.returncode == 0, done.stderr
    assert "80 rows, no observations" in done.stdout and "R2" not in done.stdout
    assert [*pd.read_csv("predictions.csv")] == ["key", *RESULTS] and not Path("scatter.png").exists()


def test_rows_that_the_run_was_trained_on_are_told(runs: Callable[[str], Path], run_predict: Callable[..., Ended]) -> None:
    done = run_predict(f"run={runs('Ridge')}", f"input={runs('Ridge').parent / 'own.csv'}")
    assert "80 rows with an observation are samples of the run: some of its models were trained on them" in done.stdout
    assert (pd.read_csv("predictions.csv")["dissimilarity"] == 0).all()


def test_importance_finds_what_the_target_depends_on(runs: Callable[[str], Path]) -> None:
    trained = read_trained(runs("Ridge"))
    importance = permutation_importance(trained, load_folds(runs("Ridge"), torch.device("cpu")))
    assert list(importance) == ["B02", "B8A", "ndvi", "elevation", "use"]
    assert importance["B02"] > importance["elevation"] > 2 * max(importance["B8A"], importance["ndvi"]) >= 0


def test_without_flags_the_newest_run_is_applied_to_simulated_plots(
    run_predict: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    done = run_predict()
    assert done.returncode == 2 and "no finished run of main; `guild run main` makes one" in done.stderr
    run_in(tmp_path / "runs" / "abc", main, "dataset=demo", "model=Ridge")
    done = run_predict()
    assert done.returncode == 0, done.stderr
    assert (
        "[*] The rows are simulated, of other plots than those of dataset=demo" in done.stdout
        and "(simulated)" in done.stdout
    )
    summary = json.loads(Path("metrics.json").read_text())["summary"]
    assert summary["r2"] > 0.3 and 0.82 < summary["coverage"] < 0.98 and summary["inside"] > 0.8


def test_too_few_plots_for_the_level_are_told(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    own_rows(2).to_csv(tmp_path / "new.csv", index=False)
    done = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}", "level=0.99")
    assert done.returncode == 0, done.stderr
    assert "too few plots for an interval of that level" in done.stdout
    assert np.isinf(pd.read_csv("predictions.csv")[["lower", "upper"]]).all(axis=None)


def test_values_of_another_unit_are_told(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    new = own_rows(2)
    bands = [name for name in new if name[-2:-1] == "_"]
    new[bands] *= 10_000
    new.to_csv(tmp_path / "new.csv", index=False)
    done = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}")
    assert done.returncode == 0, done.stderr
    assert (
        "[*] Inside: 0.0000" in done.stdout and "in the unit of the run's table, where B02 lies between 0.0" in done.stdout
    )


def without_band(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=[f"ndvi_{step}" for step in range(1, 6)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_band, "has no numbers in ndvi_1, ndvi_2, ndvi_3, ndvi_4, ndvi_5, which the run was trained on"),
        (lambda rows: rows.drop(columns="use"), "has no column 'use', a covariate that the run was trained on"),
        (lambda rows: rows.assign(use="forest"), "covariate 'use': the run does not know 'forest', only fallow, hay"),
        (lambda rows: rows.astype({"B02_1": str}).replace({"B02_1": {rows.astype(str)["B02_1"][4]: "x"}}), "row 6, column"),
        (lambda rows: rows.assign(B02_1=np.nan), "has no numbers in B02_1"),
        (lambda rows: rows[:0], "has no numbers in B02_1"),
    ],
)
def test_tables_that_do_not_fit_the_run_are_refused(
    runs: Callable[[str], Path],
    run_predict: Callable[..., Ended],
    tmp_path: Path,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    said: str,
) -> None:
    change(own_rows(2)).to_csv(tmp_path / "new.csv", index=False)
    done = run_predict(f"run={runs('Ridge')}", f"input={tmp_path / 'new.csv'}")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "predict").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["input=absent.csv"], "absent.csv does not exist"),
        (["level=1"], "level: 1 is not a number above 0 and below 1"),
        ([], "the simulated rows have other columns than Ridge was trained on; input=... names a table or rasters"),
        (["run=absent"], "run=absent: a folder, or the id of one run"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], tmp_path: Path, flags: list[str], said: str
) -> None:
    done = run_predict(f"run={runs('Ridge')}", *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "predict").iterdir())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CHECKPOINT).touch(), "is no finished run of main"),
        (lambda folder: (folder / "metrics.json").unlink(), "is no finished run of main"),
        (lambda folder: (folder / "samples.safetensors").unlink(), "an earlier version of this project made it"),
        (lambda folder: (folder / "models" / "fold_2.safetensors").unlink(), "is not a file of weights"),
        (lambda folder: (folder / "models" / "fold_2.safetensors").write_bytes(b"x"), "is not a file of weights"),
        (lambda folder: (folder / "predictions.csv").write_text("key,plot\n"), "its files cannot be read"),
        (
            lambda folder: pd.read_csv(folder / "predictions.csv")[1:].to_csv(folder / "predictions.csv", index=False),
            "has 80 samples and predictions.csv 79 rows",
        ),
    ],
)
def test_runs_that_are_not_whole_are_refused(
    runs: Callable[[str], Path],
    run_predict: Callable[..., Ended],
    tmp_path: Path,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs("Ridge"), folder)
    damage(folder)
    done = run_predict(f"run={folder}", f"input={runs('Ridge').parent / 'own.csv'}")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_the_folder_of_another_run_is_not_written_into(
    runs: Callable[[str], Path], run_predict: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs("Ridge"))
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    done = run_predict(f"run={runs('Ridge')}", f"input={runs('Ridge').parent / 'own.csv'}")
    assert done.returncode == 2 and "exists and is of another run; start a new run in another folder" in done.stderr
    assert before == {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
