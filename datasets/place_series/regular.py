"""From clear observations at any dates to a series at regular steps.

The one place where this is computed: the rows of tables and the pixels of rasters both go through `regular_series`.
"""

import datetime
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

METHODS = ("interpolate", "composite")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Rules(NamedTuple):
    """How a regular series is made; hashable.

    Attributes:
        method: interpolate, linearly between the clear dates around a step; or composite, the median of the clear dates
            within `window` days around it, and linearly between composites where there are none.
        steps: their number, evenly from `start` to `end`, on whole days.
        start, end: of the season, days of the year from 1. A start after the end is that of the year before.
        window: days of a composite, around its step: from half of them before to, exclusively, half of them after.
        max_gap: days; a longer time without a clear date in the season leaves the series out.
    """

    method: str
    steps: int
    start: int
    end: int
    window: float
    max_gap: int

    def season(self, year: int) -> tuple[int, int]:
        """First and last day, counted from 1 on 1 January of the year."""
        return self.start - (days_in(year - 1) if self.start > self.end else 0), self.end

    def step_days(self, year: int) -> Ints:
        """(step,) days, counted from 1 on 1 January of the year."""
        return np.rint(np.linspace(*self.season(year), self.steps)).astype(np.int64)

    def step_dates(self, year: int) -> list[datetime.date]:
        """The dates of the steps."""
        return [datetime.date(year, 1, 1) + datetime.timedelta(days=int(day) - 1) for day in self.step_days(year)]

    def reach(self) -> float:
        """Days before and after the season whose observations are used."""
        return self.window / 2 if self.method == "composite" else self.max_gap

    def uses(self, days: Ints, year: int) -> NDArray[np.bool_]:
        """Which days, counted from 1 on 1 January of the year, the series of that year is made from."""
        first, last = self.season(year)
        return (days >= first - self.reach()) & (days <= last + self.reach())


def days_in(year: int) -> int:
    """Days of a year."""
    return (datetime.date(year + 1, 1, 1) - datetime.date(year, 1, 1)).days


def days_from(dates: NDArray[np.datetime64], year: int) -> Ints:
    """Days of dates, counted from 1 on 1 January of a year."""
    return (dates.astype("datetime64[D]") - np.datetime64(f"{year:04d}-01-01")).astype(np.int64) + 1


class Regular(NamedTuple):
    """Regular series of places or pixels.

    Attributes:
        series: (step, band, pixel) float32; nan where a band has no clear date at all.
        clear_dates: (pixel,) dates of the season with a value in any band.
        widest_gap: (pixel,) days without a clear date, the most of any band, counted within the season and to its ends.
    """

    series: NDArray[np.float32]
    clear_dates: Ints
    widest_gap: Ints

    def complete(self, max_gap: int) -> NDArray[np.bool_]:
        """(pixel,) whether a series has all values and no wider gap."""
        return (self.widest_gap <= max_gap) & np.isfinite(self.series).all((0, 1))


def regular_series(days: Ints, values: NDArray[np.float32], rules: Rules, year: int) -> Regular:
    """The series of a year at regular steps.

    Args:
        days: (date,) counted from 1 on 1 January of the year, ascending, each once.
        values: (date, band, pixel), nan where not clear.
        rules: how.
        year: whose season.
    """
    used = rules.uses(days, year)
    days, values = days[used], values[used]
    steps, (first, last) = rules.step_days(year), rules.season(year)
    if rules.method == "composite":
        series = _interpolated(steps, _composites(days, values, steps, rules.window), steps)
    else:
        series = _interpolated(days, values, steps)
    inside = (days >= first) & (days <= last)
    clear = np.isfinite(values[inside]).any(1).sum(0)
    return Regular(series.astype(np.float32), clear, _widest_gap(days, values, first, last))


def _interpolated(days: Ints, values: NDArray[np.floating], steps: Ints) -> Floats:
    """(step, band, pixel) linear between the values around each step; the nearest value before the first, after the last."""
    before, day_before = _latest(days, values, steps)
    after, day_after = _latest(-days[::-1], values[::-1], -steps[::-1])
    after, day_after = after[::-1], -day_after[::-1]
    span = day_after - day_before
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(span > 0, (steps[:, None, None] - day_before) / span, 0)
        between = before + share * (after - before)
    return np.where(np.isnan(before), after, np.where(np.isnan(after), before, between))


def _latest(days: Ints, values: NDArray[np.floating], steps: Ints) -> tuple[Floats, Floats]:
    """The latest value not after each step and its day, (step, band, pixel) each, nan where there is none."""
    value, day = np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    found, found_days = np.empty((len(steps), *value.shape)), np.empty((len(steps), *value.shape))
    date = 0
    for number, step in enumerate(steps):
        while date < len(days) and days[date] <= step:
            valid = np.isfinite(values[date])
            value[valid], day[valid] = values[date][valid], days[date]
            date += 1
        found[number], found_days[number] = value, day
    return found, found_days


def _composites(days: Ints, values: NDArray[np.float32], steps: Ints, window: float) -> Floats:
    """(step, band, pixel) medians of the values within the window around each step, nan where there is none."""
    medians = np.full((len(steps), *values.shape[1:]), np.nan)
    for number, step in enumerate(steps):
        chosen = (days >= step - window / 2) & (days < step + window / 2)
        if chosen.any():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="All-NaN slice encountered")
                medians[number] = np.nanmedian(values[chosen].astype(np.float64), axis=0)
    return medians


def _widest_gap(days: Ints, values: NDArray[np.float32], first: int, last: int) -> Ints:
    """(pixel,) days, over all bands, between clear dates and to the ends of the season, as far as within it."""
    latest = np.full(values.shape[1:], first, dtype=np.int64)
    widest = np.zeros(values.shape[1:], dtype=np.int64)
    for day, layers in zip(np.clip(days, first, last), values, strict=True):
        valid = np.isfinite(layers)
        np.maximum(widest, day - latest, out=widest, where=valid)
        latest[valid] = day
    return np.asarray(np.maximum(widest, last - latest).max(0))
