"""The step `contexts`: squares for training, validation and test, by blocks with a buffer between them.

Heights a few hundred metres apart resemble one another, and images reach beyond their squares: of squares drawn one by one,
a test would see what was trained on (Roberts et al. 2017, Ecography 40; Kattenborn et al. 2022, ISPRS Open Journal 5). All
squares of a block belong to one context. Squares nearer than the buffer to one of a context that ranks before theirs are
left out: test before validation before training.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from datasets.canopy.catalogue import BORDER, CONTEXTS, PIXEL
from datasets.canopy.inputs_squares import KM, Square
from utils.errors import InputError
from utils.plots import BOTH_COLUMNS, COLOURS, GREY, paper_style
from utils.runs import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = (10, 5, 4, 3, 2, 1)  # km, sizes that are tried in turn
LEAST_BUFFER = 2 * BORDER * PIXEL  # m: images of squares nearer than that have pixels in common
LEFT_OUT = "left out"
TABLE = "contexts.csv"
STREAM = 310  # of random numbers
DRAWS = 20  # of each size of blocks


def draw_contexts(
    squares: Sequence[Square], block: int | None, buffer: float, shares: Mapping[str, float], seed: int
) -> tuple[dict[Square, str], int]:
    """Draw the context of each square.

    Args:
        squares: all of one coordinate system.
        block: side of the blocks (km); None: the first of 10, 5, 4, 3, 2 and 1 km by which one of 20 draws leaves half of
            all squares to training, and to validation and test two thirds to one and a half of what they are to have. If
            there is none, as in small areas, the draw that leaves most to training.
        buffer: least distance (m) between squares of different contexts.
        shares: % of the squares for validation and test, before the buffer is left out.
        seed: of the draw.

    Returns:
        The context of each square, or `LEFT_OUT`; and the side of the blocks.

    Raises:
        InputError: a context is left without a square.
    """
    best, size, most = dict[Square, str](), 0, 0
    for side, draw in itertools.product([block] if block else BLOCKS, range(DRAWS)):
        found = _without_buffer(_by_blocks(squares, side, shares, [seed, STREAM, side, draw]), buffer)
        counts = Counter(found.values())
        parts = [counts[name] / _wanted(len(squares), share) for name, share in shares.items()]
        if all(2 / 3 <= part <= 3 / 2 for part in parts) and 2 * counts["training"] >= len(squares):
            return found, side
        if min(counts[context] for context in CONTEXTS) > 0 and counts["training"] > most:
            best, size, most = found, side, counts["training"]
    if not best:
        raise InputError(
            f"{len(squares)} squares cannot be cut into blocks{f' of {block} km' if block else ''} for training, validation "
            f"and test that are {buffer:g} m apart; a larger area, a smaller block or a smaller buffer (at least "
            f"{LEAST_BUFFER:g} m) is needed"
        )
    return best, size


def _wanted(squares: int, share: float) -> int:
    return max(1, round(squares * share / 100))


def _by_blocks(squares: Sequence[Square], side: int, shares: Mapping[str, float], seed: list[int]) -> dict[Square, str]:
    """Blocks in random order, to test until it has its share of squares, then to validation, the others to training."""
    blocks: dict[tuple[int, int], list[Square]] = {}
    for square in sorted(squares, key=lambda square: (square.east, square.north, square.tile)):
        blocks.setdefault((square.east // side, (square.north - 1) // side), []).append(square)
    order = list(blocks.values())
    order = [order[place] for place in np.random.default_rng(seed).permutation(len(order))]
    contexts: dict[Square, str] = {}
    counts: Counter[str] = Counter()
    for members in order:
        short = [name for name in ("test", "validation") if counts[name] < _wanted(len(squares), shares[name])]
        context = short[0] if short else "training"
        counts[context] += len(members)
        contexts |= dict.fromkeys(members, context)
    return contexts


def _without_buffer(contexts: dict[Square, str], buffer: float) -> dict[Square, str]:
    """Leave out squares nearer than the buffer to one of a context that ranks before theirs and was not left out."""
    squares = list(contexts)
    places = np.array([(square.east, square.north) for square in squares], dtype=float)
    ranks = np.array([CONTEXTS[::-1].index(contexts[square]) for square in squares])
    kept = ranks == 0
    for rank in range(1, len(CONTEXTS)):
        before = places[kept]
        for number in np.flatnonzero(ranks == rank):
            gaps = KM * np.maximum(np.abs(before - places[number]) - 1, 0)
            kept[number] = not (np.hypot(*gaps.T) < buffer).any()
    return {square: contexts[square] if stays else LEFT_OUT for square, stays in zip(squares, kept, strict=True)}


def write_contexts(out: Path, contexts: Mapping[Square, str], block: int) -> None:
    """Write the table of contexts."""
    rows = [(square.tile, square.name, context, block) for square, context in sorted(contexts.items())]
    with whole_file(out / TABLE) as beside:
        pd.DataFrame(rows, columns=["tile", "patch", "context", "block_km"]).to_csv(beside, index=False)


def read_contexts(out: Path) -> dict[tuple[str, str], str]:
    """Contexts by tile and patch.

    Raises:
        InputError: the step has not been done, or its table was changed to something else.
    """
    path = out / TABLE
    if not path.is_file():
        raise InputError(f"{path} does not exist; the step contexts writes it")
    try:
        rows = pd.read_csv(path, dtype=str)
        return {(row.tile, row.patch): row.context for row in rows.itertuples()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a table of contexts with columns tile, patch and context: {error}") from error


@paper_style()
def context_plot(contexts: Mapping[Square, str], block: int, buffer: float, simulated: bool) -> "Figure":
    """A map of the squares and their contexts, with the blocks' borders."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    colours = dict(zip(CONTEXTS, COLOURS, strict=False)) | {LEFT_OUT: GREY}
    figure = Figure(figsize=(BOTH_COLUMNS, 0.75 * BOTH_COLUMNS))
    axes = figure.subplots()
    for square, context in contexts.items():
        axes.add_patch(
            Rectangle((square.east, square.north - 1), 1, 1, facecolor=colours[context], edgecolor="white", lw=0.5)
        )
    for east, north in {(square.east // block * block, (square.north - 1) // block * block) for square in contexts}:
        axes.add_patch(Rectangle((east, north), block, block, fill=False, edgecolor="black", lw=0.6))
    counts = Counter(contexts.values())
    handles = [Patch(color=colour, label=f"{name} ({counts[name]})") for name, colour in colours.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    axes.autoscale_view()
    axes.set_aspect("equal")
    axes.set_xlabel("Easting (km)")
    axes.set_ylabel("Northing (km)")
    axes.ticklabel_format(useOffset=False)
    note = " (simulated)" if simulated else ""
    axes.set_title(f"Blocks of {block} km, squares of different contexts at least {buffer:g} m apart{note}", fontsize=8)
    return figure
