"""The mark of simulated data: a file in their folder, by which all that is made from them says so."""

from pathlib import Path

MARK = "SIMULATED.txt"
LEVELS = 4  # folders above a file that may bear the mark


def is_simulated(place: Path) -> bool:
    """Whether a file or folder, or one that holds it, is marked."""
    place = place.absolute()
    return any((folder / MARK).exists() for folder in (place, *place.parents[:LEVELS]))
