"""Folds in training, shared among processes of one thread each.

The products of networks this small are too short to split: two threads that wait for
each other at every product are slower than two processes that train a stack of their own.
A process takes some folds, trains them to their next validation, and hands their states
back, so that the place of a fold that is done goes to the others at once. How folds are
grouped changes nothing in their arithmetic (see `utils.stacked_training`).

A GPU prefers one large stack, and other systems than Linux cannot fork safely; there, one
thread of this process trains all folds together.
"""

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from utils.errors import InputError
from utils.runs import how_to_resume
from utils.stacked_training import Advance, FoldState, StackTraining

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class FoldProcesses:
    """What trains folds; made by `fold_processes`.

    Attributes:
        epochs_done: of each fold at this moment; index 0 is no fold.
    """

    def __init__(self, count: int, epochs_done: Sequence[int], executor: Executor) -> None:
        self._count, self.epochs_done, self._executor = count, epochs_done, executor
        self._running: dict[Future[list[Advance]], list[int]] = {}

    def in_training(self) -> list[int]:
        """Numbers of the folds that are training now."""
        return [number for numbers in self._running.values() for number in numbers]

    def keep_busy(self, folds: Sequence[FoldState]) -> None:
        """Give every free process a stack of the folds that wait, of all that have not stopped."""
        busy = self.in_training()
        waiting = [state for state in folds if state.number not in busy]
        while waiting and len(self._running) < self._count:
            stack = next_stack(waiting, -(-len(folds) // self._count))
            self._running[self._executor.submit(_advance, stack)] = [state.number for state in stack]
            waiting = [state for state in waiting if state not in stack]

    def collect(self, seconds: float) -> list[Advance]:
        """Folds that have come to a stop, waited for no longer than `seconds`.

        Raises:
            InputError: a loss is not finite, or the system ended a process.
        """
        finished, _ = wait(self._running, seconds, FIRST_COMPLETED)
        for future in finished:
            del self._running[future]
        try:
            return [advance for future in finished for advance in future.result()]
        except BrokenProcessPool as error:
            raise InputError(
                f"the system ended a process of the training, probably for want of memory; to go on from the last saved "
                f"epoch: {how_to_resume()}"
            ) from error


def next_stack(waiting: Sequence[FoldState], share: int) -> list[FoldState]:
    """At most `share` of the folds that wait: those furthest behind, which have done the same number of epochs."""
    behind = min(state.epoch for state in waiting)
    return [state for state in waiting if state.epoch == behind][:share]


class _Here(NamedTuple):
    """What a process trains with; handed on by fork, for a stack and its data need no copy."""

    training: StackTraining
    epochs_done: MutableSequence[int]


_here: _Here | None = None


def _begin(training: StackTraining, epochs_done: MutableSequence[int]) -> None:
    global _here
    _here = _Here(training, epochs_done)


def _begin_process(training: StackTraining, epochs_done: MutableSequence[int]) -> None:
    _begin(training, epochs_done)
    torch.set_num_threads(1)
    # The run decides what an interrupt means; when it is gone, however it ended, so is this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _advance(states: Sequence[FoldState]) -> list[Advance]:
    assert _here is not None

    def done(epochs: int) -> None:
        for state in states:
            _here.epochs_done[state.number] = epochs

    return _here.training.advance(states, done)


@contextlib.contextmanager
def fold_processes(training: StackTraining, states: Sequence[FoldState]) -> Iterator[FoldProcesses]:
    """As many processes as PyTorch has threads, but not more than folds; they end with the block."""
    threads = torch.get_num_threads()
    epochs_done = multiprocessing.RawArray("q", max(state.number for state in states) + 1)
    for state in states:
        epochs_done[state.number] = state.epoch
    if threads == 1 or training.device.type != "cpu" or sys.platform != "linux":
        with ThreadPoolExecutor(1, initializer=_begin, initargs=(training, epochs_done)) as thread:
            yield FoldProcesses(1, epochs_done, thread)
        return
    torch.set_num_threads(1)  # here, too, so that test predictions do not depend on the machine's threads
    count = min(threads, len(states))
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin_process, (training, epochs_done))
    try:
        yield FoldProcesses(count, epochs_done, executor)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
