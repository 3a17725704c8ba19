"""Every architecture on tables of other shapes than the published one: training, resuming, the files of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Ended

import main
from models import ESTIMATORS, NETWORKS
from utils.errors import InputError
from utils.runs import CHECKPOINT, read_tensors

SHORT = ("epochs=3", "warmup_epochs=1", "folds=3")
SMALL = ("num_channels=8 8 8 8", "stem_channels=8", "num_filters=8", "num_kernels=40")
OWN = ("plot_column=site", "study_var=biomass_g_m2")
Shape = tuple[list[str], list[int], list[str]]
SHAPES: dict[str, Shape] = {
    "1 band x 23 steps": (["ndvi"], list(range(23)), ["region_column=country", "year_column=season"]),
    "4 bands x 36 steps": (["B02", "B03", "B8A", "SWIR_1"], list(range(1, 37)), ["covariates=elevation use"]),
    "12 bands x 1 step": ([f"b{number}" for number in range(12)], [5], ["kernel_size=1", "strides=1 1 1 1"]),
}


def write_table(path: Path, bands: list[str], steps: list[int]) -> None:
    """48 plots of two rows each, with a target that depends on the first band."""
    rng = np.random.default_rng(len(bands))
    rows = pd.DataFrame({f"{band}_{step}": rng.uniform(0, 1, 96) for band in bands for step in steps})
    rows["site"] = [f"site {number // 2}" for number in range(96)]
    rows["biomass_g_m2"] = 100 + 400 * rows[f"{bands[0]}_{steps[0]}"] + rng.normal(0, 20, 96)
    rows["country"], rows["season"] = ["DE", "FR", "ES"] * 32, [2020, 2021] * 48
    rows["elevation"], rows["use"] = rng.uniform(0, 900, 96), ["hay", "pasture", "fallow"] * 32
    rows.to_csv(path, index=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", [*NETWORKS, *ESTIMATORS])
def test_training_restart_and_files(
    run_main: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, shape: str
) -> None:
    bands, steps, flags = SHAPES[shape]
    write_table(tmp_path / "own.csv", bands, steps)
    flags = [f"dataset={tmp_path / 'own.csv'}", f"model={model}", *OWN, *SHORT, *SMALL, *flags]
    if model == "Rocket" and len(steps) == 1:
        done = run_main(*flags)
        assert done.returncode == 2 and "which takes at least 2 time steps" in done.stderr
        return

    def interrupted(*_: object) -> None:
        raise InputError("interrupted by the test")

    monkeypatch.setattr(main, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    place = "test_fold" if model in NETWORKS else "report_results"
    with monkeypatch.context() as patch:
        patch.setattr(main, place, interrupted)
        done = run_main(*flags)
    assert done.returncode == 2 and "interrupted by the test" in done.stderr and (tmp_path / CHECKPOINT).exists()
    done = run_main(*flags)
    assert done.returncode == 0, done.stderr
    assert "Resuming after epoch" in done.stdout and f"{len(bands)} band" in done.stdout

    predictions = pd.read_csv(tmp_path / "predictions.csv")
    further = ["year", "region"] if "region_column=country" in flags else []
    assert [*predictions] == ["key", "plot", *further, "fold", "observed", "predicted", "predicted_sd", "table"]
    assert sorted(predictions["key"]) == list(range(2, 98)) and np.isfinite(predictions["predicted"]).all()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["columns"]["bands"] == bands and metrics["columns"]["steps"] == steps
    assert np.isfinite(metrics["summary"]["rrmse_mean"]) and len(metrics["folds"]) == 3
    _, record = read_tensors(tmp_path / "models" / "fold_3.safetensors")
    assert record["bands"] == bands and record["steps"] == steps and record["study_var"] == "biomass_g_m2"
    assert len(record["predictor_mean"]) == len(bands) * len(steps)
    assert len(record["covariates"]) == (2 if "covariates" in str(flags) else 0)
    assert (tmp_path / "scatter.png").exists() and (tmp_path / "losses.png").exists() == (model in NETWORKS)


def test_what_was_read_and_where_the_results_are(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    write_table(tmp_path / "own.csv", ["ndvi"], [1, 2, 3])
    rows = pd.read_csv(tmp_path / "own.csv")
    rows.loc[3, "ndvi_2"] = -9999
    rows.to_csv(tmp_path / "own.csv", index=False)
    own = (f"dataset={tmp_path / 'own.csv'}", *OWN, "unit=g/m2", "model=Ridge")
    done = run_main(*own)
    assert done.returncode == 0, done.stderr
    assert (
        "[*] Table: own.csv, 96 rows used, 1 band (ndvi) x 3 steps (1 to 3), target biomass_g_m2, 48 plots, no "
        in done.stdout
    )
    assert "ignored columns: 4 (country, season, elevation, use)" in done.stdout
    assert (
        "beyond their band's or column's quartiles: ndvi 1 (such as -9999); they are used as they are, nodata="
        in done.stdout
    )
    assert f"[*] Results: {tmp_path} (metrics.json, models/, predictions.csv, scatter.png)" in done.stdout
    done = run_main(*own, "nodata=-9999,0")
    assert "dropped: missing value (1)" in done.stdout and "quartiles" not in done.stdout
    done = run_main(*own, "split_procedure=split_by_year", "year_column=season", "folds=9")
    assert "Fold 2/2 rows (tests 2021): train" in done.stdout and "Without effect on split_by_year: folds=9" in done.stdout


def test_the_targets_unit_changes_nothing_but_the_unit(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    write_table(tmp_path / "own.csv", ["ndvi"], [1, 2, 3])
    rows = pd.read_csv(tmp_path / "own.csv")
    predicted, losses = [], []
    for factor in (1, 1024):  # a power of two, so that nothing is rounded
        (rows.assign(biomass_g_m2=rows["biomass_g_m2"] * factor)).to_csv(tmp_path / "own.csv", index=False)
        done = run_main(f"dataset={tmp_path / 'own.csv'}", *OWN, *SHORT, "model=MLP", "ensemble_count=2")
        assert done.returncode == 0, done.stderr
        predicted.append(pd.read_csv(tmp_path / "predictions.csv")["predicted"] / factor)
        losses.append([float(line.split()[3]) / factor for line in done.stdout.splitlines() if "Val loss: " in line])
    np.testing.assert_allclose(predicted[0], predicted[1], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    _, record = read_tensors(tmp_path / "models" / "fold_1.safetensors")
    assert record["target_offset_and_factor"][0] == pytest.approx(1024 * rows["biomass_g_m2"].mean(), rel=0.1)
