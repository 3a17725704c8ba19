"""Items of STAC: what their numbers mean, static catalogues, and an API on the loopback that plays back what it recorded."""

import datetime
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from products import ANGLES, GRID, WHOLE, image, states

from datasets.products import BANDS, Product, find_products
from datasets.products.demo_stac import write_stac
from utils.errors import InputError

# By day of the month: what the numbers carry, what the item says, and whether the two agree.
ITEMS: dict[int, dict[str, Any]] = {
    1: {"offset": -1000, "applied": False, "stated": -0.1},
    2: {"offset": None, "applied": True, "stated": -0.1},  # as Earth Search has it: the flag counts
    3: {"offset": -1000, "applied": None, "stated": None},  # as the Planetary Computer has it: by the baseline alone
    4: {"offset": None, "applied": None, "stated": None, "baseline": "03.01"},
    5: {"offset": None, "applied": False, "stated": -0.1, "baseline": "03.01"},  # no offset before baseline 04.00
    6: {"offset": None, "applied": None, "stated": 0.0, "baseline": ""},
    7: {"offset": -1500, "applied": None, "stated": -0.15, "baseline": "05.11"},
}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static catalogue."""
    folder = tmp_path_factory.mktemp("stac") / "catalogue"
    for day, settings in ITEMS.items():
        write_stac(folder, GRID, datetime.date(2023, 6, day), image(day), states(), ANGLES, **settings)
    return folder


def quiet(_: str) -> None:
    """Say nothing."""


def items_of(catalogue: Path) -> list[dict[str, Any]]:
    """The items' documents."""
    return [json.loads(path.read_text()) for path in sorted(catalogue.glob("*/*.json"))]


def test_numbers_mean_what_flag_baseline_and_asset_say_together(catalogue: Path) -> None:
    lines: list[str] = []
    products = find_products(catalogue.name, catalogue.parent, [2023], lines.append)
    assert not lines, lines
    for product, (day, settings) in zip(products, ITEMS.items(), strict=True):
        assert (product.date.day, product.tile, product.sensor, product.grid) == (day, "31TDL", "SENTINEL2A", GRID)
        assert np.array_equal(product.read(WHOLE), image(day)), settings
        assert np.array_equal(product.states(WHOLE), states())
        angles = product.angles(np.array([[400_000, 5_000_000], [0, 0]]), GRID.crs)
        assert angles[0].tolist() == ANGLES.tolist() and np.isnan(angles[1]).all()
    assert products == find_products(str(catalogue / "catalog.json"), Path("/"), (), quiet)
    assert find_products(str(catalogue), Path("/"), bounds=(1.7, 45.1, 1.75, 45.2)) == products
    with pytest.raises(InputError, match="no product is there"):
        find_products(str(catalogue), Path("/"), bounds=(7, 45, 8, 46))


def test_doubt_is_said_where_the_darkest_pixels_contradict_the_item(tmp_path: Path) -> None:
    write_stac(tmp_path, GRID, datetime.date(2023, 6, 1), image(low=50), states(), ANGLES, offset=None, applied=False)
    write_stac(tmp_path, GRID, datetime.date(2023, 6, 2), image(low=50), states(), ANGLES, offset=-1200, applied=True)
    write_stac(tmp_path, GRID, datetime.date(2023, 6, 3), image(low=50), states(), ANGLES, offset=None, applied=True)
    lines: list[str] = []
    products = find_products(".", tmp_path, (), lines.append)
    already, not_yet = lines
    assert "Doubtful offset of 1 of 3 items, S2A_31TDL_20230601_0_L2A for example: with -0.1, the darkest" in already
    assert re.search(r"reflectance -0.0\d; it may be applied already$", already)
    assert "S2A_31TDL_20230602_0_L2A" in not_yet and re.search(r"reflectance 0.1\d; it may not be applied yet$", not_yet)
    # What is read is what the items say, for all that.
    assert products[0].bands[0].add == -1000 and products[1].bands[0].add == 0


def test_item_collections_and_items_are_read_from_where_they_lie(catalogue: Path, tmp_path: Path) -> None:
    items = items_of(catalogue)[:2]
    (catalogue / "search.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": strip_links(items)}))
    try:
        products = find_products(str(catalogue / "search.geojson"), tmp_path)
    finally:
        (catalogue / "search.geojson").unlink()
    assert [product.date.day for product in products] == [1, 2]
    item = next(catalogue.glob("*20230602*/*.json"))
    (product,) = find_products(str(item), tmp_path)
    assert np.array_equal(product.read(WHOLE, ["B8"])[0], image(2)[BANDS.index("B8")])


def strip_links(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as a search gives them: assets below the catalogue, no links."""
    for item in items:
        item["links"] = []
        for asset in item["assets"].values():
            asset["href"] = f"./{item['id']}/{asset['href'].removeprefix('./')}"
    return items


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda item: item["assets"].pop("rededge1"), "S2A_31TDL_20230601_0_L2A .* has no asset of B5; expected is one of"),
        (lambda item: item["assets"].pop("scl"), "has no asset of SCL"),
        (lambda item: item["assets"]["red"].update(href="./B11.tif"), r"B11.tif has another grid \(12 x 16 pixels"),
        (
            lambda item: item["assets"]["nir"].update(href="./gone.tif"),
            "gone.tif of S2A_31TDL_20230601_0_L2A cannot be read",
        ),
        (lambda item: item["properties"].update(datetime=None), "has no datetime|cannot be read as a STAC catalogue"),
        (lambda item: item.update(type="Table"), "is no STAC catalogue, collection or item: its type is Table"),
        (
            lambda item: (
                [item["properties"].clear() or item["properties"].update(datetime="2023-06-01T00:00:00Z")]
                + [asset.pop("raster:bands") for asset in item["assets"].values() if "raster:bands" in asset]
            ),
            "says neither the offset of B2 .raster:bands. nor the processing baseline",
        ),
    ],
    ids=["band", "classes", "grid", "file", "datetime", "kind", "meaning"],
)
def test_an_item_is_whole_or_refused(catalogue: Path, change: Any, expected: str) -> None:
    source = next(catalogue.glob("*20230601*/*.json"))
    item = json.loads(source.read_text())
    change(item)
    path = source.with_name("changed.json")
    path.write_text(json.dumps(item))
    try:
        with pytest.raises(InputError, match=expected) as caught:
            find_products(str(path), Path("/"), (), quiet)
    finally:
        path.unlink()
    assert "\n" not in str(caught.value)


def test_what_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken.json cannot be read as a STAC catalogue"):
        find_products("broken.json", tmp_path)


class Api(NamedTuple):
    """An API: its address, and what it was asked."""

    address: str
    asked: list[dict[str, Any]]


@pytest.fixture
def api(catalogue: Path) -> Iterator[Api]:
    """A STAC API on the loopback that serves the catalogue's files, in ranges, and answers each search by the same page."""
    asked: list[dict[str, Any]] = []

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, document: dict[str, Any], kind: str = "application/json") -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.path != "/":
                self.send_part()
                return
            classes = ["core", "item-search"]
            self.answer(
                {
                    "type": "Catalog",
                    "id": "recorded",
                    "description": "recorded",
                    "stac_version": "1.0.0",
                    "conformsTo": [f"https://api.stacspec.org/v1.0.0/{name}" for name in classes],
                    "links": [
                        {"rel": "self", "href": f"{address}/"},
                        {"rel": "root", "href": f"{address}/"},
                        {"rel": "search", "href": f"{address}/search", "type": "application/geo+json", "method": "POST"},
                    ],
                }
            )

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            features = items_of(catalogue)[:3]
            for item in features:
                item["links"] = []
                for asset in item["assets"].values():
                    asset["href"] = f"{address}/{item['id']}/{asset['href'].removeprefix('./')}"
            self.answer({"type": "FeatureCollection", "features": features, "links": []}, "application/geo+json")

        def send_part(self) -> None:
            """A file, or the range of it that is asked for."""
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(wanted[1]) if wanted else 0
            part = content[first : int(wanted[2]) + 1 if wanted and wanted[2] else None]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        def do_HEAD(self) -> None:
            self.send_part()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(catalogue)))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Api(address, asked)
    server.shutdown()
    server.server_close()
    thread.join()


def found(query: str, **settings: Any) -> list[Product]:
    """Products of an address."""
    return find_products(query, Path("/nowhere"), [2023], quiet, **settings)


def test_an_api_is_asked_for_collection_place_and_years_and_its_files_are_read_in_place(api: Api) -> None:
    products = found(f"{api.address}?collections=sentinel-2-l2a&bbox=1.7,45.1,1.8,45.2")
    (asked,) = api.asked
    assert asked["collections"] == ["sentinel-2-l2a"] and asked["bbox"] == [1.7, 45.1, 1.8, 45.2]
    assert asked["datetime"].startswith("2023-01-01T00:00:00Z/2023-12-31T23:59:59")
    assert [product.date.day for product in products] == [1, 2, 3]
    assert all(product.bands[0].path.startswith("http://127.0.0.1") for product in products)
    assert np.array_equal(products[0].read(WHOLE), image(1)) and np.array_equal(products[0].states(WHOLE), states())
    assert products[0].angles(np.array([[400_000, 5_000_000]]), GRID.crs)[0].tolist() == ANGLES.tolist()


def test_bounds_stand_in_for_a_bbox(api: Api) -> None:
    found(f"{api.address}/search?collections=sentinel-2-l2a", bounds=(1.7, 45.1, 1.75, 45.2))
    assert api.asked[0]["bbox"] == [1.7, 45.1, 1.75, 45.2]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", r"is a STAC API; what to ask it for is expected behind it, as http.*\?collections=sentinel-2-l2a&bbox=west"),
        ("?collections=sentinel-2-l2a", "says nothing of the place: bbox=west,south,east,north"),
        ("?bbox=1,2,3,4", "names no collections="),
        ("?collections=a&bbox=1,2,3,4&cloud=3", "asks for cloud; known are collections, ids, bbox"),
        ("?collections=a&bbox=1,2,3", "four numbers in degrees"),
        ("/nowhere.json", "cannot be read as a STAC catalogue"),
    ],
    ids=str,
)
def test_addresses_that_ask_for_nothing_usable_are_refused(api: Api, query: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        found(api.address + query)
    assert api.address in str(caught.value) and "\n" not in str(caught.value)


def test_an_api_that_does_not_answer_is_refused() -> None:
    with pytest.raises(InputError, match=r"127.0.0.1:9.* cannot be read as a STAC catalogue"):
        found("http://127.0.0.1:9?collections=a&bbox=1,2,3,4")
