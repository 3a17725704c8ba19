"""Schedules of the learning rate by optimiser step."""

import math
from collections.abc import Callable

LOWEST = 1e-6


def cosine_cycles(peak: float, first_cycle: int, cycle_growth: int, decay: float) -> Callable[[int], float]:
    """Cosine cycles with warm restarts (Loshchilov and Hutter 2017) whose length grows and whose peak falls.

    Args:
        peak: rate at the start of the first cycle.
        first_cycle: steps of the first cycle.
        cycle_growth: length of a cycle over that of the one before.
        decay: peak of a cycle over that of the one before.

    Returns:
        The rate of a step, counted from 0; within a cycle it falls towards 1e-6, which the next start replaces.
    """

    def rate(step: int) -> float:
        length, top = first_cycle, peak
        while step >= length:
            step, length, top = step - length, length * cycle_growth, top * decay
        return LOWEST + (top - LOWEST) * (1 + math.cos(math.pi * step / length)) / 2

    return rate
