"""Operation canopy as a user meets it: what a run leaves, resuming, several processes, presets, errors."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from canopy_root import SPECTRUM, write_root
from conftest import PROJECT, Ended, Runner, quick_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import canopy
from datasets.canopy.tiles import CanopyPatches
from models import threasure_net
from models.pixel_baselines import PARTS_OF_YEAR, fit_boosting, pixel_features
from models.threasure_net import ThreasureNet
from utils.canopy.evaluation import Evaluation
from utils.canopy.metrics import class_names
from utils.canopy.training import CHECKPOINT, TrainingState, batches_from, validation_due
from utils.errors import InputError
from utils.runs import read_tensors
from utils.seeds import INITIAL_WEIGHTS, generator_for

SHORT = ["preset=demo", "batch_size=2", "epochs=2", "window=16", "num_rdb=1", "num_dense_layers=1", "channels=8"]
SHORT += ["growth_channels=4", "max_dates=3", "validations_per_epoch=1", "t_0=1", "precision=32"]


@pytest.fixture
def tiles(small_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run on the small tiles, its cache shared by the tests."""
    return [f"data={small_tiles}", f"cache={tmp_path_factory.getbasetemp() / 'canopy_cache'}"]


@pytest.mark.plots
def test_a_run_leaves_what_it_promises(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(tiles[0].partition("=")[2])
    monkeypatch.setattr(canopy, "demo_root", lambda _: root)
    done = run_canopy(*SHORT, "data=demo", tiles[1])
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert document["data"]["simulated"] and document["squares"] == {"training": 2, "validation": 1, "test": 1}
    total = document["test"]["all"]
    assert {"mae", "rmse", "bias", "mape", "r2", "gradient_difference", "fine_structure_percent", "mae_best_shift"} < set(
        total
    )
    assert {"precision", "recall", "f1", "accuracy", "iou"} < set(total)
    assert sum(document["test"][name]["pixels"] for name in class_names()) == total["pixels"]
    assert document["test"]["tile 31TDL"]["mae"] == pytest.approx(total["mae"])
    assert set(document["baselines"]) == {"mean height", "gradient boosting"}
    assert f"[*] MAE: {total['mae']:.4f} m (simulated)" in done.stdout
    assert "[*] Sun and view angles: used; masks of tall vegetation: used" in done.stdout
    assert document["data"]["angles"] and document["data"]["mask"]
    for name in ("scatter", "height_classes", "test", "pictures/validation_0002"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not (tmp_path / CHECKPOINT).exists()

    (window,) = (tmp_path / "test").iterdir()
    with rasterio.open(window) as file:
        assert file.crs.to_epsg() == 2154 and file.res == (5, 5) and file.shape == (32, 32) and file.nodata == -10000
        assert file.descriptions == ("height (m)", "vegetation (probability)", "reference (m)", "error (m)")
        assert file.tags()["note"] == "simulated"
        height, vegetation, reference, error = file.read()
        easting, northing = (1000 * int(part) for part in window.stem.split("_")[1:])
        assert (file.bounds.left, file.bounds.top) == (easting + 420, northing - 420)
    valid = error != -10000
    np.testing.assert_allclose(error[valid], (height - reference)[valid], atol=1e-5)
    assert not reference[~valid].any() and not valid.all()
    assert np.abs(error[valid]).mean() == pytest.approx(total["mae"], rel=1e-4)
    assert vegetation.min() >= 0 and vegetation.max() <= 1 and height.min() >= 0

    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "best.safetensors",
        "second_best.safetensors",
        "last.safetensors",
    }
    _, record = read_tensors(tmp_path / "models" / "best.safetensors")
    assert record["simulated"] and record["margin"] == 8 and record["resolution"] == 5 and record["angles"]
    assert record["statistics"]["source"] in ("published", "training pixels") and record["flags"]["channels"] == 8

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert len(events.Scalars("loss_train")) == 2
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([1e-3, 2.5e-4])
    assert len(events.Images("validation")) == 2 and {"scatter", "test"} <= set(events.Tags()["images"])


def test_training_stops_early_and_the_best_weights_are_tested(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made to rise, so that the first validation is the best and the last weights are others."""
    real, losses = canopy.evaluate, iter([1.0, 2.0, 3.0])
    tested: dict[str, torch.Tensor] = {}

    def evaluate(run: canopy.Run, samples: CanopyPatches, label: str, *rest: Any) -> Evaluation:
        result = real(run, samples, label, *rest)
        if samples is run.data.validation:
            return replace(result, loss=next(losses))
        tested.update({name: tensor.clone() for name, tensor in run.state.module.state_dict().items()})
        return result

    monkeypatch.setattr(canopy, "evaluate", evaluate)
    done = run_canopy(*SHORT, *tiles, "epochs=5", "patience=2")
    assert done.returncode == 0 and "[*] Early stopping at step 3" in done.stdout
    best, record = read_tensors(tmp_path / "models" / "best.safetensors")
    last, _ = read_tensors(tmp_path / "models" / "last.safetensors")
    assert record["step"] == 1 == json.loads((tmp_path / "metrics.json").read_text())["best_step"]
    assert all(torch.equal(best[name], tensor) for name, tensor in tested.items())
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_gradients_clipped_to_almost_nothing_train_nothing(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path
) -> None:
    net = ThreasureNet(
        5, 16, encoder="rdn", num_rdb=1, num_dense_layers=1, growth_channels=4, channels=8, upsampling="shuffle"
    )
    net.initialise(generator_for(42, INITIAL_WEIGHTS))
    moved = []
    for limit in ("1e-14", "0"):
        assert run_canopy(*SHORT, *tiles, f"clip_norm={limit}").returncode == 0
        last, _ = read_tensors(tmp_path / "models" / "last.safetensors")
        moved.append(max(float((last[name] - tensor).abs().max()) for name, tensor in net.state_dict().items()))
    assert moved[0] < 1e-5 and moved[1] > 1e-3


def test_accumulated_batches_make_the_step_of_one_batch(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threasure_net, "ATTENTION_DROPOUT", 0.0)
    # Of the losses, the one that is a mean over windows, whatever batch they are in.
    rarely = ["epochs=10", "t_0=10", "loss=patch_mae+vegetation", "validations_per_epoch=0.2"]
    outcomes = []
    for flags in (["batch_size=2"], ["batch_size=1", "accumulate=2"], ["batch_size=1"]):
        assert run_canopy(*SHORT, *tiles, *rarely, *flags).returncode == 0
        kept, last = (read_tensors(tmp_path / "models" / f"{name}.safetensors") for name in ("epoch_0010", "last"))
        assert kept[1]["step"] == last[1]["step"] and all(torch.equal(kept[0][name], last[0][name]) for name in last[0])
        outcomes.append(
            [record["loss_val"] for record in json.loads((tmp_path / "metrics.json").read_text())["validations"]]
        )
    whole, accumulated, smaller = outcomes
    assert accumulated == pytest.approx(whole, rel=1e-5) and smaller != pytest.approx(whole, rel=1e-3)


def test_training_does_not_depend_on_validation_and_test_data(run_canopy: Callable[..., Ended], tmp_path: Path) -> None:
    """Statistics, weights and baselines are the same when the heights and images of validation and test are others."""
    outcomes = []
    for number in range(2):
        root = write_root(tmp_path / "root", spectrum=2 * SPECTRUM)
        for path in (root / "patches").rglob("*0440_6741.tif") if number else ():
            with rasterio.open(path, "r+") as file:
                file.write(file.read() + 300)
        for path in (root / "lidar").rglob("*0441_6741*.tif") if number else ():
            with rasterio.open(path, "r+") as file:
                file.write(file.read() // 2)
        flags = [f"data={root}", f"cache={tmp_path / 'cache'}", "statistics=data", "epochs=1"]
        assert run_canopy(*SHORT, *flags).returncode == 0
        weights, record = read_tensors(tmp_path / "models" / "last.safetensors")
        document = json.loads((tmp_path / "metrics.json").read_text())
        outcomes.append(
            (weights, record["statistics"], document["data"]["sha256"], document["validations"], document["test"])
        )
    (weights, statistics, digests, *metrics), (others, again, changed, *other_metrics) = outcomes
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items()) and statistics == again
    assert digests["training"] == changed["training"]
    assert digests["validation"] != changed["validation"] and digests["test"] != changed["test"]
    assert metrics[0] != other_metrics[0] and metrics[1] != other_metrics[1]


def test_a_validation_is_shown_before_the_checkpoint_counts_it(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run killed in between would lack its plot and its metrics in TensorBoard."""

    def fail(_: object) -> None:
        raise InputError("stopped")

    monkeypatch.setattr(TrainingState, "save", fail)
    assert run_canopy(*SHORT, *tiles).returncode == 2
    assert (tmp_path / "pictures" / "validation_0001.png").exists()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Scalars("validation/mae")) == 1 and "data/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("context", ["training", "validation", "test"])
def test_squares_without_tall_vegetation_are_refused(run_canopy: Callable[..., Ended], tmp_path: Path, context: str) -> None:
    root = write_root(tmp_path / "root")
    table = pd.read_parquet(next((root / "patches").rglob("*.parquet")))
    for name in table["lidar_name"][table["context"] == context].unique():
        with rasterio.open(next((root / "lidar").rglob(name)), "r+") as file:
            file.write(np.zeros_like(file.read()))
    done = run_canopy(*SHORT, f"data={root}", f"cache={tmp_path / 'cache'}")
    assert done.returncode == 2 and f"no selected {context} square has tall vegetation" in done.stderr


def test_a_full_disk_while_writing_tensorboard_events_is_one_sentence(
    run_canopy: Callable[..., Ended], tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(canopy, "train", fail)
    done = run_canopy(*SHORT, *tiles)
    assert done.returncode == 2 and "the disk is full; free some space, then resume with:" in done.stderr


def test_an_input_error_in_a_data_loading_process_is_one_sentence(
    run_canopy: Callable[..., Ended], tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("31TDL/0440_6740 is gone from the cache")

    monkeypatch.setattr(CanopyPatches, "sample", fail)
    done = run_canopy(*SHORT, *tiles, "workers=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "canopy.py: 31TDL/0440_6740 is gone from the cache"


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    """A run of its own process."""
    arguments = [part for text in flags for part in (f"--{text.split('=', 1)[0]}", text.split("=", 1)[1])]
    command = [sys.executable, str(PROJECT / "canopy.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=quick_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def results(folder: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """What must be the same in two runs that ought to be."""
    document = json.loads((folder / "metrics.json").read_text())
    metrics = {name: document[name] for name in ("test", "best_step", "steps", "validations")}
    return metrics, (folder / "models" / "last.safetensors").read_bytes(), next((folder / "test").iterdir()).read_bytes()


def test_a_killed_run_resumes_to_the_same_metrics_bit_for_bit(tiles: list[str], tmp_path: Path) -> None:
    folders = tmp_path / "undisturbed", tmp_path / "killed"
    # Checkpoints fall within epochs of two steps, and within what a reading process has read ahead.
    flags = [*SHORT, *tiles, "batch_size=1", "epochs=5", "validations_per_epoch=0.67", "workers=1"]
    for folder in folders:
        folder.mkdir()
    killed = start(folders[1], *flags)
    deadline = time.time() + 120
    while not (folders[1] / CHECKPOINT).exists() and time.time() < deadline and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert (folders[1] / CHECKPOINT).exists() and not (folders[1] / "metrics.json").exists()
    for folder in folders:
        process = start(folder, *flags)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    (metrics, *files), (others, *other_files) = (results(folder) for folder in folders)
    assert json.dumps(metrics) == json.dumps(others)
    assert files == other_files


def test_an_interrupted_run_says_how_to_resume(tiles: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT, *tiles, "epochs=1000", "patience=1000")
    deadline = time.time() + 120
    while not (tmp_path / CHECKPOINT).exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command in the same folder" in errors and "Traceback" not in errors


def test_a_checkpoint_is_not_continued_with_other_flags(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canopy, "test", lambda *_: (_ for _ in ()).throw(InputError("stopped")))
    assert run_canopy(*SHORT, *tiles).returncode == 2
    assert (tmp_path / CHECKPOINT).exists()
    done = run_canopy(*SHORT, *tiles, "seed=7")
    assert done.returncode == 2 and "seed=42" in done.stderr and "seed=7" in done.stderr


def test_an_invalid_checkpoint_is_refused_in_one_sentence(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path
) -> None:
    for content in (b"", b"no checkpoint"):
        (tmp_path / CHECKPOINT).write_bytes(content)
        done = run_canopy(*SHORT, *tiles)
        assert done.returncode == 2 and "checkpoint.pt is damaged or of an earlier version of this project" in done.stderr


QUICK = str(PROJECT / "tests" / "site" / "sitecustomize.py")
NAME_THREADS_AT_EXIT = """
import atexit, pathlib, threading
@atexit.register
def name_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(f"threads_{threading.get_native_id()}").write_text("".join(names))
"""


def test_two_processes_end_where_one_ends(run_script: Runner, tiles: list[str], tmp_path: Path) -> None:
    """None exits with its process group's threads alive: they abort now and then when Python shuts down under them."""
    quick = quick_environment()
    (tmp_path / "sitecustomize.py").write_text(f"import runpy\nrunpy.run_path({QUICK!r})\n{NAME_THREADS_AT_EXIT}")
    environ = quick | {"PYTHONPATH": os.pathsep.join([str(tmp_path), quick["PYTHONPATH"]])}
    outcomes = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        flags = [*tiles, f"devices={devices}"]
        done = run_script("canopy.py", *SHORT, *flags, cwd=folder, env=environ)
        assert done.returncode == 0, done.stderr
        threads = [path.read_text() for path in folder.glob("threads_*")]
        assert len(threads) == devices and "gloo" not in "".join(threads)
        document = json.loads((folder / "metrics.json").read_text())
        outcomes.append((document, read_tensors(folder / "models" / "last.safetensors")[0]))
    (one, weights), (two, others) = outcomes
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=2e-5)
    for record, other in zip(one["validations"], two["validations"], strict=True):
        assert other == pytest.approx(record, rel=1e-3)
    assert two["test"]["all"] == pytest.approx(one["test"]["all"], rel=1e-2, nan_ok=True)


def test_several_processes_refuse_in_one_sentence(run_script: Runner) -> None:
    done = run_script("canopy.py", *SHORT, "data=nowhere", "devices=2")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "canopy.py: " in done.stderr and "nowhere does not exist" in done.stderr


@pytest.mark.parametrize(
    "flags", [["encoder=unet", "upsampling=interpolation", "resolution=10"], ["resolution=2.5", "precision=auto"]], ids=str
)
def test_variants_run(run_canopy: Callable[..., Ended], tiles: list[str], flags: list[str]) -> None:
    done = run_canopy(*SHORT, *tiles, "epochs=1", *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["resolution=3"], "resolution: '3' is not one of 10, 5, 2.5"),
        (["encoder=vit"], "encoder: 'vit' is not one of rdn, unet"),
        (["loss=mse"], "loss: 'mse' is not one of"),
        (["tiles=30TXT"], "no tile 30TXT; present: 31TDL"),
        (["data=nowhere"], "nowhere does not exist; a folder of tiles is expected"),
        (["window=120"], "window of 120 pixels"),
        (["batch_size=3"], "2 training squares do not fill one step of batch_size=3"),
        (
            ["devices=3", "batch_size=2"],
            "shared evenly by 3 processes; batch_size=3 or a multiple can",
        ),
        (["min_dates=50"], "squares with fewer than 50 images"),
        (["lidar_resolution=5", "resolution=5"], "LiDAR"),
        (["channels=6"], "channels"),
        (["devices=2", "encoder=unet"], "encoder=unet runs in one process"),
        (["num_nodes=2"], "num_nodes=2 needs torchrun or srun"),
        (["lr=1e30"], "heights predicted for 31TDL/"),
        (["lr=1e30", "epochs=4", "validations_per_epoch=0.25"], "the loss of step 2 is not finite, at 31TDL/"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_one_sentence(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, flags: list[str], expected: str
) -> None:
    done = run_canopy(*SHORT, *tiles, *flags)
    assert done.returncode == 2 and expected in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("canopy.py: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_processes_must_be_as_many_as_were_launched(
    run_canopy: Callable[..., Ended], tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_canopy(*SHORT, *tiles)
    assert done.returncode == 2 and "are 1 processes, but 2 were launched" in done.stderr


def test_an_installed_slurm_is_not_mentioned_to_runs_outside_of_it(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = run_canopy(*SHORT, *tiles, "epochs=1")
    assert done.returncode == 0 and "srun" not in done.stdout + done.stderr


def test_flags_that_do_not_fit_are_refused_before_anything_is_read(
    run_canopy: Callable[..., Ended], tiles: list[str], tmp_path: Path
) -> None:
    for flag in ("window=120", "batch_size=3"):
        assert run_canopy(*SHORT, tiles[0], f"cache={tmp_path / 'empty'}", flag).returncode == 2
    assert not (tmp_path / "empty").exists()


def test_bf16_is_refused_without_hardware_support_and_auto_falls_back(
    run_canopy: Callable[..., Ended], tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    refused = run_canopy(*SHORT, *tiles, "precision=bf16")
    assert refused.returncode == 2 and "precision=bf16" in refused.stderr
    done = run_canopy(*SHORT, *tiles, "precision=auto", "epochs=1")
    assert "[*] Precision 32: this cpu has no native bf16 arithmetic" in done.stdout


def test_out_of_memory_says_which_flags_to_lower(
    run_canopy: Callable[..., Ended], tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(canopy, "predict", fail)
    done = run_canopy(*SHORT, *tiles)
    assert done.returncode == 2
    assert "batch_size=2" in done.stderr and "32 x 32 pixels" in done.stderr and "lower batch_size" in done.stderr


def test_presets_say_what_they_change() -> None:
    cpu = torch.device("cpu")
    flags: dict[str, Any] = dict.fromkeys(canopy.AUTO)
    rest: dict[str, Any] = {"lidar_resolution": None, "workers": None, "precision": "32", "preset": "auto"}
    demo: dict[str, Any] = {**flags, **rest, "resolution": 5.0, "data": "demo", "lr": 0.5}
    line, *_ = canopy.resolve_auto_flags(demo, cpu)
    assert (
        line.startswith("Preset demo; differs from the published values (in brackets)")
        and "channels 32 (64)" in line
        and "lr" not in line
    )
    assert demo["lr"] == 0.5 and demo["channels"] == 32
    real: dict[str, Any] = {**flags, **rest, "resolution": 10.0, "data": "/somewhere"}
    assert canopy.resolve_auto_flags(real, cpu)[0] == "Preset published"
    assert (real["num_rdb"], real["num_dense_layers"], real["batch_size"], real["accumulate"]) == (4, 4, 32, 4)
    assert real["clip_norm"] == 0 and demo["clip_norm"] > 0 and demo["epochs"] == 140


def test_validations_are_spread_over_epochs() -> None:
    def due(steps: int, often: float) -> list[int]:
        return [step for step in range(1, 13) if validation_due(step, steps, often)]

    assert due(4, 4) == list(range(1, 13))
    assert due(6, 1) == [6, 12]
    assert due(6, 4) == [2, 3, 5, 6, 8, 9, 11, 12]
    assert due(3, 0.5) == [6, 12]


def test_processes_share_each_batch_and_resume_within_an_epoch() -> None:
    sizes = {"batch_size": 4, "accumulate": 2, "epochs": 2, "seed": 1}
    whole = list(batches_from(19, 0, 0, 1, **sizes))
    assert len(whole) == 8 and all(len(batch) == 4 for batch in whole)  # three squares are left out of each epoch
    for epoch in range(2):
        seen = [index for batch in whole for index, of in batch if of == epoch]
        assert len(set(seen)) == 16
    halves = [list(batches_from(19, 0, rank, 2, **sizes)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert list(batches_from(19, 3, 0, 1, **sizes)) == whole[6:]


def test_features_are_means_of_the_parts_of_the_year() -> None:
    images = np.full((3, 10, 2, 2), 100, dtype=np.int16)
    images[1] = 300
    images[2, :, 0, 0] = -10000
    days = np.array([0, 20, 364])
    x = pixel_features(images, days, -10000).reshape(2, 2, PARTS_OF_YEAR, 10)
    assert (x[:, :, 0] == 200).all() and np.isnan(x[:, :, 1:-1]).all()
    assert np.isnan(x[0, 0, -1]).all() and (x[1:, :, -1] == 100).all()


def test_boosting_learns_despite_parts_of_the_year_without_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4)).astype(np.float32)
    y = (10 + 3 * x[:, 0]).astype(np.float32)
    x[:, 2] = math.nan
    predicted = fit_boosting(x[:2000], y[:2000], 1)(x[2000:])
    assert np.abs(predicted - y[2000:]).mean() < 0.3


def test_help_explains_every_flag_with_its_default() -> None:
    said = canopy.parser.format_help()
    assert all(f"--{name} " in said for name in canopy.parser.types)
    assert said.count("(default:") + said.count("(default:\n") >= len(canopy.parser.types) - 1
