"""Operation predict on rasters: the same as the table's, in whatever form they come, and how wrong ones are refused."""

import itertools
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import PROJECT, Ended, Runner
from numpy.typing import NDArray
from own_table import OWN, RESULTS, SHORT, own_rows, run_in
from PIL import Image
from rasterio import Affine
from rasterio.crs import CRS
from rio_cogeo.cogeo import cog_validate

import main
import predict
from models.applied import apply
from utils.errors import InputError

BANDS, STEPS = ("B02", "B8A", "ndvi"), range(1, 6)
HEIGHT, WIDTH = 40, 50
PROFILE = {
    "driver": "GTiff",
    "height": HEIGHT,
    "width": WIDTH,
    "dtype": "float32",
    "nodata": -1.0,
    "crs": CRS.from_epsg(32631),
}
PROFILE |= {"transform": Affine(10, 0, 500_000, 0, -10, 4_900_000)}
HOLE = (3, 7)  # row and column of a pixel without data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ridge on a table of 3 bands x 5 steps and two covariates."""
    folder = tmp_path_factory.mktemp("run")
    own_rows(1).to_csv(folder / "own.csv", index=False)
    run_in(folder / "ridge", main, f"dataset={folder / 'own.csv'}", "model=Ridge", *OWN, *SHORT)
    return folder / "ridge"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """A row for each pixel, all of the use hay."""
    rows = own_rows(2, plots=HEIGHT * WIDTH // 2).assign(use="hay").astype({"elevation": np.float32})
    predictors = [f"{band}_{step}" for band in BANDS for step in STEPS]
    return rows.drop(columns=["biomass", "site"]).astype(dict.fromkeys(predictors, np.float32))


def image(rows: pd.DataFrame, names: list[str]) -> NDArray[np.float32]:
    """(layer, row, column) of columns."""
    layers = rows[names].to_numpy(copy=True).T.reshape(len(names), HEIGHT, WIDTH)
    layers[0, *HOLE] = -1
    return layers


def write(path: Path, layers: NDArray[Any], descriptions: tuple[str, ...] = (), **profile: Any) -> Path:
    """A GeoTIFF of layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **{**PROFILE, "count": len(layers), **profile}) as raster:
        raster.write(layers)
        if descriptions:
            raster.descriptions = descriptions
    return path


def one_file_by_descriptions(folder: Path, rows: pd.DataFrame) -> str:
    names = [f"{band}_{step}" for band in reversed(BANDS) for step in reversed(STEPS)]
    layers = np.concatenate([image(rows, names), np.zeros((1, HEIGHT, WIDTH), np.float32)])
    # `B02_01` is the band and step of `B02_1`; a further layer is in nobody's way.
    return str(write(folder / "one.tif", layers, (*(name.replace("_", "_0") for name in names), "clouds")))


def one_file_in_order(folder: Path, rows: pd.DataFrame) -> str:
    names = [f"{band}_{step}" for step in STEPS for band in BANDS]
    return str(write(folder / "one.tif", image(rows, names), tiled=True, blockxsize=16, blockysize=16, compress="deflate"))


def folder_of_dates(folder: Path, rows: pd.DataFrame) -> str:
    for step, name in zip(STEPS, ("z_20240301", "y_2024-04-01", "x_20240501", "w_20240601", "v_2024_07_01"), strict=True):
        order = BANDS if step % 2 else BANDS[::-1]
        write(folder / "dated" / f"{name}.tif", image(rows, [f"{band}_{step}" for band in order]), order)
    (folder / "dated" / "notes.txt").touch()
    return str(folder / "dated")


def list_without_dates(folder: Path, rows: pd.DataFrame) -> str:
    names = dict(zip(STEPS, "edcba", strict=True))
    files = [write(folder / f"{names[step]}.tif", image(rows, [f"{band}_{step}" for band in BANDS])) for step in STEPS]
    return " ".join(map(str, files))


Form = Callable[[Path, pd.DataFrame], str]
FORMS: tuple[Form, ...] = (one_file_by_descriptions, one_file_in_order, folder_of_dates, list_without_dates)


def read_map(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as raster:
        return raster.read()


@pytest.fixture(scope="module")
def of_table(run_folder: Path, rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What predict says of the rows in a table."""
    folder = tmp_path_factory.mktemp("table")
    rows.to_parquet(folder / "rows.parquet")
    run_in(folder / "predict", predict, f"run={run_folder}", f"input={folder / 'rows.parquet'}")
    return pd.read_parquet(folder / "predict" / "predictions.parquet")


@pytest.mark.parametrize("form", FORMS)
def test_the_map_of_the_tables_rows_is_what_the_table_gives(
    run_folder: Path,
    rows: pd.DataFrame,
    of_table: pd.DataFrame,
    run_predict: Callable[..., Ended],
    tmp_path: Path,
    form: Form,
) -> None:
    elevation = write(tmp_path / "elevation.tif", rows["elevation"].to_numpy().reshape(1, HEIGHT, WIDTH))
    flags = ["window=16", "workers=1", f"covariates=elevation={elevation} use=hay"]
    done = run_predict(f"run={run_folder}", f"input={form(tmp_path, rows)}", *flags)
    assert done.returncode == 0, done.stderr
    expected = of_table[RESULTS].to_numpy().T.reshape(-1, HEIGHT, WIDTH)
    expected[:, *HOLE] = np.nan
    layers = read_map(tmp_path / "predict" / "map.tif")
    np.testing.assert_allclose(layers, expected, rtol=1e-5, atol=1e-5)
    how = "the layers' descriptions" if form in (one_file_by_descriptions, folder_of_dates) else "the order "
    assert f"[*] Rasters: {WIDTH} x {HEIGHT} pixels of 10, EPSG:32631. " in done.stdout and f"steps by {how}" in done.stdout
    if form is folder_of_dates:
        assert "5 rasters from 2024-03-01 to 2024-07-01, in the order of their dates" in done.stdout
    if form is list_without_dates:
        assert "in the order of the list" in done.stdout


@pytest.mark.plots
def test_a_map_explains_itself(
    run_folder: Path, rows: pd.DataFrame, run_predict: Callable[..., Ended], tmp_path: Path
) -> None:
    flags = ["workers=1", "covariates=elevation=400 use=hay"]
    done = run_predict(f"run={run_folder}", f"input={one_file_in_order(tmp_path, rows)}", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "predict"
    valid, errors, warnings = cog_validate(folder / "map.tif", strict=True)
    assert valid, (errors, warnings)
    layers = read_map(folder / "map.tif")
    with rasterio.open(folder / "map.tif") as raster:
        assert raster.descriptions == tuple(RESULTS) and raster.crs == PROFILE["crs"] and np.isnan(raster.nodata)
        assert raster.transform == PROFILE["transform"] and raster.dtypes == ("float32",) * 6
        assert raster.tags()["model"] == "Ridge" and raster.tags()["study_var"] == "biomass"
        assert len(raster.tags()["run_sha256"]) == 64
    summary = json.loads((folder / "metrics.json").read_text())["summary"]
    assert summary["pixels"] == HEIGHT * WIDTH - 1
    assert summary["inside"] == pytest.approx(np.nanmean(layers[5])) and summary["mean"] == pytest.approx(
        np.nanmean(layers[0])
    )
    assert "[*] Pixels: 1999 of 2000 have all values and are mapped" in done.stdout and "[*] Inside: " in done.stdout
    with Image.open(folder / "map.png") as picture:
        assert picture.width > 1000
    left = {path.name for path in folder.iterdir()}
    assert left == {"applicability.safetensors", "map.json", "map.pdf", "map.png", "map.tif", "metrics.json"}


def test_an_interrupted_map_goes_on_with_the_windows_that_it_lacks(
    run_folder: Path, rows: pd.DataFrame, run_predict: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_file_in_order(tmp_path, rows)
    flags = [f"run={run_folder}", f"input={source}", "workers=1", "window=16", "covariates=elevation=400 use=hay"]
    assert run_predict(*flags).returncode == 0
    undisturbed = read_map(tmp_path / "predict" / "map.tif")
    shutil.rmtree(tmp_path / "predict")
    (tmp_path / "predict").mkdir()
    monkeypatch.chdir(tmp_path / "predict")
    calls = itertools.count(1)

    def third_fails(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise InputError("interrupted by the test")
        return apply(*arguments)

    monkeypatch.setattr("predict.apply", third_fails)
    done = run_predict(*flags)
    assert done.returncode == 2 and "interrupted by the test" in done.stderr
    assert not (tmp_path / "predict" / "map.tif").exists() and not (tmp_path / "predict" / "metrics.json").exists()
    refused = run_predict(*flags[:-1], "covariates=elevation=500 use=hay")
    assert refused.returncode == 2 and "is of a run with covariates='elevation=400 use=hay', but" in refused.stderr
    table = run_predict(f"run={run_folder}", f"input={run_folder.parent / 'own.csv'}")
    assert table.returncode == 2 and "map.json exists and is of another run" in table.stderr
    done = run_predict(*flags)
    assert done.returncode == 0, done.stderr
    assert next(calls) - 1 == 3 + 12 - 2  # of 12 windows, two were there
    np.testing.assert_array_equal(read_map(tmp_path / "predict" / "map.tif"), undisturbed)


def test_a_cluster_gives_the_same_map_bit_for_bit(
    run_folder: Path,
    rows: pd.DataFrame,
    run_predict: Callable[..., Ended],
    dask_cluster: tuple[str, "list[subprocess.Popen[bytes]]"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = one_file_in_order(tmp_path, rows)
    flags = [f"run={run_folder}", f"input={source}", "window=16", "covariates=elevation=400 use=hay"]
    assert run_predict(*flags, "workers=1").returncode == 0
    (tmp_path / "cluster").mkdir()
    monkeypatch.chdir(tmp_path / "cluster")
    done = run_predict(*flags, f"scheduler={dask_cluster[0]}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read_map(tmp_path / "cluster" / "map.tif"), read_map(tmp_path / "predict" / "map.tif"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    run_folder: Path, rows: pd.DataFrame, run_script: Runner, tmp_path: Path
) -> None:
    source = one_file_in_order(tmp_path, rows)
    (tmp_path / "full").mkdir()

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    flags = [f"run={run_folder}", f"input={source}", "covariates=elevation=400 use=hay", "workers=1"]
    done = run_script("predict.py", *flags, cwd=tmp_path / "full", preexec_fn=small_files_only)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("predict.py: ")]
    assert "could not be written" in line and "nothing was left half-written" in line
    left = {path.name for path in (tmp_path / "full").rglob("*") if path.is_file()}
    assert left == {"applicability.safetensors", "map.json"}


def test_the_worked_example_of_the_docs(
    run_predict: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a run to a map, each command as it stands in docs/predict.md."""
    page = (PROJECT / "docs" / "predict.md").read_text()
    (block,) = re.findall(r"## Worked example\n.*?```\n(.*?)```", page, flags=re.DOTALL)
    commands = [line.split("#")[0].split()[2:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["main", "predict", "predict"]
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    run_in(tmp_path / "runs" / "abc", main, *commands[0][1:])
    done = run_predict(*commands[1][1:])
    assert done.returncode == 0 and "R2: " in done.stdout, done.stderr
    (tmp_path / "map").mkdir()
    monkeypatch.chdir(tmp_path / "map")
    monkeypatch.setenv("PROJECT_DIR", str(tmp_path))
    done = run_predict(*commands[2][1:], "workers=2")
    assert done.returncode == 0, done.stderr
    assert f"The rasters are simulated: {tmp_path / 'data' / 'demo_rasters'}" in done.stdout
    layers = read_map(tmp_path / "map" / "map.tif")
    assert layers.shape == (6, 240, 320)
    # The pond is unlike any grassland, the edge of the swath has no data, and nearly all of the rest is inside.
    assert layers[5, 150, 215] == 0 and np.isnan(layers[:, 0, 0]).all() and np.nanmean(layers[5]) > 0.85


@pytest.fixture
def dated(tmp_path: Path, rows: pd.DataFrame) -> Path:
    return Path(folder_of_dates(tmp_path, rows))


def other_grid(folder: Path, rows: pd.DataFrame, **profile: Any) -> None:
    write(folder / "x_20240501.tif", image(rows, [f"{band}_3" for band in BANDS]), BANDS, **profile)


CHANGES: dict[str, tuple[Callable[[Path, pd.DataFrame], object], str]] = {
    "crs": (
        lambda f, r: other_grid(f, r, crs=CRS.from_epsg(32632)),
        "x_20240501.tif is in EPSG:32632, z_20240301.tif in",
    ),
    "origin": (
        lambda f, r: other_grid(f, r, transform=Affine(10, 0, 500_010, 0, -10, 4_900_000)),
        "x_20240501.tif lies on another grid than z_20240301.tif: 50 x 40 pixels of 10 from 500010 4900000, not 50 x 40",
    ),
    "fewer": (lambda f, _: (f / "x_20240501.tif").unlink(), "holds 4 rasters, but the run was trained on 5 steps"),
    "same date": (
        lambda f, _: (f / "x_20240501.tif").rename(f / "x_20240601.tif"),
        "has several rasters of 2024-06-01; one a step is expected",
    ),
    "no date": (lambda f, _: (f / "x_20240501.tif").rename(f / "third.tif"), "third.tif has no date in its name"),
    "unknown bands": (
        lambda f, r: write(f / "x_20240501.tif", image(r, [f"{band}_3" for band in BANDS]), ("B02", "B8A", "evi")),
        "x_20240501.tif has no layer 'ndvi', which the run was trained on; its layers are B02, B8A, evi",
    ),
    "too many layers": (
        lambda f, r: write(f / "x_20240501.tif", image(r, [f"{band}_{step}" for band in BANDS for step in (3, 4)])),
        "x_20240501.tif has 6 layers without descriptions, but the run was trained on 3 of them (B02, B8A, ndvi)",
    ),
    "no raster": (lambda f, _: (f / "x_20240501.tif").write_bytes(b"x"), "x_20240501.tif cannot be read as a raster"),
    "no coordinates": (lambda f, r: other_grid(f, r, crs=None), "x_20240501.tif has no coordinate system"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rasters_that_do_not_fit_are_refused(
    run_folder: Path, dated: Path, rows: pd.DataFrame, run_predict: Callable[..., Ended], tmp_path: Path, change: str
) -> None:
    damage, said = CHANGES[change]
    damage(dated, rows)
    done = run_predict(f"run={run_folder}", f"input={dated}", "covariates=elevation=400 use=hay", "workers=1")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "predict").iterdir())


@pytest.mark.parametrize(
    ("covariates", "said"),
    [
        ("none", "the run was trained on the covariate 'elevation'; covariates='elevation=...' with a number or raster"),
        ("elevation=400", "covariates='use=...' with a category is expected"),
        (
            "elevation=400 use=forest",
            "covariates, covariate 'use': the run does not know 'forest', only fallow, hay, pasture",
        ),
        ("elevation=high use=hay", "elevation=high is neither a number nor a raster"),
        ("elevation=absent.tif use=hay", "absent.tif cannot be read as a raster"),
        ("elevation use=hay", "covariates: 'elevation' is not name=value or name=raster.tif"),
        ("elevation=400 use=hay slope=3", "the run was not trained on 'slope'; its covariates are: elevation, use"),
    ],
)
def test_covariates_that_do_not_fit_are_refused(
    run_folder: Path, dated: Path, run_predict: Callable[..., Ended], tmp_path: Path, covariates: str, said: str
) -> None:
    done = run_predict(f"run={run_folder}", f"input={dated}", f"covariates={covariates}", "workers=1")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "predict").iterdir())
