"""The learning rate of canopy height, as the facts state it."""

import math

import pytest

from utils.schedules import LOWEST, cosine_cycles


def test_cycles_double_and_peaks_fall_to_a_quarter() -> None:
    rate = cosine_cycles(1e-3, 6 * 10, 2, 0.25)
    assert rate(0) == 1e-3 and rate(60) == 2.5e-4 and rate(180) == 6.25e-5
    assert rate(30) == pytest.approx((1e-3 + LOWEST) / 2) and rate(120) == pytest.approx((2.5e-4 + LOWEST) / 2)
    # No stray step at the previous peak: the last step of a cycle is its lowest.
    assert rate(59) == pytest.approx(LOWEST + (1e-3 - LOWEST) * (1 + math.cos(math.pi * 59 / 60)) / 2)
    assert rate(59) < rate(58) < rate(57)


def test_one_cycle_length_repeats() -> None:
    rate = cosine_cycles(1.0, 4, 1, 0.5)
    assert [rate(step) for step in (0, 4, 8, 12)] == [1.0, 0.5, 0.25, 0.125]
