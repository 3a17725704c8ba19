"""Operation export: the file gives what the run gives, at every size; what cannot be exported is refused in a sentence."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import rasterio
import torch
from canopy_root import write_tif
from conftest import DEFAULTS, PROJECT, Ended, _in_process, environment
from torch import Tensor, nn

import export
from datasets.canopy.catalogue import NODATA
from datasets.canopy.tiles import PUBLISHED
from models import NETWORKS, make_network
from models.exported import Fold, NetworkMember, SeriesGraph
from models.threasure_net import make_network as make_canopy_network
from utils.runs import write_tensors

GUILD = Path(sys.executable).parent / "guild"
SNIPPETS = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "export.md").read_text(), flags=re.DOTALL)
BANDS, STEPS = ["B02", "B03", "B04"], list(range(1, 10))
SHORT = ["folds=2", "epochs=2", "warmup_epochs=1", "study_var=biomass", "plot_column=site", "unit=g/m2"]
NARROW = {"num_channels": (4, 4, 4, 4), "stem_channels": 4, "num_filters": 2}
WINDOWS = [(1, 1, 128, 96), (1, 12, 64, 128), (2, 5, 96, 64), (7, 1, 96, 128), (7, 12, 64, 64)]  # sample, date, row, column


@pytest.fixture
def run_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run export.py in this process and the folder `export` of the test's own."""
    (tmp_path / "export").mkdir()

    def run(*flags: str) -> Ended:
        return _in_process("export", tmp_path / "export", monkeypatch, capsys)(*flags)

    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of two covariates, one of them text."""
    rng = np.random.default_rng(1)
    columns = {f"{band}_{step:02d}": rng.normal(300, 50, 40).round(1) for band in BANDS for step in STEPS}
    rows = pd.DataFrame({"site": [f"s{number}" for number in range(40)], **columns})
    rows["elevation"] = rng.normal(400, 80, 40).round(1)
    rows["use"] = rng.choice(["hay", "pasture", "fallow"], 40)
    rows["biomass"] = (rows["B02_01"] / 10 + rows["elevation"] / 20 + rng.normal(0, 2, 40)).round(2)
    rows.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def record_of(model: str, **changes: Any) -> dict[str, Any]:
    """What a fold of main keeps beside its weights."""
    covariates = [
        {"name": "elevation", "mean": 400.0, "sd": 80.0},
        {"name": "use", "categories": ["fallow", "hay", "pasture"], "categories_in_training": ["hay", "pasture"]},
    ]
    return {
        "flags": {**DEFAULTS, **NARROW, "model": model, **changes},
        "bands": BANDS,
        "steps": STEPS,
        "predictor_mean": np.linspace(200, 400, 27).tolist(),
        "predictor_sd": np.linspace(20, 40, 27).tolist(),
        "covariates": covariates,
        "target_offset_and_factor": [50.0, 10.0],
        "value_range": {},
        "simulated": False,
    }


def write_main_run(folder: Path, model: str, network: nn.Module) -> Path:
    """A finished run of main of one fold."""
    record = {"project": "vegetation from Sentinel-2 time series, operation main", **record_of(model)}
    tensors = {f"member_1.{name}": tensor for name, tensor in network.state_dict().items()}
    write_tensors(folder / "models" / "fold_1.safetensors", tensors, record)
    predictors = [[f"{band}_{step}" for band in BANDS] for step in STEPS]
    (folder / "metrics.json").write_text(json.dumps({"flags": {"model": model}, "columns": {"predictors": predictors}}))
    pd.DataFrame({"observed": [40.0, 50.0, 60.0]}).to_csv(folder / "predictions.csv")
    return folder


def write_canopy_run(folder: Path, resolution: float = 10, **changes: Any) -> Path:
    """A finished run of canopy with initial weights."""
    flags: dict[str, Any] = {"seed": 1, "resolution": resolution, "encoder": "rdn", "upsampling": "shuffle", "channels": 4}
    flags |= {"num_rdb": 2, "num_dense_layers": 2, "growth_channels": 4, **changes}
    angles = changes.get("angles", True)
    network = make_canopy_network(flags, 16 if angles else 10)
    network.initialise(torch.Generator().manual_seed(1))
    record = {
        "project": "vegetation from Sentinel-2 time series, operation canopy",
        "flags": flags,
        "angles": angles,
        "simulated": True,
        "statistics": asdict(PUBLISHED),
        "target_unit": "decimetres, 95th percentile of LiDAR heights",
    }
    write_tensors(folder / "models" / "best.safetensors", network.state_dict(), record)
    (folder / "metrics.json").write_text("{}")
    return folder


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "flags", [["model=MLP", "ensemble_count=2"], ["model=Ridge"], ["model=GaussianProcess"]], ids=lambda flags: flags[0]
)
def test_the_file_predicts_a_table_as_the_run_did(
    run_main: Callable[..., Ended], run_export: Callable[..., Ended], table: Path, tmp_path: Path, flags: list[str]
) -> None:
    trained = run_main(*SHORT, *flags, f"dataset={table}", "covariates=elevation use")
    assert trained.returncode == 0, trained.stderr
    done = run_export(f"run={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    rows = pd.read_csv(table).set_index("site", drop=False)

    script = tmp_path / "use_main.py"
    script.write_text(f"{SNIPPETS[0]}\nassert not {{'torch', 'models'}} & sys.modules.keys()\n")
    command = [sys.executable, str(script), "export/model.onnx", table.name, "used.csv"]
    used = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    used_rows = pd.read_csv(tmp_path / "used.csv")

    # Each fold alone is what the run itself predicted with; the file is the mean and spread of all.
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    by_fold = []
    for number, path in enumerate(export.weights_of(tmp_path), start=1):
        fold, record = export.load_fold(path)
        codes = pd.Categorical(rows["use"], record["covariates"][1]["categories"]).codes.astype(np.int64)
        series = rows[[f"{band}_{step:02d}" for band in BANDS for step in STEPS]].to_numpy(np.float32).reshape(-1, 3, 9)
        covariates = [torch.from_numpy(rows["elevation"].to_numpy(np.float32)), torch.from_numpy(codes)]
        with torch.no_grad():
            members = torch.stack(fold.eval()(torch.from_numpy(series), covariates)).numpy()
        by_fold.append(members)
        own = predictions[predictions["fold"] == number].set_index("plot")
        place = rows.index.get_indexer(own.index)
        np.testing.assert_allclose(members.mean(0)[place], own["predicted"], rtol=1e-5)
        np.testing.assert_allclose(members.std(0)[place], own["predicted_sd"], rtol=1e-3, atol=1e-4)
    together = np.concatenate(by_fold)
    np.testing.assert_allclose(used_rows["prediction"], together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(used_rows["spread"], together.std(0), rtol=1e-3, atol=1e-4)

    about = session_of(tmp_path / "export" / "model.onnx").get_modelmeta().custom_metadata_map
    assert about["target_unit"] == "g/m2" and about["operation"] == "main" and about["simulated"] == "false"
    assert set(json.loads(about["weights_sha256"])) == {"fold_1.safetensors", "fold_2.safetensors"}
    assert json.loads(about["flags"])["folds"] == 2
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("model", NETWORKS)
def test_every_architecture_is_the_same_in_batches_of_any_size(model: str) -> None:
    record = record_of(model)
    network = make_network(model, len(BANDS) + 4, len(STEPS), record["flags"], seed=1)
    graph = SeriesGraph([Fold([NetworkMember(network, 50.0, 10.0)], record)]).eval()
    ports = [export.Port("series", ("sample", len(BANDS), len(STEPS)), "")]
    ports += [export.Port(f"covariate_{name}", ("sample",), "") for name in ("elevation", "use")]
    outputs = [export.Port(name, ("sample",), "") for name in ("prediction", "spread")]
    tolerance = export.Tolerance(0.01, 0.1, "% of 10")

    def draw(sizes: Any, generator: torch.Generator) -> list[Tensor]:
        return export.draw_rows(record, sizes, generator)

    cases = [{"sample": size} for size in (1, 2, 7)]
    run = export.Exportable(graph, graph, ports, outputs, [tolerance] * 2, 1, cases, draw, {"described": model}, {})
    content = export.to_onnx(run, {}, torch.Generator().manual_seed(1))
    differences = export.compare(run, content, torch.Generator().manual_seed(2))
    assert max(differences) < 0.01


@pytest.mark.parametrize(
    ("resolution", "changes"),
    [
        (10, {"angles": False}),
        (5, {}),
        (2.5, {"upsampling": "interpolation"}),
        (5, {"encoder": "unet", "upsampling": "interpolation"}),
    ],
    ids=str,
)
def test_heights_are_the_same_at_every_number_of_samples_dates_and_pixels(
    run_export: Callable[..., Ended], tmp_path: Path, resolution: float, changes: dict[str, Any]
) -> None:
    folder = write_canopy_run(tmp_path / "run", resolution, **changes)
    done = run_export(f"run={folder}")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "export" / "model.onnx"
    run = export.load_canopy(folder / "models" / "best.safetensors")
    cases = [dict(zip(("sample", "date", "row", "column"), sizes, strict=True)) for sizes in WINDOWS]
    generator = torch.Generator().manual_seed(3)
    height, vegetation = export.compare(run._replace(cases=cases), path.read_bytes(), generator)
    assert height < 0.001 and vegetation < 1e-5

    session = session_of(path)
    sizes = {"sample": 2, "date": 3, "row": 96, "column": 112}
    names = [port.name for port in run.inputs]
    inputs = dict(zip(names, (tensor.numpy() for tensor in run.draw(sizes, generator)), strict=True))
    whole, _ = session.run(None, inputs)
    assert whole.min() >= 0 and whole.max() > 1 and whole.std() > 0
    assert whole.shape == (2, 96 * 10 / resolution, 112 * 10 / resolution)
    # What is left of a part without its margin is what the whole has there, except that the U-Net sees further.
    if "encoder" not in changes:
        about = session.get_modelmeta().custom_metadata_map
        margin, factor = int(about["margin"]), round(10 / float(about["output_pixel_m"]))
        part, _ = session.run(None, {**inputs, "images": inputs["images"][..., 16:96, 32:112]})
        inner = slice(margin * factor, (80 - margin) * factor)
        there = whole[:, (16 + margin) * factor : (96 - margin) * factor, (32 + margin) * factor : (112 - margin) * factor]
        np.testing.assert_allclose(part[:, inner, inner], there, atol=1e-4)
    inputs["padding"][1] = True
    height, vegetation = session.run(None, inputs)
    np.testing.assert_array_equal(height[0], whole[0])
    assert np.isnan(height[1]).all() and np.isnan(vegetation[1]).all()


def test_a_folder_of_images_becomes_a_map_without_pytorch(run_export: Callable[..., Ended], tmp_path: Path) -> None:
    folder = write_canopy_run(tmp_path / "run", 5, angles=False)
    assert run_export(f"run={folder}").returncode == 0
    images = np.random.default_rng(2).integers(0, 4000, (3, 10, 48, 60)).astype(np.int16)
    images[:, :, :5, :7] = NODATA
    for month, image in zip((2, 5, 9), images, strict=True):
        name = f"S2_2024{month:02d}11.tif"
        write_tif(tmp_path / "images" / name, image, 440_000, 6_740_000, 10, "EPSG:2154", nodata=NODATA)
    script = tmp_path / "use_canopy.py"
    script.write_text(f"{SNIPPETS[1]}\nassert not {{'torch', 'models'}} & sys.modules.keys()\n")
    command = [sys.executable, str(script), "export/model.onnx", "images", "height.tif"]
    used = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    run = export.load_canopy(folder / "models" / "best.safetensors")
    days = torch.tensor([[41, 131, 254]])
    with torch.no_grad():
        inputs = (torch.from_numpy(images)[None], days, torch.tensor([183]), torch.zeros(1, 3, dtype=torch.bool))
        expected, _ = run.reference(*inputs)
    margin = run.record["margin"]
    with rasterio.open(tmp_path / "height.tif") as file:
        assert file.res == (5, 5) and file.crs.to_epsg() == 2154
        assert (file.bounds.left, file.bounds.top) == (440_000 + 10 * margin, 6_740_000 - 10 * margin)
        cut = 2 * margin
        np.testing.assert_allclose(file.read(), expected[:, cut:-cut, cut:-cut].numpy(), atol=1e-3)


def test_a_run_is_exported_once_and_no_other_takes_its_place(run_export: Callable[..., Ended], tmp_path: Path) -> None:
    first, second = (
        write_main_run(tmp_path / name, "MLP", make_network("MLP", 7, 9, {}, seed))
        for seed, name in enumerate(("one", "two"))
    )
    assert run_export(f"run={first}").returncode == 0
    path = tmp_path / "export" / "model.onnx"
    before = path.read_bytes()
    again = _again(run_export, f"run={first}")
    assert again.returncode == 0 and "stays as it is" in again.stdout
    other = _again(run_export, f"run={second}")
    assert other.returncode == 2 and "model.onnx is of the run one, not of" in other.stderr
    assert path.read_bytes() == before
    path.write_text("no graph")
    stray = _again(run_export, f"run={first}")
    assert stray.returncode == 2 and "model.onnx is of something else" in stray.stderr


def _again(run_export: Callable[..., Ended], *flags: str) -> Ended:
    done = run_export(*flags)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1
    return done


def test_what_cannot_be_exported_is_refused_in_a_sentence(
    run_export: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branching(nn.Module):
        """A network whose path depends on a value."""

        def __init__(self, bands: int, steps: int) -> None:
            super().__init__()
            self.head = nn.Linear(bands, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean(2)) if x.sum() > 0 else self.head(x[..., 0])

    monkeypatch.setitem(NETWORKS, "Branching", Branching)
    branching = write_main_run(tmp_path / "branching", "Branching", Branching(7, 9))
    done = run_export(f"run={branching}")
    assert done.returncode == 2 and "PyTorch cannot export it" in done.stderr
    rocket = write_main_run(tmp_path / "rocket", "Rocket", nn.Linear(1, 1))
    done = _again(run_export, f"run={rocket}")
    assert done.returncode == 2 and "is a run of Rocket, which has no ONNX form here" in done.stderr
    (rocket / "checkpoint.pt").touch()
    done = _again(run_export, f"run={rocket}")
    assert done.returncode == 2 and "is no finished run of main or canopy" in done.stderr
    other = write_main_run(tmp_path / "other", "MLP", make_network("MLP", 8, 9, {}))
    done = _again(run_export, f"run={other}")
    assert done.returncode == 2 and "its weights do not fit the MLP of the present code" in done.stderr
    assert not list((tmp_path / "export").iterdir())


def test_a_graph_that_computes_something_else_is_not_written(
    run_export: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_main_run(tmp_path / "run", "MLP", make_network("MLP", 7, 9, {}))
    real, load = SeriesGraph.forward, export.load_main

    def fixed(self: SeriesGraph, series: Tensor, *covariates: Tensor) -> Any:
        prediction, spread = real(self, series, *covariates)
        return prediction + 1e-3 * series.mean(0).sum(), spread  # depends on the others of the batch

    def wrong(*arguments: Any) -> export.Exportable:
        loaded = load(*arguments)
        return loaded._replace(reference=lambda *inputs: fixed(loaded.graph, *inputs))  # type: ignore[arg-type]

    monkeypatch.setattr(export, "load_main", wrong)
    done = run_export(f"run={run}")
    assert done.returncode == 2 and "onnxruntime's prediction differs from PyTorch's by" in done.stderr
    assert "% of the target's standard deviation" in done.stderr and not list((tmp_path / "export").iterdir())


def test_a_full_disk_leaves_no_file(
    run_export: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_main_run(tmp_path / "run", "MLP", make_network("MLP", 7, 9, {}))

    def full(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = run_export(f"run={run}")
    assert done.returncode == 2 and "No space left on device; nothing was left half-written" in done.stderr
    assert not list((tmp_path / "export").iterdir())


def test_export_runs_and_compares_under_guild(tmp_path: Path, guild_home: Callable[[Path], Path]) -> None:
    environ = environment() | {"GUILD_HOME": str(guild_home(tmp_path)), "COLUMNS": "300"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(GUILD), *arguments]
        return subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False, timeout=300)

    folder = write_main_run(tmp_path / "runs" / "123456", "MLP", make_network("MLP", 7, 9, {}))
    done = call("run", "export", "--yes", "run=1234")  # digits alone, as ids may begin with
    assert done.returncode == 0, done.stderr
    assert "unsupported flag type" not in done.stderr
    (graph,) = tmp_path.glob("runs/*/model.onnx")
    assert session_of(graph).get_modelmeta().custom_metadata_map["run"] == folder.name
    table = call("compare", "-t", "-Fo", "export").stdout
    for column in ("difference_prediction", "size", "export main 123456"):
        assert column in table
