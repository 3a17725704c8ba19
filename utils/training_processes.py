"""Networks in training, shared among processes of one thread each.

Steps of networks this small are too short to split: two threads that wait for each other at every operation are slower
than two processes that train a network each. A process takes the state of a network, trains it to its next stop and hands
it back. Which process trains which network changes nothing in its arithmetic (see `utils.training`).

On a GPU, and on other systems than Linux, which cannot fork safely, this process trains one network after the other.
"""

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableSequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from utils.errors import InputError
from utils.runs import how_to_resume
from utils.training import FoldData, Segment, Training, TrainingState, train

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class TrainingProcesses:
    """What trains networks; made by `training_processes`.

    Attributes:
        epochs_done: of each fold at this moment, the most of its members; index 0 is no fold.
        free: how many more networks can be taken at once.
    """

    def __init__(
        self,
        training: Training,
        data: Mapping[int, FoldData],
        epochs_done: MutableSequence[int],
        connections: list[Connection],
    ) -> None:
        self.epochs_done = epochs_done
        self._training, self._data, self._idle = training, data, connections
        self._here = not connections
        self._waiting: list[TrainingState] = []
        self._busy: list[Connection] = []

    @property
    def free(self) -> int:
        """How many more networks can be taken now."""
        return 1 - len(self._waiting) if self._here else len(self._idle)

    def submit(self, state: TrainingState) -> None:
        """Let a network be trained to its next stop.

        Raises:
            InputError: the system ended a process.
        """
        if self._here:
            self._waiting.append(state)
            return
        with _telling_of_ended_processes():
            self._idle[-1].send_bytes(_as_bytes(state._asdict()))
        self._busy.append(self._idle.pop())

    def collect(self, seconds: float) -> list[Segment]:
        """Networks that have come to a stop; other processes are waited for no longer than `seconds`.

        Raises:
            InputError: a loss is not finite, or the system ended a process.
        """
        if self._here:
            segments = [_advance(self._training, self._data, state, self.epochs_done) for state in self._waiting]
            self._waiting = []
            return segments
        segments = []
        for connection in wait(self._busy, seconds):
            assert isinstance(connection, Connection)
            with _telling_of_ended_processes():
                answer = _from_bytes(connection.recv_bytes())
            self._busy.remove(connection)
            self._idle.append(connection)
            if "error" in answer:
                raise InputError(answer["error"]) if answer["is_input_error"] else RuntimeError(answer["error"])
            segments.append(Segment(**{**answer, "state": TrainingState(**answer["state"])}))
        return segments


def _as_bytes(document: dict[str, Any]) -> bytes:
    """By value: PyTorch's own way hands on shared memory, of which a container has little."""
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), weights_only=True)


@contextlib.contextmanager
def _telling_of_ended_processes() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise InputError(
            f"the system ended a process of the training, probably for want of memory; to go on from the last saved "
            f"epoch: {how_to_resume()}"
        ) from error


def _advance(
    training: Training, data: Mapping[int, FoldData], state: TrainingState, epochs_done: MutableSequence[int]
) -> Segment:
    def done(fold: int, epochs: int) -> None:
        epochs_done[fold] = max(epochs, epochs_done[fold])

    return train(training, state, data[state.fold], training.next_stop(state.epoch), done)


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
        state = TrainingState(**_from_bytes(connection.recv_bytes()))
        try:
            segment = _advance(training, data, state, epochs_done)
            answer: dict[str, Any] = {**segment._asdict(), "state": segment.state._asdict()}
        except Exception as error:
            is_input_error = isinstance(error, InputError)
            answer = {"error": str(error) if is_input_error else traceback.format_exc(), "is_input_error": is_input_error}
        connection.send_bytes(_as_bytes(answer))


@contextlib.contextmanager
def training_processes(
    training: Training, data: Mapping[int, FoldData], states: list[TrainingState]
) -> Iterator[TrainingProcesses]:
    """As many processes as PyTorch has threads, but not more than networks; they end with the block."""
    epochs_done = multiprocessing.RawArray("q", max(data) + 1)
    for state in states:
        epochs_done[state.fold] = max(epochs_done[state.fold], state.epoch)
    if training.device.type != "cpu" or sys.platform != "linux":
        yield TrainingProcesses(training, data, epochs_done, [])
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here, too, so that test predictions do not depend on the machine's threads
    fork = multiprocessing.get_context("fork")
    connections, processes = [], []
    try:
        for _ in range(min(threads, len(states))):
            ours, theirs = fork.Pipe()
            # Training and data need no copy: a fork has them.
            process = fork.Process(target=_serve, args=(theirs, training, data, epochs_done, os.getpid()), daemon=True)
            processes.append(process)
            process.start()
            theirs.close()
            connections.append(ours)
        yield TrainingProcesses(training, data, epochs_done, connections)
    finally:
        for process in processes:
            process.kill()
        torch.set_num_threads(threads)
