"""Folds shared among processes: who trains what, and that it does not show in a result."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DEFAULTS, PROJECT, environment

from models import make_stack
from utils.errors import InputError
from utils.fold_processes import fold_processes, next_stack
from utils.recipes import recipe_for
from utils.stacked_training import FoldData, FoldState, StackTraining, Tensors

FLAGS = ("--dataset", "demo", "--num_channels", "8 8 8 8", "--stem_channels", "8", "--batch_size", "64")


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
    environ = environment() | {"SECONDS_BETWEEN_CHECKPOINTS": "0"}
    command = [sys.executable, "-c", WRAPPER, str(processes), str(PROJECT), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_processes(run: subprocess.Popen[str], epoch: int) -> list[psutil.Process]:
    """The processes of a run that has reached an epoch."""
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith(f"[*] Epoch: {epoch}"):
            return psutil.Process(run.pid).children()
    pytest.fail("the run ended before")


def state(number: int, epoch: int) -> FoldState:
    return FoldState(number, epoch, Tensors())


def test_a_free_process_takes_the_folds_furthest_behind_that_are_at_one_epoch() -> None:
    waiting = [state(1, 20), state(2, 10), state(3, 10), state(4, 10), state(5, 20)]
    assert [one.number for one in next_stack(waiting, 2)] == [2, 3]
    assert [one.number for one in next_stack(waiting, 5)] == [2, 3, 4]


def test_figures_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """A rate too high for the network makes folds stop one after the other, so that stacks change."""
    outcomes = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        run = start(folder, processes, "--epochs", "45", "--warmup_epochs", "4", "--lr", "0.05")
        output, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
        differing = (" time ", "Throughput", "Results: ")
        said = [line for line in output.splitlines() if not any(words in line for words in differing)]
        stops = {line for line in said if "Early stopping" in line}
        losses = [line for line in said if line not in stops]
        outcomes.append(((folder / "predictions.csv").read_bytes(), losses, stops))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2]


def small_training(batch_size: int = 32) -> StackTraining:
    """Two folds of ResNet18T before their first epoch."""
    x, y = torch.randn(2, 80, 10, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 80)
    data, recipe = FoldData(x[0], y, x[1], y), recipe_for("ResNet18T", DEFAULTS)
    stack = make_stack("ResNet18T", 2, 10, 16, DEFAULTS)
    return StackTraining(stack, [data, data], 1, recipe, batch_size, 9, 9, 1, "32", torch.device("cpu"))


@pytest.fixture
def training() -> StackTraining:
    return small_training()


def test_the_last_fold_of_a_resumed_run_trains_on_one_thread_too(training: StackTraining) -> None:
    """Two threads round otherwise, and the figures would not be those of an undisturbed run."""
    state = training.initial_state(1)._replace(epoch=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (expected,) = training.advance([state])
        torch.set_num_threads(2)
        with fold_processes(training, [state]) as processes:
            processes.keep_busy([state])
            (shared,) = processes.collect(60)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(shared.state.tensors["weights"], expected.state.tensors["weights"])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_run(tmp_path: Path, end: signal.Signals) -> None:
    run = start(tmp_path, 2, "--epochs", "400", "--warmup_epochs", "1")
    processes = wait_for_processes(run, 1)
    assert len(processes) == 2
    run.send_signal(end)
    _, errors = run.communicate(timeout=20)
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_a_process_that_the_system_ends_is_told_and_the_run_goes_on_later(tmp_path: Path) -> None:
    run = start(tmp_path, 2, "--epochs", "30", "--warmup_epochs", "1")
    wait_for_processes(run, 10)[0].kill()
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 2
    assert "the system ended a process of the training, probably for want of memory; to go on" in errors
    assert "Traceback" not in errors
    again = start(tmp_path, 2, "--epochs", "30", "--warmup_epochs", "1")
    output, errors = again.communicate(timeout=100)
    assert again.returncode == 0 and "Resuming after epoch" in output, errors


def test_a_process_that_ended_while_it_was_idle_is_told(training: StackTraining) -> None:
    state, others = training.initial_state(1), multiprocessing.active_children()
    with fold_processes(training, [state]) as processes:
        (process,) = [one for one in multiprocessing.active_children() if one not in others]
        process.kill()
        process.join(10)
        with pytest.raises(InputError, match="the system ended a process of the training"):
            processes.keep_busy([state])


def test_a_diverging_fold_ends_the_run(tmp_path: Path) -> None:
    run = start(tmp_path, 2, "--lr", "1e30", "--epochs", "30", "--warmup_epochs", "0")
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 2 and "the training diverged; a lower lr is needed" in errors
    assert "Traceback" not in errors


def test_without_fork_this_process_trains_all_folds(training: StackTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    states, others = [training.initial_state(number) for number in (1, 2)], multiprocessing.active_children()
    with fold_processes(training, states) as processes:
        assert multiprocessing.active_children() == others
        processes.keep_busy(states)
        assert processes.in_training() == [1, 2]
        advances = processes.collect(0)
    assert [advance.state.number for advance in advances] == [1, 2]
    assert list(processes.epochs_done) == [0, 1, 1]


@pytest.mark.parametrize(("batch_size", "in_training"), [(32, [1, 2]), (20, [1])])
def test_folds_train_alone_where_a_stack_would_round_otherwise(batch_size: int, in_training: list[int]) -> None:
    training = small_training(batch_size)
    states = [training.initial_state(number) for number in (1, 2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fold_processes(training, states) as processes:
        processes.keep_busy(states)
        assert processes.in_training() == in_training
    torch.set_num_threads(threads)
