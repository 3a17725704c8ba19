"""Products: dated Sentinel-2 images as their producers hand them out, found and read in one way.

Known are ESA's Level-2A SAFE products and those of Theia (MAJA), as folders or zip archives; STAC catalogues, item
collections and APIs; and this project's own dated GeoTIFFs of 10 bands. docs/products.md says what is read of each.
"""

import re
from collections.abc import Callable, Collection, Sequence
from datetime import date
from pathlib import Path

from tqdm import tqdm

from datasets.canopy.catalogue import BANDS, NODATA
from datasets.products.geotiffs import date_of, is_image, read_images
from datasets.products.packages import Package, open_package
from datasets.products.product import CLEAR, CLOUD, MISSING, RESAMPLINGS, WATER, Band, Product
from datasets.products.safe import date_of_safe, is_safe, read_safe
from datasets.products.stac import find_items, is_stac
from datasets.products.theia import date_of_theia, is_theia, read_theia
from utils.errors import InputError

__all__ = ["BANDS", "CLEAR", "CLOUD", "MISSING", "NODATA", "RESAMPLINGS", "WATER", "Band", "Product", "find_products"]

KINDS = "SAFE or Theia products (folders or zip archives), STAC catalogues or dated GeoTIFFs"


def find_products(
    products: str,
    folder: Path,
    years: Collection[int] = (),
    say: Callable[[str], None] = print,
    *,
    flag: str = "products",
    bounds: tuple[float, float, float, float] | None = None,
) -> list[Product]:
    """Find products and check that each is whole.

    Args:
        products: a folder of products; products, catalogues or images separated by commas or spaces, relative to `folder`;
            or addresses of STAC catalogues and APIs, separated by spaces (see `datasets.products.stac`).
        folder: that relative paths count from.
        years: of the products that are used; of all if empty.
        say: takes lines on what is left out or doubtful.
        flag: what `products` is called by the user, for messages.
        bounds: west, south, east, north in degrees that items of STAC must touch; an API is asked for them. Of products that
            are files all are returned, wherever they lie.

    Returns:
        The products in order of date and name; of versions of the same image the one of the latest processing.

    Raises:
        InputError: there is nothing to use, or a product is not whole.
    """
    named = f"{flag}={products}"
    addresses = products.split() if "://" in products else []
    paths = [] if addresses else _paths(products, folder, named)
    found: list[Product] = []
    there: set[int] = set()
    dated = [(path, date_of(path)) for path in paths if is_image(path)]
    packages = [open_package(path) for path in paths if not is_image(path) and not is_stac(path)]
    dated_packages = [(package, _date_of(package, named)) for package in packages]
    there |= {day.year for _, day in (*dated, *dated_packages)}
    found += read_images([path for path, day in dated if _wanted(day, years)], say)
    used = [package for package, day in dated_packages if _wanted(day, years)]
    for package in tqdm(used, "Reading products...", unit="product", leave=False, disable=not used):
        found.append(read_safe(package) if is_safe(package.names) else read_theia(package))
    for address in (*addresses, *filter(None, map(is_stac, paths))):
        found += find_items(address, years, say, bounds)
    if not found:
        wanted = f"of {', '.join(map(str, sorted(years)))}" if years else "there"
        others = f"; there are {', '.join(map(str, sorted(there)))}" if there else ""
        raise InputError(f"{named}: no product is {wanted}{others}")
    return sorted(_latest(found, say), key=lambda product: (product.date, product.name))


def _wanted(day: date, years: Collection[int]) -> bool:
    return not years or day.year in years


def _paths(products: str, folder: Path, named: str) -> list[Path]:
    """Paths of products, catalogues and images."""
    place = folder / products
    if place.is_dir() and not _is_product(place):
        paths = sorted(path for path in place.iterdir() if path.name[0] != "." and _is_product(path))
        if not paths:
            raise InputError(f"{named}: {place} has none of {KINDS}")
        return paths
    paths = [place] if place.exists() else [folder / name for name in re.split(r"[,\s]+", products) if name]
    for path in paths:
        if not path.exists():
            raise InputError(f"{named}: {path} does not exist; a folder or a list of {KINDS} is expected")
    return paths


def _is_product(path: Path) -> bool:
    if path.is_dir():
        names = frozenset(child.name for child in path.iterdir())
        return path.suffix == ".SAFE" or is_safe(names) or is_theia(names) or bool(is_stac(path))
    return is_image(path) or bool(is_stac(path)) or path.suffix.lower() == ".zip"


def _date_of(package: Package, named: str) -> date:
    if is_safe(package.names) or package.path.suffix == ".SAFE":
        return date_of_safe(package)
    if is_theia(package.names):
        return date_of_theia(package)
    raise InputError(f"{named}: {package.path} is none of {KINDS}")


def _latest(products: Sequence[Product], say: Callable[[str], None]) -> list[Product]:
    """Of products of the same image, those of the latest processing."""
    latest: dict[tuple[object, ...], list[int]] = {}
    for product in products:
        key = _image_of(product)
        latest[key] = max(latest.get(key, []), _version(product))
    used = [product for product in products if not product.sensed or _version(product) == latest[_image_of(product)]]
    old = [product.name for product in products if product not in used]
    if old:
        say(f"Left out, of an earlier processing than another product of the same image: {len(old)}, {old[0]} for example")
    return used


def _image_of(product: Product) -> tuple[object, ...]:
    return type(product), product.tile, product.sensor, product.sensed


def _version(product: Product) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", product.baseline)]
