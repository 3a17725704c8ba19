"""Rates of several ways of doing the same work, measured side by side."""

import statistics
import time
from collections.abc import Callable


def rate_of(
    units: int, call: Callable[[int], None], clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """A way that does `units` a call and takes the round's number."""

    def way(round_number: int) -> float:
        started = clock()
        call(round_number)
        return units / (clock() - started)

    return way


def compare_rates(ways: dict[str, Callable[[int], float]], rounds: int, unit: str) -> None:
    """Print how much of `unit` each way does in a second, and its ratio to the first way.

    Rounds of all ways alternate, and medians are reported, so that a machine whose speed drifts slows all alike.

    Args:
        ways: by name, what does a round, given its number, and returns its rate.
        rounds: measured rounds; one before them warms up.
        unit: what is counted, in the plural.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            rate = way(round_number)
            if round_number > 0:
                rates[name].append(rate)
    width = max(map(len, ways))
    first = statistics.median(next(iter(rates.values())))
    print(f"{'':<{width}} {'median':>8} {'min':>8} {'max':>8} {'ratio':>8}   {unit}/s, {rounds} rounds")
    for name, values in rates.items():
        median = statistics.median(values)
        measured = " ".join(f"{rate:>8.{1 if rate >= 10 else 3}f}" for rate in (median, min(values), max(values)))
        print(f"{name:<{width}} {measured} {median / first:>8.1f}")
