"""How sure the results of models that know the plot are: seeds, folds drawn anew, coverage, permuted plots, differences.

python -m benchmarks.plot_models data/dataset.xlsx predictions.csv      computes and keeps test predictions; minutes
python -m benchmarks.plot_models --report predictions.csv               the tables of docs/results.md

Ridge and the additive Gaussian process, three study variables, by plot and by observatory. A row of the file is a test row
of one setting; what is there already is not computed again.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from datasets.model_inputs import standardise
from datasets.published_grassland import STUDY_VARIABLES
from datasets.series_table import SPLIT_PROCEDURES, Samples, prepare, read_table, split
from models import ESTIMATORS
from models.additive_gaussian_process import AdditiveGaussianProcess
from utils.metrics import coverage, r2_difference, score

MODELS = ("Ridge", "AdditiveGaussianProcess")
SETTING = ["study_var", "split_procedure", "seed", "fold_seed", "permuted", "model"]
PUBLISHED = -1  # as fold_seed, the published grouping
SEEDS, FOLD_SEEDS, PERMUTATIONS = (42, 1, 2, 3, 4, 5), range(10), (1, 2, 3)
BY_PLOT, BY_OBSERVATORY = SPLIT_PROCEDURES[:2]


def settings() -> list[tuple[str, str, int, int, int, str]]:
    """The most telling first: (study_var, split_procedure, seed, fold_seed, permuted, model)."""
    first = itertools.product(STUDY_VARIABLES, (BY_PLOT, BY_OBSERVATORY), SEEDS[:1], [PUBLISHED], [0], MODELS)
    drawn = itertools.product(STUDY_VARIABLES, [BY_PLOT], SEEDS[:1], FOLD_SEEDS, [0], MODELS)
    permuted = itertools.product(STUDY_VARIABLES, [BY_PLOT], SEEDS[:1], [PUBLISHED], PERMUTATIONS, MODELS)
    seeds = [
        itertools.product(STUDY_VARIABLES, [procedure], SEEDS[1:], [PUBLISHED], [0], MODELS)
        for procedure in (BY_PLOT, BY_OBSERVATORY)
    ]
    return [*first, *permuted, *drawn, *seeds[0], *seeds[1]]


def permute_plots(samples: Samples, seed: int) -> Samples:
    """Every plot with the mean target of another one, and its years with one another's deviations from its own mean.

    What predictors and groups tell is gone; plots remain as different, and their years as alike, as they were.
    """
    plots, plot = np.unique(samples.keys["plot"], return_inverse=True)
    means = np.bincount(plot, samples.y) / np.bincount(plot)
    generator = np.random.default_rng(seed)
    y = means[generator.permutation(len(plots))][plot]
    by_plot, shuffled = np.argsort(plot, kind="stable"), np.lexsort((generator.random(len(plot)), plot))
    y[by_plot] += (samples.y - means[plot])[shuffled]
    return samples._replace(y=y)


def predictions_of(samples: Samples, procedure: str, seed: int, fold_seed: int, model: str) -> Iterator[pd.DataFrame]:
    """Test rows of each fold."""
    folds = split(samples, procedure, seed, fold_seed=None if fold_seed == PUBLISHED else fold_seed)
    for number, ids in enumerate(folds, start=1):
        inputs, rows = standardise(samples, ids.train), np.concatenate([ids.train, ids.validation])
        estimator = ESTIMATORS[model](seed=seed).fit(inputs.of_rows(rows), samples.y[rows].astype(np.float32))
        test = inputs.of_rows(ids.test)
        results: dict[str, Any] = {"fold": number, "observed": samples.y[ids.test], "predicted": estimator.predict(test)}
        if isinstance(estimator, AdditiveGaussianProcess):
            results["predicted_sd"] = estimator.predict_distribution(test)[1]
        yield samples.keys.iloc[ids.test].assign(**results)


def compute(dataset: Path, output: Path) -> None:
    """Append what the file does not have yet."""
    table = read_table(dataset)
    samples = {name: prepare(table, name) for name in STUDY_VARIABLES}
    done = (
        set(pd.read_csv(output)[SETTING].drop_duplicates().itertuples(index=False, name=None)) if output.exists() else set()
    )
    for setting in tqdm([one for one in settings() if one not in done], unit="setting"):
        study_var, procedure, seed, fold_seed, permuted, model = setting
        own = permute_plots(samples[study_var], permuted) if permuted else samples[study_var]
        rows = pd.concat(predictions_of(own, procedure, seed, fold_seed, model))
        columns = [*SETTING, "key", "plot", "region", "year", "fold", "observed", "predicted", "predicted_sd"]
        rows = rows.assign(**dict(zip(SETTING, setting, strict=True))).reindex(columns=columns)
        rows.to_csv(output, mode="a", header=not output.exists(), index=False, float_format="%.9g")


def r2_of(rows: pd.DataFrame) -> float:
    """Mean over folds."""
    folds = rows.groupby("fold")
    return float(np.mean([score(one["observed"].to_numpy(), one["predicted"].to_numpy()).r2 for _, one in folds]))


def report(predictions: pd.DataFrame) -> None:
    """Print r2 of all settings, the coverage of the intervals, and the differences between the two models."""
    found = predictions.groupby(SETTING, sort=False)
    r2 = found[predictions.columns.tolist()].apply(r2_of).unstack("model")
    print(r2.round(3).to_string())
    for setting, rows in predictions[predictions["predicted_sd"].notna()].groupby(SETTING[:2], sort=False):
        own = rows[(rows["seed"] == SEEDS[0]) & (rows["fold_seed"] == PUBLISHED) & (rows["permuted"] == 0)]
        covered = coverage(*(own[name].to_numpy() for name in ("observed", "predicted", "predicted_sd")))
        print(f"{' '.join(map(str, setting))}: 90 % intervals cover {covered:.3f}")
    plain = predictions[(predictions["fold_seed"] == PUBLISHED) & (predictions["permuted"] == 0)]
    for setting, rows in plain.groupby(SETTING[:3], sort=False):
        wide = rows.pivot(index=["key", "plot", "fold", "observed"], columns="model", values="predicted").reset_index()
        if not {*MODELS} <= {*wide.columns}:
            continue  # not computed yet
        one, other = (wide[name].to_numpy() for name in reversed(MODELS))
        keys = (wide[name].to_numpy() for name in ("plot", "fold"))
        difference = r2_difference(wide["observed"].to_numpy(), one, other, *keys, seed=SEEDS[0])
        said = f"{difference.mean:+.3f} (95 %: {difference.lower:+.3f} to {difference.upper:+.3f})"
        print(f"{' '.join(map(str, setting))}: r2 of {MODELS[1]} less that of {MODELS[0]}: {said}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="the real table, to compute")
    parser.add_argument("predictions", type=Path, help="file of predictions")
    parser.add_argument("--report", action="store_true", help="print the tables")
    arguments = parser.parse_args()
    if arguments.dataset:
        compute(arguments.dataset, arguments.predictions)
    if arguments.report:
        report(pd.read_csv(arguments.predictions))
