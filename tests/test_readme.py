"""What the README and the pages of docs/ say can be done."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import PROJECT, Ended
from test_guild import SHORT_CANOPY

PAGES = {path.name: path.read_text() for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))}
README = PAGES["README.md"]
OPERATIONS = yaml.safe_load((PROJECT / "guild.yml").read_text())[0]["operations"]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)


def documented_runs() -> Iterator[tuple[str, str]]:
    """Page and command of every `guild run`, in blocks, in sentences and in the columns of tables headed by one."""
    for page, text in PAGES.items():
        commands = re.findall(r"^[^#|\n]*?(guild run(?!s)[^#\n]*)", text, flags=re.MULTILINE)
        commands += re.findall(r"`(guild run(?!s)[^`]*)`", text)
        commands += [
            f"guild run {flags}" for flags in re.findall(r"^\| [^|]* \| `(\w+=[^`]*)` \|", text, flags=re.MULTILINE)
        ]
        for command in dict.fromkeys(command.split("`")[0].strip() for command in commands):
            yield page, command


def documented_scripts() -> Iterator[tuple[str, str, str]]:
    """Page, script and flags of every call of a script without Guild."""
    for page, text in PAGES.items():
        for script, flags in re.findall(r"(\w+)\.py((?: --\w+ \S+)+)", text):
            yield page, script, flags.strip()


def refuse_unknown(script: str, flag: str, value: str) -> None:
    """Fail where a script does not have a flag or does not take its value."""
    types = importlib.import_module(script).parser.types
    assert flag in types, f"{script}.py has no flag {flag}"
    values = value.strip("[]").split(",") if value.startswith("[") else [value]
    for one in values:
        if "..." not in one:
            types[flag](one)


def test_the_worked_example_of_an_architecture_trains(
    monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Ended]
) -> None:
    import main
    import models

    (code,) = snippets("README.md")
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


@pytest.mark.parametrize(("page", "command"), list(documented_runs()))
def test_every_documented_run_has_flags_that_exist(page: str, command: str) -> None:
    words = shlex.split(command)[2:]
    operation = next((word for word in words if word in OPERATIONS), "main")
    script = OPERATIONS[operation]["main"]
    example = ["hidden", "dropout"] if "model=TempCNN" in words else []
    options = {"--restart", "RUN", "...", *OPERATIONS}
    for word in words:
        if word.startswith("@"):
            assert (PROJECT / word[1:]).is_file(), word
        elif word not in options:
            flag, equals, value = word.partition("=")
            assert equals, f"{page}: {command}: {word} is neither a flag nor a known option"
            if flag not in example and value != "TempCNN":
                refuse_unknown(script, flag, value)


@pytest.mark.parametrize(("page", "script", "flags"), list(documented_scripts()))
def test_every_documented_script_has_flags_that_exist(page: str, script: str, flags: str) -> None:
    words = flags.split()
    assert len(words) % 2 == 0, f"{page}: {flags}"
    for flag, value in zip(words[::2], words[1::2], strict=True):
        refuse_unknown(script, flag.removeprefix("--"), value)


def test_the_commands_are_found_and_a_wrong_one_is_seen() -> None:
    runs = list(documented_runs())
    assert ("README.md", "guild run model=InceptionTime eps=0.01 ensemble_count=5") in runs and len(runs) > 30
    assert len(list(documented_scripts())) >= 2
    with pytest.raises(AssertionError, match="no flag no_such_flag"):
        refuse_unknown("main", "no_such_flag", "1")
    with pytest.raises(Exception, match="'Rigde' is not one of"):
        refuse_unknown("main", "model", "Rigde")


def test_the_snippets_on_a_run_of_main_work(run_main: Callable[..., Ended], tmp_path: Path) -> None:
    done = run_main("dataset=demo", "model=MLP", "epochs=2", "warmup_epochs=1")
    assert done.returncode == 0, done.stderr
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlp").symlink_to(tmp_path)
    namespace: dict[str, Any] = {}
    for code in snippets("runs.md")[:3]:
        exec(code, namespace)
    assert np.allclose(namespace["predicted"], namespace["tested"]["predicted"], rtol=1e-5)
    documented = set(re.findall(r"`(\w+\.\w+)`", PAGES["runs.md"].split("##")[0]))
    assert {"metrics.json", "predictions.csv", "scatter.png", "losses.png"} <= documented
    assert all((tmp_path / name).exists() for name in documented - {"checkpoint.pt", "terms.png"})  # terms of one model


def test_the_snippet_on_a_run_of_canopy_works(run_canopy: Callable[..., Ended], small_tiles: Path, tmp_path: Path) -> None:
    flags = SHORT_CANOPY | {"data": str(small_tiles), "cache": str(tmp_path / "cache")}
    done = run_canopy(*(f"{name}={value}" for name, value in flags.items()))
    assert done.returncode == 0, done.stderr
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "canopy").symlink_to(tmp_path)
    namespace: dict[str, Any] = {}
    *_, code = snippets("runs.md")
    exec(code, namespace)
    assert np.isfinite(namespace["height"]).all() and namespace["record"]["resolution"] == 5


def test_every_batch_file_is_documented_with_its_number_of_runs() -> None:
    documented = re.findall(r"^\| `(batch/\w+\.csv)` \| `\w+` \| (\d+) \|", PAGES["guild.md"], flags=re.MULTILINE)
    rows = {f"batch/{path.name}": str(len(path.read_text().splitlines()) - 1) for path in (PROJECT / "batch").glob("*.csv")}
    assert dict(documented) == rows


def test_every_path_of_the_layout_exists() -> None:
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", README, flags=re.DOTALL)
    for line in layout.splitlines():
        assert (PROJECT / line.split()[0]).exists(), line


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    folder = PROJECT if page == "README.md" else PROJECT / "docs"
    for link, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        if link.startswith("http"):
            continue
        target = folder / link if link else folder / page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


def test_the_readme_is_short_and_links_every_page() -> None:
    assert len(README.splitlines()) <= 200
    assert {page for page in PAGES if page != "README.md"} == set(re.findall(r"docs/([\w-]+\.md)\)", README))
