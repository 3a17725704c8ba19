"""Where networks are trained: in processes of this machine, on its GPU, or on a Dask cluster.

Steps of networks this small are too short to split: two threads that wait for each other at every operation are slower
than two processes that train a network each. A process takes the state of a network, trains it to its next stop and hands
it back. Which process trains which network changes nothing in its arithmetic (see `utils.training`).

On a GPU one process trains all networks together, and on other systems than Linux, which cannot fork safely, one after the
other.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, MutableSequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from utils.cluster import cluster
from utils.errors import InputError
from utils.runs import how_to_resume, say
from utils.training import FoldData, Segment, Training, TrainingState, train
from utils.training_together import groups_of, reason_against, train_together

if TYPE_CHECKING:
    from distributed import Client, Future

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class TrainingProcesses(Protocol):
    """What trains networks.

    Attributes:
        epochs_done: of each fold at this moment, the most of its members; index 0 is no fold.
    """

    epochs_done: MutableSequence[int]

    @property
    def free(self) -> int:
        """How many more networks can be taken now."""

    def submit(self, state: TrainingState) -> None:
        """Let a network be trained to its next stop.

        Raises:
            InputError: the system ended a process.
        """

    def collect(self, seconds: float) -> list[Segment]:
        """Networks that have come to a stop; other processes are waited for no longer than `seconds`.

        Raises:
            InputError: a loss is not finite, or the system ended a process.
        """


@contextlib.contextmanager
def training_processes(
    training: Training, data: Mapping[int, FoldData], states: list[TrainingState], scheduler: str = "none"
) -> Iterator[TrainingProcesses]:
    """What trains the networks best here; its processes end with the block.

    Args:
        training: what is common to all networks.
        data: of each fold, on the device.
        states: of the networks, as they start.
        scheduler: address of a Dask scheduler whose workers train, or none.
    """
    epochs_done = multiprocessing.RawArray("q", max(data) + 1)
    for state in states:
        epochs_done[state.fold] = max(epochs_done[state.fold], state.epoch)
    if scheduler != "none":
        with cluster(scheduler) as client:
            yield ClusterWorkers(training, data, epochs_done, client)
    elif training.device.type != "cpu" or sys.platform != "linux":
        yield ThisProcess(training, data, epochs_done, len(states))
    else:
        with _forked(training, data, epochs_done, len(states)) as connections:
            yield ForkedProcesses(connections, epochs_done)


def _advance(training: Training, data: FoldData, state: TrainingState, epochs_done: MutableSequence[int]) -> Segment:
    def done(fold: int, epochs: int) -> None:
        epochs_done[fold] = max(epochs, epochs_done[fold])

    return train(training, state, data, training.next_stop(state.epoch), done)


def trains_together(training: Training, data: FoldData) -> bool:
    """Whether networks advance together: on a GPU, if PyTorch can batch their layers; says so if it cannot."""
    if training.device.type == "cpu":
        return False
    reason = reason_against(training, data)
    if reason:
        say(f"Networks train one after the other, for PyTorch cannot batch their layers: {reason}")
    return not reason


class ThisProcess:
    """Trains networks here: on a GPU all that it can together, elsewhere one at a time."""

    def __init__(
        self, training: Training, data: Mapping[int, FoldData], epochs_done: MutableSequence[int], networks: int
    ) -> None:
        self.epochs_done = epochs_done
        self._training, self._data = training, data
        self._waiting: list[TrainingState] = []
        together = networks > 1 and trains_together(training, next(iter(data.values())))
        self._capacity = networks if together else 1

    @property
    def free(self) -> int:
        """See `TrainingProcesses`."""
        return self._capacity - len(self._waiting)

    def submit(self, state: TrainingState) -> None:
        """See `TrainingProcesses`."""
        self._waiting.append(state)

    def collect(self, seconds: float) -> list[Segment]:  # noqa: ARG002
        """See `TrainingProcesses`."""
        waiting, self._waiting = self._waiting, []
        if self._capacity == 1:
            return [_advance(self._training, self._data[state.fold], state, self.epochs_done) for state in waiting]
        return [segment for group in groups_of(self._training, waiting, self._data) for segment in self._together(group)]

    def _together(self, group: list[TrainingState]) -> list[Segment]:
        until = self._training.next_stop(group[0].epoch)
        segments = train_together(self._training, group, [self._data[state.fold] for state in group], until)
        for state in group:
            self.epochs_done[state.fold] = max(until, self.epochs_done[state.fold])
        return segments


class ForkedProcesses:
    """Trains networks in processes of one thread each."""

    def __init__(self, connections: list[Connection], epochs_done: MutableSequence[int]) -> None:
        self.epochs_done = epochs_done
        self._idle, self._busy = connections, list[Connection]()

    @property
    def free(self) -> int:
        """See `TrainingProcesses`."""
        return len(self._idle)

    def submit(self, state: TrainingState) -> None:
        """See `TrainingProcesses`."""
        with _telling_of_ended_processes():
            self._idle[-1].send(_as_arrays(state))
        self._busy.append(self._idle.pop())

    def collect(self, seconds: float) -> list[Segment]:
        """See `TrainingProcesses`."""
        segments = []
        for connection in wait(self._busy, seconds):
            assert isinstance(connection, Connection)
            with _telling_of_ended_processes():
                answer = _as_tensors(connection.recv())
            self._busy.remove(connection)
            self._idle.append(connection)
            if isinstance(answer, Exception):
                raise answer
            segments.append(answer)
        return segments


def _as_arrays(message: Any) -> Any:
    """Tensors as arrays, which travel by value: PyTorch would hand on shared memory, of which a container has little."""
    return tree_map_only(Tensor, lambda one: one if one.dtype == torch.bfloat16 else one.numpy(), message)


def _as_tensors(message: Any) -> Any:
    return tree_map_only(np.ndarray, torch.from_numpy, message)


@contextlib.contextmanager
def _telling_of_ended_processes() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise InputError(
            f"the system ended a process of the training, probably because memory ran out; to resume from the last saved "
            f"epoch: {how_to_resume()}"
        ) from error


@contextlib.contextmanager
def _forked(
    training: Training, data: Mapping[int, FoldData], epochs_done: MutableSequence[int], networks: int
) -> Iterator[list[Connection]]:
    """Connections to as many processes as PyTorch has threads, but not more than networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here, too, so that test predictions do not depend on the machine's threads
    fork = multiprocessing.get_context("fork")
    connections, processes = [], []
    try:
        for _ in range(min(threads, networks)):
            ours, theirs = fork.Pipe()
            # Training and data need no copy: a fork has them.
            process = fork.Process(target=_serve, args=(theirs, training, data, epochs_done, os.getpid()), daemon=True)
            processes.append(process)
            process.start()
            theirs.close()
            connections.append(ours)
        yield connections
    finally:
        for process in processes:
            process.kill()
        torch.set_num_threads(threads)


def _serve(
    connection: Connection,
    training: Training,
    data: Mapping[int, FoldData],
    epochs_done: MutableSequence[int],
    run: int,
) -> None:
    """A process's life: states in, segments or the error out."""
    # The run decides what an interrupt means; when it is gone, however it ended, so is this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != run:
        os._exit(1)
    torch.set_num_threads(1)
    while True:
        state = _as_tensors(connection.recv())
        try:
            connection.send(_as_arrays(_advance(training, data[state.fold], state, epochs_done)))
        except InputError as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))


class ClusterWorkers:
    """Trains networks on the workers of a Dask cluster; what a dead worker had begun, another does again."""

    def __init__(
        self, training: Training, data: Mapping[int, FoldData], epochs_done: MutableSequence[int], client: "Client"
    ) -> None:
        self.epochs_done = epochs_done
        self._training, self._data, self._client = training, data, client
        self._running: list[Future[Segment]] = []

    @property
    def free(self) -> int:
        """See `TrainingProcesses`."""
        return max(0, sum(self._client.nthreads().values()) - len(self._running))

    def submit(self, state: TrainingState) -> None:
        """See `TrainingProcesses`."""
        with warnings.catch_warnings():
            # Weights and rows travel in the task itself, so that they are not lost with a worker that holds them.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            task = (_train_on_one_thread, self._training, self._data[state.fold], state)
            self._running.append(self._client.submit(*task, pure=False))

    def collect(self, seconds: float) -> list[Segment]:
        """See `TrainingProcesses`."""
        from distributed import KilledWorker
        from distributed import wait as wait_for_futures

        if not self._running:
            return []
        try:
            finished = wait_for_futures(self._running, seconds, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            return []
        self._running = [future for future in self._running if future not in finished]
        try:
            segments = [future.result() for future in finished]
        except KilledWorker as error:
            raise InputError(f"workers of the cluster ended again and again: {error}; {how_to_resume()}") from error
        for segment in segments:
            fold = segment.state.fold
            self.epochs_done[fold] = max(segment.state.epoch, self.epochs_done[fold])
        return segments


_ONE_AT_A_TIME = threading.Lock()


def _train_on_one_thread(training: Training, data: FoldData, state: TrainingState) -> Segment:
    """Train on a worker, in the arithmetic of a run's own processes."""
    # Random draws belong to the process, so that tasks in threads of one process would take one another's.
    with _ONE_AT_A_TIME:
        torch.set_num_threads(1)
        return train(training, state, data, training.next_stop(state.epoch))
