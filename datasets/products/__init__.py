"""Products: dated Sentinel-2 images as their producers hand them out, found and read in one way.

Known are ESA's Level-2A SAFE products and those of Theia (MAJA), as folders or zip archives; STAC catalogues, item
collections and APIs; and this project's own dated GeoTIFFs of 10 bands. docs/products.md says what is read of each.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from tqdm import tqdm

from datasets.canopy.catalogue import BANDS, NODATA
from datasets.products.packages import open_package
from datasets.products.product import CLEAR, CLOUD, MISSING, RESAMPLINGS, WATER, Band, Product
from datasets.products.safe import is_safe, read_safe
from utils.errors import InputError

__all__ = ["BANDS", "CLEAR", "CLOUD", "MISSING", "NODATA", "RESAMPLINGS", "WATER", "Band", "Product", "find_products"]

ARCHIVE = ".zip"


def find_products(
    products: str,
    folder: Path,
    years: Collection[int] = (),
    say: Callable[[str], None] = print,
    *,
    flag: str = "products",
) -> list[Product]:
    """Find products and check that each is whole.

    Args:
        products: a folder of products, or a list of them separated by commas or spaces; relative to `folder`.
        folder: that relative paths count from.
        years: of the products that are used; of all if empty.
        say: takes lines on what is left out.
        flag: what `products` is called by the user, for messages.

    Returns:
        The products in order of date and name.

    Raises:
        InputError: there is nothing to use, or a product is not whole.
    """
    paths = _paths(products, folder, flag)
    found = [_read(path) for path in tqdm(paths, "Reading products...", unit="product", leave=False)]
    used = [product for product in found if not years or product.date.year in years]
    if not used:
        there = ", ".join(map(str, sorted({product.date.year for product in found})))
        raise InputError(f"{flag}={products}: no product is of {', '.join(map(str, sorted(years)))}; there are {there}")
    return sorted(_latest(used, say), key=lambda product: (product.date, product.name))


def _paths(products: str, folder: Path, flag: str) -> list[Path]:
    place = folder / products
    if place.exists():
        if _is_product(place):
            return [place]
        paths = sorted(path for path in place.iterdir() if not path.name.startswith(".") and _is_product(path))
        if not paths:
            raise InputError(f"{flag}={products}: {place} holds no product")
        return paths
    paths = [folder / name for name in products.replace(",", " ").split()]
    for path in paths:
        if not path.exists():
            raise InputError(f"{flag}={products}: {path} does not exist; a folder or a list of products is expected")
    return paths


def _is_product(path: Path) -> bool:
    if path.is_dir():
        return path.suffix == ".SAFE" or is_safe(frozenset(child.name for child in path.iterdir()))
    return path.suffix.lower() == ARCHIVE


def _read(path: Path) -> Product:
    package = open_package(path)
    if is_safe(package.names) or path.suffix == ".SAFE":
        return read_safe(package)
    raise InputError(f"{path} is no product that is known")


def _latest(products: list[Product], say: Callable[[str], None]) -> list[Product]:
    """Of products of the same image, those of the latest processing."""
    latest: dict[tuple[str, ...], str] = {}
    for product in products:
        key = (product.tile, product.sensor, product.sensed)
        latest[key] = max(latest.get(key, ""), product.baseline)
    used: list[Product] = []
    old: list[Product] = []
    for product in products:
        later = product.sensed and latest[product.tile, product.sensor, product.sensed] > product.baseline
        (old if later else used).append(product)
    if old:
        say(f"Left out, of an earlier processing baseline than another product of the same image: {len(old)}, {old[0].name}")
    return used
