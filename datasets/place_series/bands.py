"""Which bands a series has: chosen by any of their usual names, and indices by formula.

A formula is arithmetic on bands: numbers, names, + - * / and parentheses. It is read by Python's own parser into a tree, of
which nothing else is accepted, and computed from the tree; nothing is executed.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets.series_table import listed
from utils.errors import InputError
from utils.flags import names_in

ALIASES = (
    ("B1", "B01", "coastal", "aerosol"),
    ("B2", "B02", "blue"),
    ("B3", "B03", "green"),
    ("B4", "B04", "red"),
    ("B5", "B05", "re1", "rededge1"),
    ("B6", "B06", "re2", "rededge2"),
    ("B7", "B07", "re3", "rededge3"),
    ("B8", "B08", "nir"),
    ("B8A", "nir08", "nirn", "narrow_nir", "rededge4"),
    ("B9", "B09", "nir09"),
    ("B11", "swir1", "swir16"),
    ("B12", "swir2", "swir22"),
)
"""Names of the bands of Sentinel-2, a band a line: ESA's, and those of STAC catalogues and papers."""

LONGEST = 500  # nodes of a formula's tree
REFLECTANCE = 1e-4
"""A band of a product times this is reflectance."""


class Index(NamedTuple):
    """An index: its name, its formula, and (name in the formula, source) of each band in it."""

    name: str
    formula: str
    bands: tuple[tuple[str, str], ...]


class Channels(NamedTuple):
    """The bands and indices of a series; hashable.

    Attributes:
        sources: bands that are read, in this order.
        bands: (name, source) of each band.
        indices: the indices.
        scale: sources are multiplied by this in formulas.
    """

    sources: tuple[str, ...]
    bands: tuple[tuple[str, str], ...]
    indices: tuple[Index, ...]
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of bands and indices, in the order of `compute`."""
        return (*(name for name, _ in self.bands), *(index.name for index in self.indices))

    def compute(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Bands and indices from the sources.

        Args:
            values: (date, source, pixel), nan where not clear.

        Returns:
            (date, channel, pixel), and (index,) the values that an index lacks although its bands have theirs, which is
            where it divides by zero.
        """
        channels = [values[:, self.sources.index(source)] for _, source in self.bands]
        by_source = {source: values[:, number].astype(np.float64) * self.scale for number, source in enumerate(self.sources)}
        lacking = []
        for index in self.indices:
            inputs = {name: by_source[source] for name, source in index.bands}
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                result = _evaluate(parse(index.formula), inputs).astype(np.float32)
            known = np.logical_and.reduce([np.isfinite(one) for one in inputs.values()])
            lacking.append(int((known & ~np.isfinite(result)).sum()))
            channels.append(np.where(known & np.isfinite(result), result, np.float32(np.nan)))
        return np.stack(channels, axis=1), np.array(lacking, dtype=np.int64)


def choose_channels(bands: str, indices: str, available: Sequence[str], scale: float, where: str) -> Channels:
    """The bands and indices that two flags name.

    Args:
        bands: `all`; names of bands, as `available` or `ALIASES` have them; or name=band, which gives the band a name.
        indices: `none`, or name=formula of each index, separated by commas or semicolons.
        available: bands that there are.
        scale: of the bands in formulas.
        where: the bands are available, for messages.

    Raises:
        InputError: a band is not available, a name appears twice, or a formula is none.
    """
    chosen: list[tuple[str, str]] = []
    for part in names_in(re.sub(r"\s*=\s*", "=", bands), "all") or available:
        name, _, band = part.partition("=")
        chosen.append((name.strip(), _source(band.strip() or name.strip(), available, f"bands={bands}", where)))
    formulas = [
        _index(part.strip(), dict(chosen), available, where)
        for part in re.split(r"[,;]", "" if indices == "none" else indices)
        if part.strip()
    ]
    used = {source for _, source in chosen} | {source for index in formulas for _, source in index.bands}
    channels = Channels(tuple(band for band in available if band in used), tuple(chosen), tuple(formulas), scale)
    lowered = [name.lower() for name in channels.names]
    twice = next((name for name in channels.names if lowered.count(name.lower()) > 1), None)
    if twice:
        raise InputError(f"bands and indices: {twice!r} appears more than once; name=band gives a band another name")
    return channels


def _index(text: str, chosen: Mapping[str, str], available: Sequence[str], where: str) -> Index:
    """Name, formula and the formula's bands of name=formula; a name that `bands` gave goes before others."""
    name, equals, formula = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError(f"indices: {text!r} is not name=formula, such as ndvi=(nir-red)/(nir+red)")
    names = sorted({node.id for node in ast.walk(parse(formula)) if isinstance(node, ast.Name)})
    if not names:
        raise InputError(f"indices: {text} names no band")
    sources = [chosen[one] if one in chosen else _source(one, available, f"indices: {text}", where) for one in names]
    return Index(name, formula, tuple(zip(names, sources, strict=True)))


def _source(name: str, available: Sequence[str], flag: str, where: str) -> str:
    """The available band of a name.

    Raises:
        InputError: there is none, or several.
    """
    if name in available:
        return name
    group = next((group for group in ALIASES if name.lower() in map(str.lower, group)), (name,))
    alike = [band for band in available if band.lower() in map(str.lower, group)]
    if len(alike) != 1:
        several = f"may be {' or '.join(alike)}" if alike else f"is not a band of {where}"
        raise InputError(f"{flag}: {name!r} {several}; there are {listed(available)}")
    return alike[0]


def is_band(name: str) -> bool:
    """Whether a name is that of a band of Sentinel-2."""
    return any(name.lower() in map(str.lower, group) for group in ALIASES)


def parse(formula: str) -> ast.expr:
    """The tree of a formula.

    Raises:
        InputError: it is not arithmetic on bands.
    """
    expected = "numbers, names of bands, + - * / and parentheses are expected"
    try:
        tree = ast.parse(formula, mode="eval").body
        nodes = list(ast.walk(tree))
        strange = [node for node in nodes if not isinstance(node, _ALLOWED) and not _is_number(node)]
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise InputError(f"indices: {formula[:80]!r} is no formula; {expected}") from error
    if len(nodes) > LONGEST:
        raise InputError(f"indices: {formula[:80]!r} is too long; {expected}")
    if strange:
        raise InputError(
            f"indices: {formula[:80]!r} has {ast.unparse(strange[0]) or type(strange[0]).__name__!r}; {expected}"
        )
    return tree


def _is_number(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
        return False
    return isinstance(node.value, int | float) and math.isfinite(node.value)


_OPERATIONS: Mapping[type[ast.AST], np.ufunc] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.true_divide,
    ast.UAdd: np.positive,
    ast.USub: np.negative,
}
_ALLOWED = (ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, *_OPERATIONS)


def _evaluate(tree: ast.AST, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    match tree:
        case ast.BinOp():
            operation = _OPERATIONS[type(tree.op)]
            return np.asarray(operation(_evaluate(tree.left, values), _evaluate(tree.right, values)))
        case ast.UnaryOp():
            return np.asarray(_OPERATIONS[type(tree.op)](_evaluate(tree.operand, values)))
        case ast.Name():
            return values[tree.id]
        case ast.Constant(value=int() | float() as number):
            return np.float64(number)  # type: ignore[return-value]
    raise AssertionError(ast.dump(tree))  # parse accepts nothing else


def predictor_names(channels: Iterable[str], steps: int) -> list[str]:
    """Columns of a series, `<band>_<step>`, bands fastest, steps from 1."""
    names = list(channels)
    return [f"{name}_{step}" for step in range(1, steps + 1) for name in names]
