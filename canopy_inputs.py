"""Operation canopy-inputs: from LiDAR and satellite products to the folder of tiles that canopy trains on.

Steps: lidar (height rasters of 1 km squares), mask (no tall vegetation), contexts (training, validation, test), images
(patches around the squares), angles, statistics. What is done already is kept; an interrupted run goes on where it was.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyproj
from rasterio.crs import CRS

from datasets.canopy.catalogue import CONTEXTS
from datasets.canopy.inputs_contexts import (
    LEAST_BUFFER,
    LEFT_OUT,
    context_plot,
    draw_contexts,
    read_contexts,
    write_contexts,
)
from datasets.canopy.inputs_demo import demo_cloud
from datasets.canopy.inputs_images import (
    ImageSpec,
    angle_tasks,
    build_angles,
    build_images,
    degrees_around,
    image_tasks,
    report_images,
    tiles_of,
    write_angle_tables,
    write_patch_tables,
)
from datasets.canopy.inputs_lidar import (
    EDGES,
    HeightSpec,
    Lidar,
    build_edges,
    build_heights,
    edge_tasks,
    find_lidar,
    find_terrain,
    lidar_tasks,
    report_heights,
)
from datasets.canopy.inputs_mask import MaskSpec, build_masks, mask_tasks, write_mask_tables
from datasets.canopy.inputs_squares import RECORDS, Square, Task, area_of, do_tasks, finished, squares_of, undone
from datasets.canopy.inputs_statistics import check, write_statistics
from datasets.canopy.map_reference import RESAMPLINGS, UNITS
from datasets.products import RESAMPLINGS as IMAGE_RESAMPLINGS
from datasets.products import Product, find_products
from datasets.products.demo import demo_products
from datasets.products.point_clouds import require_metres
from utils.errors import InputError
from utils.flags import FlagParser, auto_or, names_in, number_of, one_of, real, whole
from utils.plots import save_plot
from utils.runs import add_to_label, called_from, project_folder, run_or_explain, say, versions, write_json, write_text
from utils.simulated import MARK, is_simulated

STEPS = ("lidar", "mask", "contexts", "images", "angles", "statistics")
PLACES = "inputs.json"  # says where the LiDAR and the products of a folder are
OF_PRODUCTS = {"images", "angles"}


def steps_in(text: str) -> str:
    """`all`, or names of steps."""
    for name in names_in(text, "all"):
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(STEPS)}, or all")
    return text


def classes_in(text: str) -> tuple[int, ...]:
    """ASPRS classes."""
    classes = [whole(0, 255)(part) for part in text.replace(",", " ").split()]
    if not classes:
        raise argparse.ArgumentTypeError("no class is given; 3 4 5, say, are expected")
    return tuple(sorted(set(classes)))


def iso_day(text: str) -> str:
    """A date."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2024-01-27")
    return text


parser = FlagParser(prog="canopy_inputs.py", description=__doc__)
parser.flag("area", str, "all", "all the LiDAR; left,bottom,right,top in its coordinates; or a vector file")
parser.flag("block", auto_or(whole(1, 100)), "auto", "km, side of the blocks of a context; auto: as the area allows")
parser.flag("buffer", real(LEAST_BUFFER), 1000, "m, least distance between squares of different contexts")
parser.flag("crs", str, "auto", "coordinate system of the squares, as EPSG:2154; auto: as the LiDAR files say")
parser.flag("fields", str, "none", "none, or a vector file or raster of fields, whose low vegetation is masked")
parser.flag(
    "lidar", str, "auto", "folder or list of LAS, LAZ or COPC files or height rasters; auto: as before, or simulated"
)
parser.flag("lidar_date", auto_or(iso_day), "auto", "date of the flight, as 2024-01-27; auto: as points or names say")
parser.flag("lidar_resampling", one_of(*RESAMPLINGS), "auto", f"of height rasters: {', '.join(RESAMPLINGS)}")
parser.flag("lidar_resolution", number_of(1, 2.5, 5, 10), 1, "m, pixel size of the heights: 1, 2.5, 5 or 10")
parser.flag("lidar_unit", one_of(*UNITS), "auto", "of height rasters: dm, m, or auto: dm if whole numbers, else m")
parser.flag("max_height", real(0, 200, above=True), 70, "m above ground, above which returns are outliers")
parser.flag("max_masked", real(0, 100), 50, "percent, maximum share of cloud-masked pixels in an image that is kept")
parser.flag("min_coverage", real(0, 100), 90, "percent, minimum share of a square's 50 m blocks with LiDAR")
parser.flag("min_valid", real(0, 100), 100, "percent, minimum share of valid pixels in an image that is kept")
parser.flag("out", str, "auto", "folder of the tiles; auto: tiles, in the run's folder")
parser.flag("percentile", real(0, 100), 95, "of the heights of vegetation returns in a cell")
parser.flag("products", str, "auto", "folder, list or STAC address of Sentinel-2 products; auto: as before, or simulated")
parser.flag("resampling", one_of(*IMAGE_RESAMPLINGS), "nearest", "of images: nearest (as published) or bilinear")
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of the contexts and of the pixels of the statistics")
parser.flag("steps", steps_in, "all", f"all, or some of {', '.join(STEPS)}")
parser.flag("terrain", str, "none", "none: from ground points; or folder or list of terrain rasters, in metres")
parser.flag("test_share", real(0, 50, above=True), 15, "percent of the squares drawn for the test")
parser.flag("tile", str, "auto", "name of the tile, for LiDAR without products; auto: as the products say")
parser.flag("validation_share", real(0, 50, above=True), 15, "percent of the squares drawn for validation")
parser.flag("vegetation_classes", classes_in, "3 4 5", "ASPRS classes of vegetation returns")
parser.flag("workers", auto_or(whole(1)), "auto", "processes; auto: one a core")
parser.flag("year", auto_or(whole(1900)), "auto", "year of the images; auto: those within a year of the LiDAR")


def main() -> None:
    """Find what there is, do the steps, check the result."""
    flags = parser.parse_flags()
    started = time.perf_counter()
    steps = [step for step in STEPS if step in (names_in(flags["steps"], "all") or STEPS)]
    flags["workers"] = flags["workers"] or len(os.sched_getaffinity(0))
    out = Path("tiles").resolve() if flags["out"] == "auto" else (called_from() / flags["out"]).resolve()
    make_folder(out)
    places = find_places(flags, out)
    add_to_label("canopy-inputs ", flags["steps"], parser.changed(flags, ("area", "year", "lidar_resolution", "percentile")))
    crs, lidar, squares, products = find_inputs(flags, places, steps)
    if places["simulated"]:
        say(f"The inputs are simulated: {', '.join(sorted({places['lidar'], places['products']} - {'none'}))}")
        write_text(out / MARK, "Made from simulated products or points; nothing here was measured.\n")
    elif (out / MARK).exists():
        raise InputError(f"{out} holds simulated tiles; give real ones another folder with out=...")
    write_json(out / PLACES, places)
    run = Run(flags, out, crs, places["simulated"])
    for step in steps:
        {
            "lidar": lambda: run.lidar(lidar, squares),
            "mask": lambda: run.mask(squares),
            "contexts": lambda: run.contexts(squares),
            "images": lambda: run.images(squares, products),
            "angles": lambda: run.angles(squares, products),
            "statistics": run.statistics,
        }[step]()
    run.finish(steps, time.perf_counter() - started)


def make_folder(out: Path) -> None:
    """Make the output folder and see that it can be written.

    Raises:
        InputError: it cannot.
    """
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
        probe = out / RECORDS / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error


def find_places(flags: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Where LiDAR and products are: as the flags say, or as the folder was made from before, or simulated.

    Raises:
        InputError: one of them is given and the other one is not known.
    """
    before: dict[str, Any] = {}
    if (out / PLACES).is_file():
        before = json.loads((out / PLACES).read_text(encoding="utf-8"))
    places = {name: before.get(name) if flags[name] == "auto" else absolute(flags[name]) for name in ("lidar", "products")}
    if places["lidar"] is None and places["products"] is None:
        data = project_folder() / "data"
        place = demo_products(data)
        places = {"lidar": str(demo_cloud(place, data)), "products": str(place / "products")}
    if places["lidar"] is None:
        raise InputError("lidar=... is missing: a folder or list of LAS, LAZ or COPC files, or of rasters of heights")
    if places["products"] is None and flags["tile"] == "auto":
        raise InputError("products=... is missing; for the steps that need no image, tile=31TDL, say, takes its place")
    simulated = any(place is not None and is_simulated(Path(place)) for place in places.values())
    return {**places, "products": places["products"] or "none", "simulated": simulated}


def absolute(places: str) -> str:
    """A folder as an absolute path, so that it is found from elsewhere, too; a list or an address as it is."""
    return str((called_from() / places).resolve()) if (called_from() / places).exists() else places


def find_inputs(
    flags: Mapping[str, Any], places: Mapping[str, Any], steps: Sequence[str]
) -> tuple[CRS, Lidar, list[Square], list[Product]]:
    """The LiDAR, the squares of the area with their tiles, and the products.

    Raises:
        InputError: something cannot be read, or nothing is left.
    """
    lidar = find_lidar(places["lidar"], called_from(), crs_of(flags["crs"]), flags["lidar_date"], say)
    area = area_of(flags["area"], called_from(), lidar.crs)
    squares = squares_of(lidar.bounds, area)
    if not squares:
        raise InputError(
            f"area={flags['area']} holds no LiDAR, whose files reach from {lidar.bounds[0][0]:.0f} "
            f"{lidar.bounds[0][1]:.0f} on ({lidar.crs.to_string()})"
        )
    say(f"LiDAR: {len(lidar.bounds)} files, {len(squares)} squares of 1 km in {lidar.crs.to_string()}")
    if places["products"] == "none":
        if OF_PRODUCTS & set(steps) and flags["steps"] != "all":
            raise InputError(f"steps={flags['steps']} needs products=...")
        return lidar.crs, lidar, [Square(flags["tile"], *square) for square in squares], []
    years = {flags["year"]} if flags["year"] else {int(day[:4]) + step for day in lidar.days for step in (-1, 0, 1)}
    products = find_products(places["products"], called_from(), years, say, bounds=degrees_around(squares, lidar.crs))
    if flags["tile"] != "auto":
        products = [product for product in products if product.tile == flags["tile"]]
        if not products:
            raise InputError(f"tile={flags['tile']}: no product is of that tile")
    covered = tiles_of(squares, products, lidar.crs)
    beyond = f"; not covered by them with 250 m around: {len(squares) - len(covered)}" if len(covered) < len(squares) else ""
    say(f"Products: {len(products)} of tiles {', '.join(sorted({square.tile for square in covered}))}{beyond}")
    return lidar.crs, lidar, covered, products


def crs_of(text: str) -> CRS | None:
    """The coordinate system of a flag; None for auto.

    Raises:
        InputError: it is unknown, or not a projected one in metres.
    """
    if text == "auto":
        return None
    try:
        crs = pyproj.CRS.from_user_input(text)
    except pyproj.exceptions.CRSError as error:
        raise InputError(f"crs={text} is not a coordinate system; EPSG:2154 or the like is expected") from error
    return CRS.from_wkt(require_metres(crs, Path(f"crs={text}")).to_wkt())


class Run:
    """The steps of a run, which share flags, the output folder and the coordinate system."""

    def __init__(self, flags: Mapping[str, Any], out: Path, crs: CRS, simulated: bool) -> None:
        self.flags, self.out, self.crs, self.simulated = flags, out, crs, simulated
        self.counts: dict[str, Any] = {}

    def do(self, step: str, tasks: Sequence[Task], build: Any, spec: Any) -> dict[str, dict[str, Any]]:
        """Do a step's tasks."""
        return do_tasks(self.out, step, tasks, build, spec, self.flags["workers"], say)

    def lidar(self, lidar: Lidar, squares: Sequence[Square]) -> None:
        """Make the heights of each square."""
        names = HeightSpec._fields[2:]
        spec = HeightSpec(str(self.out), self.crs.to_wkt(), *(self.flags[name] for name in names))
        terrain = find_terrain(self.flags["terrain"], called_from(), self.crs)
        tasks = lidar_tasks(squares, lidar, terrain, spec)
        self.do(EDGES, edge_tasks(undone(self.out, "lidar", tasks)), build_edges, str(self.out))
        records = self.do("lidar", tasks, build_heights, spec)
        shutil.rmtree(self.out / RECORDS / EDGES, ignore_errors=True)
        report_heights(list(records.values()), spec, say)

    def heights(self, squares: Sequence[Square]) -> dict[Square, dict[str, Any]]:
        """The records of the squares that have heights, by square.

        Raises:
            InputError: the step lidar has not been done.
        """
        names = {f"{square.tile}_{square.name}": square for square in squares}
        records = finished(self.out, "lidar", names)
        missing = [name for name in names if name not in records]
        if missing:
            raise InputError(
                f"{len(missing)} squares, {missing[0]} for example, have no heights in {self.out} yet; the step lidar, "
                f"with the same area, makes them"
            )
        return {names[name]: record for name, record in records.items() if "left_out" not in record}

    def mask(self, squares: Sequence[Square]) -> None:
        """Mask what is no tall vegetation."""
        heights = self.heights(squares)
        fields = "" if self.flags["fields"] == "none" else absolute(self.flags["fields"])
        spec = MaskSpec(str(self.out), self.crs.to_wkt(), self.flags["lidar_resolution"], fields)
        records = self.do("mask", mask_tasks(list(heights), list(heights.values()), spec), build_masks, spec)
        write_mask_tables(self.out, list(records.values()))
        tall = [record["row"]["valid_whole"] for record in records.values()]
        say(f"Tall vegetation: {sum(tall) / len(tall):.1f} % of the squares")

    def contexts(self, squares: Sequence[Square]) -> None:
        """Draw what is for training, validation and test."""
        shares = {"test": self.flags["test_share"], "validation": self.flags["validation_share"]}
        contexts, block = draw_contexts(
            list(self.heights(squares)), self.flags["block"], self.flags["buffer"], shares, self.flags["seed"]
        )
        write_contexts(self.out, contexts, block)
        save_plot(context_plot(contexts, block, self.flags["buffer"], self.simulated), self.out / "contexts")
        counts = {name: sum(context == name for context in contexts.values()) for name in (*CONTEXTS, LEFT_OUT)}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        say(f"Contexts in blocks of {block} km, {self.flags['buffer']:g} m apart: {listed} (in the buffer)")

    def image_tasks(self, squares: Sequence[Square], products: Sequence[Product]) -> list[Task]:
        """The pieces of the steps images and angles."""
        spec = self.image_spec()
        days = {square: record["lidar_date"] for square, record in self.heights(squares).items()}
        return image_tasks(list(days), read_contexts(self.out), days, products, spec)

    def image_spec(self) -> ImageSpec:
        """How images are made."""
        return ImageSpec(str(self.out), self.crs.to_wkt(), *(self.flags[name] for name in ImageSpec._fields[2:]))

    def images(self, squares: Sequence[Square], products: Sequence[Product]) -> None:
        """Cut the patches out of the products."""
        if not products:
            return
        records = list(self.do("images", self.image_tasks(squares, products), build_images, self.image_spec()).values())
        report_images(records, say)
        write_patch_tables(self.out, records, read_contexts(self.out), self.heights(squares))

    def angles(self, squares: Sequence[Square], products: Sequence[Product]) -> None:
        """Write sun and view angles of the patches."""
        if not products:
            return
        tasks = self.image_tasks(squares, products)
        done = finished(self.out, "images", (task.name for task in tasks))
        if any(done.get(task.name, {}).get("identity") != task.identity for task in tasks):
            raise InputError("the images are not there yet, or of other flags; the step images makes them")
        of_angles = angle_tasks(tasks, done, self.crs.to_wkt())
        write_angle_tables(self.out, of_angles, self.do("angles", of_angles, build_angles, self.crs.to_wkt()), say)

    def statistics(self) -> None:
        """Write the statistics of the training pixels."""
        if list(self.out.glob("patches/*/*.parquet")):
            write_statistics(self.out, self.flags["lidar_resolution"], self.flags["seed"], self.simulated, say)

    def finish(self, steps: Sequence[str], seconds: float) -> None:
        """Check the folder by the code of canopy, and write what the run did."""
        results: dict[str, Any] = {}
        if list(self.out.glob("patches/*/*.parquet")):
            catalogue = check(self.out, self.flags["lidar_resolution"], say)
            results["squares"] = len(catalogue.rows[["tile", "patch"]].drop_duplicates())
            results["images"] = len(catalogue.rows)
            say(f"Squares: {results['squares']}")
            say(f"Images checked: {results['images']}")
        else:
            say("There are no images yet, so canopy cannot read the folder; the step images makes them")
        document = {"out": str(self.out), "steps": steps, **results, "simulated": self.simulated, "time": round(seconds, 1)}
        write_json(Path("metrics.json"), {**document, "flags": self.flags, "versions": versions()})
        say(f"Tiles: {self.out}{' (simulated)' if self.simulated else ''}")
        if results:
            say(f"Next: guild run canopy data={self.out}")


if __name__ == "__main__":
    run_or_explain(main)
