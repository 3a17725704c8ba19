"""Read and check a folder of canopy tiles, and select the squares and images that an experiment uses.

    patches/<tile>/<tile>.parquet                one row per image of a patch
    patches/<tile>/<patch>/<image>.tif           10 bands, 10 m, 150 x 150 pixels, reflectance x 10 000
    lidar/<tile>/res_<resolution>/<lidar>.tif    canopy height in decimetres of the 1 km square
    lidar_mask/<tile>/mask_<tile>.parquet        optional: share of tall vegetation
    lidar_mask/<tile>/<mask>.tif                 1 = no tall vegetation
    angles/<tile>.csv                            optional: sun and view angles of an image
    SIMULATED.txt                                marks simulated tiles

A patch is named after the upper-left corner of its 1 km LiDAR square in kilometres (`0440_6740`); its images reach
250 m further on each side. Any projected coordinate system in metres will do, as long as a tile's files share it.

`read_catalogue` reads the tables and the header of every file. Missing files and unusable rows are left out and counted.
Files that do not match the layout are refused, since they would be misread silently. `select` then applies the selection
criteria of the paper (Kalinicheva et al. 2026, THREASURE-Net, Remote Sensing of Environment) and, in addition, a limit to
the time between image and LiDAR.
"""

import contextlib
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.io import DatasetReader
from tqdm import tqdm

from utils.canopy import FACTORS
from utils.errors import InputError
from utils.simulated import MARK

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
NODATA = -10000  # of images
PIXEL = 10.0  # m, of images
SQUARE_SIZE = 100  # image pixels of a LiDAR square
BORDER = 25  # image pixels of a patch around its square
PATCH_SIZE = SQUARE_SIZE + 2 * BORDER
CONTEXTS = ("training", "validation", "test")
CHOICES = ("auto", "yes", "no")

ANGLES = ("sun_zenith", "sun_azimuth", "view_zenith", "view_azimuth")
ANGLE_CHANNELS = 6
MAX_DAYS_FROM_LIDAR = 366
EXAMPLES = 3  # files or rows named for each finding
THREADS = 8  # for opening files, which mostly waits for the disk

PATCH_COLUMNS = (
    "lidarhd_id",
    "context",
    "lidar_date",
    "lidar_name",
    "s2_date",
    "image_name",
    "masked_pixels",
    "valid_pixels",
)
MASK_COLUMNS = ("lidar_id", "lidar_mask_name", "valid_crop")
# The published files swap x and y of the patch centre; angles are found by patch and image name instead.
ANGLE_COLUMNS = ("patch_id", "image_name", *ANGLES)


@dataclass(frozen=True)
class Finding:
    """A problem with the data: what it is, whether it is an error, how often it occurs, and the first examples."""

    what: str
    refused: bool
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the user."""
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} x {self.what}: {', '.join(self.examples)}{more}"


class Raster(NamedTuple):
    """What a kind of file must have: bands, data types, pixel sizes (m), and border around the square (m)."""

    bands: int
    dtypes: tuple[str, ...]
    pixels: tuple[float, ...]
    border: float


class Catalogue(NamedTuple):
    """The usable images of a folder of tiles, all checked.

    Attributes:
        root: the folder.
        rows: one row per image: tile, patch, context, image, date, lidar, lidar_date, masked_pixels, valid_pixels; the
            four angles in degrees if angles are used; mask and valid_crop if masks are. File paths are relative to the
            root.
        with_angles: whether angles are used.
        with_mask: whether masks of tall vegetation are used.
        crs: the coordinate system of each tile.
        findings: what was left out, for the user to read.
    """

    root: Path
    rows: pd.DataFrame
    with_angles: bool
    with_mask: bool
    crs: dict[str, CRS]
    findings: list[Finding]

    @property
    def simulated(self) -> bool:
        """Whether the tiles are simulated."""
        return (self.root / MARK).exists()

    def report(self) -> list[str]:
        """Lines for the user: the folder, what was left out, and whether angles and masks are used."""
        angles, masks = ("used" if used else "not used" for used in (self.with_angles, self.with_mask))
        return [
            f"Data: {self.root}{' (simulated)' if self.simulated else ''}",
            *map(str, self.findings),
            f"Sun and view angles: {angles}; masks of tall vegetation: {masks}",
        ]


@dataclass(frozen=True)
class Patch:
    """A LiDAR square and its selected images, ordered by date.

    Attributes:
        tile: the tile's name.
        name: the square's upper-left corner in km, as `0440_6740`.
        images: image files.
        dates: (date,) datetime64[D].
        angles: (date, 6) float32 from `angle_channels`, or None if angles are not used.
        lidar: the height file.
        lidar_date: datetime64[D].
        mask: the mask of tall vegetation, or None if masks are not used.
    """

    tile: str
    name: str
    images: tuple[Path, ...]
    dates: NDArray[np.datetime64]
    angles: NDArray[np.float32] | None
    lidar: Path
    lidar_date: np.datetime64
    mask: Path | None

    @property
    def corner(self) -> tuple[float, float]:
        """Easting and northing of the square's upper-left corner (m)."""
        return corner_of(self.name)


class Selection(NamedTuple):
    """The selected patches, ordered by tile and name, and the number left out by reason."""

    patches: list[Patch]
    dropped: dict[str, int]

    def __str__(self) -> str:
        """The number of patches and what was left out."""
        left_out = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.items())
        return f"{len(self.patches)}{f'; left out: {left_out}' if left_out else ''}"


def corner_of(patch: str) -> tuple[float, float]:
    """Easting and northing (m) of the upper-left corner of a square from its name in km."""
    easting, northing = patch.split("_")
    return 1000.0 * int(easting), 1000.0 * int(northing)


def angle_channels(degrees: NDArray[np.float64]) -> NDArray[np.float32]:
    """Angles as input channels, rounded to 4 decimals as in the published code.

    Args:
        degrees: (date, 4), sun zenith, sun azimuth, view zenith, view azimuth.

    Returns:
        (date, 6): cos sun zenith, cos and sin sun azimuth, cos view zenith, cos and sin view azimuth.
    """
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    channels = [cosine[:, 0], cosine[:, 1], sine[:, 1], cosine[:, 2], cosine[:, 3], sine[:, 3]]
    return np.round(np.stack(channels, axis=1), 4).astype(np.float32)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[DatasetReader]:
    """Open a GeoTIFF for reading.

    Raises:
        InputError: it cannot be opened, or not be read within the block.
    """
    try:
        # With its driver named and not shared, a file opens in half the time.
        with rasterio.open(path, driver="GTiff", sharing=False) as raster:
            yield raster
    except (RasterioError, CRSError) as error:
        raise InputError(f"{path} cannot be read as a GeoTIFF; it may be truncated: {str(error).splitlines()[0]}") from error


def read_catalogue(
    root: Path,
    tiles: Sequence[str] = (),
    *,
    resolution: float,
    lidar_resolution: float = 1.0,
    angles: str = "auto",
    mask: str = "auto",
) -> Catalogue:
    """Read the tables of a folder of tiles and check every file that they name.

    Args:
        root: folder in the layout described above.
        tiles: names of tiles; all if empty.
        resolution: pixel size of the output in m, a key of `FACTORS`.
        lidar_resolution: pixel size of the LiDAR files in m: 1, or that of the output.
        angles: whether to use sun and view angles: yes, no, or auto, which uses them if every tile has them.
        mask: the same for the masks of tall vegetation.

    Raises:
        InputError: an argument is invalid; a tile, table or column is missing; a file cannot be read or does not match
            the layout; or no image is left.
    """
    if resolution not in FACTORS:
        raise InputError(f"the output resolution {resolution:g} m is not one of {_listed(FACTORS)}")
    if lidar_resolution not in (1.0, resolution):
        raise InputError(
            f"the LiDAR resolution {lidar_resolution:g} m is neither 1 m nor that of the output, {resolution:g} m"
        )
    if not root.is_dir():
        raise InputError(
            f"{root} {'is a file' if root.exists() else 'does not exist'}; a folder of tiles is expected (relative paths "
            f"start from the folder in which the command is run)"
        )
    present = sorted(path.stem for path in root.glob("patches/*/*.parquet") if path.stem == path.parent.name)
    if not present:
        raise InputError(f"{root} has no table patches/<tile>/<tile>.parquet")
    unknown = [tile for tile in tiles if tile not in present]
    if unknown:
        raise InputError(f"{root / 'patches'} has no tile {', '.join(unknown)}; present: {', '.join(present)}")
    tiles = sorted(set(tiles)) or present
    for tile in tiles:
        _need_lidar(root / "lidar" / tile, lidar_resolution)
    findings: list[Finding] = []
    with_angles = _in_use("angles", angles, [root / "angles" / f"{tile}.csv" for tile in tiles], findings)
    with_mask = _in_use("mask", mask, [root / "lidar_mask" / tile / f"mask_{tile}.parquet" for tile in tiles], findings)
    tables = []
    for tile in tiles:
        rows = _read_patches(root, tile, lidar_resolution, findings)
        rows = _join_angles(root, tile, rows, findings) if with_angles else rows
        tables.append(_join_mask(root, tile, rows, findings) if with_mask else rows)
    rows = pd.concat(tables, ignore_index=True)
    for column, what in (
        ("lidar", "LiDAR file missing, square left out"),
        *([("mask", "mask of tall vegetation missing, square left out")] if with_mask else []),
        ("image", "image missing, left out"),
    ):
        files = rows[column].drop_duplicates()
        missing = files[[not path.is_file() for path in _paths(root, files)]]
        _note(findings, what, missing)
        if len(files) and len(missing) == len(files):
            raise InputError(f"{root} has none of the files that its tables name, for example {_paths(root, files)[0]}")
        rows = rows[~rows[column].isin(missing)]
    crs = _check_headers(root, rows, lidar_resolution, findings)
    refused = any(finding.refused for finding in findings)
    if refused or rows.empty:
        # Errors first, then what was left out.
        listed = "".join(f"\n  {finding}" for finding in sorted(findings, key=lambda finding: not finding.refused))
        why = "files that do not match the expected layout; fix or remove them" if refused else "no usable image"
        raise InputError(f"{root} has {why}:{listed}")
    return Catalogue(root, rows.reset_index(drop=True), with_angles, with_mask, crs, findings)


def select(
    catalogue: Catalogue,
    context: str,
    *,
    max_masked: float = 50.0,
    min_valid: float = 100.0,
    min_vegetation: float = 10.0,
    min_dates: int = 5,
) -> Selection:
    """Select the patches of a context and their images; the default limits are those of the paper.

    Args:
        catalogue: the images to select from.
        context: training, validation or test.
        max_masked: maximum `masked_pixels` of an image, %.
        min_valid: minimum `valid_pixels` of an image, %.
        min_vegetation: minimum `valid_crop` of a square, % of its central 640 m, if masks are used.
        min_dates: minimum number of images of a patch.

    Raises:
        InputError: no patch is left.
    """
    rows = catalogue.rows[catalogue.rows["context"] == context]
    if rows.empty:
        squares = catalogue.rows.drop_duplicates(["tile", "patch"])["context"].value_counts()
        known = ", ".join(f"{name} ({count} squares)" for name, count in squares.items()) or "none"
        raise InputError(f"{catalogue.root} has no square of context {context!r}; present: {known}")
    near = (rows["date"] - rows["lidar_date"]).abs() <= pd.Timedelta(days=MAX_DAYS_FROM_LIDAR)
    keep: dict[str, pd.Series] = {
        f"images with masked_pixels above {max_masked:g}": rows["masked_pixels"] <= max_masked,
        f"images with valid_pixels below {min_valid:g}": rows["valid_pixels"] >= min_valid,
        f"images more than {MAX_DAYS_FROM_LIDAR} days from the LiDAR": near,
    }
    if catalogue.with_angles:
        keep["images without sun or view angles"] = rows[list(ANGLES)].notna().all(axis=1)
    dropped = {}
    if catalogue.with_mask:
        sparse = ~(rows["valid_crop"] >= min_vegetation)
        dropped[f"squares with valid_crop below {min_vegetation:g}"] = _squares(rows[sparse])
        rows = rows[~sparse]
    before = _squares(rows)
    for reason, kept in keep.items():
        kept = kept[rows.index]
        dropped[reason] = int((~kept).sum())
        rows = rows[kept]
    rows = rows[rows.groupby(["tile", "patch"])["image"].transform("size") >= min_dates]
    dropped[f"squares with fewer than {min_dates} images"] = before - _squares(rows)
    dropped = {reason: count for reason, count in dropped.items() if count}
    if rows.empty:
        counts = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        raise InputError(f"{catalogue.root} has no usable square of context {context!r}; left out: {counts}")
    ordered = rows.sort_values(["tile", "patch", "date", "image"]).groupby(["tile", "patch"], sort=True)
    return Selection([_patch(catalogue, key, images) for key, images in ordered], dropped)


def select_disjoint(catalogue: Catalogue, **limits: Any) -> dict[str, Selection]:
    """Select the patches of all contexts so that no square is in two of them.

    Where tiles overlap, a square may belong to one context in one tile and to another in the next. It is kept in test
    before validation, and in validation before training.

    Args:
        catalogue: the images to select from.
        limits: passed on to `select`.

    Returns:
        Selections by context: test, validation, training.

    Raises:
        InputError: a context has no patch left.
    """
    grids = {tile: crs.to_epsg() or crs.to_wkt() for tile, crs in catalogue.crs.items()}
    chosen: dict[str, Selection] = {}
    taken: set[tuple[int | str, tuple[float, float]]] = set()
    for context in reversed(CONTEXTS):
        patches, dropped = select(catalogue, context, **limits)
        places = [(grids[patch.tile], patch.corner) for patch in patches]
        left = [patch for patch, place in zip(patches, places, strict=True) if place not in taken]
        others = " or ".join(chosen)
        if not left:
            raise InputError(f"every {context} square is also a {others} square in another tile")
        if len(left) < len(patches):
            dropped = dropped | {f"squares used for {others} in another tile": len(patches) - len(left)}
        taken |= set(places)
        chosen[context] = Selection(left, dropped)
    return chosen


def _patch(catalogue: Catalogue, key: Hashable, images: pd.DataFrame) -> Patch:
    """Make the patch of a square from its rows of the catalogue."""
    assert isinstance(key, tuple)
    first = images.iloc[0]
    angles = angle_channels(images[list(ANGLES)].to_numpy(np.float64)) if catalogue.with_angles else None
    return Patch(
        tile=key[0],
        name=key[1],
        images=tuple(_paths(catalogue.root, images["image"])),
        dates=images["date"].to_numpy().astype("datetime64[D]"),
        angles=angles,
        lidar=catalogue.root / first["lidar"],
        lidar_date=np.datetime64(first["lidar_date"], "D"),
        mask=catalogue.root / first["mask"] if catalogue.with_mask else None,
    )


def _need_lidar(folder: Path, resolution: float) -> None:
    """Raise an InputError if a tile has no LiDAR heights at a resolution."""
    if not (folder / f"res_{resolution:g}").is_dir():
        present = ", ".join(sorted(path.name.removeprefix("res_") for path in folder.glob("res_*"))) or "none"
        raise InputError(f"{folder} has no LiDAR at {resolution:g} m (res_{resolution:g}); resolutions present: {present}")


def _in_use(flag: str, choice: str, tables: Sequence[Path], findings: list[Finding]) -> bool:
    """Whether to use optional data; with auto, if every tile has them.

    Raises:
        InputError: `choice` is invalid, or a tile lacks the data that it asks for.
    """
    if choice not in CHOICES:
        raise InputError(f"{flag}={choice} is not one of {_listed(CHOICES)}")
    absent = [path for path in tables if not path.is_file()]
    if choice == "yes" and absent:
        raise InputError(f"{flag}=yes needs {absent[0]}, which does not exist")
    if choice == "auto" and len(absent) < len(tables):
        _note(findings, f"table missing, so {flag}=auto is resolved to no", absent)
    return choice != "no" and not absent


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read columns of a .parquet or .csv table.

    Raises:
        InputError: the table cannot be read, lacks a column or has no rows.
    """
    try:
        rows = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype={"patch_id": str})
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a {path.suffix} table; it may be truncated: {reason}") from error
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; expected columns: {_listed(columns)}")
    if rows.empty:
        raise InputError(f"{path} has no rows")
    return rows[list(columns)].reset_index(drop=True)


def _read_patches(root: Path, tile: str, lidar_resolution: float, findings: list[Finding]) -> pd.DataFrame:
    """The usable rows of a tile's table, with paths relative to the root."""
    path = root / "patches" / tile / f"{tile}.parquet"
    table = _read_table(path, PATCH_COLUMNS)
    patch, image = _text(table["lidarhd_id"]), _with_suffix(table["image_name"])
    rows = pd.DataFrame(
        {
            "tile": tile,
            "patch": patch,
            "context": table["context"].astype(str),
            "image": f"patches/{tile}/" + patch + "/" + image,
            "date": _dates(table["s2_date"]),
            "lidar": f"lidar/{tile}/res_{lidar_resolution:g}/" + _with_suffix(table["lidar_name"]),
            "lidar_date": _dates(table["lidar_date"]),
            "masked_pixels": pd.to_numeric(table["masked_pixels"], errors="coerce"),
            "valid_pixels": pd.to_numeric(table["valid_pixels"], errors="coerce"),
        }
    )
    square = patch.str.replace(r"(^|_)0+(?=\d)", r"\1", regex=True)  # 0440_6740 and 440_6740 are the same square
    kinds = rows.groupby(square)["context"].transform("nunique")
    _note(findings, f"{path.name}: square in more than one context", patch[kinds > 1].unique(), refused=True)
    several = rows.groupby("patch")[["lidar", "lidar_date"]].transform("nunique").max(axis=1) > 1
    for unusable, names, what in (
        (rows[["patch", "image", "lidar"]].isna().any(axis=1), patch, "lidarhd_id, image_name or lidar_name missing"),
        (~patch.map(lambda name: re.fullmatch(r"\d+_\d+", str(name)) is not None), patch, "lidarhd_id not <km>_<km>"),
        (~rows["context"].isin(CONTEXTS), rows["context"], f"context not one of {_listed(CONTEXTS)}"),
        (rows["lidar_date"].isna(), patch, "lidar_date not a date"),
        (rows["date"].isna(), image, "s2_date not a date"),
        (several, patch, "square with more than one LiDAR file or date"),
        (rows.duplicated("image"), image, "duplicate row of an image"),
    ):
        left_out = unusable[rows.index]
        _note(findings, f"{path.name}: {what}, row left out", names[rows.index][left_out])
        rows = rows[~left_out]
    return rows


def _join_angles(root: Path, tile: str, rows: pd.DataFrame, findings: list[Finding]) -> pd.DataFrame:
    """Append the four angles in degrees, NaN where the table has none."""
    path = root / "angles" / f"{tile}.csv"
    table = _read_table(path, ANGLE_COLUMNS)
    angles = table[list(ANGLES)].apply(pd.to_numeric, errors="coerce")
    for name in ANGLES:
        angles[name] = angles[name].where(angles[name].between(*((0, 90) if "zenith" in name else (-360, 360))))
    angles["image"] = f"patches/{tile}/" + table["patch_id"].astype(str) + "/" + _with_suffix(table["image_name"])
    repeated = angles.duplicated("image")
    _note(findings, f"{path.name}: duplicate row of an image, left out", angles["image"][repeated])
    unknown = ~angles["image"].isin(rows["image"])
    _note(findings, f"{path.name}: angles of an unknown image, left out", angles["image"][unknown])
    return rows.merge(angles[~repeated], on="image", how="left")


def _join_mask(root: Path, tile: str, rows: pd.DataFrame, findings: list[Finding]) -> pd.DataFrame:
    """Append mask and valid_crop; squares without them are left out."""
    path = root / "lidar_mask" / tile / f"mask_{tile}.parquet"
    table = _read_table(path, MASK_COLUMNS)
    masks = pd.DataFrame(
        {
            "patch": table["lidar_id"].astype(str),
            "mask": f"lidar_mask/{tile}/" + _with_suffix(table["lidar_mask_name"]),
            "valid_crop": pd.to_numeric(table["valid_crop"], errors="coerce"),
        }
    )
    repeated = masks.duplicated("patch")
    _note(findings, f"{path.name}: duplicate row of a square, left out", masks["patch"][repeated])
    joined = rows.merge(masks[~repeated], on="patch", how="left")
    _note(findings, f"{path.name}: square without a row, left out", joined["patch"][joined["mask"].isna()].unique())
    return joined[joined["mask"].notna()]


def _check_headers(root: Path, rows: pd.DataFrame, lidar_resolution: float, findings: list[Finding]) -> dict[str, CRS]:
    """Check the header of every file and append a finding for whatever does not match the layout.

    Returns:
        The coordinate system of each tile.
    """
    jobs = [
        (column, row.tile, row.patch, root / getattr(row, column))
        for column in ("image", "lidar", "mask")
        if column in rows.columns
        for row in rows.drop_duplicates(column).itertuples()
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        found_in = pool.map(lambda job: _header(job[0], job[2], job[3], lidar_resolution), jobs)
        headers = list(tqdm(found_in, "Checking the files...", len(jobs), unit="file", leave=False))
    problems: dict[str, list[str]] = {}
    grids: dict[str, dict[str, Path]] = {}  # by tile and coordinate system (WKT): the first file that has it
    for (_, tile, _, path), (found, grid) in zip(jobs, headers, strict=True):
        for problem in found:
            problems.setdefault(problem, []).append(str(path.relative_to(root)))
        if grid is not None:
            grids.setdefault(tile, {}).setdefault(grid, path)
    for problem, files in problems.items():
        _note(findings, problem, files, refused=True)
    crs = {}
    for tile, files_of in grids.items():
        crs[tile] = CRS.from_wkt(next(iter(files_of)))
        others = [str(path.relative_to(root)) for grid, path in files_of.items() if CRS.from_wkt(grid) != crs[tile]]
        first = next(iter(files_of.values())).relative_to(root)
        _note(findings, f"coordinate system other than that of {first}", others, refused=True)
    return crs


def _header(kind: str, patch: str, path: Path, lidar_resolution: float) -> tuple[list[str], str | None]:
    """The problems of a file's header, and its coordinate system as well-known text (WKT)."""
    expected = {
        "image": Raster(len(BANDS), ("int16", "uint16"), (PIXEL,), BORDER * PIXEL),
        "lidar": Raster(1, ("uint8", "int16", "uint16", "int32"), (lidar_resolution,), 0.0),
        # A mask may come at 1 m beside coarser heights.
        "mask": Raster(1, ("uint8",), (1.0, lidar_resolution), 0.0),
    }[kind]
    easting, northing = corner_of(patch)
    left, top, side = easting - expected.border, northing + expected.border, SQUARE_SIZE * PIXEL + 2 * expected.border
    sizes = {round(side / pixel): pixel for pixel in expected.pixels}
    found = []
    try:
        with opened(path) as raster:
            crs, pixel = raster.crs, sizes.get(raster.width)
            if raster.count != expected.bands:
                found.append(f"{kind} of {raster.count} bands, not {expected.bands}")
            if kind == "image" and set(raster.descriptions) == set(BANDS) and raster.descriptions != BANDS:
                found.append(f"image with its bands in the order {' '.join(raster.descriptions)}, not {' '.join(BANDS)}")
            if raster.dtypes[0] not in expected.dtypes:
                found.append(f"{kind} of type {raster.dtypes[0]}, not {_listed(expected.dtypes)}")
            if pixel is None or raster.height != raster.width:
                wanted = " or ".join(f"{size} x {size}" for size in sizes)
                found.append(f"{kind} of {raster.height} x {raster.width} pixels, not {wanted}")
            elif not raster.transform.almost_equals(Affine(pixel, 0, left, 0, -pixel, top), precision=0.001 * pixel):
                found.append(f"{kind} whose upper-left corner or pixel size is not that of its patch at {pixel:g} m")
            if crs is None or not crs.is_projected or crs.linear_units_factor[1] != 1.0:
                found.append(f"{kind} without a projected coordinate system in metres")
            if _is_cut_off(raster, path):
                found.append(f"{kind} truncated")
            return found, crs.to_wkt() if crs else None
    except InputError:
        return [f"{kind} that cannot be read as a GeoTIFF, perhaps truncated"], None


def _is_cut_off(raster: DatasetReader, path: Path) -> bool:
    """Whether the file ends before the last block listed in its header."""
    height, width = raster.block_shapes[-1]
    block = f"{(raster.width - 1) // width}_{(raster.height - 1) // height}"
    place = [raster.get_tag_item(f"BLOCK_{part}_{block}", "TIFF", bidx=raster.count) for part in ("OFFSET", "SIZE")]
    return None not in place and sum(map(int, place)) > path.stat().st_size


def _note(findings: list[Finding], what: str, names: Iterable[object], refused: bool = False) -> None:
    """Append a finding unless `names` is empty."""
    listed = [str(name) for name in names]
    if listed:
        findings.append(Finding(what, refused, len(listed), tuple(listed[:EXAMPLES])))


def _dates(values: pd.Series) -> pd.Series:
    """A column of ISO dates as days, NaT where it cannot be parsed."""
    days = pd.to_datetime(values.astype(str), format="ISO8601", errors="coerce", utc=True)
    return days.dt.tz_localize(None).dt.normalize()


def _with_suffix(names: pd.Series) -> pd.Series:
    """File names with the extension .tif, which some tables leave out."""
    return _text(names).str.removesuffix(".tif") + ".tif"


def _text(values: pd.Series) -> pd.Series:
    """Values as text, missing values kept missing."""
    return values.astype(str).where(values.notna())


def _paths(root: Path, files: Iterable[str]) -> list[Path]:
    """Paths of files that are relative to the root."""
    return [root / file for file in files]


def _squares(rows: pd.DataFrame) -> int:
    """The number of different squares in rows of a catalogue."""
    return len(rows[["tile", "patch"]].drop_duplicates())


def _listed(values: Iterable[object]) -> str:
    """Values joined by commas."""
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
