"""Guild as a user sees it: its commands in a terminal, its pages in a browser."""

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, environment

GUILD = str(Path(sys.executable).parent / "guild")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
LABEL = "MLP SpecRichness seed 7 dataset demo epochs 2"
# Colours, cursor movements and character sets.
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\([0B]|[=>])|\r")


class Terminal:
    """A command in a terminal of 40 lines and 250 columns."""

    def __init__(self, home: Path, *command: str) -> None:
        self.shown = ""
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 250))
        environ = environment() | {"GUILD_HOME": str(home), "TERM": "xterm"}
        for name in ("LINES", "COLUMNS"):  # they would override the size of the terminal
            environ.pop(name, None)
        # Not pty.fork: Python 3.12 and later warn about it in a process with threads.
        self.process = subprocess.Popen(
            command, cwd=PROJECT, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read until the screen has shown the pattern."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, ESCAPE.sub(" ", self.shown))):
            assert self._read(deadline - time.monotonic()), f"{pattern!r} is not in {self.shown!r}"
        return found

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._ours, keys.encode())

    def ended(self, seconds: float = 30) -> int:
        """Exit status of the command, once it has ended by itself."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0, deadline - time.monotonic()))

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._ours)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # how Linux reports a terminal that no process has open any more
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextmanager
def terminal(home: Path, *command: str) -> Iterator[Terminal]:
    opened = Terminal(home, *command)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def served(home: Path, command: str, ready: str) -> Iterator[str]:
    """Address of the page that a Guild command serves, without a browser, until Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with terminal(home, GUILD, command, "--no-open", "--host", "127.0.0.1", "--port", str(port)) as opened:
        opened.wait_for(rf"{ready} \S*http://127.0.0.1:{port}")
        assert eventually(lambda: answers(port))  # the address is printed before the server listens
        yield f"http://127.0.0.1:{port}"
        os.kill(opened.process.pid, signal.SIGINT)
        assert opened.ended() == 0, opened.shown


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def answer(url: str, data: dict[str, Any] | None = None) -> Any:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Repeat until it holds: a server may still be starting, or still be reading the runs."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return held


def drawn(url: str, folder: Path) -> str:
    """The text of a page in Chromium once its scripts have run."""
    assert CHROMIUM is not None
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
    command += [f"--user-data-dir={folder}", "--window-size=1600,1000", "--virtual-time-budget=10000", "--dump-dom", url]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    page = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page).replace("\u200b", ""))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, guild_home: Callable[[Path], Path]) -> Path:
    """A home with one short run."""
    home = guild_home(tmp_path_factory.mktemp("guild"))
    flags = ["dataset=demo", "model=MLP", "seed=7", "epochs=2", "warmup_epochs=1"]
    environ = environment() | {"GUILD_HOME": str(home)}
    command = [GUILD, "run", "main", *flags, "--yes"]
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> str:
    (folder,) = home.glob("runs/*/metrics.json")
    return folder.parent.name[:8]


@pytest.fixture(scope="module")
def view(home: Path) -> Iterator[str]:
    with served(home, "view", "Running Guild View at") as address:
        yield address


@pytest.fixture(scope="module")
def tensorboard(home: Path) -> Iterator[str]:
    with served(home, "tensorboard", "Running TensorBoard .* at") as address:
        yield address


def test_runs_lists_the_run(home: Path, run: str) -> None:
    with terminal(home, GUILD, "runs") as opened:
        opened.wait_for(rf"{run}\] +main .* completed +{LABEL}")
        assert opened.ended() == 0


def test_compare_draws_its_table_and_quits(home: Path, run: str) -> None:
    with terminal(home, GUILD, "compare") as opened:
        opened.wait_for(r"\brun +operation +started .* r2_mean ")
        opened.wait_for(rf"\b{run} +main .* completed .* MLP +SpecRichness .* demo +-?\d+\.\d+ ")
        opened.press("q")
        assert opened.ended() == 0, opened.shown


def test_view_serves_the_run(view: str, run: str) -> None:
    (served_run,) = answer(f"{view}/runs")
    assert served_run["shortId"] == run and served_run["label"] == LABEL and served_run["status"] == "completed"


def test_tensorboard_has_r2_beside_the_flags(tensorboard: str, run: str) -> None:
    """What the page HParams requests."""
    query = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
    groups: list[dict[str, Any]] = []

    def read() -> bool:
        groups[:] = answer(f"{tensorboard}/data/plugin/hparams/session_groups", query).get("sessionGroups", [])
        return any(metric["name"]["tag"] == "r2_mean" for group in groups for metric in group["metricValues"])

    assert eventually(read), groups
    (group,) = groups
    assert group["name"] == f"{run} main" and group["hparams"]["model"] == "MLP" and group["hparams"]["seed"] == 7


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent (Debian's package chromium)")
def test_pages_draw_the_run(view: str, tensorboard: str, run: str, tmp_path: Path) -> None:
    assert eventually(lambda: LABEL in drawn(view, tmp_path / "view"))
    texts: list[str] = []

    def shows_scalars() -> bool:
        texts.append(drawn(f"{tensorboard}/#timeseries", tmp_path / "tensorboard"))
        return run in texts[-1] and LABEL in texts[-1] and "loss_train" in texts[-1] and "r2_mean" in texts[-1]

    assert eventually(shows_scalars), texts[-1]
