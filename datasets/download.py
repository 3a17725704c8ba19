"""Download the published grassland table into data/, checked against its sha256: `python -m datasets.download`."""

import pooch
import requests

from utils.errors import InputError
from utils.runs import project_folder, run_or_explain

URL = "https://raw.githubusercontent.com/alvrogd/ResNeTS/main/data/dataset.xlsx"
SHA256 = "d40401774253628583de4efb502775d086a17944aba2ea007bc95772de673642"


def main() -> None:
    """Download the table unless the file already exists.

    Raises:
        InputError: the table cannot be downloaded or is not the published one; no partial file is left.
    """
    target = project_folder() / "data" / "dataset.xlsx"
    if target.exists():
        print(f"{target} already exists")
        return
    try:
        pooch.retrieve(
            URL,
            known_hash=f"sha256:{SHA256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=30),
        )
    except requests.RequestException as error:
        raise InputError(
            f"the grassland table could not be downloaded from {URL} ({type(error).__name__}); "
            f"without internet or behind a proxy, get it by other means and put it at {target}"
        ) from error
    except ValueError as error:
        raise InputError(f"the file at {URL} is not the published table: its sha256 is not {SHA256}") from error
    except OSError as error:
        raise InputError(f"{target} could not be written: {error.strerror or error}") from error
    print(f"{target} downloaded, checked against its sha256")


if __name__ == "__main__":
    run_or_explain(main)
