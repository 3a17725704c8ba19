"""A tiny root of canopy tiles in the real layout, of random but plausible content, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio import Affine

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
SPECTRUM = np.array([271, 538, 389, 921, 2333, 2758, 2995, 3101, 1853, 905])  # reflectance x 10 000, of a forest
NODATA = -10000
LIDAR_DATE = "2024-01-27"
SQUARES = {"0440_6740": "training", "0441_6740": "training", "0440_6741": "validation", "0441_6741": "test"}


def write_root(
    root: Path,
    *,
    tile: str = "30TXT",
    squares: dict[str, str] | None = None,
    images: int = 7,
    crs: str = "EPSG:2154",
    resolutions: Sequence[float] = (1.0,),
    angles: bool = True,
    mask: bool = True,
    spectrum: NDArray[Any] = SPECTRUM,
    seed: int = 1,
) -> Path:
    """Write a tile and return the root.

    Args:
        root: folder to write to.
        tile: name of the tile.
        squares: context by patch id.
        images: number of images a patch, 25 days apart.
        crs: the coordinate system of all files.
        resolutions: of the LiDAR files, m.
        angles: whether to write the table of angles.
        mask: whether to write masks of tall vegetation.
        spectrum: (10,) mean reflectance x 10 000.
        seed: of the content.
    """
    rng = np.random.default_rng(seed)
    squares = SQUARES if squares is None else squares
    rows, mask_rows, angle_rows = [], [], []
    dates = pd.date_range("2024-02-10", periods=images, freq="25D")
    for patch, context in squares.items():
        easting, northing = (1000 * int(part) for part in patch.split("_"))
        lidar = f"pH95_{patch}_{LIDAR_DATE}.tif"
        for resolution in resolutions:
            size = round(1000 / resolution)
            heights = _stands(rng, size)
            write_tif(root / "lidar" / tile / f"res_{resolution:g}" / lidar, heights, easting, northing, resolution, crs)
            if mask and resolution == resolutions[0]:
                name = f"lidar_mask_{patch}_{tile}.tif"
                grass = (heights < 15).astype(np.uint8)
                write_tif(root / "lidar_mask" / tile / name, grass, easting, northing, resolution, crs)
                mask_rows.append((patch, name, tile, 70.0, 75.0))
        for date in dates:
            name = f"SENTINEL2B_{date:%Y%m%d}_{tile}_{patch}"
            # One brightness a date, noise a pixel, and a corner without data.
            image = spectrum[:, None, None] * rng.uniform(0.7, 1.3) + rng.normal(0, 100, (10, 150, 150))
            image[:, :3, :4] = NODATA
            path = root / "patches" / tile / patch / f"{name}.tif"
            write_tif(path, image.astype(np.int16), easting - 250, northing + 250, 10, crs, nodata=NODATA)
            rows.append(
                (patch, context, LIDAR_DATE, lidar, f"{date:%Y-%m-%d}", "SENTINEL2B", tile, f"{name}.tif", 10.0, 100.0)
            )
            # As published: x is the northing, y the easting.
            angle_rows.append((patch, f"{name}.tif", northing - 500, easting + 500, 40.0, 160.0, 5.5, 100.0))
    columns = "lidarhd_id context lidar_date lidar_name s2_date sensor tile_name image_name masked_pixels valid_pixels"
    pd.DataFrame(rows, columns=columns.split()).to_parquet(root / "patches" / tile / f"{tile}.parquet")
    if mask:
        columns = "lidar_id lidar_mask_name tile valid_whole valid_crop"
        table = pd.DataFrame(mask_rows, columns=columns.split())
        table.to_parquet(root / "lidar_mask" / tile / f"mask_{tile}.parquet")
    if angles:
        columns = "patch_id image_name x y sun_zenith sun_azimuth view_zenith view_azimuth"
        (root / "angles").mkdir(parents=True, exist_ok=True)
        pd.DataFrame(angle_rows, columns=columns.split()).to_csv(root / "angles" / f"{tile}.csv", index=False)
    return root


def write_tif(
    path: Path, values: NDArray[Any], easting: float, northing: float, pixel: float, crs: str, **options: Any
) -> None:
    """Write (row, column) or (band, row, column) as a GeoTIFF with its upper-left corner there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = values.reshape(-1, *values.shape[-2:])
    options = {"crs": crs, "transform": Affine(pixel, 0, easting, 0, -pixel, northing), "dtype": bands.dtype, **options}
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.open(path, "w", driver="GTiff", **size, **options) as raster:
        raster.write(bands)


def edit_table(path: Path, **columns: Any) -> None:
    """Rewrite columns of a parquet table."""
    pd.read_parquet(path).assign(**columns).to_parquet(path)


def _stands(rng: np.random.Generator, size: int) -> NDArray[np.int16]:
    """Heights in dm of stands some 50 m wide beside grass, with nodata (-1) and ground (0) strewn in."""
    coarse = rng.integers(-60, 250, (20, 20))
    heights = np.kron(coarse, np.ones((size // 20, size // 20))) + rng.normal(0, 15, (size, size))
    heights = np.clip(heights, 0, None)
    heights[rng.random((size, size)) < 0.01] = -1
    return heights.astype(np.int16)
