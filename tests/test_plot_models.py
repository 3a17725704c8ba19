"""Models that know a row's plot: the additive Gaussian process, folds drawn by a seed, and that no test target leaks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Ended
from own_table import run_in
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

import export
import main
from benchmarks.plot_models import permute_plots, predictions_of, r2_of
from datasets.finished_run import read_trained, rows_like
from datasets.model_inputs import Inputs, channel_count, channels, standardise
from datasets.plot_context import context_of, mean_over_plots, names_of_groups, rows_of_plots
from datasets.series_table import Samples, demo_table, prepare, read_table, split
from models.additive_gaussian_process import GROUPS, SERIES, AdditiveGaussianProcess
from models.plot_ensemble import Blend
from models.saved import load_folds, predict_fold, predictive_sd
from utils.errors import InputError
from utils.metrics import coverage

OWN = ("plot_column=site", "study_var=biomass", "folds=3")
ADDITIVE = ("model=AdditiveGaussianProcess", *OWN)


def plots_over_years(seed: int, plots: int = 30, years: int = 3) -> pd.DataFrame:
    """Plots whose mean series tells half of their biomass, and whose region, year and name tell a part of the rest."""
    rng = np.random.default_rng(seed)
    count = plots * years
    plot, year = np.repeat(np.arange(plots), years), np.tile(np.arange(years), plots)
    kind = rng.normal(0, 1, plots)
    rows = pd.DataFrame({f"{band}_{step}": rng.normal(0, 0.4, count) for band in ("B02", "B8A") for step in range(4)})
    for name in rows:
        rows[name] += kind[plot] * (1 if name.startswith("B02") else -1)
    rows["site"], rows["year"] = [f"site {number}" for number in plot], 2017 + year
    rows["explo"] = np.array(["north", "south", "west"])[plot % 3]
    effects = 10 * kind[plot] + 4 * rng.normal(0, 1, plots)[plot] + 4 * (plot % 3) + 3 * year
    rows["biomass"] = 100 + effects + rng.normal(0, 3, count)
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the additive process; its table lies beside it."""
    folder = tmp_path_factory.mktemp("additive")
    plots_over_years(1).to_csv(folder / "own.csv", index=False)
    run_in(folder / "run", main, f"dataset={folder / 'own.csv'}", *ADDITIVE)
    return folder / "run"


def grassland() -> Samples:
    return prepare(demo_table(), "SpecRichness")


def test_fold_seed_deals_whole_plots_anew_and_none_is_the_published_grouping() -> None:
    samples = grassland()
    plots = samples.keys["plot"].to_numpy()
    published = [fold.test for fold in split(samples, "split_by_plot", 42)]
    drawn = {seed: split(samples, "split_by_plot", 42, fold_seed=seed) for seed in (0, 1)}
    for folds in drawn.values():
        np.testing.assert_array_equal(np.sort(np.concatenate([fold.test for fold in folds])), np.arange(len(plots)))
        for fold in folds:
            sides = [set(plots[ids]) for ids in fold]
            assert sum(map(len, sides)) == len(set(plots)) and 27 <= len(sides[2]) <= 28
    tests = [[fold.test for fold in folds] for folds in drawn.values()]
    for one, other in ((published, tests[0]), (published, tests[1]), (tests[0], tests[1])):
        assert not np.array_equal(np.concatenate(one), np.concatenate(other))
    again = split(samples, "split_by_plot", 42, fold_seed=1)
    assert all(
        np.array_equal(a, b) for fold, same in zip(drawn[1], again, strict=True) for a, b in zip(fold, same, strict=True)
    )


def test_fold_seed_is_a_flag_and_says_where_it_has_no_effect(run_main: Callable[..., Ended], finished: Path) -> None:
    own = (f"dataset={finished.parent / 'own.csv'}", "model=Ridge", *OWN)
    done = run_main(*own, "fold_seed=3")
    assert done.returncode == 0 and json.loads(Path("metrics.json").read_text())["flags"]["fold_seed"] == 3
    done = run_main(*own, "fold_seed=3", "split_procedure=split_by_observatory")
    assert "Without effect on split_by_observatory: folds=3, fold_seed=3" in done.stdout
    done = run_main(*own, "fold_seed=some")
    assert done.returncode == 2 and "fold_seed: 'some' is not a whole number from 0 to" in done.stderr


def test_means_over_plots_are_over_named_plots() -> None:
    plots = np.array(["b", "a", "b", "", ""])
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [5.0, 50.0], [7.0, 70.0]])
    expected = [[2.5, 25.0], [2.0, 20.0], [2.5, 25.0], [5.0, 50.0], [7.0, 70.0]]
    np.testing.assert_allclose(mean_over_plots(values, plots), expected)
    np.testing.assert_array_equal(rows_of_plots(plots), [2, 1, 2, 1, 1])
    keys = pd.DataFrame({"key": [1, 2], "plot": ["a", np.nan], "year": ["2019.0", np.nan]})
    names = names_of_groups(keys)
    assert {role: list(every) for role, every in names.items()} == {"plot": ["a", ""], "year": ["2019", ""]}
    context = context_of(
        values[:2, :, None].astype(np.float32), np.empty((2, 0), np.float32), names, {"plot": ["a"], "region": ["x"]}
    )
    assert {role: list(found) for role, found in context.groups.items()} == {"plot": [0, -1], "region": [-1, -1]}


def test_one_term_is_scikit_learns_gaussian_process() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2, 3)).astype(np.float32), rng.normal(5, 3, 40).astype(np.float32)
    none = np.empty((40, 0), np.float32)
    process = AdditiveGaussianProcess(0).fit(Inputs(x[:30], none[:30], {}), y[:30])
    assert set(process.rows) == {"series"}
    values = {name: float(value) for name, value in process.parameters.items()}
    kernel = ConstantKernel(values["variance_series"]) * RBF(values["length_series"]) + WhiteKernel(values["variance_noise"])
    reference = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True)
    reference.fit(x[:30].transpose(0, 2, 1).reshape(30, -1), y[:30].astype(np.float64))
    mean, sd = reference.predict(x[30:].transpose(0, 2, 1).reshape(10, -1), return_std=True)
    found = process.predict_distribution(Inputs(x[30:], none[30:], {}))
    np.testing.assert_allclose(found[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found[1], sd, rtol=1e-6)


def test_a_known_plot_is_shrunk_towards_the_mean_as_random_effects_are() -> None:
    """With a plot's effect and noise alone: n s2 / (n s2 + noise) of the mean of its n targets, and that variance."""
    tensors = {
        "variance_series": np.array([1e-12]),
        "length_series": np.array([1.0]),
        "variance_plot": np.array([0.5]),
        "variance_noise": np.array([0.25]),
        "rows_series": np.zeros((5, 2)),
        "rows_plot": np.array([[0], [0], [0], [1], [1]]),
        "targets": np.array([1.0, 2.0, 3.0, -1.0, -2.0]),
        "target_mean_and_scale": np.array([10.0, 2.0]),
    }
    process = AdditiveGaussianProcess.from_tensors(tensors)
    x, none = np.zeros((3, 1, 2), np.float32), np.empty((3, 0), np.float32)
    context = context_of(x, none, {"plot": np.array(["a", "b", "new"])}, {"plot": ["a", "b"]})
    mean, sd = process.predict_distribution(Inputs(x, none, {}, context))
    np.testing.assert_allclose(mean, [10 + 2 * 2 * 1.5 / 1.75, 10 - 2 * 1.5 * 1 / 1.25, 10], rtol=1e-6)
    variances = [0.5 * 0.25 / 1.75 + 0.25, 0.5 * 0.25 / 1.25 + 0.25, 0.75]
    np.testing.assert_allclose(sd, 2 * np.sqrt(variances), rtol=1e-6)
    # Five rows, 3 and 2 to a plot: of a unit variance (5 - 13 / 5) / 4 shows among them.
    assert process.variances()["plot"] == pytest.approx(4 * 0.5 * (5 - 13 / 5) / 4)
    assert process.variances()["noise"] == pytest.approx(1)


@pytest.mark.plots
def test_a_run_has_distributions_and_says_what_explains_the_plots(finished: Path) -> None:
    predictions = pd.read_csv(finished / "predictions.csv")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (predictions["predicted_sd"] > 2).all() and (predictions["predicted_sd"] < 25).all()
    assert metrics["summary"]["r2_mean"] > 0.5 and metrics["summary"]["coverage_mean"] > 0.75
    for fold in metrics["folds"]:
        rows = predictions[predictions["fold"] == fold["fold"]]
        covered = coverage(*(rows[name].to_numpy() for name in ("observed", "predicted", "predicted_sd")))
        assert 0.5 < covered <= 1
        variances = fold["variances"]
        assert [*variances] == [*SERIES, *GROUPS, "noise"]
        assert variances["plot_mean"] == max(variances.values()) and variances["plot"] > 2 * variances["deviation"]
        assert 0.5 < sum(variances.values()) / predictions["observed"].var() < 2
    assert (finished / "terms.png").stat().st_size > 10_000 and (finished / "terms.pdf").exists()


def test_garbage_in_the_test_targets_changes_nothing_else(finished: Path, tmp_path: Path) -> None:
    before = pd.read_csv(finished / "predictions.csv").set_index("key")
    tested = before.index[before["fold"] == 1]
    rows = plots_over_years(1)
    rows.loc[tested - 2, "biomass"] = np.random.default_rng(0).uniform(-1e4, 1e4, len(tested))
    rows.to_csv(tmp_path / "garbage.csv", index=False)
    run_in(tmp_path / "run", main, f"dataset={tmp_path / 'garbage.csv'}", *ADDITIVE)
    after = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("key")
    assert (after["fold"] == before["fold"]).all()
    assert not np.allclose(after.loc[tested, "observed"], before.loc[tested, "observed"])
    for name in ("predicted", "predicted_sd"):
        np.testing.assert_array_equal(after.loc[tested, name], before.loc[tested, name])
    folds = [json.loads((folder / "metrics.json").read_text())["folds"][0] for folder in (finished, tmp_path / "run")]
    assert folds[0]["variances"] == folds[1]["variances"] and folds[0]["r2"] != folds[1]["r2"]


@pytest.mark.parametrize(
    ("flags", "left", "said"),
    [
        (
            ["plot_column=none"],
            {"series", "region", "year", "region_year"},
            "plot_mean, deviation, plot, for its training rows",
        ),
        (
            ["region_column=none", "year_column=none"],
            {*SERIES, "plot"},
            "region, region_year, for its training rows have no col",
        ),
    ],
)
def test_terms_without_their_column_are_left_out_and_told(
    run_main: Callable[..., Ended], tmp_path: Path, flags: list[str], left: set[str], said: str
) -> None:
    plots_over_years(1).to_csv(tmp_path / "own.csv", index=False)
    done = run_main(f"dataset={tmp_path / 'own.csv'}", *ADDITIVE, *flags)
    assert done.returncode == 0, done.stderr
    assert f"[*] Fold 1/3: without {said}" in done.stdout
    assert {*json.loads(Path("metrics.json").read_text())["folds"][0]["variances"]} == left | {"noise"}


def test_predict_gives_back_the_runs_predictions_for_its_own_table(finished: Path) -> None:
    trained = read_trained(finished)
    rows = rows_like(read_table(finished.parent / "own.csv"), trained, [])
    kept = pd.read_csv(finished / "predictions.csv").set_index("key")
    folds = load_folds(finished, torch.device("cpu"))
    for number, fold in enumerate(folds, start=1):
        chosen = np.isin(rows.keys["key"], kept.index[kept["fold"] == number])
        # The surroundings are those of the rows at hand, whole plots.
        own = {role: names[chosen] for role, names in rows.names.items()}
        predicted = predict_fold(fold, rows.x[chosen], {}, own)[0]
        expected = kept.loc[rows.keys["key"][chosen]]
        np.testing.assert_allclose(predicted, expected["predicted"], rtol=1e-6)
        sd = predictive_sd([fold], rows.x[chosen], {}, own)
        assert sd is not None
        np.testing.assert_allclose(sd, expected["predicted_sd"], rtol=1e-6)


def test_new_tables_are_predicted_and_what_they_lack_is_told(
    finished: Path, run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    new = plots_over_years(2)
    new["site"] = "new " + new["site"]
    new.loc[new["year"] == 2019, "year"] = 2024
    new = new.drop(index=[1, 2])  # leaves one row of the first plot
    new.to_csv(tmp_path / "new.csv", index=False)
    done = run_predict(f"run={finished}", f"input={tmp_path / 'new.csv'}")
    assert done.returncode == 0, done.stderr
    assert "Rows of plots with a single row: 1 of 88" in done.stdout
    assert "Rows of a year that the run does not know: 29 of 88" in done.stdout and "of a region" not in done.stdout
    predictions = pd.read_csv("predictions.csv")
    assert (predictions["predicted_sd"] >= predictions["spread"]).all()
    assert json.loads(Path("metrics.json").read_text())["summary"]["r2"] > 0.4


def test_maps_and_graphs_of_the_additive_process_are_refused(
    finished: Path, run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "stack.tif").touch()
    done = run_predict(f"run={finished}", f"input={tmp_path / 'stack.tif'}")
    assert done.returncode == 2 and "it predicts the rows of a table, not rasters" in done.stderr
    with pytest.raises(InputError, match="reads all rows of a plot at once and has no ONNX form here"):
        run_in(tmp_path / "export", export, f"run={finished}")


def test_more_rows_than_covariances_have_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.additive_gaussian_process.MOST_ROWS", 20)
    inputs = Inputs(np.zeros((21, 1, 2), np.float32), np.empty((21, 0), np.float32), {})
    with pytest.raises(InputError, match="fits at most 20 rows; there are 21 to train on"):
        AdditiveGaussianProcess(0).fit(inputs, np.arange(21.0))


def test_the_real_tables_floor(run_main: Callable[..., Ended], real_table: Path) -> None:
    done = run_main(f"dataset={real_table}", "model=AdditiveGaussianProcess")
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("metrics.json").read_text())["summary"]
    assert summary["r2_mean"] > 0.67 and 0.85 < summary["coverage_mean"] < 0.95


NETWORK = ("model=MLP", "epochs=2", "warmup_epochs=1", "plot_context=yes", *OWN)


@pytest.fixture(scope="module")
def network(finished: Path) -> Path:
    """The folder of a short run of a network that sees plots, on the same table."""
    run_in(finished.parent / "network", main, f"dataset={finished.parent / 'own.csv'}", *NETWORK)
    return finished.parent / "network"


def test_networks_see_the_plots_mean_series_and_its_region_and_year(finished: Path) -> None:
    samples = prepare(read_table(finished.parent / "own.csv"), "biomass", plot_column="site")
    train = np.flatnonzero(samples.keys["year"] != 2019)
    inputs = standardise(samples, train)
    x = channels(inputs, plot_context=True)
    assert x.shape[1] == channel_count(inputs.record, True) == 2 + 2 + 3 + 3
    np.testing.assert_array_equal(x[:, :2], inputs.x)
    for row, plot in ((0, [0, 1, 2]), (31, [30, 31, 32])):
        np.testing.assert_allclose(x[row, 2:4], inputs.x[plot].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(x[:, 4:7, 1], samples.keys["region"].to_numpy()[:, None] == ["north", "south", "west"])
    # 2019 is not in training: its channel is 0 throughout.
    np.testing.assert_array_equal(x[:, 7:, 0], samples.keys["year"].to_numpy()[:, None] == [2017, 2018, 0])
    assert channels(inputs).shape[1] == channel_count(inputs.record, False) == 2


def test_a_network_that_sees_plots_is_applied_to_tables_alone(
    network: Path, run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    trained = read_trained(network)
    rows = rows_like(read_table(network.parent / "own.csv"), trained, [])
    kept = pd.read_csv(network / "predictions.csv").set_index("key").sort_index()
    predicted = np.stack([predict_fold(one, rows.x, {}, rows.names)[0] for one in load_folds(network, torch.device("cpu"))])
    own = predicted[kept["fold"].to_numpy() - 1, np.arange(len(kept))]
    np.testing.assert_allclose(own, kept["predicted"], rtol=1e-5)
    (tmp_path / "stack.tif").touch()
    done = run_predict(f"run={network}", f"input={tmp_path / 'stack.tif'}")
    assert done.returncode == 2 and "it predicts the rows of a table, not rasters" in done.stderr
    with pytest.raises(InputError, match="has no ONNX form here"):
        run_in(tmp_path / "export", export, f"run={network}")


def test_plot_context_needs_something_to_see(run_main: Callable[..., Ended], finished: Path) -> None:
    nothing = ("plot_column=none", "year_column=none", "region_column=none")
    done = run_main(f"dataset={finished.parent / 'own.csv'}", *NETWORK, *nothing)
    assert done.returncode == 2 and "own.csv has neither plots with a name, nor regions, nor years" in done.stderr


def test_without_a_relation_to_the_targets_nothing_is_explained(finished: Path) -> None:
    samples = prepare(read_table(finished.parent / "own.csv"), "biomass", plot_column="site")
    permuted = permute_plots(samples, seed=1)
    np.testing.assert_allclose(np.sort(permuted.y.reshape(30, 3).mean(1)), np.sort(samples.y.reshape(30, 3).mean(1)))
    own, after = (np.sort(one.y.reshape(30, 3) - one.y.reshape(30, 3).mean(1, keepdims=True)) for one in (samples, permuted))
    np.testing.assert_allclose(after, own, atol=1e-9)  # the deviations of a plot, in another order
    rows = pd.concat(predictions_of(permuted, "split_by_plot", 42, -1, "AdditiveGaussianProcess"))
    assert r2_of(rows) < 0.2 < 0.4 < r2_of(pd.read_csv(finished / "predictions.csv"))


def test_the_ensembles_weight_is_the_best_on_the_validation_rows(finished: Path) -> None:
    samples = prepare(read_table(finished.parent / "own.csv"), "biomass", plot_column="site")
    ids = split(samples, "split_by_plot", 42, folds=3)[0]
    inputs = standardise(samples, ids.train)
    y = samples.y[ids.validation]
    assert Blend.fit(inputs, samples.y, ids, y).weight == 0  # networks without an error need no process
    assert Blend.fit(inputs, samples.y, ids, np.full(len(y), 1e6)).weight > 0.99
    trained = AdditiveGaussianProcess(0).fit(inputs.of_rows(ids.train), samples.y[ids.train])
    process = trained.predict(inputs.of_rows(ids.validation))
    networks = y + np.where(np.arange(len(y)) % 2 == 0, 1, -1) * np.abs(process - y)
    blend = Blend.fit(inputs, samples.y, ids, networks)
    errors = [float(((w * process + (1 - w) * networks - y) ** 2).sum()) for w in np.linspace(0, 1, 101)]
    assert blend.weight == pytest.approx(np.argmin(errors) / 100, abs=0.0051)
    again = Blend.from_tensors(blend.tensors())
    test = inputs.of_rows(ids.test)
    np.testing.assert_allclose(again.predict(test, np.zeros(30)), blend.predict(test, np.zeros(30)), rtol=1e-9)
    expected = blend.weight * blend.process.predict(test) + (1 - blend.weight) * 7
    np.testing.assert_allclose(blend.predict(test, np.full((2, 30), 7.0)), np.stack([expected] * 2))


def test_the_ensemble_runs_and_is_applied_like_any_model(finished: Path) -> None:
    small = ("num_channels=4 4 4 4", "stem_channels=4", "epochs=2", "warmup_epochs=1", "ensemble_count=2", *OWN)
    folder = finished.parent / "ensemble"
    run_in(folder, main, f"dataset={finished.parent / 'own.csv'}", "model=PlotEnsemble", *small)
    assert json.loads((folder / "metrics.json").read_text())["flags"]["plot_context"] is True
    kept = pd.read_csv(folder / "predictions.csv").set_index("key").sort_index()
    assert (kept["predicted_sd"] > 0).all() and np.corrcoef(kept["predicted"], kept["observed"])[0, 1] > 0.5
    rows = rows_like(read_table(finished.parent / "own.csv"), read_trained(folder), [])
    folds = load_folds(folder, torch.device("cpu"))
    predicted = np.stack([predict_fold(one, rows.x, {}, rows.names).mean(0) for one in folds])
    np.testing.assert_allclose(predicted[kept["fold"] - 1, np.arange(len(kept))], kept["predicted"], rtol=1e-5)
