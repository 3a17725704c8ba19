"""Runs are found by id, its beginning, their folder, or as the newest of their operation."""

import os
from pathlib import Path

import pytest
import torch

from utils.errors import InputError
from utils.finished_runs import find_run
from utils.runs import write_json, write_tensors

IDS = ("1da47f3730dd4634", "1db00000000000ff", "2aa47f3730dd4634")


def write_run(folder: Path, operation: str, age: int = 0, finished: bool = True) -> None:
    record = {"project": f"vegetation from Sentinel-2 time series, operation {operation}"}
    write_tensors(folder / "models" / "best.safetensors", {"x": torch.zeros(1)}, record)
    if finished:
        write_json(folder / "metrics.json", {})
        os.utime(folder / "metrics.json", (1e9 - age, 1e9 - age))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Guild home of two runs of canopy, the second one newer, and a yet newer run of main."""
    monkeypatch.delenv("RUN_DIR", raising=False)
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    monkeypatch.setenv("CMD_DIR", str(tmp_path))
    for number, (name, operation) in enumerate(zip(IDS, ("canopy", "canopy", "main"), strict=True)):
        write_run(tmp_path / "runs" / name, operation, age=10 - number)
    return tmp_path / "runs"


def test_a_run_is_found_by_id_beginning_folder_or_age(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run(IDS[0], "canopy") == find_run("1da", "canopy") == find_run(f"runs/{IDS[0]}", "canopy") == runs / IDS[0]
    write_run(runs / "3bb", "canopy", finished=False)
    assert find_run("", "canopy") == runs / IDS[1] and find_run("", "main") == runs / IDS[2]
    assert find_run("", "main", "canopy") == runs / IDS[2] and find_run("1da", "main", "canopy") == runs / IDS[0]
    # Within a run of Guild, which has a folder beside the others.
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "runs" / "4cc"))
    monkeypatch.setenv("GUILD_HOME", "/elsewhere")
    assert find_run("", "canopy") == runs / IDS[1]


@pytest.mark.parametrize(
    ("run", "operation", "expected"),
    [
        ("1d", "canopy", "2 runs begin so"),
        ("9", "canopy", "there is none"),
        ("../runs", "canopy", "there is none"),
        ("2aa", "canopy", "is a run of main, but one of canopy is expected"),
        ("3bb", "canopy", "is no finished run of canopy"),
        (".", "main", "is no finished run of main"),
    ],
)
def test_what_is_no_such_run_is_refused(runs: Path, run: str, operation: str, expected: str) -> None:
    write_run(runs / "3bb", "canopy", finished=False)
    with pytest.raises(InputError, match=expected):
        find_run(run, operation)


def test_without_any_run_the_way_to_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_DIR", raising=False)
    monkeypatch.setenv("GUILD_HOME", str(tmp_path))
    with pytest.raises(InputError, match="no finished run of canopy; `guild run canopy` makes one"):
        find_run("", "canopy")
