"""Clear observations of places, and series of every pixel, from satellite products.

Both go through `clear_pixels`: what is read of a product, and which of its pixels are clear. Products of the same tile and
date count once: where several show a pixel clear, they are averaged.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.features
import shapely
from numpy.typing import NDArray
from rasterio.windows import Window
from tqdm import tqdm

from datasets.place_series.bands import Channels
from datasets.place_series.places import Places
from datasets.place_series.regular import Rules, days_from, regular_series
from datasets.place_series.rows import OUTSIDE, PARTLY, Observed
from datasets.products import CLEAR, NODATA, WATER, Product
from utils.errors import InputError
from utils.rasters import Grid, Run

CELL = 1024  # pixels of a side of what is read at once, as the blocks of JPEG 2000 files
ROWS_AT_ONCE = 16_384  # pixels whose series are computed at once, for memory


Sums = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Sums (band, place) over clear pixels, and their number (place,)."""


class Tile(NamedTuple):
    """Products of one tile, by date; a tile without a name is called by its upper-left corner."""

    name: str
    grid: Grid
    products: tuple[Product, ...]

    @property
    def dates(self) -> NDArray[np.datetime64]:
        """(date,) of the products, ascending, each once."""
        return np.unique(np.array([product.date for product in self.products], dtype="datetime64[D]"))


class Piece(NamedTuple):
    """The pixels of a place in a cell.

    Attributes:
        place: its number among those of the tile.
        row, column: of the mask's corner in the cell's window.
        mask: (row, column) which pixels are the place's.
    """

    place: int
    row: int
    column: int
    mask: NDArray[np.bool_]


class Cell(NamedTuple):
    """A window of a tile, and the pieces of places in it."""

    window: Window
    pieces: tuple[Piece, ...]


class Reading(NamedTuple):
    """How products are read; hashable."""

    bands: tuple[str, ...]
    resampling: str


class Extraction(NamedTuple):
    """What a worker reads of a product for places.

    Attributes:
        tile, number: of the product.
        product: the product.
        cells: with the pieces of places in them.
        places: their number.
    """

    tile: int
    number: int
    product: Product
    cells: tuple[Cell, ...]
    places: int


def tiles_of(products: Sequence[Product], rules: Rules, years: Sequence[int]) -> list[Tile]:
    """Tiles with the products that the series of any of the years use, the tile with most dates first."""
    found: dict[tuple[str, Grid], list[Product]] = {}
    for product in products:
        day = np.array([product.date], dtype="datetime64[D]")
        if any(rules.uses(days_from(day, year), year)[0] for year in years):
            name = product.tile or f"{product.grid.transform.c:.0f}_{product.grid.transform.f:.0f}"
            found.setdefault((name, product.grid), []).append(product)
    tiles = [
        Tile(name, grid, tuple(sorted(own, key=lambda one: (one.date, one.name)))) for (name, grid), own in found.items()
    ]
    return sorted(tiles, key=lambda tile: (-len(tile.dates), tile.name))


def years_of(products: Sequence[Product], rules: Rules) -> list[int]:
    """Years with a product in their season."""
    found = set()
    for product in products:
        for year in (product.date.year, product.date.year + 1):
            first, last = rules.season(year)
            if first <= days_from(np.array([product.date], dtype="datetime64[D]"), year)[0] <= last:
                found.add(year)
    return sorted(found)


def clear_pixels(product: Product, window: Window, reading: Reading) -> tuple[NDArray[np.int16], NDArray[np.bool_]] | None:
    """Bands (band, row, column) of a window and which of its pixels (row, column) are clear; None if none is.

    Water is clear; a pixel that lacks a band is not.
    """
    states = product.states(window)
    clear = (states == CLEAR) | (states == WATER)
    if not clear.any():
        return None
    values = product.read(window, reading.bands, reading.resampling)
    clear &= (values != NODATA).all(0)
    return (values, clear) if clear.any() else None


def homes_of(places: Places, tiles: Sequence[Tile]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The tile of each place, -1 if none, and how many have none, by reason.

    A place is read from a tile that holds it wholly: of several the one with most dates, and then the one to whose edge it
    has furthest.

    Args:
        places: the places.
        tiles: that with most dates first.
    """
    home = np.full(len(places.geometry), -1)
    best, touched = np.full((len(home), 2), -np.inf), np.zeros(len(home), dtype=bool)
    for number, tile in enumerate(tiles):
        to_pixels = ~tile.grid.transform
        bounds = shapely.bounds(places.on(tile.grid.crs.to_wkt()))
        (left, top), (right, bottom) = to_pixels * (bounds[:, 0], bounds[:, 3]), to_pixels * (bounds[:, 2], bounds[:, 1])
        width, height = tile.grid.width, tile.grid.height
        touched |= (right > 0) & (left < width) & (bottom > 0) & (top < height)
        margin = np.minimum.reduce([left, top, width - right, height - bottom])
        # A point on the right or lower edge lies in no pixel.
        held = np.isfinite(margin) & (margin >= 0) & (left < width) & (top < height)
        better = held & ((len(tile.dates) > best[:, 0]) | ((len(tile.dates) == best[:, 0]) & (margin > best[:, 1])))
        home[better], best[better] = number, np.stack([np.full(better.sum(), len(tile.dates)), margin[better]], axis=1)
    reasons = {OUTSIDE: int(((home < 0) & ~touched).sum()), PARTLY: int(((home < 0) & touched).sum())}
    return home, {reason: count for reason, count in reasons.items() if count}


def pixels_of(geometry: Any, grid: Grid) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """The pixels of a place, cut where cells meet: row and column of a corner and the mask (row, column) of each part.

    Of a point the pixel that holds it, of a polygon those whose centre lies inside, or all that it touches if there is none.

    Args:
        geometry: of the place, within the grid, in its coordinate system.
        grid: of the tile.
    """
    for all_touched in (False, True):
        parts = [part for part in _parts(geometry, grid, all_touched) if part[2].any()]
        if parts:
            return parts
    raise AssertionError("a geometry within the grid touches a pixel")


def _parts(geometry: Any, grid: Grid, all_touched: bool) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    west, south, east, north = geometry.bounds
    (left, top), (right, bottom) = ~grid.transform * (west, north), ~grid.transform * (east, south)
    rows = range(math.floor(top), min(grid.height, math.floor(bottom) + 1))
    columns = range(math.floor(left), min(grid.width, math.floor(right) + 1))
    for row in range(rows.start // CELL * CELL, rows.stop, CELL):
        for column in range(columns.start // CELL * CELL, columns.stop, CELL):
            first_row, first_column = max(row, rows.start), max(column, columns.start)
            height, width = min(row + CELL, rows.stop) - first_row, min(column + CELL, columns.stop) - first_column
            part = grid.part(Window(first_column, first_row, width, height))
            if geometry.geom_type in ("Point", "MultiPoint"):
                yield first_row, first_column, _of_points(geometry, part)
            else:
                mask = rasterio.features.geometry_mask(
                    [geometry], (height, width), part.transform, invert=True, all_touched=all_touched
                )
                yield first_row, first_column, mask


def _of_points(geometry: Any, part: Grid) -> NDArray[np.bool_]:
    mask = np.zeros((part.height, part.width), dtype=bool)
    for x, y in shapely.get_coordinates(geometry):
        column, row = (math.floor(one) for one in ~part.transform * (x, y))
        if 0 <= row < part.height and 0 <= column < part.width:
            mask[row, column] = True
    return mask


def cells_of(parts: Sequence[list[tuple[int, int, NDArray[np.bool_]]]]) -> tuple[Cell, ...]:
    """The pieces of places by cell, with the window around those in a cell.

    Args:
        parts: of each place, of `pixels_of`.
    """
    grouped: dict[tuple[int, int], list[tuple[int, int, int, NDArray[np.bool_]]]] = {}
    for place, of_place in enumerate(parts):
        for row, column, mask in of_place:
            grouped.setdefault((row // CELL, column // CELL), []).append((place, row, column, mask))
    cells = []
    for group in grouped.values():
        top, left = min(row for _, row, _, _ in group), min(column for _, _, column, _ in group)
        bottom = max(row + len(mask) for _, row, _, mask in group)
        right = max(column + mask.shape[1] for _, _, column, mask in group)
        pieces = tuple(Piece(place, row - top, column - left, mask) for place, row, column, mask in group)
        cells.append(Cell(Window(left, top, right - left, bottom - top), pieces))
    return tuple(cells)


def build_extractor(reading: Reading) -> Callable[[Extraction], Sums]:
    """What a worker computes of a product: sums (band, place) over clear pixels, and their number (place,)."""

    def extract(task: Extraction) -> Sums:
        sums, counts = np.zeros((len(reading.bands), task.places)), np.zeros(task.places, dtype=np.int64)
        for cell in task.cells:
            found = clear_pixels(task.product, cell.window, reading)
            if found is None:
                continue
            values, clear = found
            for piece in cell.pieces:
                height, width = piece.mask.shape
                here = (slice(piece.row, piece.row + height), slice(piece.column, piece.column + width))
                own = piece.mask & clear[here]
                sums[:, piece.place] += values[:, *here][:, own].sum(1, dtype=np.float64)
                counts[piece.place] += own.sum()
        return sums, counts

    return extract


def observe(
    places: Places,
    home: NDArray[np.int64],
    tiles: Sequence[Tile],
    channels: Channels,
    resampling: str,
    min_clear: float,
    run: Run,
) -> tuple[list[Observed], NDArray[np.int64]]:
    """Read the places from their tiles.

    Args:
        places: the places.
        home: (place,) of `homes_of`.
        tiles: the tiles.
        channels: bands and indices.
        resampling: of 20 m bands.
        min_clear: percent of a place's pixels that must be clear for a date to count.
        run: computes products in workers.

    Returns:
        The observations, and (index,) the values that an index lacks although its bands have theirs.
    """
    tasks: list[Extraction] = []
    shares: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for number, tile in enumerate(tiles):
        own = np.flatnonzero(home == number)
        if not len(own):
            continue
        geometry = places.on(tile.grid.crs.to_wkt())[own]
        parts = [pixels_of(one, tile.grid) for one in geometry]
        shares[number] = own, np.array([sum(int(mask.sum()) for _, _, mask in part) for part in parts])
        cells = cells_of(parts)
        tasks += [Extraction(number, *one, cells, len(own)) for one in enumerate(tile.products)]
    results: dict[tuple[int, int], Sums] = {}
    with tqdm(total=len(tasks), desc="Averaging places...", unit="product") as bar:
        for task, result in run(build_extractor, Reading(channels.sources, resampling), tasks):
            results[task.tile, task.number] = result
            bar.update()
    observed, lacking = [], np.zeros(len(channels.indices), dtype=np.int64)
    for number, (own, pixels) in shares.items():
        tile = tiles[number]
        sums = [results[number, one] for one in range(len(tile.products))]
        means = np.stack([_of_date(tile, date, sums, pixels, min_clear) for date in tile.dates])
        values, without = channels.compute(means)
        lacking += without
        further = {"pixels": pixels, "tile": np.full(len(own), tile.name)}
        observed.append(Observed(own, tile.dates, values, further))
    return observed, lacking


def _of_date(
    tile: Tile, date: np.datetime64, results: Sequence[Sums], pixels: NDArray[np.int64], min_clear: float
) -> NDArray[np.float32]:
    """(band, place) means over the clear pixels of all products of a date, nan where too few are clear."""
    own = [one for product, one in zip(tile.products, results, strict=True) if np.datetime64(product.date) == date]
    sums, counts = np.sum([one[0] for one in own], axis=0), np.sum([one[1] for one in own], axis=0)
    return clear_means(sums, np.where(counts >= np.maximum(1, min_clear / 100 * pixels), counts, 0))


def clear_means(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """(band, ...) means from sums and numbers (...,), nan where the number is 0."""
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


class StackSpec(NamedTuple):
    """What a worker needs to know of a raster stack; hashable."""

    products: tuple[Product, ...]
    origin: tuple[int, int]
    rules: Rules
    year: int
    channels: Channels
    resampling: str


def build_stacker(spec: StackSpec) -> Callable[[Window], tuple[NDArray[np.float32], ...]]:
    """What a worker computes of a window of the area: an array (channel, row, column) for each step, nan where left out."""
    reading = Reading(spec.channels.sources, spec.resampling)

    def compute(window: Window) -> tuple[NDArray[np.float32], ...]:
        row, column = spec.origin
        place = Window(window.col_off + column, window.row_off + row, window.width, window.height)
        read = [(product.date, found) for product in spec.products if (found := clear_pixels(product, place, reading))]
        dates = np.unique(np.array([date for date, _ in read], dtype="datetime64[D]"))
        series = np.full((spec.rules.steps, len(spec.channels.names), window.height * window.width), np.nan, np.float32)
        for start in range(0, series.shape[2], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            series[:, :, part] = _series_of(spec, dates, _means(read, dates, part, len(reading.bands)))
        return tuple(series.reshape(*series.shape[:2], window.height, window.width))

    return compute


def _means(
    read: Iterable[tuple[Any, tuple[NDArray[np.int16], NDArray[np.bool_]]]],
    dates: NDArray[np.datetime64],
    part: slice,
    bands: int,
) -> NDArray[np.float32]:
    """(date, band, pixel) of a part of a window's pixels, nan where not clear."""
    read = list(read)
    pixels = len(read[0][1][1].ravel()[part]) if read else 0
    means = np.empty((len(dates), bands, pixels), dtype=np.float32)
    for number, date in enumerate(dates):
        sums, counts = np.zeros((bands, pixels)), np.zeros(pixels, dtype=np.int64)
        for own, (values, clear) in read:
            if np.datetime64(own) == date:
                clear_part = clear.ravel()[part]
                sums += np.where(clear_part, values.reshape(bands, -1)[:, part], 0)
                counts += clear_part
        means[number] = clear_means(sums, counts)
    return means


def _series_of(spec: StackSpec, dates: NDArray[np.datetime64], means: NDArray[np.float32]) -> NDArray[np.float32]:
    """(step, channel, pixel), nan for pixels that a table would leave out."""
    if not len(dates):
        return np.full((spec.rules.steps, len(spec.channels.names), 1), np.nan, np.float32)
    values, _ = spec.channels.compute(means)
    regular = regular_series(days_from(dates, spec.year), values, spec.rules, spec.year)
    return np.where(regular.complete(spec.rules.max_gap), regular.series, np.float32(np.nan))


def tile_for(tiles: Sequence[Tile], window_of: Callable[[Grid], Window]) -> Tile:
    """The tile that holds most of an area, of several the first.

    Args:
        tiles: with most dates first.
        window_of: the pixels of a grid that the area touches; raises InputError if there is none.

    Raises:
        InputError: no tile holds any of it.
    """
    held, outside = list[tuple[int, Tile]](), InputError("there is no product")
    for tile in tiles:
        try:
            window = window_of(tile.grid)
            held.append((window.width * window.height, tile))
        except InputError as error:
            outside = error
    if not held:
        raise outside
    return max(held, key=lambda one: one[0])[1]
