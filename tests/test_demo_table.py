"""The simulated grassland table: its layout, its ranges, and that diversity can be predicted from the season."""

import re

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datasets.demo_table import OBSERVATORIES, simulate_table
from datasets.published_grassland import BANDS, STUDY_VARIABLES

SEEDS = (2024, 1)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The table of the default seed."""
    return simulate_table()


def ridge_r2(table: pd.DataFrame, target: NDArray[np.float64]) -> float:
    """Mean over five folds by plot of the squared correlation of ridge regression."""
    inputs = table.iloc[:, 7:].to_numpy()
    scores = []
    for train, test in GroupKFold(5).split(inputs, target, table["ep"]):
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 11))).fit(inputs[train], target[train])
        scores.append(np.corrcoef(model.predict(inputs[test]), target[test])[0, 1] ** 2)
    return float(np.mean(scores))


def test_columns_are_those_of_the_real_table(table: pd.DataFrame) -> None:
    """Keys, study variables, then predictors bands fastest."""
    bands = ["blue", "green", "red", "nir", "nirb", "re1", "re2", "re3", "swir1", "swir2"]
    predictors = [f"{band}_{step}" for step in range(16) for band in bands]
    keys = ["year", "ep", "yep", "explo", "SpecRichness", "Shannon", "Simpson"]
    assert list(table.columns) == keys + predictors
    assert table["year"].dtype == np.int64
    assert (table.dtypes.iloc[4:] == np.float64).all()


def test_rows_are_those_of_the_real_table(table: pd.DataFrame) -> None:
    """Plot-years by observatory and year, in the order year, observatory, plot."""
    assert len(table) == 563
    assert table["ep"].nunique() == 150
    counts = table.groupby(["explo", "year"]).size().unstack()
    assert counts.loc["ALB"].tolist() == [50, 47, 48, 50]
    assert counts.loc["HAI"].tolist() == [49, 46, 50, 50]
    assert counts.loc["SCH"].tolist() == [46, 42, 42, 43]
    pd.testing.assert_frame_equal(table, table.sort_values(["year", "explo", "ep"], ignore_index=True))


def test_keys_are_unique_and_agree(table: pd.DataFrame) -> None:
    """`yep` is the plot's number, the year and the observatory that the plot's prefix names."""
    assert table["yep"].is_unique
    assert table["yep"].iloc[0] == "012017ALB"
    for row in table[["year", "ep", "yep", "explo"]].itertuples():
        assert re.fullmatch(r"[AHS]EG(0[1-9]|[1-4]\d|50)", row.ep)
        assert row.explo == OBSERVATORIES[row.ep[:3]]
        assert row.yep == f"{row.ep[3:]}{row.year}{row.explo}"


def test_one_row_lacks_its_study_variables(table: pd.DataFrame) -> None:
    """One survey is missing as a whole; nothing else is."""
    missing = table.isna()
    assert missing.to_numpy().sum() == 3
    assert missing.loc[:, list(STUDY_VARIABLES)].all(axis=1).sum() == 1


def test_same_seed_same_table(table: pd.DataFrame) -> None:
    """The seed determines every number and which plots are missing."""
    pd.testing.assert_frame_equal(table, simulate_table(2024), check_exact=True)
    other = simulate_table(2025)
    assert not table["yep"].equals(other["yep"])
    assert not table["nir_0"].equals(other["nir_0"])


@pytest.mark.parametrize("seed", SEEDS)
def test_diversity_has_the_real_order_of_magnitude(seed: int) -> None:
    """Ranges, means, spreads and correlations of the study variables."""
    diversity = simulate_table(seed)[list(STUDY_VARIABLES)].dropna()
    richness, shannon, simpson = (diversity[name] for name in STUDY_VARIABLES)
    assert (richness == richness.round()).all()
    assert richness.between(10, 80).all()
    assert simpson.between(0.0, 1.0, inclusive="neither").all()
    assert (shannon > 0.0).all()
    assert (shannon <= np.log(richness)).all()
    assert richness.mean() == pytest.approx(32.0, abs=2.0)
    assert richness.std() == pytest.approx(11.0, abs=2.0)
    assert shannon.mean() == pytest.approx(2.14, abs=0.2)
    assert shannon.std() == pytest.approx(0.48, abs=0.1)
    assert simpson.mean() == pytest.approx(0.81, abs=0.03)
    assert simpson.std() == pytest.approx(0.10, abs=0.02)
    assert 0.85 < shannon.corr(simpson) < 0.97
    assert 0.4 < richness.corr(shannon) < 0.65


def test_reflectances_are_whole_and_plausible(table: pd.DataFrame) -> None:
    """Green vegetation: whole numbers, the near infrared high, red low, its neighbours in between."""
    series = table.iloc[:, 7:].to_numpy().reshape(len(table), 16, len(BANDS))
    assert (series == np.rint(series)).all()
    assert series.min() > 0
    assert series.max() < 10_000
    mean = dict(zip(BANDS, series.mean(axis=(0, 1)), strict=True))
    assert mean["blue"] < mean["red"] < mean["re1"] < mean["re2"] < mean["re3"] < mean["nir"]
    assert mean["swir2"] < mean["swir1"] < mean["nir"]
    correlation = np.corrcoef(series.reshape(-1, len(BANDS)).T)
    assert correlation[BANDS.index("nir"), BANDS.index("nirb")] > 0.95
    assert correlation[BANDS.index("red"), BANDS.index("nir")] < -0.4


def test_series_are_smooth_and_seasonal(table: pd.DataFrame) -> None:
    """Greenness peaks in spring, is correlated from step to step and suffers in the summer drought of 2018."""
    steps = range(16)
    red = table[[f"red_{step}" for step in steps]].to_numpy()
    nir = table[[f"nir_{step}" for step in steps]].to_numpy()
    ndvi = (nir - red) / (nir + red)
    assert 2 <= ndvi.mean(axis=0).argmax() <= 6
    assert np.mean([np.corrcoef(ndvi[:, step], ndvi[:, step + 1])[0, 1] for step in range(15)]) > 0.7
    summer = pd.Series(ndvi[:, 10:].mean(axis=1)).groupby(table["year"]).mean()
    assert summer.idxmin() == 2018


@pytest.mark.parametrize("name", STUDY_VARIABLES)
@pytest.mark.parametrize("seed", SEEDS)
def test_ridge_by_plot_explains_part_of_diversity(seed: int, name: str) -> None:
    """A linear model explains much of every study variable on unseen plots, but not all of it."""
    complete = simulate_table(seed).dropna()
    assert 0.4 < ridge_r2(complete, complete[name].to_numpy()) < 0.75


@pytest.mark.parametrize("name", STUDY_VARIABLES)
def test_permuted_target_is_not_predictable(table: pd.DataFrame, name: str) -> None:
    """The score comes from the shape of the season: without it there is none."""
    complete = table.dropna()
    shuffled = np.random.default_rng(0).permutation(complete[name].to_numpy())
    assert ridge_r2(complete, shuffled) < 0.05
