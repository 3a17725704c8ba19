"""Learning-rate schedules by optimiser step."""

import math
from collections.abc import Callable

LOWEST = 1e-6


def cosine_cycles(lr: float, t_0: int, t_mult: int, decay_factor: float) -> Callable[[int], float]:
    """Cosine cycles with warm restarts (Loshchilov and Hutter 2017) whose length grows and whose peak falls.

    Args:
        lr: peak of the first cycle, at its start.
        t_0: steps of the first cycle.
        t_mult: length of a cycle relative to the one before.
        decay_factor: peak of a cycle relative to the one before.

    Returns:
        The learning rate of a step, counted from 0. Within a cycle it falls towards 1e-6, which it does not reach.
    """

    def rate(step: int) -> float:
        length, peak = t_0, lr
        while step >= length:
            step, length, peak = step - length, length * t_mult, peak * decay_factor
        return LOWEST + (peak - LOWEST) * (1 + math.cos(math.pi * step / length)) / 2

    return rate
