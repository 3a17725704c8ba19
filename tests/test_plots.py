"""Plots of operation main: legible at the width of a journal's column, complete, and written whole or not at all."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from utils.errors import InputError
from utils.metrics import Scores, score
from utils.plots import BOTH_COLUMNS, COLUMN, MAX_GROUPS, as_image, losses, save_plot, scatter

pytestmark = pytest.mark.plots

TARGET = "above-ground biomass of grasses and herbs (g per square metre of dry weight)"


def check_legible(figure: Figure) -> None:
    """No text is smaller than 7 points or extends beyond the plot, and no legend covers axes or their labels."""
    as_image(figure)  # lays the plot out
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert texts and min(float(text.get_fontsize()) for text in texts) >= 7
    page = figure.bbox.padded(1)
    for text in texts:
        box = text.get_window_extent()
        on_axis = figure.axes and text.get_clip_on()
        assert on_axis or (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1), text
    drawn = [extent.padded(-1) for axes in figure.axes if (extent := axes.get_tightbbox())]
    assert not any(legend.get_window_extent().overlaps(extent) for legend in figure.legends for extent in drawn)


def written(figure: Figure) -> list[str]:
    """The entries of a plot's legends."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def points_of(figure: Figure) -> list[int]:
    """The number of points of each group in a scatter plot."""
    return [len(np.asarray(points.get_offsets())) for points in figure.axes[0].collections]


def sample(groups: Sequence[str] | None, size: int = 60) -> tuple[Figure, NDArray[np.float64], NDArray[np.float64]]:
    """A scatter plot of noisy predictions, its observations and predictions."""
    rng = np.random.default_rng(0)
    observed = rng.uniform(10, 60, size)
    predicted = observed + rng.normal(0, 5, size)
    folds = [score(part, other) for part, other in zip(np.split(observed, 3), np.split(predicted, 3), strict=True)]
    title = "InceptionTime x 5: above-ground biomass\na_table_with_a_long_name_of_2024.xlsx#sheet, n = 60, seed 42"
    return scatter(observed, predicted, groups, folds, title, TARGET), observed, predicted


def test_scatter_lists_metrics_by_region_pooled_and_over_folds() -> None:
    regions = np.array(["north", "south", "south"] * 20)
    figure, observed, predicted = sample(list(regions))
    check_legible(figure)
    assert figure.get_figwidth() == pytest.approx(88 / 25.4)
    cells = written(figure)
    names, numbers, r2, rrmse = (cells[start : start + 5] for start in range(0, 20, 5))
    assert names == ["", "north", "south", "all, pooled", "mean ± sd of 3 folds"] and numbers == ["n", "20", "40", "60", ""]
    south = score(observed[regions == "south"], predicted[regions == "south"])
    assert (r2[2], rrmse[2]) == (f"{south.r2:.3f}", f"{south.rrmse:.3f}")
    folds = [score(part, other).r2 for part, other in zip(np.split(observed, 3), np.split(predicted, 3), strict=True)]
    assert r2[4] == f"{np.mean(folds):.3f} ± {np.std(folds):.3f}"
    assert "r²: squared correlation" in figure.legends[0].get_title().get_text()
    assert points_of(figure) == [20, 40]


def test_scatter_without_regions_has_one_row() -> None:
    figure, *_ = sample(None)
    check_legible(figure)
    assert written(figure)[:3] == ["", "all", "mean ± sd of 3 folds"]


@pytest.mark.parametrize("count", [MAX_GROUPS, MAX_GROUPS + 1, 60])
def test_scatter_pools_the_smallest_of_many_regions(count: int) -> None:
    regions = [f"region {number % count}" for number in range(60)]
    figure, *_ = sample(regions)
    check_legible(figure)
    assert len(points_of(figure)) == MAX_GROUPS and sum(points_of(figure)) == 60
    assert (f"{count - MAX_GROUPS + 1} other regions" in written(figure)) == (count > MAX_GROUPS)


def test_names_are_shown_as_they_are() -> None:
    names = ["_north", "$a_b$", "other $"]
    figure, *_ = sample(names * 20)
    as_image(figure)
    assert set(names) < set(written(figure))


def test_undefined_metrics_are_dashes() -> None:
    """Those of a region with a single plot, and of one where nothing grows."""
    observed = np.array([1.0, 2.0, 3.0, 0.0, 0.0, 4.0])
    regions = ["a", "a", "a", "bare", "bare", "single"]
    figure = scatter(observed, observed + 1, regions, [score(observed, observed + 1)], "", "x")
    cells = written(figure)
    rows = {cells[row]: [cells[row + 6 * column] for column in (1, 2, 3)] for row in range(6)}
    assert rows["bare"] == ["2", "–", "–"] and rows["single"] == ["1", "–", "0.250"]


def history(start: float, best: int, warmup_epochs: int = 5) -> list[dict[str, float]]:
    """Decreasing training losses, and a validation every ten epochs, the best after `best` training epochs."""
    records = [{"epoch": epoch + 1.0, "loss_train": 3 + start / (epoch + 1) ** 2} for epoch in range(60 + warmup_epochs)]
    for epoch in (1, 10, 20, 30, 40, 50, 60):
        records[epoch + warmup_epochs - 1]["loss_val"] = 5 + abs(epoch - best) / 60
    return records


def test_losses_mark_the_best_epoch_of_each_fold_after_warm_up() -> None:
    figure = losses([(1, history(30, 20)), (2, history(30, 50))], 5, "ResNet18T: biomass\na table, n = 60, seed 1", TARGET)
    check_legible(figure)
    assert figure.get_figwidth() == pytest.approx(BOTH_COLUMNS)
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    np.testing.assert_array_equal([line.get_xydata() for line in stars], [[(20, 5)], [(50, 5)]])
    assert stars[0].get_color() != stars[1].get_color()
    assert written(figure) == ["fold 1", "fold 2", "training", "validation", "best validation", "warm-up"]


def test_extreme_losses_do_not_compress_the_others() -> None:
    records = history(1e9, 20)
    for record in records[20:]:
        record["loss_train"] = 1e-9
    axes = losses([(1, records)], 0, "", "x").axes[0]
    low, high = axes.get_ylim()
    assert 1e-10 < low < 5 and 6 < high < 200 and axes.get_yscale() == "log"


@pytest.mark.parametrize("records", [[{"epoch": 1.0, "loss_train": 0.0, "loss_val": 0.0}], history(0, 20)])
def test_losses_of_many_folds_and_few_epochs_are_legible(records: list[dict[str, float]]) -> None:
    figure = losses([(number, records) for number in range(1, 31)], 0, "", "x")
    check_legible(figure)
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()[:28]}
    assert len(styles) == 28


def test_a_plot_is_saved_at_print_resolution_and_as_vector_graphics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("one", "two"):
        figure, *_ = sample(["north", "south"] * 30)
        save_plot(figure, tmp_path / "sub" / name)
    with Image.open(tmp_path / "sub" / "one.png") as image:
        assert image.width == pytest.approx(COLUMN * 300, abs=1) and image.info["dpi"][0] == pytest.approx(300, abs=1)
    content = (tmp_path / "sub" / "one.pdf").read_bytes()
    assert content.startswith(b"%PDF") and b"/Subtype /Image" not in content and b"/FontFile2" in content
    assert content == (tmp_path / "sub" / "two.pdf").read_bytes()
    assert as_image(figure).shape[1] < 500
    assert not caplog.records


def test_very_many_points_are_rasterised_in_the_pdf(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=30_000)
    save_plot(scatter(values, values, None, [Scores(1, 1, 1, 1)], "", "x"), tmp_path / "many")
    content = (tmp_path / "many.pdf").read_bytes()
    assert b"/Subtype /Image" in content and len(content) < 300_000


def test_a_plot_that_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def savefig(_: Figure, path: Path, *, format: str, **__: Any) -> None:
        path.write_bytes(b"a part")
        if format == "pdf":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(InputError, match=r"plot\.pdf could not be written: No space left on device"):
        save_plot(Figure(), tmp_path / "plot")
    assert not list(tmp_path.iterdir())
