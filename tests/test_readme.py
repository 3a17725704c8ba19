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
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert sum(bool(line.strip()) for line in code.splitlines()) < 20
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--stdin-filename", "models/one_conv.py", "-"]
    linted = subprocess.run(ruff, input=code, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout
    monkeypatch.setitem(models.NETWORKS, "OneConv", namespace["OneConv"])
    try:
        importlib.reload(main)
        done = run_main("model=OneConv", "dataset=demo", "epochs=2", "warmup_epochs=1", "ensemble_count=2", "kernel_size=3")
    finally:
        monkeypatch.undo()
        importlib.reload(main)
    assert done.returncode == 0, done.stderr
    assert "R2 mean: " in done.stdout


def test_every_path_of_the_layout_exists() -> None:
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", README, flags=re.DOTALL)
    for line in layout.splitlines():
        assert (PROJECT / line.split()[0]).exists(), line
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (PROJECT / link).exists(), link
