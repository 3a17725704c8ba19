"""Operation main as a user runs it: what it prints and leaves, how it resumes, how it refuses."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import DEFAULTS, PROJECT, Ended, Runner, _in_process, environment, quick_environment
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import main
from datasets.model_inputs import Inputs
from datasets.published_grassland import BANDS, PREDICTORS
from datasets.series_table import demo_table, prepare, split
from main import Run
from models import ESTIMATORS, make_network
from models.classical import Ridge
from utils.metrics import score
from utils.runs import CHECKPOINT, read_tensors

SMALL = ("dataset=demo", "folds=3", "num_channels=8 8 8 8", "stem_channels=8", "batch_size=64")
SHORT = (*SMALL, "epochs=12", "warmup_epochs=2")


def lines_of(output: str) -> list[str]:
    return [line for line in output.replace("\r", "\n").splitlines() if line.startswith("[*] ")]


def value_of(output: str, label: str) -> float:
    (line,) = [line for line in lines_of(output) if line.startswith(f"[*] {label}: ")]
    return float(line.split(": ")[1].split()[0])


def test_a_run_prints_and_leaves_what_it_promises(run_script: Runner, tmp_path: Path) -> None:
    done = run_script("main.py", *SHORT, "folds=5", "ensemble_count=2", "study_var=Shannon")
    assert done.returncode == 0, done.stderr
    said = lines_of(done.stdout)
    assert any("simulated table" in line for line in said)
    for expected in ("Warmup epoch: 2/2 - Train loss: ", "Epoch: 12", "Train loss: ", "Val loss: ", "Fold 5/5 - R2: "):
        assert any(expected in line for line in said), expected
    for label in ("R2 mean", "R2 std", "RRMSE mean", "RMSES mean", "RMSEU std", "Training time mean", "Testing time std"):
        assert np.isfinite(value_of(done.stdout, label))
    for pattern in ("Total params: ", "Total mult-adds (M): ", "Estimated Total Size (MB): "):
        assert sum(line.startswith(pattern) for line in done.stdout.splitlines()) == 1
    assert "Warming up the model..." in done.stderr
    assert "Training the model..." in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert metrics["table"]["simulated"] and set(predictions["table"]) == {"simulated table"}
    samples = prepare(demo_table(), "Shannon")
    assert sorted(predictions["key"]) == sorted(samples.keys["key"])
    assert (predictions["predicted_sd"] > 0).all()
    for number, rows in predictions.groupby("fold"):
        fold = metrics["folds"][int(number) - 1]
        again = score(rows["observed"].to_numpy(), rows["predicted"].to_numpy())
        assert fold["r2"] == pytest.approx(again.r2, rel=1e-5)
        assert fold["rows"]["test"] == len(rows)
    means = [fold["r2"] for fold in metrics["folds"]]
    assert metrics["summary"]["r2_mean"] == pytest.approx(np.mean(means))
    assert value_of(done.stdout, "R2 std") == pytest.approx(np.std(means), abs=1e-4)
    assert "[*] R2 mean: " in done.stdout and "(simulated)" in done.stdout
    for plot in ("scatter", "losses"):
        with Image.open(tmp_path / f"{plot}.png") as image:
            assert image.info["dpi"][0] >= 200
        assert (tmp_path / f"{plot}.pdf").read_bytes().startswith(b"%PDF")
    assert list(tmp_path.glob("events.out.tfevents.*"))
    left_over = [path.name for path in tmp_path.rglob("*") if "partial" in path.name or path.name == CHECKPOINT]
    assert not left_over


def test_events_go_to_the_folder_that_the_run_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(DEFAULTS, demo_table(), torch.device("cpu"))
    run.events.close()
    # A thread of the writer opens the file at some later time, in whatever folder the process then is.
    assert run.events.log_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["model=MLP", "lr=0.5", "kernel_size=3"], "Without effect on MLP: kernel_size=3"),
        (["model=ResNet18T", "lr=0.5", "kernel_size=3"], ""),
        (["model=ResNet18T", "lr=0.5", "eps=0.1", "original_training=yes"], "Without effect on ResNet18T: eps=0.1"),
        (["model=Ridge", "lr=0.5"], "Without effect on Ridge: lr=0.5"),
        (["model=Ridge", "num_kernels=9", "epochs=7"], "Without effect on Ridge: epochs=7, num_kernels=9"),
        (["model=Ridge", "precision=bf16"], "Without effect on Ridge: precision=bf16"),
        (["model=Transformer", "precision=bf16"], ""),
        (
            ["model=FCN", "original_training=yes", "strides=1 2 1 1"],
            "Without effect on FCN: original_training=yes, strides='1 2 1 1'",
        ),
    ],
)
def test_flags_that_a_model_does_not_read_are_told(
    run_main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    for name in ("train_networks", "fit_estimators", "report_results"):
        monkeypatch.setattr(main, name, lambda *_: None)
    lines = [line for line in lines_of(run_main("dataset=demo", *flags).stdout) if "Without effect" in line]
    assert lines == ([f"[*] {said}"] if said else [])


def test_a_saved_fold_predicts_again_from_its_file_alone(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    assert run_main(*SHORT, "ensemble_count=2").returncode == 0
    predictions = pd.read_csv(tmp_path / "predictions.csv").set_index("key")
    tensors, record = read_tensors(tmp_path / "models" / "fold_3.safetensors")
    flags = record["flags"]
    assert record["bands"] == list(BANDS) and record["simulated"] and flags["ensemble_count"] == 2
    networks = []
    for member in (1, 2):
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"member_{member}.")}
        networks.append(make_network(flags["model"], len(BANDS), len(record["steps"]), flags).eval())
        networks[-1].load_state_dict(own)
    rows = demo_table().rows.set_index("yep").loc[predictions.index[predictions["fold"] == 3]]
    scaled = (rows[PREDICTORS].to_numpy() - record["predictor_mean"]) / record["predictor_sd"]
    x = torch.from_numpy(scaled.astype(np.float32)).view(len(rows), 16, 10).transpose(1, 2)
    with torch.no_grad():
        predicted = torch.stack([network(x) for network in networks]).mean(0)
    np.testing.assert_allclose(predicted, predictions.loc[rows.index, "predicted"], rtol=1e-4)


def test_predictions_that_hardly_differ_are_told(run_main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network whose rate was too high: its figures mean little."""
    monkeypatch.setattr(Ridge, "predict", lambda _, inputs: 30 + 1e-3 * np.arange(len(inputs.x)))
    done = run_main("dataset=demo", "model=Ridge")
    assert done.returncode == 0, done.stderr
    told = [line for line in lines_of(done.stdout) if "predictions hardly differ, sd 0.0" in line]
    assert len(told) == 5 and all("of the observations; r2 and RMSEU say little" in line for line in told)


def test_observations_that_are_all_the_same_are_told(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    rows = demo_table().rows
    rows.loc[rows["explo"] == "ALB", "Shannon"] = 2.0
    rows.to_csv(tmp_path / "mine.csv", index=False)
    flags = [f"dataset={tmp_path / 'mine.csv'}", "model=Ridge", "study_var=Shannon", "split_procedure=split_by_observatory"]
    done = run_main(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all test observations are the same, r2 is undefined") == 1
    assert "all predictions are the same" not in done.stdout
    assert "table/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]


@pytest.mark.parametrize("model", ["ResNet18T", "Ridge"])
def test_nothing_is_learnt_from_test_rows(run_main: Callable[..., Ended], tmp_path: Path, model: str) -> None:
    """Scaler and weights of a fold are the same when the values of its test rows are others."""
    samples = prepare(demo_table(), "SpecRichness")
    fold = split(samples, "split_by_observatory", 42)[1]
    keys = samples.keys["key"].iloc[fold.test]
    rows = demo_table().rows
    changed = rows["yep"].isin(keys)
    assert changed.sum() == len(fold.test) > 100
    outcomes = []
    for number in range(2):
        rows.loc[changed, ["SpecRichness", *PREDICTORS]] *= 1 + number
        rows.to_csv(tmp_path / "mine.csv", index=False)
        flags = [f"dataset={tmp_path / 'mine.csv'}", f"model={model}", "split_procedure=split_by_observatory"]
        assert run_main(*SHORT, *flags).returncode == 0
        outcomes.append(
            (*read_tensors(tmp_path / "models" / "fold_2.safetensors"), (tmp_path / "predictions.csv").read_text())
        )
    (weights, record, figures), (others, again, other_figures) = outcomes
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())
    assert record["predictor_mean"] == again["predictor_mean"] and record["predictor_sd"] == again["predictor_sd"]
    assert figures != other_figures
    x = samples.x[fold.train].transpose(0, 2, 1).reshape(len(fold.train), -1)
    np.testing.assert_allclose(record["predictor_mean"], x.mean(0))
    np.testing.assert_allclose(record["predictor_sd"], x.std(0))


def test_the_rate_follows_the_schedule_and_the_best_weights_are_kept(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    """Warm-up from 0, a cosine after it; too much weight decay makes some folds stop early."""
    done = run_main(*SMALL, "folds=5", "epochs=45", "warmup_epochs=4", "lr=0.02", "weight_decay=2")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    folds = json.loads((tmp_path / "metrics.json").read_text())["folds"]
    stopped = [fold for fold in folds if fold["last_epoch"] < 45]
    assert stopped and all(
        f"[*] Fold {f['fold']}/5: Early stopping at epoch {f['last_epoch']}" in done.stdout for f in stopped
    )
    for fold in folds:
        number, last = fold["fold"], fold["last_epoch"]
        rates = [event.value for event in events.Scalars(f"lr/fold_{number}")]
        cosine = [0.01 * (1 + np.cos(np.pi * epoch / 45)) for epoch in range(last)]
        assert rates == pytest.approx([0, 0.005, 0.01, 0.015, *cosine])
        validations = {event.step - 4: event.value for event in events.Scalars(f"loss_val/fold_{number}")}
        assert list(validations) == [epoch for epoch in (1, 10, 20, 30, 40) if epoch <= last]
        assert fold["best_epoch"] == min(validations, key=lambda epoch: validations[epoch])
        assert last == 45 or list(validations)[-3] == fold["best_epoch"]


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(
    run_main: Callable[..., Ended], tmp_path: Path
) -> None:
    figures = []
    for seed in (1, 1, 2):
        assert run_main(*SHORT, f"seed={seed}").returncode == 0
        figures.append((tmp_path / "predictions.csv").read_bytes())
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.parametrize("model", ["Ridge", "GaussianProcess", "Rocket"])
def test_estimators_go_through_the_same_door(run_main: Callable[..., Ended], tmp_path: Path, model: str) -> None:
    members = 2 if ESTIMATORS[model].has_random_part else 1
    done = run_main("dataset=demo", f"model={model}", "num_kernels=200", f"ensemble_count={members}")
    assert done.returncode == 0, done.stderr
    assert "Total params: -1" in done.stdout
    assert value_of(done.stdout, "R2 mean") > 0.3
    tensors, record = read_tensors(tmp_path / "models" / "fold_1.safetensors")
    rows = pd.read_csv(tmp_path / "predictions.csv").query("fold == 1").set_index("key")
    raw = demo_table().rows.set_index("yep").loc[rows.index, PREDICTORS].to_numpy()
    x = ((raw - record["predictor_mean"]) / record["predictor_sd"]).astype(np.float32)
    x = x.reshape(-1, 16, 10).transpose(0, 2, 1)
    each = []
    for member in range(1, members + 1):
        own = {k.split(".")[1]: v.numpy() for k, v in tensors.items() if k.startswith(f"member_{member}.")}
        each.append(ESTIMATORS[model].from_tensors(own).predict(Inputs(x, np.empty((len(x), 0), np.float32), {})))
    np.testing.assert_allclose(np.mean(each, axis=0), rows["predicted"], rtol=1e-4)
    assert (rows["predicted_sd"].max() > 0) == (members > 1)


def test_rocket_runs_on_the_threads_that_it_is_given(run_script: Runner) -> None:
    environ = environment() | {"NUMBA_NUM_THREADS": "1"}
    done = run_script("main.py", "dataset=demo", "model=Rocket", "num_kernels=20", env=environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["MLP", "BiLSTM", "Transformer", "FCN", "ResidualNet", "InceptionTime"])
def test_every_architecture_runs_to_its_figures(run_main: Callable[..., Ended], model: str) -> None:
    done = run_main("dataset=demo", f"model={model}", "num_filters=8", "epochs=1", "warmup_epochs=0")
    assert done.returncode == 0, done.stderr
    assert np.isfinite(value_of(done.stdout, "RRMSE mean"))


def test_flags_change_what_is_trained(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    def predicted(*flags: str) -> "pd.Series[float]":
        done = run_main(*SMALL, "epochs=2", "warmup_epochs=0", *flags)
        assert done.returncode == 0, done.stderr
        return pd.read_csv(tmp_path / "predictions.csv")["predicted"]

    plain = predicted()
    for flag in ("precision=bf16", "original_training=yes", "shortcut_pooling=no", "kernel_size=3"):
        assert (predicted(flag) - plain).abs().max() > 1e-3, flag


# Long enough for one fold to stop early and for several checkpoints.
LONG = (*SMALL, "folds=2", "epochs=25", "warmup_epochs=5", "lr=0.02")


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    arguments = [part for text in flags for part in (f"--{text.split('=')[0]}", text.split("=", 1)[1])]
    command = [sys.executable, str(PROJECT / "main.py"), *arguments]
    environ = quick_environment() | {"SECONDS_BETWEEN_CHECKPOINTS": "0"}
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"[*] Epoch: {epoch}"):
            return
    pytest.fail("the run ended before it could be interrupted")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, *LONG)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


def test_a_network_learns_the_simulated_table(undisturbed: Path) -> None:
    assert 0.35 < json.loads((undisturbed / "metrics.json").read_text())["summary"]["r2_mean"] < 0.8


def test_a_folder_with_figures_keeps_them(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    run = _in_process("main", undisturbed, monkeypatch, capsys, afresh=False)
    done = run(*LONG)
    assert done.returncode == 0 and "This run is complete" in done.stdout
    done = run(*LONG, "seed=43")
    assert done.returncode == 2 and "start a new run in another folder" in done.stderr and done.stderr.count("\n") == 1
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_figures(
    tmp_path: Path, undisturbed: Path, run_main: Callable[..., Ended]
) -> None:
    """Killed, then interrupted; its last epoch is not validated."""
    for epoch, end in ((1, signal.SIGKILL), (10, signal.SIGINT)):
        process = start(tmp_path, *LONG)
        wait_for_epoch(process, epoch)
        time.sleep(0.1)
        before, children = time.monotonic(), psutil.Process(process.pid).children()
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - before < 5 and children
        assert not psutil.wait_procs(children, timeout=10)[1]
        if end == signal.SIGINT:
            assert process.returncode == 130
            assert "Interrupted; to resume from the last checkpoint: " in errors and "Traceback" not in errors
        assert (tmp_path / CHECKPOINT).exists() and not (tmp_path / "metrics.json").exists()
    refused = run_main(*LONG, "seed=7")
    assert refused.returncode == 2
    assert "is of a run with seed=42, but seed=7 was given; resume with the former value" in refused.stderr
    resumed = start(tmp_path, *LONG)
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert "Resuming after epoch" in output and "[*] Epoch: 25" in output
    assert output.count("[*] Val loss: ") == output.count("[*] Epoch: ") - 1
    assert (tmp_path / "predictions.csv").read_bytes() == (undisturbed / "predictions.csv").read_bytes()
    one, other = (json.loads((folder / "metrics.json").read_text())["folds"] for folder in (undisturbed, tmp_path))
    for a, b in zip(one, other, strict=True):
        timeless = {key for key in a if not key.startswith("seconds")}
        assert {key: a[key] for key in timeless} == {key: b[key] for key in timeless}


def test_an_interrupt_that_gets_lost_ends_the_run_all_the_same() -> None:
    """As one does that comes while the garbage collector calls back."""
    code = """
import time
from utils.runs import run_or_explain
def main():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            pass
run_or_explain(main)
"""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=environment(), **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Interrupted; to resume from the last checkpoint: " in errors


def test_a_checkpoint_of_an_earlier_version_is_refused(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    for content in (b"", b"no checkpoint", pickle.dumps({"identity": {}}, protocol=2)):
        (tmp_path / CHECKPOINT).write_bytes(content)
        done = run_main(*SHORT)
        assert done.returncode == 2
        assert "is damaged or of an earlier version of this project; delete it to start over" in done.stderr


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(run_script: Runner, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run_script("main.py", *SHORT, preexec_fn=small_files_only)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("main.py: ")]
    assert "could not be written" in line and "nothing was left half-written" in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*partial*"))
    for path in tmp_path.rglob("*.safetensors"):
        assert read_tensors(path)[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["model=VGG"], "model: 'VGG' is not one of MLP, BiLSTM"),
        (
            ["dataset=demo", "study_var=Evenness"],
            "no column 'Evenness', the requested study variable; columns with numbers",
        ),
        (["dataset=demo", "study_var=red_3"], "study_var=red_3: it is one of the predictors, of the band 'red'"),
        (["steps=3-x"], "steps: '3-x' is neither a whole number nor a range such as 3-20"),
        (["steps=9-3"], "steps: '9-3' is neither a whole number nor a range"),
        (["nodata=-9999 cloud"], "nodata: 'cloud' is not a number"),
        (["folds=1"], "folds: 1 is not a whole number of at least 2"),
        (
            ["dataset=demo", "steps=14-20"],
            "steps: 16 is not among those of simulated table, which are 0, 1, 2",
        ),
        (
            ["dataset=demo", "bands=red B8"],
            "bands: B8 is not among those of simulated table, which are blue",
        ),
        (["split_procedure=random"], "split_procedure: 'random' is not one of split_by_plot"),
        (["strides=1 2"], "strides: '1 2' has 2 numbers"),
        (["num_channels=64 64 64 wide"], "num_channels: '64 64 64 wide' is not 4 whole numbers"),
        (["shortcut_pooling=maybe"], "shortcut_pooling: 'maybe' is neither yes nor no"),
        (["precision=16"], "precision: '16' is not one of 32, bf16"),
        (["epochs=0"], "epochs: 0 is not a whole number of at least 1"),
        (["beta1=1"], "beta1: 1 is not a number of at least 0 and below 1"),
        (["eps=0"], "eps: 0 is not a number above 0"),
        (["lr=nan"], "lr: nan is not finite; a number of at least 0 is expected"),
        (["dataset=demo", "kernel_size=4"], "kernel_size=4 does not fit"),
        (["dataset=demo", "model=InceptionTime", "bottleneck_factor=999"], "bottleneck_factor=999 leaves no channel"),
        (["dataset=demo", "strides=9 9 1 1"], "leaves no time step"),
        (["model=Ridge", "ensemble_count=5"], "Ridge has no random part"),
        (["device=cuda:99"], "device=cuda:99 was asked for, but"),
        (["device=tpu"], "device=tpu is not one of auto, cpu, cuda or cuda:N"),
        (["dataset=absent.csv"], "absent.csv does not exist"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    run_main: Callable[..., Ended], tmp_path: Path, flags: list[str], said: str
) -> None:
    done = run_main(*flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_end_in_one_sentence(
    run_main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, said in (
        (errno.EDQUOT, "the disk is full; free some space, then resume with:"),
        (errno.EROFS, "Read-only file system"),
    ):

        def fail(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        # TensorBoard's own thread fails first, then the run that next writes to it.
        monkeypatch.setattr(RecordWriter, "write", fail)
        done = run_main(*SHORT)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_out_of_memory_says_which_flags_to_lower(run_main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("utils.training.run_epoch", fail)
    done = run_main(*SHORT)
    assert done.returncode == 2 and "out of memory on cpu with 3 networks; lower ensemble_count" in done.stderr


def test_a_diverging_training_says_so(run_main: Callable[..., Ended]) -> None:
    done = run_main(*SMALL, "lr=1e30", "epochs=30", "warmup_epochs=0")
    assert done.returncode == 2
    assert "the training diverged" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_real_table_says_what_to_do(
    run_main: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROJECT_DIR", str(tmp_path))
    done = run_main()
    assert done.returncode == 2
    assert "`make data` downloads it; dataset=demo runs on simulated data" in done.stderr


def test_help_explains_every_flag_and_reads_the_device_from_the_environment() -> None:
    environ = environment() | {"DEVICE": "cuda:7"}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "main.py"), "--help"], capture_output=True, text=True, check=True, env=environ
    )
    assert "(default: cuda:7)" in done.stdout
    for name in ("--study_var", "--warmup_epochs", "--precision", "--device"):
        assert name in done.stdout
    assert "(default: 1500)" in done.stdout


def test_the_defaults_are_the_published_ones() -> None:
    published = {
        "batch_size": 32, "bottleneck_factor": 4, "ensemble_count": 1, "epochs": 1500, "kernel_size": 5,
        "model": "ResNet18T", "num_blocks_per_stage": (1, 1, 1, 1),
        "num_channels": (64, 64, 64, 64), "num_filters": 64, "num_kernels": 15000, "original_training": False, "seed": 42,
        "shortcut_pooling": True, "split_procedure": "split_by_plot", "stem_channels": 96, "strides": (1, 1, 2, 1),
        "study_var": "SpecRichness", "warmup_epochs": 150,
    }  # fmt: skip
    assert {name: value for name, value in DEFAULTS.items() if name in published} == published
    assert DEFAULTS["covariates"] == DEFAULTS["nodata"] == "none" and DEFAULTS["bands"] == DEFAULTS["steps"] == "all"
    settings = dict(DEFAULTS)
    main.resolve_auto_flags(settings)
    adamw = {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.001}
    assert {name: settings[name] for name in adamw} == adamw


@pytest.mark.parametrize(("text", "value"), [("no", False), ("False", False), ("0", False), ("yes", True), ("1", True)])
def test_yes_and_no_mean_it(run_main: Callable[..., Ended], tmp_path: Path, text: str, value: bool) -> None:
    assert run_main("dataset=demo", "model=Ridge", f"original_training={text}").returncode == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["flags"]["original_training"] is value
