"""Plots that are not drawn: drawing takes up to two thirds of a short run's time, and most tests look at no plot."""

from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure
from PIL import Image


def save_blank(_: Figure, file: IO[bytes] | Path, *, format: str, **__: Any) -> None:
    """In place of `Figure.savefig`: a picture of one pixel."""
    Image.new("RGB", (1, 1)).save(file, format)
