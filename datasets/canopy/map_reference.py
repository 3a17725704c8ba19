"""Reference heights of any grid brought to the grid of a map, as training brings LiDAR to the network's resolution."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import array_bounds
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from datasets.canopy.image_series import grown
from datasets.canopy.reference import drop_low_and_isolated
from utils.errors import InputError
from utils.rasters import Grid

MISSING = -32768.0
RESAMPLINGS = ("auto", "max", "average", "nearest", "bilinear")
UNITS = ("auto", "dm", "m")


class MapReference:
    """Rasters of heights, seen on the grid of a map; where several overlap, the first that has a height counts.

    Args:
        reference: a folder, or files separated by commas or spaces; or their paths.
        folder: that relative paths count from.
        grid: of the map.
        unit: of the heights: dm, m, or auto: dm where they are whole numbers, else m.
        resampling: auto takes the highest of the pixels in a pixel of the map, as training does, where the reference is
            finer, and interpolates linearly where it is not.
        flag: that names the rasters, for messages.

    Raises:
        InputError: a file cannot be used, or none touches the map.
    """

    def __init__(
        self,
        reference: str | Sequence[str],
        folder: Path,
        grid: Grid,
        unit: str,
        resampling: str,
        flag: str = "reference",
    ) -> None:
        if isinstance(reference, str):
            place = folder / reference
            names = [place] if place.is_file() else [folder / name for name in reference.replace(",", " ").split()]
            paths = sorted(place.glob("*.tif")) if place.is_dir() else names
        else:
            paths = [folder / name for name in reference]
        self.grid, self.flag, self.notes = grid, flag, dict[str, None]()
        self._files = [found for path in paths if (found := self._opened(path, unit, resampling)) is not None]
        if not self._files:
            raise InputError(f"{flag}={reference}: none of {len(paths)} files of heights touches the map")

    def _opened(
        self, path: Path, unit: str, resampling: str
    ) -> tuple[WarpedVRT, float, tuple[float, float, float, float]] | None:
        try:
            raster = rasterio.open(path)
        except RasterioError as error:
            raise InputError(f"{self.flag}: {path} cannot be read: {str(error).splitlines()[0]}") from error
        if raster.crs is None or raster.count != 1:
            raise InputError(f"{self.flag}: {path} must have one band and a coordinate system")
        bounds = transform_bounds(raster.crs, self.grid.crs, *raster.bounds)
        left, bottom, right, top = array_bounds(self.grid.height, self.grid.width, self.grid.transform)
        if bounds[0] >= right or bounds[2] <= left or bounds[1] >= top or bounds[3] <= bottom:
            return None
        pixel = math.sqrt((bounds[2] - bounds[0]) * (bounds[3] - bounds[1]) / (raster.width * raster.height))
        if resampling == "auto":
            resampling = "max" if pixel < 0.99 * self.grid.transform.a else "bilinear"
        if unit == "auto":
            unit = "dm" if np.issubdtype(raster.dtypes[0], np.integer) else "m"
        self.notes[f"about {pixel:.2g} m, in {unit}, brought to {self.grid.transform.a:g} m by {resampling}"] = None
        return self._on_grid(raster, resampling), 0.1 if unit == "dm" else 1.0, bounds

    def _on_grid(self, raster: DatasetReader, resampling: str) -> WarpedVRT:
        crs, transform, height, width = self.grid
        return WarpedVRT(
            raster,
            crs=crs,
            transform=transform,
            height=height,
            width=width,
            resampling=Resampling[resampling],
            src_nodata=raster.nodata,
            nodata=MISSING,
            dtype="float32",
        )

    def heights(self, window: Window) -> NDArray[np.float32]:
        """Metres, (row, column) of a window that may reach beyond the map; nan where there is no reference."""
        result = np.full((window.height, window.width), np.nan, np.float32)
        inside = window.intersection(Window(0, 0, self.grid.width, self.grid.height))
        corner = self.grid.part(inside)
        left, bottom, right, top = array_bounds(corner.height, corner.width, corner.transform)
        rows, columns = inside.row_off - window.row_off, inside.col_off - window.col_off
        part = result[rows : rows + inside.height, columns : columns + inside.width]
        for raster, scale, bounds in self._files:
            if bounds[0] < right and bounds[2] > left and bounds[1] < top and bounds[3] > bottom:
                values = raster.read(1, window=inside)
                np.copyto(part, scale * values, where=np.isnan(part) & (values != MISSING) & np.isfinite(values))
        return result

    def heights_and_mask(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Heights in metres, nan where there is no reference, and where there is no tall vegetation.

        Tall vegetation is as in training: at least 1.5 m, and not alone among its neighbours.
        """
        around = self.heights(grown(window, 1))
        decimetres = np.rint(10 * np.nan_to_num(around)).astype(np.int32)
        _, no_vegetation = drop_low_and_isolated(decimetres, decimetres <= 0)
        inner = (slice(1, -1), slice(1, -1))
        return around[inner], no_vegetation[inner]


def reference_windows(grid: Grid, side: int) -> Sequence[Window]:
    """Windows of a side, as a test's, that cover a map; what is left at its edges joins the window before."""
    edges = [[*range(0, max(1, length - side // 2), side), length] for length in (grid.height, grid.width)]
    return [
        Window(left, top, right - left, bottom - top)
        for top, bottom in zip(edges[0], edges[0][1:], strict=False)
        for left, right in zip(edges[1], edges[1][1:], strict=False)
    ]
