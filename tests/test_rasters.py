"""Maps by windows: any size of window, any workers, killed and continued, to the same pixels."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import on_path, wait_for
from rasterio import Affine
from rasterio.warp import transform_geom
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate
from row_map import GRID, IDENTITY_OF_TEST, OUTPUTS, make

from utils.errors import InputError
from utils.rasters import (
    BLOCKS,
    IDENTITY,
    area_window,
    begin_map,
    windows_of,
)


def pixels(folder: Path) -> list[bytes]:
    """The pixels of the outputs."""
    found = []
    for output in OUTPUTS:
        with rasterio.open(folder / output.file) as raster:
            found.append(raster.read().tobytes())
    return found


def test_windows_cover_the_grid_once() -> None:
    for size in (64, 150, 1000):
        seen = np.zeros((GRID.height, GRID.width), int)
        for window in windows_of(GRID, size):
            seen[window.toslices()] += 1
        assert (seen == 1).all()


def test_a_map_is_a_cog_with_names_units_and_tags(tmp_path: Path) -> None:
    make(tmp_path, 64)
    row, column = np.indices((300, 662))
    with rasterio.open(tmp_path / "sums.tif") as raster:
        assert raster.crs.to_epsg() == 32631 and raster.transform == Affine(5, 0, 500000, 0, -5, 4900000)
        assert raster.descriptions == ("sum", "row") and raster.units == ("m", None) and raster.scales == (0.1, 1.0)
        assert raster.nodata == -10000 and raster.dtypes[0] == "int16" and raster.tags()["model"] == "test"
        assert raster.overviews(1) == [2] and raster.block_shapes[0] == (512, 512)
        np.testing.assert_array_equal(raster.read(), [row + column, row])
    for output in OUTPUTS:
        valid, errors, warnings = cog_validate(tmp_path / output.file, strict=True)
        assert valid, (errors, warnings)
    assert {path.name for path in tmp_path.iterdir()} == {"sums.tif", "means.tif", IDENTITY, f"built_{os.getpid()}"}


def test_windows_of_any_size_leave_the_same_pixels(tmp_path: Path) -> None:
    make(tmp_path / "one", 64)
    make(tmp_path / "large", 1000)
    make(tmp_path / "other", 50)
    assert pixels(tmp_path / "one") == pixels(tmp_path / "large") == pixels(tmp_path / "other")


def test_a_window_that_is_refused_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(InputError, match="window 64 64 cannot be read"):
        make(tmp_path, 64)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / BLOCKS / "sums").iterdir()}
    assert kept and not (tmp_path / "sums.tif").exists()
    (tmp_path / "refuse").unlink()
    make(tmp_path, 64)
    assert not (tmp_path / BLOCKS).exists()
    make(tmp_path / "undisturbed", 64)
    assert pixels(tmp_path) == pixels(tmp_path / "undisturbed")


def start(folder: Path, *, count: int = 1, scheduler: str = "", seconds: float = 0.1) -> "subprocess.Popen[str]":
    """The map of the test in a process of its own, with windows that take their time."""
    code = f"import row_map as t, pathlib; t.make(pathlib.Path({str(folder)!r}), 32, {count}, {scheduler!r}, {seconds})"
    return subprocess.Popen([sys.executable, "-c", code], env=on_path(), text=True, stderr=subprocess.PIPE)


def test_a_killed_map_goes_on_to_the_same_pixels_and_its_workers_end(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed", count=2)
    blocks = tmp_path / "killed" / BLOCKS / "sums"
    wait_for(lambda: blocks.exists() and len(list(blocks.glob("[0-9]*.npz"))) > 3)
    pids = [int(path.name.removeprefix("built_")) for path in (tmp_path / "killed").glob("built_*")]
    killed.kill()
    killed.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    done = {path.name: path.stat().st_mtime_ns for path in blocks.glob("[0-9]*.npz")}
    assert done and not list((tmp_path / "killed").glob("*.tif"))
    assert len(pids) == 2 and all((tmp_path / "killed" / f"built_{pid}").read_text() == "once\n" for pid in pids)
    make(tmp_path / "killed", 32, seconds=0)
    make(tmp_path / "undisturbed", 32)
    assert pixels(tmp_path / "killed") == pixels(tmp_path / "undisturbed")


def test_a_map_killed_while_it_is_put_together_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rasterio.shutil.copy", fail)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, 64)
    assert not list(tmp_path.glob("*.tif"))
    built = (tmp_path / f"built_{os.getpid()}").read_text()
    make(tmp_path, 64)
    assert (tmp_path / f"built_{os.getpid()}").read_text() == built  # no window is computed again
    make(tmp_path / "undisturbed", 64)
    assert pixels(tmp_path) == pixels(tmp_path / "undisturbed")


def test_the_map_of_something_else_is_refused(tmp_path: Path) -> None:
    begin_map(tmp_path, OUTPUTS, IDENTITY_OF_TEST)
    begin_map(tmp_path, OUTPUTS, IDENTITY_OF_TEST)
    with pytest.raises(InputError, match=r"map\.json is of a run with run=abc, but run=other was given"):
        begin_map(tmp_path, OUTPUTS, {**IDENTITY_OF_TEST, "run": "other"})
    (tmp_path / IDENTITY).unlink()
    (tmp_path / BLOCKS).mkdir()
    begin_map(tmp_path, OUTPUTS, {"run": "other"})
    assert not (tmp_path / BLOCKS).exists()  # of who knows what
    (tmp_path / IDENTITY).unlink()
    (tmp_path / "means.tif").touch()
    with pytest.raises(InputError, match=r"means\.tif exists and is of another map"):
        begin_map(tmp_path, OUTPUTS, IDENTITY_OF_TEST)
    assert not (tmp_path / IDENTITY).exists()


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk, passed by a block, a GeoTIFF, a cloud-optimised GeoTIFF."""
    limits = (1_000, 2_000, 20_000)
    code = f"""
import pathlib, resource, test_rasters as t
for limit in {limits}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        t.make(pathlib.Path({str(tmp_path)!r}) / str(limit), 32)
    except t.InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=on_path(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.strip().splitlines()
    assert len(sentences) == len(limits)
    assert all("could not be written" in one and "nothing was left half-written" in one for one in sentences), sentences
    make(tmp_path / "undisturbed", 32)
    for limit in limits:
        assert not list((tmp_path / str(limit)).glob("*.tif"))
        make(tmp_path / str(limit), 32)
        assert pixels(tmp_path / str(limit)) == pixels(tmp_path / "undisturbed")


def test_an_area_is_the_pixels_that_it_touches(tmp_path: Path) -> None:
    assert area_window("all", GRID, tmp_path) == Window(0, 0, 331, 150)
    assert area_window("500020,4899905,500045,4899970", GRID, tmp_path) == Window(2, 3, 3, 7)
    assert area_window("499000 4899990 500010 4999999", GRID, tmp_path) == Window(0, 0, 1, 1)
    ring = [[500_100, 4_899_000], [500_200, 4_899_000], [500_200, 4_899_100], [500_100, 4_899_000]]
    polygon = transform_geom("EPSG:32631", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    (tmp_path / "part.geojson").write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": polygon}))
    found = area_window("part.geojson", GRID, tmp_path)
    assert abs(found.col_off - 10) <= 1 and abs(found.row_off - 90) <= 1 and abs(found.width - 10) <= 2
    for area, expected in (("1,2,3,4", "holds no pixel"), ("1,2,3", "neither all nor four numbers")):
        with pytest.raises(InputError, match=expected):
            area_window(area, GRID, tmp_path)


def test_a_cluster_whose_worker_dies_leaves_the_same_pixels(
    dask_cluster: tuple[str, "list[subprocess.Popen[bytes]]"], tmp_path: Path
) -> None:
    address, dask_workers = dask_cluster
    running = start(tmp_path / "cluster", scheduler=address)
    wait_for(lambda: len(list((tmp_path / "cluster").glob("built_*"))) == 2)
    victim = next(process for process in dask_workers if (tmp_path / "cluster" / f"built_{process.pid}").exists())
    victim.send_signal(signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    make(tmp_path / "one", 32)
    assert pixels(tmp_path / "cluster") == pixels(tmp_path / "one")
    assert all(path.read_text() == "once\n" for path in (tmp_path / "cluster").glob("built_*"))


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("utils.cluster.SECONDS_TO_CONNECT", 1)
    with pytest.raises(InputError, match=r"scheduler=tcp://127\.0\.0\.1:9 cannot be reached"):
        make(tmp_path, 64, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match="scheduler=nonsense:// cannot be reached"):
        make(tmp_path, 64, scheduler="nonsense://")
