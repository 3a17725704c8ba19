"""The download of the table: checked, complete or absent, and explained when it fails."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets import download
from utils.errors import InputError

CONTENT = b"a table"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local server in place of the table's."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "dataset.xlsx").write_bytes(CONTENT)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(served)))  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PROJECT_DIR", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_table_is_downloaded_once(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "URL", f"{address}/dataset.xlsx")
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    download.main()
    assert (tmp_path / "data" / "dataset.xlsx").read_bytes() == CONTENT
    monkeypatch.setattr(download, "URL", f"{address}/gone")
    download.main()
    assert "already exists" in capsys.readouterr().out


def test_another_file_is_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "URL", f"{address}/dataset.xlsx")
    with pytest.raises(InputError, match="is not the published table"):
        download.main()
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/dataset.xlsx", "missing.xlsx"])
def test_no_connection_is_explained(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(download, "URL", path if path.startswith("http") else f"{address}/{path}")
    with pytest.raises(InputError, match=r"could not be downloaded from .* put it at"):
        download.main()
    assert not list((tmp_path / "data").iterdir())
