"""The reference of canopy height: what LiDAR heights count as tall vegetation, and heights at coarser resolutions.

Heights are the 95th percentile of LiDAR returns above ground (pH95), whole decimetres; 0 is ground, negative is nodata.
The rules are those of THREASURE-Net (Kalinicheva et al. 2026, Remote Sensing of Environment; arXiv 2512.11524).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from utils.errors import InputError

SMALLEST_COMPONENT = 25  # pixels of 1 m: less is no stand but a pole, a wire or noise
LOW = 15  # dm: below it grass, crops and the roughness of the ground
LOWEST_ON_CROPS = 50  # dm: below it the vegetation of a field is the crop
NEIGHBOURHOOD = 7  # pixels of 1 m
HALF_STEP = 2.5  # the one ratio of resolutions that is not whole: 1 m to 2.5 m
EIGHT_NEIGHBOURS = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)


def vegetation_mask(height: NDArray[Any], crop: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """Tell tall vegetation from everything else in a 1 km LiDAR square.

    Args:
        height: pH95 at 1 m, decimetres: (row, column).
        crop: True (or 1) on fields, where low vegetation is the crop: (row, column).

    Returns:
        1 where there is no tall vegetation, 0 where there is: (row, column).

    Raises:
        InputError: the crop mask has another shape than the heights.
    """
    if crop is not None and crop.shape != height.shape:
        raise InputError(f"the crop mask has the shape {crop.shape}, but the heights have {height.shape}")
    vegetation = _without_small_components(height > 0)
    # Nodata is negative but no height, so it adds nothing to the sum.
    height_sum = _window_sum(np.maximum(height, 0))
    low = (height_sum < LOW * _window_sum(vegetation)) & (height < LOW)
    if crop is not None:
        vegetation &= ~((height < LOWEST_ON_CROPS) & crop.astype(bool))
    return (~_without_small_components(vegetation & ~low)).astype(np.uint8)


def at_resolution(
    height: NDArray[Any], no_vegetation: NDArray[np.bool_], source: float, target: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Bring heights and mask to a coarser resolution: the highest of each block, masked where all of the block is.

    The maximum includes the heights of masked pixels. Where the resolution is 2.5 times coarser, each pixel is first
    doubled along both axes. At the same resolution the arrays come back as they are; otherwise
    `drop_low_and_isolated` is to follow, on the window in use.

    Args:
        height: Decimetres: (row, column).
        no_vegetation: True where there is no tall vegetation: (row, column).
        source: Resolution of the arrays, metres.
        target: Resolution wanted, metres.

    Raises:
        InputError: `target` is neither 2.5 nor a whole number of times `source`, or the blocks do not fill the arrays.
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
            f"heights at {source:g} m cannot be brought to {target:g} m: the resolution wanted must be the same, "
            f"{HALF_STEP:g} times or a whole number of times coarser"
        )
    rows, columns = height.shape
    if rows % block or columns % block:
        raise InputError(
            f"heights of {rows} x {columns} pixels do not divide into whole pixels of {target:g} m ({block} x {block} each)"
        )
    blocks = (rows // block, block, columns // block, block)
    return height.reshape(blocks).max(axis=(1, 3)), np.asarray(no_vegetation.reshape(blocks).all(axis=(1, 3)))


def drop_low_and_isolated(height: NDArray[Any], no_vegetation: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Drop what a coarser resolution makes of stray returns: low pixels, and pixels of vegetation that stand alone.

    Heights below 15 dm become 0 and masked; then a pixel without vegetation among its eight neighbours is masked and
    keeps its height. Beyond the window counts as masked. For a window that `at_resolution` has made coarser.

    Args:
        height: Decimetres: (row, column).
        no_vegetation: True where there is no tall vegetation: (row, column).
    """
    low = height < LOW
    vegetation = ~(no_vegetation | low)
    isolated = ~np.asarray(ndimage.binary_dilation(vegetation, EIGHT_NEIGHBOURS))
    return np.where(low, 0, height).astype(height.dtype), ~vegetation | isolated


def _without_small_components(vegetation: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove 4-connected components smaller than `SMALLEST_COMPONENT`: (row, column)."""
    labels, _ = ndimage.label(vegetation)
    large = np.bincount(labels.ravel()) >= SMALLEST_COMPONENT
    large[0] = False  # the background
    return large[labels]


def _window_sum(values: NDArray[Any]) -> NDArray[np.int64]:
    """Sum over the window around each pixel, reflected at the edges: (row, column)."""
    ones = np.ones(NEIGHBOURHOOD, dtype=np.int64)
    rows = ndimage.correlate1d(values.astype(np.int64), ones, axis=0)
    return np.asarray(ndimage.correlate1d(rows, ones, axis=1))
