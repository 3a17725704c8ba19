"""Predicted windows of height as GeoTIFFs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import from_origin
from torch import Tensor

from utils.runs import whole_file


def write_windows(
    folder: Path,
    names: Sequence[str],
    corners: Tensor,
    *maps: Tensor,
    crs: Mapping[str, CRS],
    resolution: float,
    nodata: float,
    note: str = "",
) -> None:
    """Write the windows of a batch, one file `<tile>_<patch>.tif` each.

    Args:
        folder: of the files.
        names: tile/patch of each window.
        corners: (sample, 2), easting and northing of their upper-left corners.
        maps: height, vegetation, reference and no_vegetation of `write_window`, (sample, 1, row, column) each.
        crs: coordinate system of each tile.
        resolution: pixel size, m.
        nodata: nodata value.
        note: text for the files' tag `note`, if any.
    """
    for row, name in enumerate(names):
        tile, _, patch = name.partition("/")
        write_window(
            folder / f"{tile}_{patch}.tif",
            *(tensor[row, 0].cpu().numpy() for tensor in maps),
            corner=corners[row].tolist(),
            resolution=resolution,
            crs=crs[tile],
            nodata=nodata,
            note=note,
        )


def write_window(
    path: Path,
    height: NDArray[np.float32],
    vegetation: NDArray[np.float32],
    reference: NDArray[np.float32],
    no_vegetation: NDArray[np.bool_],
    *,
    corner: Sequence[float],
    resolution: float,
    crs: CRS,
    nodata: float,
    note: str = "",
) -> None:
    """Write a window's prediction, reference and error as a GeoTIFF of four bands, completely or not at all.

    Args:
        path: of the file.
        height: (row, column), predicted height, m.
        vegetation: (row, column), predicted probability of tall vegetation.
        reference: (row, column), m, 0 where there is no tall vegetation.
        no_vegetation: (row, column), True where there is no tall vegetation; the error is nodata there.
        corner: easting and northing of the upper-left corner.
        resolution: pixel size, m.
        crs: coordinate system.
        nodata: nodata value.
        note: text for the file's tag `note`, if any.
    """
    error = np.where(no_vegetation, nodata, height - reference)
    bands = {"height (m)": height, "vegetation (probability)": vegetation, "reference (m)": reference, "error (m)": error}
    profile = {
        "driver": "GTiff",
        "dtype": "float32",
        "count": len(bands),
        "height": height.shape[0],
        "width": height.shape[1],
        "crs": crs,
        "transform": from_origin(*corner, resolution, resolution),
        "nodata": nodata,
        "compress": "deflate",
        "predictor": 3,
    }
    with whole_file(path) as beside, rasterio.open(beside, "w", **profile) as file:
        for number, (description, values) in enumerate(bands.items(), start=1):
            file.write(values.astype(np.float32), number)
            file.set_band_description(number, description)
        if note:
            file.update_tags(note=note)
