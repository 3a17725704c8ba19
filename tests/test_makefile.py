"""Which Python `make` selects for its environment, among stand-ins that answer like Python."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, environment

# Answers the questions of the Makefile as a Python of that version; what it installs is a stand-in for pip and Guild.
STAND_IN = """#!/bin/sh
case "$2 $3" in
  'import sys;'*) case {version} in 3.11|3.12|3.13) exit 0 ;; *) exit 1 ;; esac ;;
  'import ensurepip'*) exit {lacks_venv} ;;
  'venv --clear')
    mkdir -p "$4/bin"
    printf '#!/bin/sh\\n' >"$4/bin/python"
    echo '#!{version}/bin/python{version}' >"$4/bin/guild"
    chmod +x "$4/bin/python" ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`make` in a copy, on a PATH with Pythons of the given versions: `3.12-` lacks venv, an empty one does not run."""
    commands, project = tmp_path / "bin", tmp_path / "project"
    commands.mkdir()
    project.mkdir()
    for name in ("Makefile", "requirements.txt", "requirements.lock"):
        shutil.copy(PROJECT / name, project)
    for name in ("make", "sh", "mkdir", "chmod", "sed", "touch"):
        (commands / name).symlink_to(shutil.which(name) or name)

    def call(*arguments: str, **pythons: str) -> subprocess.CompletedProcess[str]:
        for name, version in pythons.items():
            path = commands / re.sub(r"_(?=\d)", ".", name)
            broken = "#!/bin/sh\nexit 127\n"
            stand_in = STAND_IN.format(version=version.rstrip("-"), lacks_venv=int(version.endswith("-")))
            path.write_text(stand_in if version else broken)
            path.chmod(0o755)
        environ = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
        environ |= {"PATH": str(commands), "GUILD_HOME": str(tmp_path / "guild")}
        command = ["make", *arguments, ".venv/.run-ready"]
        return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, check=False, timeout=60)

    return call


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3_13": "3.13", "python3_12": "3.12", "python3_11": "3.11", "python3": "3.11"}, "3.13"),
        ({"python3_13": "", "python3_12": "", "python3_11": "3.11"}, "3.11"),  # names without a Python behind them
        ({"python3_13": "3.13-", "python3": "3.12"}, "3.12"),
        ({"python3": "3.12"}, "3.12"),
    ],
    ids=["newest", "broken names", "without venv", "python3 alone"],
)
def test_make_selects_the_newest_python_that_works(
    make: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, pythons: dict[str, str], taken: str
) -> None:
    done = make(**pythons)
    assert done.returncode == 0, done.stderr
    launcher = (tmp_path / "project" / ".venv" / "bin" / "guild").read_text()
    assert launcher == f"#!{taken}/bin/python{taken} -Wignore:pkg_resources:UserWarning\n"


@pytest.mark.parametrize(
    ("arguments", "pythons", "sentence"),
    [
        (
            [],
            {},
            "python3.13 python3.12 python3.11 python3. On Debian 12, 13 or Ubuntu 24.04: apt-get",
        ),
        ([], {"python3": "3.14"}, "Python 3.11, 3.12 or 3.13 is needed, and none of these is one"),
        (["PYTHON=python3.14"], {"python3_14": "3.14", "python3": "3.12"}, "none of these is one: python3.14."),
        (
            [],
            {"python3": "3.13-"},
            "python3 cannot make an environment: on Debian and Ubuntu, apt-get install",
        ),
    ],
    ids=["none", "too new", "chosen too new", "without venv"],
)
def test_make_says_in_a_sentence_which_python_it_needs(
    make: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], pythons: dict[str, str], sentence: str
) -> None:
    done = make(*arguments, **pythons)
    assert done.returncode == 2
    said, failed = done.stderr.splitlines()
    assert sentence in said and failed.startswith("make: ***")
