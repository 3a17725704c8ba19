"""Finished runs that another operation applies: found by id, folder or operation, read from their own files alone."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.errors import InputError
from utils.runs import CHECKPOINT, called_from


def runs_folder() -> Path:
    """Where Guild keeps its runs: those beside this one, or those of Guild's home."""
    if "RUN_DIR" in os.environ:
        return Path(os.environ["RUN_DIR"]).parent
    from guild import var

    return Path(var.runs_dir())


def is_finished(folder: Path) -> bool:
    """Whether a run has its metrics and its weights, and nothing left to resume."""
    return (folder / "metrics.json").is_file() and (folder / "models").is_dir() and not (folder / CHECKPOINT).exists()


def operation_of(folder: Path) -> str | None:
    """The operation that a run's weights are of; None where there are no weights of this project."""
    for path in sorted((folder / "models").glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                record = (file.metadata() or {}).get("record", "")
        except (SafetensorError, OSError):
            continue
        # The record names its project and operation: "project": "..., operation canopy".
        for operation in ("main", "canopy"):
            if f', operation {operation}"' in record:
                return operation
    return None


def find_run(run: str, *operations: str) -> Path:
    """The folder of a finished run.

    Args:
        run: id of a run of Guild or its beginning, a folder, or nothing: the newest finished run of the operations.
        operations: `main`, `canopy` or both.

    Raises:
        InputError: there is none, or not one alone, or it is unfinished or of another operation.
    """
    runs, wanted = runs_folder(), " or ".join(operations)
    if not run:
        finished = [path.parent for path in runs.glob("*/metrics.json") if is_finished(path.parent)]
        by_age = sorted(finished, key=lambda folder: (folder / "metrics.json").stat().st_mtime_ns, reverse=True)
        newest = next((folder for folder in by_age if operation_of(folder) in operations), None)
        if newest is None:
            raise InputError(
                f"{runs} has no finished run of {wanted}; `guild run {operations[0]}` makes one, run=... names one elsewhere"
            )
        return newest
    folder = called_from() / run
    if not folder.is_dir():
        matching = [path for path in runs.glob(f"{run}*") if path.is_dir()] if run.isalnum() else []
        if len(matching) != 1:
            found = f"{len(matching)} runs begin so" if matching else "there is none"
            raise InputError(
                f"run={run}: a folder, or the id of one run in {runs} or its beginning is expected, but {found}"
            )
        folder = matching[0]
    found_operation = operation_of(folder)
    if found_operation not in (None, *operations):
        raise InputError(f"{folder} is a run of {found_operation}, but one of {wanted} is expected")
    if found_operation is None or not is_finished(folder):
        raise InputError(
            f"{folder} is no finished run of {wanted}: metrics.json and models/*.safetensors, and no {CHECKPOINT}, are "
            f"expected"
        )
    return folder
