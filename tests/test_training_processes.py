"""Networks shared among processes, which does not show in a result."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PROJECT, environment, quick_environment, running_cluster
from test_training import fold_data, new_training

from utils.errors import InputError
from utils.training import Training, initial_state, train
from utils.training_processes import training_processes

FLAGS = ("--dataset", "demo", "--folds", "3", "--num_channels", "8 8 8 8", "--stem_channels", "8", "--batch_size", "64")


# PyTorch takes no more threads from OMP_NUM_THREADS than there are cores.
WRAPPER = """
import runpy, sys, torch
torch.set_num_threads(int(sys.argv.pop(1)))
sys.argv[0] = "main.py"
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("main", run_name="__main__")
"""


def start(folder: Path, processes: int, *flags: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environ = quick_environment() | {"SECONDS_BETWEEN_CHECKPOINTS": "0"}
    command = [sys.executable, "-c", WRAPPER, str(processes), str(PROJECT), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_processes(run: subprocess.Popen[str], epoch: int) -> list[psutil.Process]:
    """The processes of a run that has reached an epoch."""
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith(f"[*] Epoch: {epoch}"):
            return psutil.Process(run.pid).children()
    pytest.fail("the run ended before")


def test_figures_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Too much weight decay makes folds stop one after the other."""
    outcomes = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        run = start(folder, processes, "--epochs", "45", "--warmup_epochs", "4", "--lr", "0.02", "--weight_decay", "2")
        output, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
        differing = (" time ", "Throughput", "Results: ")
        said = [line for line in output.splitlines() if not any(words in line for words in differing)]
        stops = {line for line in said if "Early stopping" in line}
        losses = [line for line in said if line not in stops]
        outcomes.append(((folder / "predictions.csv").read_bytes(), losses, stops))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2]


@pytest.fixture
def training() -> Training:
    return new_training("ResNet18T")


def test_the_last_network_of_a_resumed_run_trains_on_one_thread_too(training: Training) -> None:
    """Two threads round otherwise, and the figures would not be those of an undisturbed run."""
    state, data = initial_state(training, 1, 0), {1: fold_data()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = train(training, state, data[1], 1)
        torch.set_num_threads(2)
        with training_processes(training, data, [state]) as processes:
            processes.submit(state)
            assert processes.free == 0
            (shared,) = processes.collect(60)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert expected.records == shared.records and shared.state.epoch == 1
    for name, tensor in expected.state.network.items():
        assert torch.equal(tensor, shared.state.network[name])


def test_a_process_that_the_system_ends_is_told_and_the_run_goes_on_later(tmp_path: Path) -> None:
    run = start(tmp_path, 2, "--epochs", "30", "--warmup_epochs", "1")
    wait_for_processes(run, 10)[0].kill()
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 2
    assert "the system ended a process of the training, probably because memory ran out; to resume" in errors
    assert "Traceback" not in errors
    again = start(tmp_path, 2, "--epochs", "30", "--warmup_epochs", "1")
    output, errors = again.communicate(timeout=100)
    assert again.returncode == 0 and "Resuming after epoch" in output, errors


def test_a_process_that_ended_while_it_was_idle_is_told(training: Training) -> None:
    state, others = initial_state(training, 1, 0), multiprocessing.active_children()
    with training_processes(training, {1: fold_data()}, [state]) as processes:
        (process,) = [one for one in multiprocessing.active_children() if one not in others]
        process.kill()
        process.join(10)
        with pytest.raises(InputError, match="the system ended a process of the training"):
            processes.submit(state)


def test_an_error_of_a_process_arrives_with_its_place(training: Training) -> None:
    state = initial_state(training, 1, 0)._replace(fold=9)
    with training_processes(training, {1: fold_data()}, [initial_state(training, 1, 0)]) as processes:
        processes.submit(state)
        with pytest.raises(RuntimeError, match="KeyError: 9"):
            processes.collect(60)


def test_a_diverging_fold_ends_the_run(tmp_path: Path) -> None:
    run = start(tmp_path, 2, "--lr", "1e30", "--epochs", "30", "--warmup_epochs", "0")
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 2 and "the training diverged; a lower lr is needed" in errors
    assert "Traceback" not in errors


def test_without_fork_this_process_trains(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    states, others = [initial_state(training, number, 0) for number in (1, 2)], multiprocessing.active_children()
    with training_processes(training, {1: fold_data(), 2: fold_data()}, states) as processes:
        assert multiprocessing.active_children() == others and processes.free == 1
        processes.submit(states[1])
        assert processes.free == 0
        (segment,) = processes.collect(0)
    assert segment.state.fold == 2 and list(processes.epochs_done) == [0, 0, 1]


def test_a_cluster_whose_worker_dies_trains_to_the_same_predictions(
    dask_cluster: tuple[str, "list[subprocess.Popen[bytes]]"], tmp_path: Path
) -> None:
    address, workers = dask_cluster
    flags = ("--epochs", "11", "--warmup_epochs", "1", "--ensemble_count", "2")
    undisturbed = start(tmp_path / "here", 2, *flags)
    run = start(tmp_path / "cluster", 2, *flags, "--scheduler", address)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("[*] Epoch: 1"):
            break
    workers[0].kill()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    undisturbed.communicate(timeout=120)
    assert (tmp_path / "cluster" / "predictions.csv").read_bytes() == (tmp_path / "here" / "predictions.csv").read_bytes()


def test_errors_of_a_cluster_are_told(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.cluster.SECONDS_TO_CONNECT", 1)
    states = [initial_state(training, 1, 0)]
    with (
        pytest.raises(InputError, match=r"scheduler=tcp://127\.0\.0\.1:9 cannot be reached"),
        training_processes(training, {1: fold_data()}, states, "tcp://127.0.0.1:9"),
    ):
        pytest.fail("connected to nothing")


def test_on_a_gpu_networks_of_a_group_are_collected_at_once(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a CPU, which is taken for a GPU."""
    states = [initial_state(training, fold, member) for fold in (1, 2) for member in (0, 1)]
    data = {1: fold_data(), 2: fold_data(76)}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("utils.training_processes.trains_together", lambda *_: True)
    with training_processes(training, data, states) as processes:
        assert processes.free == 4
        for state in states:
            processes.submit(state)
        assert processes.free == 0
        segments = processes.collect(0)
    assert [(one.state.fold, one.state.member, one.state.epoch) for one in segments] == [
        (1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1),
    ]  # fmt: skip
    assert list(processes.epochs_done) == [0, 1, 1]
    alone = train(training, states[3], data[2], 1)
    assert segments[3].records[0]["loss_train"] == pytest.approx(alone.records[0]["loss_train"], rel=1e-5)


def test_a_cluster_that_does_not_know_the_project_is_told(training: Training, tmp_path: Path) -> None:
    with (
        running_cluster(tmp_path, environment() | {"PYTHONPATH": ""}) as (address, _),
        pytest.raises(InputError, match="its scheduler or a worker cannot import this project"),
        training_processes(training, {1: fold_data()}, [initial_state(training, 1, 0)], address),
    ):
        pytest.fail("connected")
