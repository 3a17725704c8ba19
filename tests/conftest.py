"""What several test files share: where the real table is, golden numbers, running a script as a user does."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# As in guild.yml, before torch is imported: waiting OpenMP threads soon sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes that share the cores would wait for one another's threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import meta_device
import torch
from blank_plots import save_blank

import main

# Tests that a shell runs in the background are born deaf to Ctrl-C, and so would be the runs that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parent.parent
REAL_TABLES = (PROJECT / "data" / "dataset.xlsx", PROJECT.parent / "shared" / "data" / "grassland" / "dataset.xlsx")

DEFAULTS = main.parser.parse_flags([])

Runner = Callable[..., subprocess.CompletedProcess[str]]


def golden(name: str) -> Any:
    """Reference numbers of `tests/golden`."""
    return json.loads((PROJECT / "tests" / "golden" / f"{name}.json").read_text())


def environment() -> dict[str, str]:
    """The environment of a script under test: no Guild run around it."""
    ours = ("RUN_ID", "RUN_DIR", "PROJECT_DIR", "CMD_DIR", "DEVICE")
    return {name: value for name, value in os.environ.items() if name not in ours}


def quick_environment() -> dict[str, str]:
    """An environment whose scripts draw no plots and grow few trees (`site/sitecustomize.py`)."""
    return environment() | {"PYTHONPATH": os.pathsep.join([str(PROJECT / "tests" / "site"), str(PROJECT / "tests")])}


@pytest.fixture(autouse=True)
def blank_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests that are marked with `plots` draw them."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_blank)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Tests that draw from PyTorch's own generator draw the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture
def real_table() -> Path:
    """The published table; tests that need it are skipped where it is absent."""
    for path in REAL_TABLES:
        if path.exists():
            return path
    pytest.skip("the real grassland table is absent (make data downloads it)")


class Ended(NamedTuple):
    """How a script run in this process ended."""

    returncode: int
    stdout: str
    stderr: str


def _in_process(
    script: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    afresh: bool = True,
) -> Callable[..., Ended]:
    """Run a script's main function in this process and a folder; afresh: each call is a run of its own."""
    module = importlib.import_module(script)
    from utils.runs import run_or_explain

    for name in ("RUN_ID", "RUN_DIR", "PROJECT_DIR", "CMD_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)

    def run(*flags: str) -> Ended:
        arguments = [part for text in flags for part in (f"--{text.split('=', 1)[0]}", text.split("=", 1)[1])]
        monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
        if afresh:
            # Figures in the folder would end the run.
            Path("metrics.json").unlink(missing_ok=True)
        try:
            run_or_explain(module.main)
        except SystemExit as ended:
            return Ended(int(ended.code or 0), *capsys.readouterr())
        return Ended(0, *capsys.readouterr())

    return run


@pytest.fixture
def run_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run main.py without the seconds that a fresh interpreter takes."""
    return _in_process("main", tmp_path, monkeypatch, capsys)


@pytest.fixture
def run_canopy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run canopy.py without the seconds that a fresh interpreter and the baseline's many trees take."""
    from models import pixel_baselines

    monkeypatch.setattr(pixel_baselines, "BOOSTING_ROUNDS", 20)
    return _in_process("canopy", tmp_path, monkeypatch, capsys)


@pytest.fixture
def run_canopy_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run canopy_map.py in this process, alone unless the test says otherwise."""
    run = _in_process("canopy_map", tmp_path, monkeypatch, capsys)
    return lambda *flags: run(*([] if any(flag.startswith("workers=") for flag in flags) else ["workers=1"]), *flags)


@pytest.fixture
def run_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run predict.py in this process and the folder `predict` of the test's own."""
    (tmp_path / "predict").mkdir()
    return _in_process("predict", tmp_path / "predict", monkeypatch, capsys, afresh=False)


@pytest.fixture
def run_series_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run series_inputs.py in this process, alone unless the test says otherwise."""
    run = _in_process("series_inputs", tmp_path, monkeypatch, capsys)
    return lambda *flags: run(*([] if any(flag.startswith("workers=") for flag in flags) else ["workers=1"]), *flags)


@pytest.fixture(scope="session")
def small_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of few simulated squares: one tile, two for training, one each for validation and test."""
    from datasets.canopy.demo import demo_root

    return demo_root(tmp_path_factory.mktemp("tiles"), small=True)


@pytest.fixture(scope="session")
def guild_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes a folder a home of Guild; all homes share what Guild keeps of the scripts' flags, which take it long to read."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "guild_cache"
    cache.mkdir(exist_ok=True)

    def make(folder: Path) -> Path:
        (folder / "cache").symlink_to(cache)
        return folder

    return make


@pytest.fixture
def run_script(tmp_path: Path) -> Runner:
    """Run a script of the project in the test's own folder, `flag=value` as in Guild."""

    def run(script: str, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        arguments = [part for text in flags for part in (f"--{text.split('=', 1)[0]}", text.split("=", 1)[1])]
        options = {"cwd": tmp_path, "env": environment(), "timeout": 300, **options}
        return subprocess.run(
            [sys.executable, str(PROJECT / script), *arguments], capture_output=True, text=True, check=False, **options
        )

    return run


def on_path() -> dict[str, str]:
    """An environment whose processes find the project and its tests."""
    return environment() | {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something is so."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def running_cluster(folder: Path, environ: dict[str, str]) -> Iterator[tuple[str, "list[subprocess.Popen[bytes]]"]]:
    """A Dask scheduler and two workers, each a process: its address and the workers."""
    from distributed import Client

    dask = [sys.executable, "-W", "ignore", "-m", "dask"]
    quiet: dict[str, Any] = {"env": environ, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    options = ["--port", "0", "--no-dashboard", "--scheduler-file", str(folder / "scheduler.json"), "--host", "127.0.0.1"]
    processes = [subprocess.Popen([*dask, "scheduler", *options], **quiet)]
    try:
        wait_for(lambda: (folder / "scheduler.json").exists() and (folder / "scheduler.json").read_text())
        address = json.loads((folder / "scheduler.json").read_text())["address"]
        one = ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(folder)]
        processes += [subprocess.Popen([*dask, "worker", address, *one], **quiet) for _ in range(2)]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, 120)  # else a worker may be through before the other one has come
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "list[subprocess.Popen[bytes]]"]]:
    """A cluster that knows the project."""
    with running_cluster(tmp_path_factory.mktemp("dask"), on_path()) as cluster:
        yield cluster


@pytest.fixture
def meta_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Stands for `torch.autocast`, which refuses the meta device."""
    with meta_device.Autocast() as mode:
        monkeypatch.setattr(torch, "autocast", mode.switch)
        yield mode.switch
