"""What the README says can be done."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Ended

README = (PROJECT / "README.md").read_text()


def test_the_worked_example_of_an_architecture_trains(
    monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Ended]
) -> None:
    import main
    import models

    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 26
    for command in (["check"], ["format", "--check"]):
        ruff = [str(Path(sys.executable).parent / "ruff"), *command, "--stdin-filename", "models/temp_cnn.py", "-"]
        linted = subprocess.run(ruff, input=code, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout + linted.stderr
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    monkeypatch.setitem(models.NETWORKS, "TempCNN", namespace["TempCNN"])
    try:
        importlib.reload(main)
        short = ("dataset=demo", "epochs=2", "warmup_epochs=1", "ensemble_count=2")
        done = run_main("model=TempCNN", "hidden=8", "dropout=0.3", "conv_width=3", *short)
    finally:
        monkeypatch.undo()
        importlib.reload(main)
    assert done.returncode == 0, done.stderr
    assert "R2 mean: " in done.stdout and "Without effect" not in done.stdout


def test_every_path_of_the_layout_exists() -> None:
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", README, flags=re.DOTALL)
    for line in layout.splitlines():
        assert (PROJECT / line.split()[0]).exists(), line
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (PROJECT / link).exists(), link
