"""Plots of operation canopy: legible at the width of a journal's columns, comparable colours, complete metrics."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_plots import check_legible, written

from utils.canopy.metrics import BIN, BINS, class_names
from utils.canopy.plots import Scene, density_scatter, error_by_class, scenes, true_colour
from utils.plots import BOTH_COLUMNS, PRINT_DPI, as_image, save_plot

pytestmark = pytest.mark.plots

TITLE = "Canopy height at 2.5 m, validation 1000 after step 1000000\nsimulated tiles, seed 42"
EVERY = {"pixels": 1200, "mae": 2.0, "rmse": 3.0, "bias": -0.5, "r2": 0.75}


def window(missing: bool = False, tallest: float = 24, size: int = 32) -> Scene:
    """A window whose heights rise from 0 to the tallest, predicted 2 m too high."""
    rng = np.random.default_rng(0)
    reference = np.linspace(0, tallest, size * size, dtype=np.float32).reshape(size, size)
    image = rng.uniform(200, 900, (10, size // 2, size // 2)).astype(np.float32)
    if missing:
        image[:, :3, :3] = np.nan
    return Scene("30TXT/0440_6740", image, reference, reference + 2, reference < 5, 5.0)


def test_true_colour_is_stretched_by_valid_pixels_alone() -> None:
    image = np.random.default_rng(0).uniform(200, 900, (10, 50, 50)).astype(np.float32)
    colours = true_colour(image)
    assert colours.shape == (50, 50, 4) and colours.min() == 0 and colours.max() == 1
    low, high = np.percentile(image[:3], (2, 98))
    np.testing.assert_allclose(colours[..., 0], np.clip((image[2] - low) / (high - low), 0, 1), rtol=1e-5)
    marred = image.copy()
    marred[:, :5, :8] = np.nan
    marred[:, 20, 20] = 9000  # a roof
    again = true_colour(marred)
    assert not again[:5, :8, 3].any() and again[5:, 8:, 3].all()
    np.testing.assert_allclose(again[5:, 8:][again[5:, 8:] < 1], colours[5:, 8:][again[5:, 8:] < 1], atol=0.03)
    assert not true_colour(np.full_like(image, np.nan)).any()


@pytest.mark.parametrize("count", [1, 3])
def test_scenes_share_the_scale_of_heights_and_centre_errors_at_zero(count: int) -> None:
    figure = scenes([window(missing=number == 0) for number in range(count)], TITLE)
    check_legible(figure)
    assert figure.get_figwidth() == BOTH_COLUMNS
    images = [axes.images[0] for axes in figure.axes[: 4 * count]]
    assert {images[4 * row + column].get_clim() for row in range(count) for column in (1, 2)} == {(0, 25)}
    low, high = images[3].get_clim()
    errors = np.ma.masked_array(images[3].get_array())
    assert low == -high and np.ma.allclose(errors, 2) and errors.mask.any()
    assert written(figure) == ["no tall vegetation", "no image data"]


def test_heights_scale_with_the_vegetation() -> None:
    shrubs = scenes([window(tallest=4)], TITLE)
    assert shrubs.axes[1].images[0].get_clim() == (0, 5)
    assert written(shrubs) == ["no tall vegetation"]
    bare = window(tallest=0)
    check_legible(scenes([bare], TITLE))


def test_density_scatter_lists_metrics_of_all_pixels_and_of_each_tile() -> None:
    counts = np.zeros((BINS, BINS), np.int64)
    counts[10, 12] = 5
    scores = {"all": EVERY, "tile 30TXT": {**EVERY, "pixels": 900}, "tile 31TDL": {**EVERY, "pixels": 300, "r2": np.nan}}
    figure = density_scatter(counts, scores, TITLE)
    check_legible(figure)
    cells = written(figure)
    assert cells[:4] == ["", "all", "30TXT", "31TDL"] and cells[4:8] == ["pixels", "1,200", "900", "300"]
    assert cells[8:12] == ["R²", "0.75", "0.75", "–"] and cells[20:22] == ["bias (m)", "−0.50"]
    assert "coefficient of determination" in figure.legends[0].get_title().get_text()
    assert figure.axes[0].get_xlim() == (0, 13 * BIN)
    many = density_scatter(counts, {"all": EVERY, **{f"tile {number}": EVERY for number in range(20)}}, TITLE)
    check_legible(many)
    assert "and 8 more tiles" in written(many)
    single = density_scatter(np.zeros_like(counts), {"all": EVERY, "tile 30TXT": EVERY}, TITLE)
    check_legible(single)
    assert written(single)[:3] == ["", "all", "pixels"]


def test_an_empty_height_class_keeps_its_place() -> None:
    scores = {name: {**EVERY, "pixels": 1_234_567} for name in class_names()}
    scores["0-5 m"] |= {"pixels": 0, "mae": np.nan, "bias": np.nan}
    figure = error_by_class(scores, class_names(), TITLE)
    check_legible(figure)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0] == "0–5\n0" and labels[-1] == "over 30\n1M" and figure.axes[0].get_xlim() == (-0.5, 6.5)


def test_scenes_are_saved_at_print_resolution(tmp_path: Path) -> None:
    figure: Figure = scenes([window()], TITLE)
    save_plot(figure, tmp_path / "test")
    with Image.open(tmp_path / "test.png") as image:
        assert image.width == pytest.approx(BOTH_COLUMNS * PRINT_DPI, abs=1)
    assert (tmp_path / "test.pdf").read_bytes().startswith(b"%PDF")
    assert as_image(figure).shape[1] < 900
