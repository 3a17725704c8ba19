"""Reference heights: which LiDAR pixels are tall vegetation, and how heights are brought to coarser resolutions.

Heights are the 95th percentile of LiDAR heights above ground (pH95), whole decimetres; 0 is ground, negative is nodata.
The rules are those of THREASURE-Net (Kalinicheva et al. 2026, Remote Sensing of Environment; arXiv 2512.11524).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from utils.errors import InputError

SMALLEST_COMPONENT = 25  # pixels of 1 m: anything smaller is not a stand but a pole, a wire or noise
LOW = 15  # dm: anything lower is grass, crops or rough ground
LOWEST_ON_CROPS = 50  # dm: anything lower on a field is the crop
NEIGHBOURHOOD = 7  # pixels of 1 m
HALF_STEP = 2.5  # the only ratio of resolutions that is not a whole number: 1 m to 2.5 m
EIGHT_NEIGHBOURS = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)


def vegetation_mask(height: NDArray[Any], crop: NDArray[Any] | None = None, resolution: float = 1.0) -> NDArray[np.uint8]:
    """Mask everything but tall vegetation in a 1 km LiDAR square.

    The published rules are for 1 m. Coarser pixels keep their areas and lengths, as far as they can: a component of 25 m2,
    a window of an odd number of pixels that is nearest to 7 m.

    Args:
        height: pH95, decimetres: (row, column).
        crop: True (or 1) on fields, where low vegetation is a crop: (row, column).
        resolution: pixel size, metres.

    Returns:
        1 where there is no tall vegetation, 0 where there is: (row, column).

    Raises:
        InputError: crop mask and heights differ in shape.
    """
    if crop is not None and crop.shape != height.shape:
        raise InputError(f"the crop mask has the shape {crop.shape}, but the heights have {height.shape}")
    smallest = SMALLEST_COMPONENT / resolution**2
    side = 2 * round((NEIGHBOURHOOD / resolution - 1) / 2) + 1
    vegetation = _without_small_components(height > 0, smallest)
    # Nodata is negative and must not lower the sum.
    height_sum = _window_sum(np.maximum(height, 0), side)
    low = (height_sum < LOW * _window_sum(vegetation, side)) & (height < LOW)
    if crop is not None:
        vegetation &= ~((height < LOWEST_ON_CROPS) & crop.astype(bool))
    return (~_without_small_components(vegetation & ~low, smallest)).astype(np.uint8)


def at_resolution(
    height: NDArray[Any], no_vegetation: NDArray[np.bool_], source: float, target: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Bring heights and mask to a coarser resolution: the maximum of each block, masked if the whole block is.

    The maximum includes the heights of masked pixels. For a resolution that is 2.5 times coarser, each pixel is first
    doubled along both axes. At the same resolution the arrays are returned unchanged; otherwise the windows that are cut
    out of them must pass `drop_low_and_isolated`.

    Args:
        height: Decimetres: (row, column).
        no_vegetation: True where there is no tall vegetation: (row, column).
        source: Pixel size of the arrays, metres.
        target: Pixel size to bring them to, metres.

    Raises:
        InputError: `target` is neither 2.5 times nor a multiple of `source`, or the blocks do not fill the arrays.
    """
    ratio = target / source
    if ratio == 1:
        return height, no_vegetation
    if ratio == HALF_STEP:
        height, no_vegetation = (array.repeat(2, axis=0).repeat(2, axis=1) for array in (height, no_vegetation))
        ratio *= 2
    block = round(ratio)
    if block < 1 or block != ratio:
        raise InputError(
            f"heights at {source:g} m cannot be resampled to {target:g} m: the pixel size must be the same, {HALF_STEP:g} "
            f"times as large or a multiple"
        )
    rows, columns = height.shape
    if rows % block or columns % block:
        raise InputError(
            f"heights of {rows} x {columns} pixels cannot be divided into pixels of {target:g} m ({block} x {block} each)"
        )
    blocks = (rows // block, block, columns // block, block)
    return height.reshape(blocks).max(axis=(1, 3)), np.asarray(no_vegetation.reshape(blocks).all(axis=(1, 3)))


def drop_low_and_isolated(height: NDArray[Any], no_vegetation: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Mask what stray returns leave at a coarser resolution: low pixels and isolated pixels of vegetation.

    Heights below 15 dm become 0 and are masked; then a pixel without vegetation among its eight neighbours is masked and
    keeps its height. Pixels beyond the window count as masked. For windows that `at_resolution` has made coarser.

    Args:
        height: Decimetres: (row, column).
        no_vegetation: True where there is no tall vegetation: (row, column).
    """
    low = height < LOW
    vegetation = ~(no_vegetation | low)
    isolated = ~np.asarray(ndimage.binary_dilation(vegetation, EIGHT_NEIGHBOURS))
    return np.where(low, 0, height).astype(height.dtype), ~vegetation | isolated


def _without_small_components(vegetation: NDArray[np.bool_], smallest: float) -> NDArray[np.bool_]:
    """Remove 4-connected components of fewer than `smallest` pixels: (row, column)."""
    labels, _ = ndimage.label(vegetation)
    large = np.bincount(labels.ravel()) >= smallest
    large[0] = False  # the background
    return large[labels]


def _window_sum(values: NDArray[Any], side: int) -> NDArray[np.int64]:
    """Sum over the window of `side` pixels around each pixel, reflected at the edges: (row, column)."""
    ones = np.ones(side, dtype=np.int64)
    rows = ndimage.correlate1d(values.astype(np.int64), ones, axis=0)
    return np.asarray(ndimage.correlate1d(rows, ones, axis=1))
