"""Folders of simulated data: made whole or not at all, and marked, by which all that is made from them says so."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from utils.errors import InputError

MARK = "SIMULATED.txt"
LEVELS = 4  # folders above a file that may bear the mark


def is_simulated(place: Path) -> bool:
    """Whether a file or folder, or one that holds it, is marked."""
    place = place.absolute()
    return any((folder / MARK).exists() for folder in (place, *place.parents[:LEVELS]))


def simulated_folder(folder: Path, simulate: Callable[[Path], None], what: str) -> Path:
    """A folder that `simulate` fills, unless it exists; several processes may ask for it at once.

    Args:
        folder: to be made.
        simulate: writes the same files into whatever empty folder it is given.
        what: what they are, for messages and the mark.

    Raises:
        InputError: the folder cannot be written.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            (beside / MARK).write_text(f"Simulated {what}; nothing here was measured.\n")
            simulate(beside)
            beside.chmod(0o755)  # temporary folders are accessible to their owner only
            try:
                beside.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster, with the same files
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the simulated {what} could not be written to {folder.parent}: {error.strerror or error}"
        ) from error
    return folder
