"""The project under Guild: flags, compare, batch files, resuming."""

import csv
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PROJECT, Ended, environment

from utils.runs import CHECKPOINT

GUILD = Path(sys.executable).parent / "guild"
SHORT = ["dataset=demo", "folds=2", "num_channels=8 8 8 8", "stem_channels=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, guild_home: Callable[[Path], Path]) -> Path:
    return guild_home(tmp_path_factory.mktemp("guild"))


@pytest.fixture(scope="module")
def guild(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(GUILD), *arguments],
            cwd=PROJECT,
            env=environment() | {"GUILD_HOME": str(home), "COLUMNS": "300", "SECONDS_BETWEEN_CHECKPOINTS": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return call


def compared(guild: Callable[..., subprocess.CompletedProcess[str]]) -> list[dict[str, str]]:
    """Rows of `guild compare`, newest first."""
    return list(csv.DictReader(io.StringIO(guild("compare", "--csv", "-").stdout)))


def test_a_run_without_a_name_is_main_and_compares(
    guild: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    done = guild("run", "--yes", *SHORT, "model=Ridge", "shortcut_pooling=no", "precision=32")
    assert done.returncode == 0, done.stderr
    assert "pkg_resources" not in done.stderr and "unsupported flag type" not in done.stderr
    (row,) = compared(guild)
    columns = list(row)
    expected = ["run", "started", "status", "model", "study_var", "ensemble_count", "split_procedure", "seed"]
    expected += ["r2_mean", "r2_std", "rrmse_mean", "rmses_mean", "rmseu_mean", "params", "time_train_mean"]
    assert [column for column in columns if column in expected] == expected
    assert row["dataset"] == "demo" and row["status"] == "completed"
    assert float(row["r2_mean"]) > 0.3
    (metrics,) = home.glob("runs/*/metrics.json")
    assert json.loads(metrics.read_text())["flags"]["shortcut_pooling"] is False
    sources = metrics.parent / ".guild" / "sourcecode"
    packages = ("models", "datasets", "utils")
    expected_sources = {Path(name) for name in ("guild.yml", "requirements.lock", "main.py", "canopy.py")}
    expected_sources |= {path.relative_to(PROJECT) for package in packages for path in (PROJECT / package).rglob("*.py")}
    assert {path.relative_to(sources) for path in sources.rglob("*.*")} == expected_sources


def test_guild_help_explains_every_flag(guild: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    said = guild("help").stdout
    for name in ("study_var", "warmup_epochs", "dataset", "precision"):
        assert name in said
    assert re.search(r"^ +seed ", said, re.MULTILINE) and not re.search(r"^ +(device|cache) ", said, re.MULTILINE)
    assert re.search(r"SpecRichness,\s+Shannon,\s+Simpson", said)


def test_a_batch_file_runs_its_rows(guild: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    before = {row["run"] for row in compared(guild)}
    flags = [*SHORT, "model=Ridge"]
    done = guild("run", "main", "@batch/ten_seeds.csv", *flags, "--max-trials", "2", "--yes")
    assert done.returncode == 0, done.stderr
    new = [row for row in compared(guild) if row["run"] not in before and row["model"] == "Ridge"]
    assert len(new) == 2
    assert len({row["seed"] for row in new} & {str(seed) for seed in range(1, 11)}) == 2


def test_compare_shows_one_operation_where_asked(guild: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert " r2_mean " in guild("compare", "-t", "-Fo", "main").stdout
    assert "main" not in guild("compare", "-t", "-Fo", "canopy").stdout


@pytest.mark.parametrize("options", [[], ["--optimize"], ["--optimizer", "gbrt"]], ids=" ".join)
@pytest.mark.parametrize("operation", ["main", "canopy"])
def test_a_search_says_in_a_sentence_that_it_does_not_run(
    guild: Callable[..., subprocess.CompletedProcess[str]], operation: str, options: list[str]
) -> None:
    done = guild("run", operation, "lr=loguniform[1e-4:1e-2]", *options, "--yes")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("list the values, as in lr=[1e-4,1e-3,1e-2].")
    assert "Traceback" not in done.stderr


BATCHES = {
    path.name: list(csv.DictReader(path.read_text().splitlines())) for path in sorted((PROJECT / "batch").glob("*.csv"))
}


def test_the_batch_files_hold_the_expected_rows() -> None:
    ours = {"depth_and_width.csv", "published_table.csv", "ten_seeds.csv", "canopy_resolutions.csv", "canopy_ablations.csv"}
    assert set(BATCHES) == ours
    assert [row["resolution"] for row in BATCHES["canopy_resolutions.csv"]] == ["10", "5", "2.5"]
    published = BATCHES["published_table.csv"]
    assert len(published) == 30
    assert {row["study_var"] for row in published} == {"SpecRichness", "Shannon", "Simpson"}
    assert len({row["seed"] for row in BATCHES["ten_seeds.csv"]}) == 10


@pytest.mark.parametrize(
    "row",
    [
        *BATCHES["published_table.csv"][:10],  # the table for one study variable, and a row of each of the others
        BATCHES["published_table.csv"][12],
        BATCHES["published_table.csv"][25],
        BATCHES["depth_and_width.csv"][-1],
        BATCHES["ten_seeds.csv"][0],
    ],
    ids=lambda row: " ".join(row.values()),
)
def test_a_row_of_a_batch_runs_at_reduced_epochs(run_main: Callable[..., Ended], row: dict[str, str]) -> None:
    reduced = {
        "dataset": "demo",
        "folds": "2",
        "num_kernels": "50",
        "num_filters": "8",
        **row,
        "epochs": "1",
        "warmup_epochs": "0",
    }
    done = run_main(*(f"{name}={value}" for name, value in reduced.items()))
    assert done.returncode == 0, done.stderr
    assert "R2 mean: " in done.stdout


SHORT_CANOPY = {"preset": "demo", "batch_size": "2", "epochs": "1", "window": "16", "num_rdb": "1", "num_dense_layers": "1"}
SHORT_CANOPY |= {"channels": "8", "growth_channels": "4", "max_dates": "3", "validations_per_epoch": "1"}


@pytest.mark.parametrize("row", BATCHES["canopy_ablations.csv"], ids=lambda row: " ".join(row.values()))
def test_a_row_of_a_canopy_batch_runs_at_reduced_size(
    run_canopy: Callable[..., Ended], small_tiles: Path, tmp_path: Path, row: dict[str, str]
) -> None:
    flags = SHORT_CANOPY | row | {"data": str(small_tiles), "cache": str(tmp_path / "cache")}
    done = run_canopy(*(f"{name}={value}" for name, value in flags.items()))
    assert done.returncode == 0, done.stderr
    assert "[*] MAE: " in done.stdout


def test_canopy_runs_and_compares_under_guild(small_tiles: Path, tmp_path: Path, guild_home: Callable[[Path], Path]) -> None:
    """In a home of its own, for Guild has one set of columns an operation."""
    environ = environment() | {"GUILD_HOME": str(guild_home(tmp_path)), "COLUMNS": "300"}
    environ["CACHE_DIR"] = str(tmp_path / "tiles")

    def call(*arguments: str) -> str:
        command = [str(GUILD), *arguments]
        done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "unsupported flag type" not in done.stderr
        return done.stdout

    flags = [f"{name}={value}" for name, value in (SHORT_CANOPY | {"data": str(small_tiles), "devices": "2"}).items()]
    # Guild passes a plain `no` on differently from a batch file than from the command line.
    (tmp_path / "rows.csv").write_text("resolution,angles\n10,no\n")
    call("run", "--yes", "canopy", f"@{tmp_path / 'rows.csv'}", *flags)
    row, *_ = csv.DictReader(io.StringIO(call("compare", "--csv", "-")))
    columns = ["resolution", "data", "preset", "loss", "mae", "rmse", "bias", "r2", "iou", "params", "time_train"]
    assert [name for name in row if name in columns] == columns
    assert row["status"] == "completed" and float(row["mae"]) > 0 and row["loss"] == "patch_mae+gradient+vegetation"
    assert row["label"] == f"10 m /…/{small_tiles.name} seed 42 angles no preset demo epochs 1"
    (metrics,) = tmp_path.glob("runs/*/metrics.json")
    assert json.loads(metrics.read_text())["flags"]["angles"] == "no"


def test_predict_by_itself_applies_the_newest_run(
    guild: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    assert guild("run", "main", "--yes", "dataset=demo", "model=Ridge").returncode == 0
    applied = compared(guild)[0]["run"]
    done = guild("run", "predict", "--yes")
    assert done.returncode == 0, done.stderr
    assert "unsupported flag type" not in done.stderr
    row = compared(guild)[0]
    assert row["operation"] == "predict" and row["label"] == f"predict simulated run {applied}"
    assert float(row["r2"]) > 0.3 and 0.8 < float(row["coverage"]) <= 1 and 0.8 < float(row["inside"]) <= 1
    # By the beginning of its id, which may have digits alone.
    again = guild("run", "predict", "--yes", f"run={applied}", "level=0.5")
    assert again.returncode == 0, again.stderr
    assert float(compared(guild)[0]["coverage"]) < float(row["coverage"])
    assert len(list(home.glob("runs/*/predictions.parquet"))) >= 2


def test_restart_resumes_a_killed_run(guild: Callable[..., subprocess.CompletedProcess[str]], home: Path) -> None:
    before = set(home.glob("runs/*"))
    command = [str(GUILD), "run", "--yes", "main", *SHORT, "epochs=20", "warmup_epochs=2"]
    environ = environment() | {"GUILD_HOME": str(home), "SECONDS_BETWEEN_CHECKPOINTS": "0"}
    process = subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((run / CHECKPOINT).exists() for run in set(home.glob("runs/*")) - before):
        assert process.poll() is None
        time.sleep(0.02)
    # Guild runs the operation in another process, which would continue on its own.
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.wait()
    (folder,) = set(home.glob("runs/*")) - before
    run = folder.name[:8]
    done = guild("run", "--yes", "--restart", run)
    assert done.returncode == 0, done.stderr
    assert "Resuming after epoch" in done.stdout
    results = (folder / "metrics.json").read_bytes()
    again = guild("run", "--yes", "--restart", run)
    assert again.returncode == 0 and "This run is complete" in again.stdout
    kept = next(row for row in compared(guild) if row["run"] == run)
    assert kept["status"] == "completed" and kept["r2_mean"]
    other = guild("run", "--yes", "--restart", run, "epochs=30")
    assert other.returncode == 2 and "epochs=20, but epochs=30 was given" in other.stderr
    # Guild keeps the refused flag, so the sentence names the command that undoes it.
    undoing = re.search(r"`guild (run --restart \w+ epochs=20)`", other.stderr)
    assert undoing is not None and guild(*undoing[1].split(), "--yes").returncode == 0
    assert (folder / "metrics.json").read_bytes() == results


def test_no_column_takes_the_place_of_guilds_own() -> None:
    """`guild compare` looks runs up by its first column, `run`; a flag of that name is shown under another."""
    (model,) = yaml.safe_load((PROJECT / "guild.yml").read_text())
    columns = {column for operation in model["operations"].values() for column in operation.get("compare", [])}
    assert "=run as applied_run" in columns
    assert not columns & {f"={name}" for name in ("run", "operation", "started", "time", "status", "label")}


def test_the_operation_declares_what_it_prints() -> None:
    (model,) = yaml.safe_load((PROJECT / "guild.yml").read_text())
    for name, some in (("main", {"throughput", "madds", "memory"}), ("canopy", {"mape", "f1", "mae_best_shift"})):
        operation = model["operations"][name]
        scalars = {name for entry in operation["output-scalars"] for name in entry}
        assert {"step", "loss_train", "loss_val"} | some <= scalars
        assert {column for column in operation["compare"] if not column.startswith("=")} <= scalars
