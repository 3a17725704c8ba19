"""The reference of canopy height: golden resampling, the rules of the vegetation mask one by one, refusals."""

from typing import Any

import numpy as np
import pytest
from conftest import golden
from numpy.typing import NDArray

from datasets.canopy.reference import at_resolution, drop_low_and_isolated, vegetation_mask
from utils.errors import InputError

CASES = golden("canopy_resampling")["cases"]


def golden_window() -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Heights and mask at 1 m that the golden numbers were made from."""
    height = np.random.RandomState(21).randint(0, 300, (1, 1, 40, 40))[0, 0]
    height[np.random.RandomState(22).uniform(size=(1, 1, 40, 40))[0, 0] < 0.55] = 0
    height[:20, :20] = 0
    height[33, 7] = 12
    height[5, 5] = 90
    height[20:30, 0:10] = np.minimum(height[20:30, 0:10], 14)
    return height, height <= 0


@pytest.mark.parametrize("case", CASES, ids=[f"{case['resolution']} m" for case in CASES])
def test_resampling_is_the_published_one(case: dict[str, Any]) -> None:
    height, masked = drop_low_and_isolated(*at_resolution(*golden_window(), 1, case["resolution"]))
    assert height.shape == masked.shape == tuple(case["shape"][2:])
    assert height.sum() == case["height_sum"] and masked.sum() == case["mask_sum"]
    first = len(case["height_first_rows"])
    np.testing.assert_array_equal(height[:first], case["height_first_rows"])
    np.testing.assert_array_equal(masked[:first], case["mask_first_rows"])
    if case["height"] is not None:
        np.testing.assert_array_equal(height, case["height"])
        np.testing.assert_array_equal(masked, case["mask"])


def test_the_same_resolution_changes_nothing() -> None:
    height, masked = golden_window()
    same_height, same_masked = at_resolution(height, masked, 2.5, 2.5)
    np.testing.assert_array_equal(same_height, height)
    np.testing.assert_array_equal(same_masked, masked)


def test_resampling_in_two_steps_agrees_with_one() -> None:
    """1 m to 5 m to 10 m is 1 m to 10 m: the maximum of maxima."""
    fine = at_resolution(*golden_window(), 1, 5)
    for stepwise, direct in zip(at_resolution(*fine, 5, 10), at_resolution(*golden_window(), 1, 10), strict=True):
        np.testing.assert_array_equal(stepwise, direct)
    assert fine[0].dtype == golden_window()[0].dtype and fine[1].dtype == np.bool_


def test_a_half_step_shares_the_middle_pixel() -> None:
    """At 2.5 m two coarse pixels overlap the middle one of five."""
    height = np.zeros((5, 5), dtype=np.int16)
    height[2, 0] = 40
    coarse, masked = at_resolution(height, height <= 0, 1, 2.5)
    np.testing.assert_array_equal(coarse, [[40, 0], [40, 0]])
    np.testing.assert_array_equal(masked, [[False, True], [False, True]])


@pytest.mark.parametrize(("source", "target"), [(1, 1.5), (1, 3.3), (5, 2.5), (10, 1), (1, 0.5)])
def test_other_ratios_are_refused(source: float, target: float) -> None:
    with pytest.raises(InputError, match=f"heights at {source:g} m cannot be resampled to {target:g} m"):
        at_resolution(*golden_window(), source, target)


def test_blocks_that_do_not_fill_the_window_are_refused() -> None:
    height, masked = golden_window()
    with pytest.raises(InputError, match="39 x 40 pixels cannot be divided into pixels of 10 m"):
        at_resolution(height[1:], masked[1:], 1, 10)


def test_low_then_isolated_pixels_are_dropped() -> None:
    """A neighbour that was dropped as low is no neighbour; an isolated pixel keeps its height under the mask."""
    height = np.array([[60, 14, 0], [0, 0, 0], [0, 80, 15]], dtype=np.int16)
    kept, masked = drop_low_and_isolated(height, height <= 0)
    np.testing.assert_array_equal(kept, [[60, 0, 0], [0, 0, 0], [0, 80, 15]])
    np.testing.assert_array_equal(masked, [[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    assert kept.dtype == np.int16 and height[0, 1] == 14


def square_of(height: int, size: int, side: int = 40) -> NDArray[np.int16]:
    """A clump of one height on bare ground."""
    ground = np.zeros((side, side), dtype=np.int16)
    ground[10 : 10 + size, 10 : 10 + size] = height
    return ground


def test_components_under_25_pixels_are_not_vegetation() -> None:
    assert (vegetation_mask(square_of(100, 5)) == 0).sum() == 25
    height = square_of(100, 5)
    height[10, 10] = 0
    assert vegetation_mask(height).all()


def test_diagonal_neighbours_do_not_connect() -> None:
    height = square_of(100, 4)
    height[14:18, 14:18] = 100
    assert vegetation_mask(height).all()


def test_low_vegetation_counts_only_next_to_trees() -> None:
    """Below 15 dm a pixel needs a mean of its vegetated surroundings of at least 15 dm."""
    assert vegetation_mask(square_of(14, 12)).all()
    assert (vegetation_mask(square_of(15, 12)) == 0).sum() == 144
    height = square_of(10, 12)
    height[10:22, 16:22] = 100
    kept = vegetation_mask(height) == 0
    # Three columns reach the trees within the 7 x 7 window.
    assert kept[10:22, 13:22].all() and kept.sum() == 12 * 9


def test_low_mean_counts_every_height_over_the_vegetation_left() -> None:
    """Shrubs too small to stay still add their height to the sum, not their pixels to the count."""
    height = square_of(14, 14)
    assert vegetation_mask(height).all()
    height[10:24:2, 25] = 200
    kept = vegetation_mask(height) == 0
    assert kept[10:24, 22:24].all() and kept.sum() == 28


def test_window_is_reflected_at_the_edge() -> None:
    """In the corner's window, a tree two pixels in counts four times."""
    height = np.full((30, 30), 8, dtype=np.int16)
    height[:, 6:] = 100
    height[0, 1:6] = 15  # kept for itself; it links the corner to a component that is not small
    height[2, 2] = 76  # (35 * 8 + 10 * 15 + 4 * 76) / 49 = 14.98 dm
    assert vegetation_mask(height)[0, 0] == 1
    height[2, 2] = 77  # 15.06 dm
    assert vegetation_mask(height)[0, 0] == 0


def test_crops_are_masked_below_50_dm() -> None:
    height = square_of(49, 10)
    height[10:20, 20:30] = 50
    crop = np.zeros(height.shape, dtype=np.uint8)
    assert (vegetation_mask(height, crop) == 0).sum() == 200
    crop[:] = 1
    np.testing.assert_array_equal(vegetation_mask(height, crop) == 0, height == 50)


def test_small_components_are_removed_again_after_crops() -> None:
    height = square_of(30, 8)
    crop = np.ones(height.shape, dtype=bool)
    crop[10:13, 10:18] = False
    assert vegetation_mask(height, crop).all()
    crop[13, 10] = False
    assert (vegetation_mask(height, crop) == 0).sum() == 25


def test_nodata_is_not_vegetation_and_does_not_lower_means() -> None:
    height = square_of(20, 12)
    height[10, 10] = 14  # its window holds 15 other pixels of 20 dm
    with_nodata = np.where(height == 0, -1, height)
    mask = vegetation_mask(with_nodata)
    np.testing.assert_array_equal(mask == 0, height > 0)
    assert mask.dtype == np.uint8
    height = square_of(15, 12)
    height[10, 10] = 14
    height[10, 11] = 16  # the mean is exactly 15 dm, and 33 pixels of -1 would take it below
    assert (vegetation_mask(np.where(height == 0, -1, height)) == 0).sum() == 144


def test_a_crop_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"the crop mask has the shape \(10, 10\), but the heights have \(40, 40\)"):
        vegetation_mask(square_of(30, 8), np.zeros((10, 10), dtype=bool))
