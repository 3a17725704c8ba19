"""Folds in training, shared among processes of one thread each.

The products of networks this small are too short to split: two threads that wait for
each other at every product are slower than two processes that train a stack of their own.
A process takes some folds, trains them to their next stop, and hands their states back,
so that the place of a fold that is done goes to the others at once. How folds are grouped
changes nothing in their arithmetic (see `StackTraining.may_share_a_stack`).

A GPU prefers one large stack, and other systems than Linux cannot fork safely; there,
this process trains all folds together.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, MutableSequence, Sequence
from multiprocessing.connection import Connection, wait

import torch

from utils.errors import InputError
from utils.runs import how_to_resume
from utils.stacked_training import Advance, FoldState, StackTraining

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class FoldProcesses:
    """What trains folds; made by `fold_processes`.

    Args:
        connections: to the processes; none where this process trains.

    Attributes:
        epochs_done: of each fold at this moment, on a GPU those it was told to do; index 0 is no fold.
    """

    def __init__(
        self, training: StackTraining, epochs_done: MutableSequence[int], connections: Sequence[Connection]
    ) -> None:
        self.epochs_done = epochs_done
        self._training, self._free = training, list(connections)
        self._count = len(connections)
        self._running: dict[Connection | None, list[FoldState]] = {}

    def in_training(self) -> list[int]:
        """Numbers of the folds that are training now."""
        return [state.number for stack in self._running.values() for state in stack]

    def keep_busy(self, folds: Sequence[FoldState]) -> None:
        """Give every free process a stack of the folds that wait, of all that have not stopped.

        Raises:
            InputError: the system ended a process.
        """
        busy = self.in_training()
        waiting = [state for state in folds if state.number not in busy]
        if self._count == 0 and waiting:
            self._running[None] = next_stack(waiting, len(folds))
        while waiting and self._free:
            share = -(-len(folds) // self._count) if self._training.may_share_a_stack() else 1
            stack = next_stack(waiting, share)
            with _telling_of_ended_processes():
                self._free[-1].send(stack)
            self._running[self._free.pop()] = stack
            waiting = [state for state in waiting if state not in stack]

    def collect(self, seconds: float) -> list[Advance]:
        """Folds that have come to a stop; other processes are waited for no longer than `seconds`.

        Raises:
            InputError: a loss is not finite, or the system ended a process.
        """
        if self._count == 0:
            return _advance(self._training, self._running.pop(None), self.epochs_done)
        advances = []
        for connection in wait([connection for connection in self._running if connection], seconds):
            assert isinstance(connection, Connection)
            with _telling_of_ended_processes():
                answer = connection.recv()
            if isinstance(answer, Exception):
                raise answer
            advances += answer
            del self._running[connection]
            self._free.append(connection)
        return advances


def next_stack(waiting: Sequence[FoldState], share: int) -> list[FoldState]:
    """At most `share` of the folds that wait: those furthest behind, which have done the same number of epochs."""
    behind = min(state.epoch for state in waiting)
    return [state for state in waiting if state.epoch == behind][:share]


@contextlib.contextmanager
def _telling_of_ended_processes() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        # The frames hold what was to be sent, a view of a buffer. Left to the garbage collector, which may close the buffer
        # first, Python 3.13 complains.
        traceback.clear_frames(error.__traceback__)
        raise InputError(
            f"the system ended a process of the training, probably for want of memory; to go on from the last saved "
            f"epoch: {how_to_resume()}"
        ) from error


def _advance(training: StackTraining, states: Sequence[FoldState], epochs_done: MutableSequence[int]) -> list[Advance]:
    def done(epochs: int) -> None:
        for state in states:
            epochs_done[state.number] = epochs

    return training.advance(states, done)


def _serve(connection: Connection, training: StackTraining, epochs_done: MutableSequence[int], run: int) -> None:
    """A process's life: stacks in, advances or the error out."""
    # The run decides what an interrupt means; when it is gone, however it ended, so is this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != run:
        os._exit(1)
    torch.set_num_threads(1)
    while True:
        states = connection.recv()
        try:
            answer: list[Advance] | Exception = _advance(training, states, epochs_done)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        connection.send(answer)


@contextlib.contextmanager
def fold_processes(training: StackTraining, states: Sequence[FoldState]) -> Iterator[FoldProcesses]:
    """As many processes as PyTorch has threads, but not more than folds; they end with the block."""
    epochs_done = multiprocessing.RawArray("q", max(state.number for state in states) + 1)
    for state in states:
        epochs_done[state.number] = state.epoch
    if training.device.type != "cpu" or sys.platform != "linux":
        yield FoldProcesses(training, epochs_done, [])
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here, too, so that test predictions do not depend on the machine's threads
    fork = multiprocessing.get_context("fork")
    connections, processes = [], []
    try:
        for _ in range(min(threads, len(states))):
            ours, theirs = fork.Pipe()
            # Training and data need no copy: a fork has them.
            processes.append(fork.Process(target=_serve, args=(theirs, training, epochs_done, os.getpid()), daemon=True))
            processes[-1].start()
            theirs.close()
            connections.append(ours)
        yield FoldProcesses(training, epochs_done, connections)
    finally:
        for process in processes:
            process.kill()
            process.join()
        torch.set_num_threads(threads)
