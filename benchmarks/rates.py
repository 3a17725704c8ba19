"""Rates of several ways of doing the same work, measured side by side."""

import statistics
import time
from collections.abc import Callable


def compare_rates(ways: dict[str, tuple[int, Callable[[int], None]]], rounds: int, unit: str) -> None:
    """Print how much of `unit` each way does in a second, and its ratio to the first way.

    Rounds of all ways alternate, and medians are reported, so that a machine whose speed drifts slows all alike.

    Args:
        ways: by name, how many units a call does and the call, which takes the round's number.
        rounds: measured rounds; one before them warms up.
        unit: what is counted, in the plural.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, (units, way) in ways.items():
            started = time.perf_counter()
            way(round_number)
            if round_number > 0:
                rates[name].append(units / (time.perf_counter() - started))
    width = max(map(len, ways))
    first = statistics.median(next(iter(rates.values())))
    print(f"{'':<{width}} {'median':>8} {'min':>8} {'max':>8} {'ratio':>8}   {unit}/s, {rounds} rounds")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<{width}} {median:>8.1f} {min(values):>8.1f} {max(values):>8.1f} {median / first:>8.1f}")
